"""A process that prepares things to time and then waits for its turn, so that preparing overlaps and timing does not.

``python -m benchmarks.device_worker KIND CASE DTYPE VARIANT...`` compiles and warms up all variants at once, prints a
line of JSON about each, and then answers each line on its standard input with a line of JSON:

    time VARIANT STEPS REPEATS       seconds a step, of STEPS steps without waiting in between, REPEATS times
    profile VARIANT STEPS            device time by kernel
    bits VARIANT STEPS               whether two trainings of STEPS steps end with equal bits

`benchmarks.on_device` starts such processes. Two kinds print one line and end: ``checkpoint`` writes random weights to
the folder DTYPE, ``first_loss`` trains one step from the folder CASE.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

BORN = time.time()


class Prepared:
    """Something that can be timed.

    Attributes:
      figures: what preparing it has shown.
      run: makes so many steps, then waits for the device.
      restart: goes back to the state before the first step; None if it cannot.
      digest: a hash of the parameters' bits; None if there are none.
    """

    def __init__(
        self,
        figures: dict[str, Any],
        run: Callable[[int], None],
        restart: Callable[[], None] | None = None,
        digest: Callable[[], str] | None = None,
    ):
        self.figures, self.run, self.restart, self.digest = figures, run, restart, digest


def prepare_step(case: str, dtype: str, variant: str) -> Prepared:
    """Our training step, as `cases.Training` makes it."""
    import jax

    from benchmarks import cases, programs

    parsed = cases.Case.parse(case)
    started = time.perf_counter()
    model, params, config = cases.load_model(parsed.model, dtype=dtype, **cases.model_options(variant))
    batch = jax.device_put(cases.random_batch(config.vocab_size, parsed.rows, parsed.length))
    training = cases.Training(model, params, cases.settings_of(variant), 10_000, batch)
    figures: dict[str, Any] = {"load_seconds": time.perf_counter() - started, "parameters": cases.size(params)}
    step = jax.jit(training.step, donate_argnums=0)
    figures |= programs.compile_timed(step, (training.shapes, batch))

    def create():
        return training.create(jax.device_put(params))

    held = [create()]

    def run(steps):
        for _ in range(steps):
            held[0], metrics = step(held[0], batch)
        jax.block_until_ready((held[0].params, metrics))
        held[1:] = [metrics]

    def restart():
        held.clear()
        held.append(create())

    _warm_up(run, figures)
    figures["loss"] = float(held[1]["loss"])
    return Prepared(figures, run, restart, lambda: _digest(held[0].params))


def prepare_lanes(case: str, dtype: str, variant: str) -> Prepared:
    """The step of many trainings side by side; variant is ``LANES:METHOD[:CHANGE...]``."""
    import jax
    import numpy as np

    from benchmarks import cases, programs
    from pats_jax.training import lanes

    number, _, method = variant.partition(":")
    parsed = cases.Case.parse(case)
    model, params, config = cases.load_model(parsed.model, dtype=dtype, **cases.model_options(method))
    runs = [cases.settings_of(method, seed=seed) for seed in range(int(number))]
    batch = cases.random_batch(config.vocab_size, parsed.rows, parsed.length)
    program = lanes.LaneProgram(model.apply, runs[0], 10_000)
    shared = lanes.lane_arrays(runs), program.split(params)[1], lanes.rate_table(runs[0].optimizer, 10_000)
    batches = {name: np.stack([array] * len(runs)) for name, array in batch.items()}
    arrays, frozen, rates, batches = jax.device_put((*shared, batches))
    held = [program.init(params, {}, arrays, rates)]
    figures: dict[str, Any] = {"parameters": cases.size(params), "lanes": len(runs)}
    figures |= programs.compile_timed(program.step, (held[0], arrays, frozen, rates, batches))

    def run(steps):
        for _ in range(steps):
            held[0], metrics = program.step(held[0], arrays, frozen, rates, batches)
        jax.block_until_ready((held[0].params, metrics))
        held[1:] = [metrics]

    _warm_up(run, figures)
    figures["loss"] = float(held[1]["loss"][0])
    return Prepared(figures, run)


def prepare_update(case: str, dtype: str, variant: str) -> Prepared:
    """The optimizer's update alone, on the parameters of a model; as variant ``copy``, reading and writing 1 GiB.

    The bytes that it must move are the ``least_bytes`` of `benchmarks.optimizer`.
    """
    import jax
    import jax.numpy as jnp

    from benchmarks import cases, optimizer, programs

    del dtype
    figures: dict[str, Any] = {}
    if variant == "copy":
        entries = 2**28 if jax.default_backend() != "cpu" else 2**24
        held = [jnp.zeros(entries)]
        add = jax.jit(lambda x: x + 1, donate_argnums=0)
        figures["bytes"] = 8 * entries

        def step():
            held[0] = add(held[0])
            return held[0]
    else:
        params, grads = optimizer.params_and_gradient(cases.Case.parse(case).model, **cases.model_options(variant))
        update = optimizer.Update(variant, params, grads, 10_000)
        figures |= programs.compile_timed(update.function, update.shapes)
        figures |= {"parameters": cases.size(params)}
        figures["bytes"] = optimizer.describe_bytes(variant, params)["least_bytes"]
        step = update.start()
        del params, grads

    def run(steps):
        for _ in range(steps):
            result = step()
        jax.block_until_ready(result)

    _warm_up(run, figures)
    return Prepared(figures, run)


def prepare_torch(case: str, dtype: str, variant: str) -> Prepared:
    """The same step in Transformers with torch, in one of its ways (`against_torch.WAYS`)."""
    import torch

    from benchmarks import against_torch, cases

    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    parsed = cases.Case.parse(case)
    way, started = against_torch.way_named(variant), time.perf_counter()
    model = against_torch.load_torch_model(parsed.model, way.attention)
    batch = cases.random_batch(model.config.vocab_size, parsed.rows, parsed.length)
    settings = cases.settings_of("finetune", max_steps=10_000)
    step = against_torch.torch_step(model, way, settings, batch, dtype)
    figures: dict[str, Any] = {"load_seconds": time.perf_counter() - started, "torch": torch.__version__}
    held: list[Any] = [None]

    def run(steps):
        for _ in range(steps):
            held[0] = step()
        held[0].block_until_ready()

    _warm_up(run, figures)
    figures["loss"] = float(held[0])
    return Prepared(figures, run)


def prepare_attention(case: str, dtype: str, variant: str) -> Prepared:
    """Forward and backward passes of 12 attentions in a row, without dropout, over rows without padding.

    Args:
      case: ROWSxLENGTHxHEADSxWIDTH.
      dtype: of queries, keys and values.
      variant: einsum, xla, cudnn or cudnn-lengths (key lengths in place of a mask).
    """
    import jax
    import jax.numpy as jnp

    from benchmarks import programs

    rows, length, heads, width = map(int, case.split("x"))
    bias = jnp.zeros((rows, 1, 1, length), jnp.float32)
    allowed = jnp.ones((rows, 1, 1, length), bool)
    lengths = jnp.full(rows, length, jnp.int32)

    def attend(query, key, value):
        if variant == "einsum":
            scores = jnp.einsum("bqhd,bkhd->bhqk", query * width**-0.5, key, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(scores + bias).astype(dtype)
            return jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        if variant == "cudnn-lengths":
            given = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
        else:
            given = {"mask": jnp.broadcast_to(allowed, (rows, 1, length, length))}
        kind: Any = variant.partition("-")[0]
        return jax.nn.dot_product_attention(query, key, value, implementation=kind, **given)

    def loss(query, key, value):
        for _ in range(12):
            query = attend(query, key, value)
        return jnp.sum(query.astype(jnp.float32) ** 2)

    figures: dict[str, Any] = {}
    shape = (rows, length, heads, width)
    arrays = [jax.random.normal(jax.random.key(number), shape, dtype) for number in range(3)]
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    figures |= programs.compile_timed(gradient, arrays)

    def run(steps):
        for _ in range(steps):
            result = gradient(*arrays)
        jax.block_until_ready(result)

    _warm_up(run, figures)
    return Prepared(figures, run)


KINDS: dict[str, Callable[[str, str, str], Prepared]] = {
    "step": prepare_step,
    "lanes": prepare_lanes,
    "update": prepare_update,
    "torch": prepare_torch,
    "attention": prepare_attention,
}


def _warm_up(run: Callable[[int], None], figures: dict[str, Any]) -> None:
    started = time.perf_counter()
    run(1)
    figures["first_call_seconds"] = time.perf_counter() - started
    run(2)


def _digest(tree: Any) -> str:
    import jax
    import numpy as np

    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def answer(prepared: dict[str, Prepared], words: list[str]) -> dict[str, Any]:
    """Obeys one line; see the module's docstring."""
    command, variant, *numbers = words
    one, counts = prepared[variant], [int(number) for number in numbers]
    if command == "time":
        steps, repeats = counts
        one.run(2)
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            one.run(steps)
            seconds.append((time.perf_counter() - started) / steps)
        return {"seconds": seconds}
    if command == "profile":
        return _profile(one, counts[0])
    if command == "bits":
        digests = []
        for _ in range(2):
            one.restart()  # type: ignore[misc]
            one.run(counts[0])
            digests.append(one.digest())  # type: ignore[misc]
        return {"equal_bits": digests[0] == digests[1], "digests": digests}
    raise ValueError(f"no such command: {command}")


