"""XLA's flags that the programs set for a GPU before a backend starts; flags in XLA_FLAGS take precedence."""

import importlib.util
import os

import jax
import jaxlib

from pats_jax.errors import InputError

_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")

# Compile for seconds, not minutes. XLA otherwise compiles and times many candidates for each matrix product; on an H100
# BERT-base's step then takes 10.0 ms in place of 11.2, and 84 s to compile in place of 31: worth it from some 40,000
# steps on.
_QUICK = ("--xla_gpu_enable_triton_gemm=false", "--xla_gpu_autotune_level=0")

# These versions add float32 gradients to a table by compare-and-swap loops (openxla/xla#46225).
_SLOW_ATOMICS = ("0.10.2", "0.11.0")
_FAST_ATOMICS = "--xla_backend_extra_options=-nvptx-allow-ftz-atomics"


# No operation whose sums come in the order in which threads finish. On an H100 a step of BERT-base then takes 13.3 ms
# instead of 10.7, and two trainings of five steps end with the same bits.
_ORDERED = "--xla_gpu_exclude_nondeterministic_ops"


def set_defaults(deterministic: bool = False) -> None:
    """Adds the flags to the environment variable XLA_FLAGS if JAX has a plugin for NVIDIA's GPUs.

    XLA reads the variable when the first backend starts; later this has no effect.

    Args:
      deterministic: whether the same program must compute the same bits each time.

    Raises:
      InputError: if ``deterministic`` comes too late, or XLA_FLAGS says the opposite.
    """
    if not any(importlib.util.find_spec(name) for name in _PLUGINS):
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if deterministic:
        _check_ordered(flags)
    os.environ["XLA_FLAGS"] = with_defaults(flags, jaxlib.__version__, deterministic)


def _check_ordered(flags):
    own = [flag for flag in flags.split() if flag.partition("=")[0] == _ORDERED]
    if own and own[-1].partition("=")[2] not in ("", "true", "1"):
        raise InputError(f"--deterministic: XLA_FLAGS has {own[-1]}; remove one of them")
    if not own and _has_started() and jax.default_backend() == "gpu":
        raise InputError(
            f"--deterministic: JAX has already started its GPU; set XLA_FLAGS={_ORDERED}=true before that, "
            "or use a new process"
        )


def _has_started() -> bool:
    """Whether JAX has started a backend; found out by trying to change the number of CPU devices."""
    number = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    try:
        jax.config.update("jax_num_cpu_devices", number + 1)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", number)
    return False


def with_defaults(flags: str, version: str, deterministic: bool = False) -> str:
    """The value of XLA_FLAGS with the defaults for a version of jaxlib; flags that it sets itself are kept.

    Examples:
      >>> with_defaults("--xla_gpu_autotune_level=4", "0.11.2")
      '--xla_gpu_autotune_level=4 --xla_gpu_enable_triton_gemm=false'
    """
    defaults = [*_QUICK]
    if version in _SLOW_ATOMICS:
        defaults.append(_FAST_ATOMICS)
    if deterministic:
        defaults.append(f"{_ORDERED}=true")
    own = {flag.partition("=")[0] for flag in flags.split()}
    return " ".join([*flags.split(), *(flag for flag in defaults if flag.partition("=")[0] not in own)])
