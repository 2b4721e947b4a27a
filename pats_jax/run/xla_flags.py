"""XLA's flags that the programs set for a GPU, before a backend starts; whoever sets one in XLA_FLAGS keeps it."""

import importlib.util
import os

import jaxlib

_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")

# Compile for seconds, not minutes. XLA otherwise compiles and times many candidates for each matrix product; on an H100
# BERT-base's step then takes 10.0 ms in place of 11.2, and 40 s longer to begin: worth it from some 30,000 steps on.
_QUICK = ("--xla_gpu_enable_triton_gemm=false", "--xla_gpu_autotune_level=0")

# These versions add float32 gradients to a table by compare-and-swap loops (openxla/xla#46225).
_SLOW_ATOMICS = ("0.10.2", "0.11.0")
_FAST_ATOMICS = "--xla_backend_extra_options=-nvptx-allow-ftz-atomics"


def set_defaults() -> None:
    """Adds the flags to the environment variable XLA_FLAGS if JAX has a plugin for NVIDIA's GPUs.

    XLA reads the variable when the first backend starts; later this has no effect.
    """
    if any(importlib.util.find_spec(name) for name in _PLUGINS):
        os.environ["XLA_FLAGS"] = with_defaults(os.environ.get("XLA_FLAGS", ""), jaxlib.__version__)


def with_defaults(flags: str, version: str) -> str:
    """The value of XLA_FLAGS with the defaults for a version of jaxlib, but for flags that it sets itself.

    Examples:
      >>> with_defaults("--xla_gpu_autotune_level=4", "0.11.2")
      '--xla_gpu_autotune_level=4 --xla_gpu_enable_triton_gemm=false'
    """
    defaults = (*_QUICK, _FAST_ATOMICS) if version in _SLOW_ATOMICS else _QUICK
    own = {flag.partition("=")[0] for flag in flags.split()}
    return " ".join([*flags.split(), *(flag for flag in defaults if flag.partition("=")[0] not in own)])
