"""Every test sees eight virtual CPU devices; the flag counts only if it is set before JAX starts."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import pytest  # after the flag
import tiny


@pytest.fixture(scope="module")
def quick_compilation(tmp_path_factory):
    """Little optimisation by XLA in a module, and its results kept."""
    with tiny.quick_compilation(tmp_path_factory.getbasetemp() / "compiled"):
        yield
