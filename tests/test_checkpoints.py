"""What is saved comes back bit by bit, wherever it goes; what is damaged is noticed; what fails is said."""

import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import pathlib
import random
import resource
import shutil
import tempfile

import damage
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import pats_jax
from pats_jax.errors import InputError
from pats_jax.training import checkpoints, loop, runners
from pats_jax.training.checkpoints import Checkpoints


def make_state(runner, scale=1.0, tx=None):
    """A state with every kind of leaf: keys of two kinds, bfloat16, scalars, an empty array, masked leaves."""
    rng = np.random.default_rng(0)
    params = {
        "kernel": np.float32(scale * rng.normal(size=(16, 24))),
        "bias": np.float32(rng.normal(size=7)),
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 4), np.float32),
    }
    tx = tx or pats_jax.pats(
        optax.chain(optax.adamw(1e-2), optax.add_noise(0.1, 0.5, key=jax.random.key(4))),
        key=3,
        mask={"kernel": True, "bias": False, "scalar": True, "empty": True},
        sensitivity_dtype=jnp.bfloat16,
    )
    state = runner.create_state(functools.partial(pats_jax.TrainState.create, apply_fn=None, tx=tx, key=1), params)
    return step_with(0.3, state)


@functools.partial(jax.jit, static_argnums=0)
def step_with(gradient, state):
    """The state after an update by gradients that are this number everywhere."""
    return state.apply_gradients(grads=jax.tree.map(lambda p: jnp.full_like(p, gradient), state.params))


@pytest.fixture(scope="module")
def state():
    """On one device; nobody gives its buffers away."""
    return make_state(runners.make_runner(num_devices=1))


@pytest.fixture(scope="module")
def scattered():
    """On eight devices, two of which hold a copy together."""
    return make_state(runners.make_runner(fsdp=2))


def bits(state):
    """Every leaf as bytes, by path."""

    def to_bytes(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return str(jax.random.key_impl(leaf)), np.asarray(jax.random.key_data(leaf)).tobytes()
        return str(leaf.dtype), np.asarray(leaf).tobytes()

    return {jax.tree_util.keystr(path): to_bytes(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


@pytest.mark.parametrize(
    "target",
    [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ({}, {"num_devices": 4})), {"fsdp": 4}, {"kind": "pmap"}],
    ids=str,
)
def test_a_state_comes_back_bit_by_bit_on_any_devices(tmp_path, scattered, target):
    state = scattered
    progress = {"step": 3, "pending": [{"loss": 0.1 + 0.2}], "nothing": None}
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(3, state, progress)
    runner = runners.make_runner(**target)
    empty = runner.view(make_state(runner, scale=7.0))
    restored, found = Checkpoints(tmp_path / "c", keep=1).restore(empty)
    assert bits(restored) == bits(state) and found == progress
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(empty), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim) or not ours.size
    assert restored.opt_state[1].sensitivity["bias"] is None
    assert int(step_with(1.0, restored).step) == 2  # its keys draw, its structure is whole


def test_what_is_saved_is_the_state_of_that_moment(tmp_path):
    """Steps that donate the saved buffers go on while the save is being written."""
    runner = runners.make_runner(num_devices=1)
    state = make_state(runner)
    step = jax.jit(lambda s: s.replace(params=jax.tree.map(lambda p: p * 1.5, s.params)), donate_argnums=0)
    expected = {}
    with Checkpoints(tmp_path / "c", keep=None) as checkpoints:
        for number in range(1, 6):
            expected[number] = bits(state)
            checkpoints.save(number, state, {"number": number})
            for _ in range(10):
                state = step(state)
        assert checkpoints.steps == [1, 2, 3, 4, 5]
        empty = make_state(runner)
        for number in range(5, 0, -1):
            restored, progress = checkpoints.restore(empty)
            assert bits(restored) == expected[number] and progress == {"number": number}
            shutil.rmtree(tmp_path / "c" / str(number))


def test_the_newest_are_kept_and_every_best_one_that_they_name(state, tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5)):
            checkpoints.save(step, state, {}, best)
        checkpoints.wait()
        assert checkpoints.steps == [5, 6]
        checkpoints.save(7, state, {}, 5)
        checkpoints.save(8, state, {}, 5)
    assert Checkpoints(tmp_path / "c", keep=2).steps == [5, 7, 8]


