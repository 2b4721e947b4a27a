"""Programs that another thread compiles before they are needed: the same ones, each once, and only those announced."""

import contextlib
import functools
import threading
import time

import jax
import numpy as np
import optax
import pytest
import tiny

import pats_jax
from pats_jax import make_loss_fn, make_train_step, models
from pats_jax.training import runners

ROWS, LENGTHS = 16, (12, 5, 8)
TWO = LENGTHS[:2]  # of a training with every runner
SLOW = pytest.mark.slow
RUNNERS = {"one device": {"num_devices": 1}, "mesh": {}, "fsdp": {"fsdp": 2}, "pmap": {"kind": "pmap"}}


@contextlib.contextmanager
def listening():
    """A list that grows by (thread, program) with every training step that is compiled."""
    found = []

    def listen(event, seconds, fun_name="", **_):
        if event.endswith("backend_compile_duration") and any(name in fun_name for name in ("step", "_fun")):
            found.append((threading.current_thread().name, fun_name))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def compiled():
    with listening() as found:
        yield found


@functools.cache
def plain(name):
    """Parameters and metrics of the training without another thread, and how many programs it compiled."""
    with listening() as found:
        return *train(*prepare(**RUNNERS[name])), len(found)


def make_batch(length):
    rng = np.random.default_rng(length)
    return {
        "input_ids": rng.integers(5, tiny.CONFIG.vocab_size, (ROWS, length), dtype=np.int32),
        "attention_mask": np.ones((ROWS, length), np.int32),
        "labels": rng.integers(2, size=ROWS, dtype=np.int32),
    }


def prepare(**kind):
    """A runner, a first state, and a step with dropout and noise."""
    model = models.SequenceClassifier(tiny.CONFIG)
    runner = runners.make_runner(**kind)
    tx = pats_jax.pats(optax.sgd(1e-2), noise_scale=1e-3, key=3)
    create = functools.partial(pats_jax.TrainState.create, apply_fn=model.apply, tx=tx, key=0)
    state = runner.create_state(create, tiny.random_params(tiny.CONFIG))
    step = make_train_step(make_loss_fn(model.apply), axis_name=runner.axis_name)
    return runner, state, runner.compile_step(step, state)


@pytest.mark.parametrize("name", ["one device", *(pytest.param(name, marks=SLOW) for name in ("mesh", "fsdp", "pmap"))])
def test_the_first_program_may_be_begun_from_shapes_alone(name, compiled):
    """Of a state that is not there yet; it is the very program that the step then runs."""
    expected, expected_metrics, _ = plain(name)
    compiled.clear()
    runner, state, step = prepare(**RUNNERS[name])
    shapes = runner.state_shapes(lambda params: state, state.params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), state
    )
    step.begin(shapes, runner.put_ahead(make_batch(TWO[0])))
    with step.compiling_ahead(state, map(make_batch, TWO)):
        params, metrics = train(runner, state, step)
    assert [thread.partition("_")[0] for thread, _ in compiled] == ["compile"] * 2
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, expected)), strict=True))
    assert metrics == expected_metrics


def test_a_call_waits_for_a_program_that_is_being_compiled(compiled):
    """And does not compile it, too; nor does a thread that comes later."""
    began = threading.Event()

    def step(x):  # the listener looks for this name
        began.set()
        time.sleep(0.5)  # at tracing
        return x + 1

    program = runners.CompiledProgram(jax.jit(step))
    thread = threading.Thread(target=program.compile, args=(jax.ShapeDtypeStruct((3,), np.float32),))
    thread.start()
    began.wait()
    assert program(np.ones(3, np.float32)).tolist() == [2, 2, 2]
    thread.join()
    program.compile(np.ones(3, np.float32))
    assert len(compiled) == 1


def test_what_else_is_needed_is_compiled_after_the_first_step():
    order = []
    runner, state, step = prepare(num_devices=1)
    with step.compiling_ahead(state, [], [lambda: order.append(threading.current_thread().name)]):
        assert not order
        step(state, runner.put_ahead(make_batch(LENGTHS[0])))
    assert [name.partition("_")[0] for name in order] == ["compile"]


def train(runner, state, step):
    for length in (*TWO, *TWO):
        state, metrics = step(state, runner.put_ahead(make_batch(length)))
    return runner.to_host(state.params), jax.device_get(metrics)


@pytest.mark.parametrize("name", ["one device", *(pytest.param(name, marks=SLOW) for name in ("mesh", "fsdp", "pmap"))])
def test_each_program_is_compiled_once_all_but_the_first_in_the_thread_and_computes_the_same(name, compiled):
    expected, expected_metrics, programs = plain(name)
    assert programs == len(TWO)
    compiled.clear()
    runner, state, step = prepare(**RUNNERS[name])
    with step.compiling_ahead(state, map(make_batch, TWO)):
        params, metrics = train(runner, state, step)
    assert [thread.partition("_")[0] for thread, _ in compiled] == ["MainThread", "compile"]
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, expected)), strict=True))
    assert metrics == expected_metrics
    assert not any(thread.name.startswith("compile") for thread in threading.enumerate())


def test_what_was_not_announced_is_compiled_when_it_comes(compiled):
    _, state, step = prepare(num_devices=1)
    with step.compiling_ahead(state, [make_batch(12), make_batch(8)]):
        state, _ = step(state, make_batch(12))
        step(state, make_batch(5))
    assert sorted(thread.partition("_")[0] for thread, _ in compiled) == ["MainThread", "MainThread", "compile"]


def test_an_error_of_the_compiler_is_raised_by_the_step_that_needs_the_program(monkeypatch):
    _, state, step = prepare(num_devices=1)

    def fail(arguments):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(step, "_compile", fail)
    with step.compiling_ahead(state, [make_batch(12), make_batch(5)]):
        state, _ = step(state, make_batch(12))
        with pytest.raises(RuntimeError, match="out of registers"):
            step(state, make_batch(5))


def test_whoever_ends_early_waits_for_no_program_that_is_not_begun(monkeypatch, compiled):
    _, state, step = prepare(num_devices=1)
    real, begun, go_on = step._compile, threading.Event(), threading.Event()

    def compile_slowly(arguments):
        begun.set()
        go_on.wait(10)
        real(arguments)

    monkeypatch.setattr(step, "_compile", compile_slowly)
    with pytest.raises(KeyError), step.compiling_ahead(state, map(make_batch, LENGTHS)):
        step(state, make_batch(LENGTHS[0]))
        begun.wait(10)
        threading.Timer(0.1, go_on.set).start()
        raise KeyError
    assert len(compiled) == 2, "the first, and the one that was begun"
    assert not any(thread.name.startswith("compile") for thread in threading.enumerate())
