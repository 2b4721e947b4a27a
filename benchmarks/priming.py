"""Subject `priming`: the step of each upstream algorithm, and what second-order MAML takes of memory."""

import dataclasses
from typing import Any

import jax
import numpy as np

from benchmarks import cases, report
from benchmarks.cases import Case
from benchmarks.memory import figures_of
from benchmarks.turns import take_turns
from pats_jax import methods, train_state
from pats_jax.models import peft
from pats_jax.priming import meta_losses, option_scoring
from pats_jax.priming.upstream_settings import PrimingSettings
from pats_jax.training import runners

BASE = "fomaml"
OPTIONS, OPTION_LENGTH = 3, 8


@dataclasses.dataclass(frozen=True)
class Priming(report.Subject):
    """Upstream step of each algorithm against first-order MAML's: tasks of so many rows, options given once a task.

    Each variant is ALGORITHM[:KIND], the model or the PE modules of a kind alone being trained. Memory is XLA's own
    figure, for one device; nothing is run for it. Tasks are taken together, or one after the other by
    accumulation.
    """

    case: str = "minilm:16x64"  # MODEL:ROWSxLENGTH, the rows of a task in the inner step and again in the query
    tasks: int = 4  # of a step
    variants: tuple[str, ...] = ("mtl", "fomaml", "maml", "reptile", "fomaml:lora", "maml:lora")  # ALGORITHM[:KIND]
    rounds: int = 7  # timed steps of each
    memory_case: str = "bert-base:16x64"  # MODEL:ROWSxLENGTH, MAML on the whole model

    def run(self) -> report.Results:
        results = report.Results()
        case = Case.parse(self.case)
        runner = runners.make_runner(num_devices=1)
        sides = {name: start(name, case, self.tasks, runner) for name in dict.fromkeys((BASE, *self.variants))}
        turns = take_turns(sides, self.rounds)
        table = report.table(f"Upstream step, {self.tasks} tasks, {case}", "algorithm", "median, s", f"to {BASE}")
        for name in sides:
            key = f"{case} {name}"
            results.ratios[key] = turns.ratio(name, BASE)
            results.measured[key] = {
                "median_seconds": turns.median(name),
                "ratio": turns.ratio(name, BASE),
                "seconds": turns.seconds[name],
            }
            table.add_row(name, f"{turns.median(name):.3f}", f"{turns.ratio(name, BASE):.2f}")
        results.tables.append(table)
        self._memory(results)
        return results

    def _memory(self, results: report.Results) -> None:
        case = Case.parse(self.memory_case)
        table = report.table(f"Second-order MAML, {self.tasks} tasks, {case}, GB", "", "temporaries", "in all")
        for name, micro_batches in {"together": 1, "in turn": self.tasks}.items():
            training = Upstream("maml", case, self.tasks, micro_batches=micro_batches)
            shapes = jax.eval_shape(training.create, training.params)
            compiled = jax.jit(training.step, donate_argnums=0).lower(shapes, training.batch).compile()
            figures = figures_of(compiled)
            key = f"{case} maml {name}"
            results.measured[key] = figures
            results.sizes[key] = figures["total"]
            table.add_row(name, *(f"{figures[n] / 1e9:.2f}" for n in ("temporaries", "total")))
        results.tables.append(table)


class Upstream:
    """An algorithm's step and what it starts from, made as `pats-jax prime` makes them.

    Attributes:
      params: NumPy arrays, where it starts.
      batch: random rows of so many tasks.
      step: the pure step.
    """

    def __init__(self, variant: str, case: Case, tasks: int, *, micro_batches: int = 1):
        algorithm, _, kind = variant.partition(":")
        model, params, config = cases.load_model(case.model)
        model = model.clone(first_token_only=False)
        settings = PrimingSettings(algorithm=algorithm, peft=kind or None, train="pe" if kind else "plm")
        modules = settings.adapter
        if modules:
            model, params = peft.add_peft(model, params, modules, key=0)
        self._model, self.params = model, params
        self._trainable = option_scoring.trainable_mask(params, settings.upstream.train, settings.upstream.head)
        loss_fn = meta_losses.make_meta_loss(
            algorithm,
            option_scoring.make_option_loss(option_scoring.get_head(settings.upstream.head), model),
            inner_learning_rate=settings.upstream.inner_learning_rate,
            trainable=self._trainable,
        )
        trained = jax.tree.map(lambda keep, p: p if keep else None, self._trainable, params)
        self._tx = methods.make_optimizer(settings.optimizer, settings.methods, 1000, trained)
        self.step = train_state.make_train_step(loss_fn, accumulation_steps=micro_batches, skip_nonfinite=True)
        self.batch = random_tasks(config.vocab_size, tasks, case.rows, case.length)

    def create(self, params: Any) -> train_state.TrainState:
        """The state before the first step; params are given away to it."""
        return train_state.TrainState.create(
            apply_fn=self._model.apply, params=params, tx=self._tx, key=0, trainable=self._trainable
        )


def start(variant: str, case: Case, tasks: int, runner: runners.MeshRunner) -> Any:
    """A function that makes one step of a variant on the same batch."""
    training = Upstream(variant, case, tasks)
    state = runner.create_state(lambda params: training.create(params), training.params)
    compiled = runner.compile_step(training.step, state)
    held = [state]

    def run():
        held[0], metrics = compiled(held[0], training.batch)
        return held[0], metrics

    return run


def random_tasks(vocab_size: int, tasks: int, rows: int, length: int) -> dict[str, np.ndarray]:
    """A batch of tasks without padding, whose rows share their options; one inner step."""
    rng = np.random.default_rng(0)

    def draw(*leading):
        shape, options = (*leading, rows), (*leading, 1, OPTIONS)
        low = min(1000, vocab_size // 2)
        return {
            "input_ids": rng.integers(low, vocab_size, (*shape, length), dtype=np.int32),
            "attention_mask": np.ones((*shape, length), np.int32),
            "option_input_ids": rng.integers(low, vocab_size, (*options, OPTION_LENGTH), dtype=np.int32),
            "option_attention_mask": np.ones((*options, OPTION_LENGTH), np.int32),
            "option_mask": np.ones((*shape, OPTIONS), np.int32),
            "answers": rng.integers(OPTIONS, size=shape, dtype=np.int32),
        }

    support, query = draw(tasks, 1), draw(tasks)
    named = {meta_losses.SUPPORT + name: x for name, x in support.items()}
    return named | {meta_losses.QUERY + name: x for name, x in query.items()}