def test_there_is_nothing_to_restore_and_nothing_is_made(tmp_path):
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        assert checkpoints.restore(make_state(runners.make_runner())) is None and checkpoints.steps == []
    assert not list(tmp_path.iterdir())


# damage


def flip_a_bit(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def save_two(folder, best=None):
    """Copies checkpoints of `state` at steps 10 and 20, of which 20 names a best one."""
    shutil.copytree(pathlib.Path(two_saved(best).name, "c"), folder)


@functools.cache
def two_saved(best):
    """The temporary folder of these checkpoints."""
    state, folder = make_state(runners.make_runner(num_devices=1)), tempfile.TemporaryDirectory()
    with Checkpoints(pathlib.Path(folder.name, "c"), keep=None) as checkpoints:
        checkpoints.save(10, state, {"step": 10})
        checkpoints.save(20, state, {"step": 20}, best)
    return folder


def warnings(caplog):
    said = [record.message for record in caplog.records if record.name == "pats_jax.training.checkpoints"]
    assert all("\n" not in message for message in said)
    return said


@pytest.fixture(autouse=True)
def loud(caplog):
    caplog.set_level("WARNING", logger="pats_jax")  # the benchmarks make it say less


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, lambda data: None], ids=["flip a bit", "truncate", "remove"])
@pytest.mark.parametrize("kind", ["record.json", "arrays", "everything"])
def test_a_damaged_checkpoint_is_named_and_kept_and_the_one_before_it_taken(state, tmp_path, damage, kind, caplog):
    """Whatever file it is: how Orbax lays arrays out, and which copies it reads, changes from one save to the next."""
    folder = tmp_path / "c"
    save_two(folder)
    hit = [path for path in (folder / "20" / "state").rglob("*") if path.is_file()]
    if kind != "everything":
        hit = [path for path in hit if (path.name == "record.json") == (kind == "record.json")]
    for path in hit:
        if path.name != "commit_success.txt":  # Orbax's own; nobody reads it on a disk that can rename
            data = damage(path.read_bytes())
            path.unlink() if data is None else path.write_bytes(data)
    damaged = {path: path.read_bytes() for path in hit if path.exists()}
    with Checkpoints(folder, keep=None) as checkpoints:
        restored, progress = checkpoints.restore(state)
        assert progress == {"step": 10} and bits(restored) == bits(state)
        (warning,) = warnings(caplog)
        assert f"{folder / '20'} is damaged: state/" in warning and "renamed to 20.damaged" in warning
        for path, data in damaged.items():
            assert (folder / "20.damaged" / path.relative_to(folder / "20")).read_bytes() == data
        checkpoints.save(20, state, {"step": 20})  # the place is free again
    assert Checkpoints(folder, keep=None).restore(state)[1] == {"step": 20}


def test_a_second_damaged_one_of_the_same_step_gets_a_name_of_its_own(state, tmp_path):
    for _ in range(3):
        with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
            checkpoints.save(20, state, {})
        (tmp_path / "c" / "20" / "state" / "manifest.ocdbt").unlink()
        assert Checkpoints(tmp_path / "c", keep=1).restore(state) is None
    names = ["20.damaged", "20.damaged.2", "20.damaged.3"]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == names
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        for step in (20, 30):
            checkpoints.save(step, state, {})
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [*names, "30"]


def rewrite(path, **changes):
    """Another record, with the digest that belongs to it."""
    value = json.loads(path.read_text()) | changes
    del value["digest"]
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**value, "digest": digest}))


def test_arrays_that_were_written_wrong_are_found_by_their_checksum(state, tmp_path, caplog):
    """Files and record are as they were written, but the arrays are not those that were on the devices."""
    save_two(tmp_path / "c")
    path = tmp_path / "c" / "20" / "state" / "record.json"
    rewrite(path)
    assert Checkpoints(tmp_path / "c", keep=None).restore(state)[1] == {"step": 20}
    sums = json.loads(path.read_text())["checksums"]
    rewrite(path, checksums=sums | {"params.bias": sums["params.bias"] ^ 1})
    assert Checkpoints(tmp_path / "c", keep=None).restore(state)[1] == {"step": 10}
    assert "is damaged: params.bias does not match what was saved" in warnings(caplog)[0]