def _profile(one: Prepared, steps: int) -> dict[str, Any]:
    import jax

    from benchmarks import programs

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    one.run(2)
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        one.run(steps)
        jax.profiler.stop_trace()
        return programs.summarize_profile(pathlib.Path(folder), steps)


def serve(kind: str, case: str, dtype: str, variants: list[str], say: Callable[[Any], None]) -> None:
    """Prepares all variants at the same time, then obeys the lines on standard input."""
    prepared: dict[str, Prepared] = {}
    report: dict[str, Any] = {"variants": {}}
    # torch's compiler works on one model at a time, and is parallel in itself
    workers = 1 if kind == "torch" else len(variants)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        coming = {variant: pool.submit(KINDS[kind], case, dtype, variant) for variant in variants}
        for variant, future in coming.items():
            try:
                prepared[variant] = future.result()
                report["variants"][variant] = prepared[variant].figures
            except Exception as error:
                traceback.print_exc()
                report["variants"][variant] = {"error": _one_line(error)}
    report["device"], report["versions"] = describe_device(kind)
    report["ready_seconds"] = time.time() - BORN
    say(report)
    for line in sys.stdin:
        try:
            say(answer(prepared, line.split()))
        except Exception as error:
            traceback.print_exc()
            say({"error": _one_line(error)})


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def describe_device(kind: str) -> tuple[str, dict[str, str]]:
    """What this process computes on, and versions."""
    if kind == "torch":
        import torch
        import transformers

        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        return name, {"torch": torch.__version__, "transformers": transformers.__version__}
    import jax
    import jaxlib

    return jax.devices()[0].device_kind, {"jax": jax.__version__, "jaxlib": jaxlib.__version__}


