"""Every test sees eight virtual CPU devices, and programs that XLA compiles quickly and that are kept between runs.

The flags count only if they are set before JAX starts; those in the environment reach the programs that tests start.
With ``JAX_DISABLE_MOST_OPTIMIZATIONS=0`` programs are compiled as users have them: `make slow` runs the tests of
numerics so, too.
"""

import gc
import importlib.util
import mmap
import os
import pathlib
import tempfile

# Most of the suite's time is XLA's: these halve it, to 1.5 s from 3.6 for the training step of the tiny model.
QUICK_COMPILATION = {
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
    "xla_cpu_enable_concurrency_optimized_scheduler": "false",
}


def flags_that_jaxlib_has() -> list[str]:
    """Those of the above; XLA ends a process that names another one, as versions to come may."""
    (folder,) = importlib.util.find_spec("jaxlib").submodule_search_locations
    with (pathlib.Path(folder) / "libjax_common.so").open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
            return [f"--{name}={value}" for name, value in QUICK_COMPILATION.items() if library.find(name.encode()) > 0]


xla_flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") != "0":
    xla_flags += flags_that_jaxlib_has()
os.environ["XLA_FLAGS"] = " ".join(xla_flags).strip()
# Nobody reads where in the source the operations of a test's program come from.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# NumPy's threads wait for each other by spinning: a logistic regression of 16 rows took eight times as long with two.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax  # noqa: E402  # after the flags
import process_state  # noqa: E402
import pytest  # noqa: E402


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


# Files of ten seconds and more: they begin, or one worker would wait for the other at the end.
LONGEST = (
    "downstream glue encoders peft upstream model_layers methods parallel lanes resume text2text_lanes stacked_runs "
    "companions option_scoring snippets glue_lanes compiling_ahead transforms objectives layers optimizer_table "
    "journal models settings checkpoints text2text gym_of_texts seq2seq shape_costs"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; --no-loadscope-reorder keeps it so."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_sessionstart() -> None:
    """Python's garbage collector would look through all that JAX has traced, for a tenth of the suite's time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs from one run of the suite to the next, in one folder for all workers.

    Programs that tests start, and kill, do not write there but in another, which stands for the user's cache folder.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    if not hasattr(config, "cache"):  # pytest was told to keep nothing
        os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
        return
    os.environ["XDG_CACHE_HOME"] = str(config.cache.mkdir(f"home-{worker}"))
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