@pytest.mark.parametrize(
    ("change", "seen_before"),
    [
        (lambda x: x.at[3].set(-x[3]), True),
        (lambda x: x.at[jnp.array([3, 7])].multiply(-1), False),  # twice 2**31 * odd is 0 modulo 2**32
        (
            lambda x: x.at[jnp.array([0, 256])].set(x[jnp.array([256, 0])]),
            False,
        ),  # 2**23 apart in bits
        (lambda x: -x, False),
    ],
    ids=["a sign", "two signs", "two in each other's place", "all signs"],
)
def test_what_the_checksums_see(change, seen_before):
    """What cancelled in sum(bits * (2 i + 1)), the sum of the first format, and does not in this one."""
    x = jnp.where(jnp.arange(1024) < 128, 1.0, 2.0)

    def linear(x):
        words = np.asarray(x).view(np.uint32).astype(object)
        return sum(words * (2 * np.arange(1024) + 1)) % 2**32

    assert (linear(x) != linear(change(x))) == seen_before
    assert checkpoints._checksums({"x": x})["x"] != checkpoints._checksums({"x": change(x)})["x"]


def test_a_checkpoint_under_the_name_of_another_step(state, tmp_path, caplog):
    save_two(tmp_path / "c")
    (tmp_path / "c" / "20").rename(tmp_path / "c" / "30")
    assert Checkpoints(tmp_path / "c", keep=None).restore(state)[1] == {"step": 10}
    assert "it belongs to step 20" in warnings(caplog)[0]


def test_progress_comes_back_as_its_type_with_numbers_that_are_none(state, tmp_path):
    progress = loop.Progress(
        3, [{"step": 2, "loss": 0.1, "eval": {"f1": 1}}], [{"loss": math.nan, "x": -math.inf, "y": 5e-324}], 1
    )
    with Checkpoints(tmp_path / "c", keep=None) as saving:
        saving.save(3, state, dataclasses.asdict(progress))
        progress.records.append({})  # what comes later is not of that moment
    _, found = Checkpoints(tmp_path / "c", keep=None).restore(state, loop.Progress)
    progress.records.pop()
    assert repr(found) == repr(progress)


@pytest.fixture(scope="module")
def three(state, tmp_path_factory):
    """Checkpoints of three different states, the last of which names the second as its best one."""
    folder = tmp_path_factory.mktemp("three") / "c"
    states = {step: state.replace(step=state.step + step) for step in (10, 20, 30)}
    with Checkpoints(folder, keep=None) as saving:
        for step, best in ((10, None), (20, 20), (30, 20)):
            saving.save(step, states[step], {"step": step, "log": [0.1 * step] * 20}, best)
    return folder, states


@pytest.mark.parametrize("seed", range(8))
def test_random_damages(three, tmp_path, seed, caplog, capfd):
    """What is restored is bit for bit what was saved; whatever is not the newest is warned of."""
    folder, states = three
    shutil.copytree(folder, tmp_path / "c")
    rng = random.Random(seed)
    what = damage.at_random(rng, tmp_path / "c" / rng.choice(["20", "30", "30"]), folder)
    with Checkpoints(tmp_path / "c", keep=None) as restoring:
        restored, progress = restoring.restore(states[10])
    step = progress["step"]
    assert progress == {"step": step, "log": [0.1 * step] * 20} and bits(restored) == bits(states[step]), what
    assert step == 30 or any("damaged" in warning for warning in warnings(caplog)), what
    assert "Traceback" not in "".join(capfd.readouterr()), what


# the best checkpoint