def write_checkpoint(name: str, folder: str) -> None:
    """Random weights of a size of `cases.SIZES`, as a folder that `from_pretrained` loads."""
    from benchmarks import cases
    from pats_jax import models

    _, params, config = cases.load_model(name)
    models.save_pretrained(folder, params=params, config=config)


def first_loss(folder: str, dtype: str, variant: str, say: Callable[[Any], None]) -> None:
    """Trains one step of 32 x 128 from a checkpoint in a folder; prints the loss and the seconds since the start."""
    from benchmarks import cases
    from pats_jax.training import runners

    times = {"imported": time.time() - BORN}
    model, params, config = cases.load_model(folder, dtype=dtype, **cases.model_options(variant))
    times["loaded"] = time.time() - BORN
    batch = cases.random_batch(config.vocab_size, 32, 128)
    training = cases.Training(model, params, cases.settings_of(variant), 1000, batch)
    run = training.start(runners.make_runner(num_devices=1))
    times["state created"] = time.time() - BORN
    _, metrics = run()
    loss = float(metrics["loss"])
    say({"loss": loss, "seconds_inside": times | {"loss": time.time() - BORN}})


def main(words: list[str]) -> None:
    """Runs one process; what libraries print goes to standard error."""
    mine = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(what):
        print(json.dumps(what), file=mine, flush=True)

    kind, case, dtype, *variants = words
    if kind != "torch":
        from pats_jax.run import xla_flags

        xla_flags.set_defaults()  # as in the programs
    if kind == "checkpoint":
        write_checkpoint(case, dtype)
        say({})
    elif kind == "first_loss":
        first_loss(case, dtype, variants[0], say)
    else:
        serve(kind, case, dtype, variants, say)


if __name__ == "__main__":
    main(sys.argv[1:])
