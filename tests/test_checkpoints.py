"""What is saved comes back bit by bit, wherever it goes; what is damaged is noticed; what fails is said."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pats_jax
from pats_jax import parallel
from pats_jax.checkpoints import Checkpoints
from pats_jax.errors import InputError


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
    grads = jax.tree.map(lambda p: jnp.ones_like(p) * 0.3, state.params)
    return jax.jit(lambda s: s.apply_gradients(grads=grads))(state)


def bits(state):
    """Every leaf as bytes, by path."""

    def to_bytes(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return str(jax.random.key_impl(leaf)), np.asarray(jax.random.key_data(leaf)).tobytes()
        return str(leaf.dtype), np.asarray(leaf).tobytes()

    return {jax.tree_util.keystr(path): to_bytes(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


@pytest.mark.parametrize("target", [{}, {"num_devices": 4}, {"fsdp": 4}, {"kind": "pmap"}], ids=str)
def test_a_state_comes_back_bit_by_bit_on_any_devices(tmp_path, target):
    state = make_state(parallel.make_runner(fsdp=2))
    progress = {"step": 3, "pending": [{"loss": 0.1 + 0.2}], "nothing": None}
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(3, state, progress)
    runner = parallel.make_runner(**target)
    empty = runner.view(make_state(runner, scale=7.0))
    restored, found = Checkpoints(tmp_path / "c", keep=1).restore(empty)
    assert bits(restored) == bits(state) and found == progress
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(empty), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim) or not ours.size
    assert restored.opt_state[1].sensitivity["bias"] is None
    grads = jax.tree.map(jnp.ones_like, restored.params)
    assert int(restored.apply_gradients(grads=grads).step) == 2  # its keys draw, its structure is whole


def test_what_is_saved_is_the_state_of_that_moment(tmp_path):
    """Steps that donate the saved buffers go on while the save is being written."""
    runner = parallel.make_runner(num_devices=1)
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
            checkpoints._manager.delete(number)


def test_the_newest_are_kept_and_every_best_one_that_they_name(tmp_path):
    state = make_state(parallel.make_runner(num_devices=1))
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
        assert checkpoints.restore(make_state(parallel.make_runner())) is None and checkpoints.steps == []
    assert not list(tmp_path.iterdir())


# damage


def truncate(folder):
    data = largest(folder).read_bytes()
    largest(folder).write_bytes(data[: len(data) // 2])


def flip_a_bit(folder):
    data = bytearray(largest(folder).read_bytes())
    data[len(data) // 2] ^= 1
    largest(folder).write_bytes(data)


def lose_a_file(folder):
    largest(folder).unlink()


def lose_the_progress(folder):
    (folder / "progress" / "metadata").write_text('{"progress": ')


def forget_a_change(folder):
    """The arrays are sound, but not those that were saved: only the checksum tells."""
    path = folder / "progress" / "metadata"
    saved = json.loads(path.read_text())
    saved["checksums"]["params.bias"] ^= 1
    path.write_text(json.dumps(saved))


def largest(folder: pathlib.Path) -> pathlib.Path:
    """The file that holds the arrays."""
    return max((folder / "state").glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_a_file, lose_the_progress, forget_a_change])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, damage, caplog):
    caplog.set_level("WARNING", logger="pats_jax")  # the benchmarks make it say less
    state = make_state(parallel.make_runner(num_devices=1))
    with Checkpoints(tmp_path / "c", keep=None) as checkpoints:
        checkpoints.save(10, state, {"step": 10})
        checkpoints.save(20, state, {"step": 20})
    damage(tmp_path / "c" / "20")
    with Checkpoints(tmp_path / "c", keep=None) as checkpoints:
        restored, progress = checkpoints.restore(state)
        assert progress == {"step": 10} and bits(restored) == bits(state)
        (warning,) = [record.message for record in caplog.records if record.name == "pats_jax.checkpoints"]
        assert f"{tmp_path / 'c' / '20'} is damaged" in warning and "\n" not in warning
        checkpoints.save(20, state, {"step": 20})  # the place is free again
    assert Checkpoints(tmp_path / "c", keep=None).restore(state)[1] == {"step": 20}


def test_a_checkpoint_of_another_optimizer_is_refused_and_kept(tmp_path):
    runner = parallel.make_runner(num_devices=1)
    with Checkpoints(tmp_path / "c", keep=None) as checkpoints:
        checkpoints.save(1, make_state(runner, tx=optax.sgd(0.1)), {})
        checkpoints.wait()
        with pytest.raises(InputError, match=r"c/1 is of another model or optimizer: opt_state\..* differs"):
            checkpoints.restore(make_state(runner))
        assert checkpoints.steps == [1]


def test_a_path_that_orbax_would_take_for_a_pattern(tmp_path):
    with pytest.raises(InputError, match="no checkpoints can be kept under a path with"):
        Checkpoints(tmp_path / "run [1]" / "checkpoints", keep=1)


def test_a_save_that_fails_is_said_in_one_line_with_what_is_left(tmp_path, monkeypatch):
    state = make_state(parallel.make_runner(num_devices=1))
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