@pytest.mark.parametrize("lost", [False, True])
def test_a_checkpoint_is_whole_only_with_the_best_one_that_it_names(state, tmp_path, lost, caplog):
    """From the one before it training comes to the same best one again; nothing is removed."""
    folder = tmp_path / "c"
    with Checkpoints(folder, keep=None) as saving:
        for step, best in ((10, 10), (20, 10), (30, 30), (40, 30), (50, 30)):
            saving.save(step, state, {"step": step}, best)
    if lost:
        (folder / "30").rename(tmp_path / "30")
    else:
        path = folder / "30" / "state" / "record.json"
        path.write_bytes(flip_a_bit(path.read_bytes()))
    with Checkpoints(folder, keep=None) as restoring:
        assert restoring.restore(state)[1] == {"step": 20}
        names = {"10", "20", "40.without_best", "50.without_best"} | (set() if lost else {"30.damaged"})
        assert {path.name for path in folder.iterdir()} == names
        said = warnings(caplog)
        assert f"50 needs the best checkpoint so far, {folder / '30'}, which is damaged" in " ".join(said)
        for step in (30, 40):
            restoring.save(step, state, {"step": step}, 30)
    assert Checkpoints(folder, keep=None).restore(state)[1] == {"step": 40}


def test_nothing_whole_is_left(state, tmp_path, caplog):
    folder = tmp_path / "c"
    save_two(folder, best=10)
    (folder / "10" / "state" / "_METADATA").write_text("{}")
    assert Checkpoints(folder, keep=None).restore(state) is None
    assert sorted(path.name for path in folder.iterdir()) == ["10.damaged", "20.without_best"]
    assert warnings(caplog)[-1] == f"{folder} has no valid checkpoint; training starts from the beginning"


def test_best_parameters_that_are_damaged_when_they_are_needed(state, tmp_path):
    save_two(tmp_path / "c")
    with Checkpoints(tmp_path / "c", keep=None) as restoring:
        jax.tree.map(np.testing.assert_array_equal, restoring.restore_params(20, state), state.params)
        (tmp_path / "c" / "20" / "state" / "_sharding").unlink()
        with pytest.raises(InputError, match=r"c/20 is damaged: state/_sharding is missing; resume rebuilds it"):
            restoring.restore_params(20, state)
    assert Checkpoints(tmp_path / "c", keep=None).steps == [10, 20]


# no damage


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("name", ["record.json", "manifest.ocdbt"])
def test_what_the_system_refuses_is_no_damage(state, tmp_path, monkeypatch, number, name, caplog):
    folder = tmp_path / "c"
    save_two(folder)
    real = os.open

    def refuse(path, *args, **kwargs):
        if os.fspath(path).endswith(f"20/state/{name}"):
            raise OSError(number, os.strerror(number), path)
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(InputError) as caught:
            Checkpoints(folder, keep=None).restore(state)
    assert str(caught.value) == f"{folder}/20/state/{name}: cannot be read ({os.strerror(number)})"
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20"] and not warnings(caplog)
    assert Checkpoints(folder, keep=None).restore(state)[1] == {"step": 20}


@pytest.mark.parametrize("more", [0, 1, 5, 40, 90])
def test_too_many_open_files(state, tmp_path, more, caplog, capfd):
    """Really so: wherever reading runs out of them, the checkpoint stays."""
    folder = tmp_path / "c"
    save_two(folder)
    Checkpoints(folder, keep=None).restore(state)  # what is imported is open
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.dup(0)
    os.close(first_free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + more, hard))
        message = ""
        restored = Checkpoints(folder, keep=None).restore(state)
    except InputError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert ("cannot be read" in message and "\n" not in message) if message else restored[1] == {"step": 20}
    assert bool(message) == (more < 64)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20"] and not warnings(caplog)


