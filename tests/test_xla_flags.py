"""XLA's flags that the programs set: only for GPUs, never over one's own, and --deterministic in time or not at all."""

import importlib.util
import os
import subprocess
import sys

import jax
import pytest
import rich.console

from pats_jax.errors import InputError
from pats_jax.priming import downstream
from pats_jax.priming.gym_settings import GymSettings
from pats_jax.priming.upstream_settings import PrimingSettings
from pats_jax.run import run_start, xla_flags
from pats_jax.run.settings import Settings
from pats_jax.run.xla_flags import set_defaults, with_defaults

QUICK = ["--xla_gpu_enable_triton_gemm=false", "--xla_gpu_autotune_level=0"]
ATOMICS = "--xla_backend_extra_options=-nvptx-allow-ftz-atomics"
ORDERED = "--xla_gpu_exclude_nondeterministic_ops=true"


@pytest.fixture
def with_plugin(monkeypatch):
    """As if JAX had a plugin for NVIDIA's GPUs, with a started backend of the name that is set."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name == "jax_cuda13_plugin" or find(name, *rest)
    )
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.setattr(xla_flags.jaxlib, "__version__", "0.11.2")
    return lambda backend: monkeypatch.setattr(jax, "default_backend", lambda: backend)


@pytest.mark.parametrize(
    "flags, version, deterministic, added",
    [
        ("", "0.11.2", False, QUICK),
        ("", "0.11.2", True, [*QUICK, ORDERED]),
        ("", "0.11.0", False, [*QUICK, ATOMICS]),
        ("--xla_dump_to=x", "0.10.2", True, [*QUICK, ATOMICS, ORDERED]),
        ("--xla_gpu_autotune_level=4", "0.11.2", False, QUICK[:1]),
        ("  --xla_gpu_autotune_level=4   --xla_gpu_enable_triton_gemm=true ", "0.11.2", False, []),
        ("--xla_gpu_enable_triton_gemm", "0.11.2", False, QUICK[1:]),
        ("--xla_backend_extra_options=-other", "0.10.2", False, QUICK),
        ("--xla_gpu_exclude_nondeterministic_ops", "0.11.2", True, QUICK),
    ],
)
def test_flags_are_added_but_for_ones_own(flags, version, deterministic, added):
    assert with_defaults(flags, version, deterministic).split() == [*flags.split(), *added]
    assert with_defaults(with_defaults(flags, version, deterministic), version, deterministic).split() == [
        *flags.split(),
        *added,
    ]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("given", [None, "--xla_dump_to=x"])
def test_without_a_plugin_the_environment_stays(given, deterministic, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("XLA_FLAGS")
    if given is not None:
        monkeypatch.setenv("XLA_FLAGS", given)
    set_defaults(deterministic)
    assert os.environ.get("XLA_FLAGS") == given


def test_with_a_plugin_the_environment_has_them(with_plugin):
    with_plugin("cpu")
    set_defaults()
    assert os.environ["XLA_FLAGS"].split() == ["--xla_force_host_platform_device_count=8", *QUICK]
    set_defaults(deterministic=True)
    assert os.environ["XLA_FLAGS"].split()[1:] == [*QUICK, ORDERED]


def test_deterministic_after_a_gpu_has_started_is_an_error(with_plugin, monkeypatch):
    jax.devices()
    with_plugin("gpu")
    before = os.environ["XLA_FLAGS"]
    with pytest.raises(InputError, match="--deterministic: JAX has already started its GPU; set XLA_FLAGS") as caught:
        set_defaults(deterministic=True)
    assert "\n" not in str(caught.value) and os.environ["XLA_FLAGS"] == before
    set_defaults()  # that other flags come too late costs time, nothing else
    monkeypatch.setenv("XLA_FLAGS", ORDERED)
    set_defaults(deterministic=True)  # it has been there from the start


def test_a_flag_that_says_the_opposite_is_an_error(with_plugin, monkeypatch):
    with_plugin("cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_exclude_nondeterministic_ops=false")
    with pytest.raises(InputError, match="XLA_FLAGS has --xla_gpu_exclude_nondeterministic_ops=false; remove one"):
        set_defaults(deterministic=True)


def test_it_is_seen_whether_a_backend_has_started():
    """In a process of its own, where none has; the question starts none and changes nothing."""
    code = (
        "import jax\nfrom pats_jax.run import xla_flags\nbefore = jax.config.jax_num_cpu_devices\n"
        "print(xla_flags._has_started(), xla_flags._has_started(), jax.config.jax_num_cpu_devices == before)\n"
        "print(jax.device_count(), xla_flags._has_started(), jax.config.jax_num_cpu_devices == before)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert ran.stdout.split() == ["False", "False", "True", "8", "True", "True"], ran.stderr


def test_xla_knows_the_flags():
    """It ends a process whose XLA_FLAGS hold one that it does not know."""
    flags = with_defaults("", "0.10.2", deterministic=True)
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("kind", [Settings, PrimingSettings])
def test_programs_pass_the_flag_on_and_keep_it(kind, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(xla_flags, "set_defaults", lambda *arguments: asked.append(arguments))
    own = {"task_name": "rte"} if kind is Settings else {}
    settings = kind(deterministic=True, num_devices=1, **own)
    monkeypatch.setattr(run_start.compilation_cache, "keep_compiled_programs", lambda directory: None)
    start = run_start.begin(settings, str(tmp_path / "run"), None)
    assert asked == [(True,)] and start.settings.to_dict()["deterministic"] is True


def test_a_gym_passes_it_on_too(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(xla_flags, "set_defaults", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(downstream.compilation_cache, "keep_compiled_programs", lambda directory: None)
    settings = GymSettings(deterministic=True, output_dir=str(tmp_path))
    downstream.tune_all(settings, [], rich.console.Console(quiet=True), None)
    assert asked == [(True,)]
