"""Sets of GLUE runs in lanes, see `lane_sets`: data, classifier, logits of all lanes at once."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import rich.console

from pats_jax import glue, models, train_state
from pats_jax.core.files import JsonObject
from pats_jax.data import batches, readers, tasks
from pats_jax.models import labels
from pats_jax.programs import lane_sets
from pats_jax.run.lane_training import LaneTraining
from pats_jax.run.run_start import Start
from pats_jax.run.settings import Settings
from pats_jax.training import runners, shape_costs
from pats_jax.training.lane_evaluation import LaneLogits, LanePredictor
from pats_jax.training.table import TableSource, bucket_boundaries, count_steps

Data = tuple[dict[str, readers.Split], batches.Tokens]  # the splits of a run, and the tokens of its training rows


def main(text: str, console: rich.console.Console) -> None:
    """Makes the runs of a set that are not finished; arguments and errors are those of `lane_sets.main`."""
    lane_sets.main(text, console, Settings, Classifiers)


@dataclasses.dataclass(frozen=True)
class Classifiers(lane_sets.Shared[Settings]):
    """What all runs of a set of classifiers share.

    Attributes:
      task: what is learnt.
      splits: the data; of runs of ``--low_resource``, the training rows of the first.
      texts: the splits as texts of the model.
      config: the model's.
      order: see `Predictor.order`.
    """

    task: tasks.Task
    splits: dict[str, readers.Split]
    texts: glue.Texts
    config: Any
    order: np.ndarray | None

    @classmethod
    def load(cls, settings: Settings, runner: runners.MeshRunner, tokenizer: Any) -> "Classifiers":
        task, splits = glue.load_data(settings)
        alone = settings.replace(adapters=(), attention="einsum")  # cuDNN's kernel does not work under vmap
        *plain, config = glue.load_model(alone, task, splits)
        model, params = glue.add_adapter(settings, *plain)
        texts = glue.Texts.check(splits, tokenizer, model, settings.model.max_seq_length)
        order = None if task.labels is None else labels.match_labels(task.labels, list(config.id2label.values()))
        return cls((plain[0], plain[1]), model, params, task.main_metric, runner, task, splits, texts, config, order)

    @property
    def train_rows(self) -> int:
        return len(self.splits["train"])

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def regression(self) -> bool:
        return self.task.is_regression

    @functools.cached_property
    def loss_without_dropout(self) -> train_state.LossFn:
        """The loss to measure sensitivity with."""
        return train_state.make_loss_fn(self.model.apply, regression=self.regression, deterministic=True)

    def data_of(self, settings: Settings) -> Data:
        if not settings.data.low_resource:
            return self.splits, self.texts.tokens("train")
        _, splits = glue.load_data(settings)
        own = glue.Texts.check(
            {"train": splits["train"]}, self.texts.tokenizer, self.model, settings.model.max_seq_length
        )
        return splits, own.tokens("train")

    def source(self, settings: Settings, data: Data) -> TableSource:
        splits, tokens = data
        steps = count_steps(settings.length, settings.batches.train_batch_size, len(tokens))
        rows = steps * (settings.batches.train_batch_size or 1)
        boundaries = bucket_boundaries(settings.batches, self.runner.platform, self.params, tokens.lengths, rows)
        split, plain = glue.in_order_of_head(splits["train"], self.order), self.loss_without_dropout
        return TableSource(settings.batches, self.runner, tokens, split.labels, boundaries, plain, settings.seed)

    def evaluators(
        self, settings: Settings, data: Sequence[Data], training: LaneTraining, interrupt: Callable[[], None]
    ) -> tuple[LaneLogits, list[LanePredictor]]:
        logits = LaneLogits(training.compiled, training.frozen)
        predict = self.runner.compile_predict(train_state.make_predict_step(self.model.apply))
        cost = shape_costs.shape_cost(self.params, self.runner.platform, 1, training=False)
        return logits, [
            LanePredictor(
                predict,
                self.runner,
                self.task,
                splits,
                functools.partial(self._tokens, tokens),
                settings.batches.per_device_eval_batch_size,
                interrupt,
                self.order,
                cost,
                training.rhythm.evaluations,
                of_lanes=logits,
                lane=lane,
            )
            for lane, (splits, tokens) in enumerate(data)
        ]

    def _tokens(self, of_train, name):
        return of_train if name == "train" else self.texts.tokens(name)

    def add_adapter(self, settings: Settings, model: Any, params: Any) -> tuple[Any, Any]:
        return glue.add_adapter(settings, model, params)

    def new_layers(self, settings: Settings, seeds: Sequence[int]) -> Any:
        return models.new_layers(settings.model.model_name_or_path, self.config, keys=seeds)

    def describe(self, settings: Settings, params: Any) -> JsonObject:
        return glue.describe_run(settings, self.task, params)

    def finish(self, start: Start[Settings], model: Any, evaluator: Any, keeps_model: bool) -> glue.Finish:
        return glue.Finish(start, self.task, model, self.texts.tokenizer, evaluator, keeps_model=keeps_model)
