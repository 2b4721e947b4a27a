"""Every test sees eight virtual CPU devices, and programs that XLA compiles quickly and that are kept between runs.

The flags count only if they are set before JAX starts; those in the environment reach the programs that tests start.
"""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # half of the suite's time would be XLA's optimisation

import jax  # after the flags
import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs from one run of the suite to the next, a folder for each worker.

    Programs that tests start, and kill, do not write there.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir(f"compiled-{worker}")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def full_optimization():
    """Programs compiled as users have them, for a test of what XLA makes of the code."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()
