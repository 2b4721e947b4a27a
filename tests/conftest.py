"""Every test sees eight virtual CPU devices, and programs that XLA compiles quickly and that are kept between runs.

The flags count only if they are set before JAX starts; those in the environment reach the programs that tests start.
With ``JAX_DISABLE_MOST_OPTIMIZATIONS=0`` programs are compiled as users have them: `make slow` runs the tests of
numerics so, too.
"""

import os
import tempfile

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# half of the suite's time would be XLA's optimisation
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # after the flags
import process_state
import pytest


@pytest.fixture(autouse=True)
def process_is_put_back():
    """A program that a test calls may set what it likes."""
    with process_state.put_back():
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test that is marked with more devices than there are: the flag above makes CPU devices only."""
    for mark in item.iter_markers("devices"):
        if jax.device_count() < mark.args[0]:
            pytest.skip(f"needs {mark.args[0]} devices; here: {jax.device_count()} ({jax.default_backend()})")


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs from one run of the suite to the next, a folder for each worker.

    Programs that tests start, and kill, do not write there but in another, which stands for the user's cache folder.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    if not hasattr(config, "cache"):  # pytest was told to keep nothing
        os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
        return
    os.environ["XDG_CACHE_HOME"] = str(config.cache.mkdir(f"home-{worker}"))
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir(f"compiled-{worker}")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