@pytest.mark.parametrize("name", ["record.json", "manifest.ocdbt"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(state, tmp_path, name):
    save_two(tmp_path / "c")
    path = tmp_path / "c" / "20" / "state" / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match=f"c/20/state/{name}: not a regular file"):
        Checkpoints(tmp_path / "c", keep=None).restore(state)


def test_whatever_orbax_makes_of_sound_files_is_no_damage(state, tmp_path, monkeypatch):
    save_two(tmp_path / "c")

    def fail(*args, **kwargs):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand a lot more")

    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", fail)
    with pytest.raises(InputError, match=r"checkpoint .*c/20 cannot be read: RESOURCE_EXHAUSTED: Out of memory$"):
        Checkpoints(tmp_path / "c", keep=None).restore(state)
    assert Checkpoints(tmp_path / "c", keep=None).steps == [10, 20]


def test_a_damaged_one_that_cannot_be_renamed(state, tmp_path, monkeypatch):
    save_two(tmp_path / "c")
    (tmp_path / "c" / "20" / "state" / "record.json").unlink()

    def refuse(self, target):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with pytest.raises(InputError, match=r"c/20 is damaged: .* cannot be renamed \(Read-only file system\); move it"):
        Checkpoints(tmp_path / "c", keep=None).restore(state)


@pytest.mark.parametrize(
    ("number", "version", "expected"),
    [(2, "0.9.1", "has format 2"), ("x" * 1000, "1" * 1000, "has format 'xxx"), (None, None, "has format None")],
)
def test_another_format_is_refused_and_kept(state, tmp_path, number, version, expected):
    save_two(tmp_path / "c")
    rewrite(tmp_path / "c" / "20" / "state" / "record.json", format=number, version=version)
    with pytest.raises(InputError) as caught:
        Checkpoints(tmp_path / "c", keep=None).restore(state)
    message = str(caught.value)
    assert f"c/20 {expected}" in message and len(message) < 500 and "\n" not in message
    assert f"reads format 1; resume with pats_jax {(version or 'None')[:5]}" in message
    assert Checkpoints(tmp_path / "c", keep=None).steps == [10, 20]


def test_a_checkpoint_of_before_formats_had_numbers(state, tmp_path):
    """As pats_jax 0.1.0 wrote it: the progress in an item of its own, without format and digest."""
    save_two(tmp_path / "c")
    (tmp_path / "c" / "20" / "state" / "record.json").unlink()
    (tmp_path / "c" / "20" / "progress").mkdir()
    (tmp_path / "c" / "20" / "progress" / "metadata").write_text('{"progress": {}, "key_kinds": {}, "checksums": {}}')
    with pytest.raises(InputError) as caught:
        Checkpoints(tmp_path / "c", keep=None).restore(state)
    assert str(caught.value) == (
        f"checkpoint {tmp_path / 'c' / '20'} has no format number, but pats_jax {pats_jax.__version__} reads format 1; "
        "resume with pats_jax 0.1.0"
    )
    assert Checkpoints(tmp_path / "c", keep=None).steps == [10, 20]


def test_a_record_of_ours_with_a_field_of_another_type(state, tmp_path):
    save_two(tmp_path / "c")
    rewrite(tmp_path / "c" / "20" / "state" / "record.json", progress={"step": "three"})
    with pytest.raises(InputError, match=r"c/20/state/record.json: step: Input should be a valid integer"):
        Checkpoints(tmp_path / "c", keep=None).restore(state, loop.Progress)


def test_a_checkpoint_of_another_optimizer_is_refused_and_kept(tmp_path):
    runner = runners.make_runner(num_devices=1)
    with Checkpoints(tmp_path / "c", keep=None) as checkpoints:
        checkpoints.save(1, make_state(runner, tx=optax.sgd(0.1)), {})
        checkpoints.wait()
        with pytest.raises(InputError, match=r"c/1 belongs to another model or optimizer: opt_state\..* differs"):
            checkpoints.restore(make_state(runner))
        assert checkpoints.steps == [1]


def test_a_path_that_orbax_would_take_for_a_pattern(tmp_path):
    with pytest.raises(InputError, match="cannot save checkpoints under a path with"):
        Checkpoints(tmp_path / "run [1]" / "checkpoints", keep=1)


def test_a_save_that_fails_is_said_in_one_line_with_what_is_left(state, tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "c", keep=None) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()

        def full(*args, **kwargs):
            raise ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device\nand much more")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, "save", full)
            with pytest.raises(InputError) as caught:
                checkpoints.save(2, state, {})
    message = "a checkpoint could not be written: No space left on device; the last good one is "
    assert str(caught.value) == message + str(tmp_path / "c" / "1")
