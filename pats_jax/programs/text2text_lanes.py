"""Sets of text-to-text runs in lanes, see `lane_sets`: data, encoder-decoder, texts of one lane after the other."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.console

from pats_jax import models, train_state
from pats_jax.core.files import JsonObject
from pats_jax.data.pair_batches import PairTokens
from pats_jax.data.text_pairs import TextPairs
from pats_jax.programs import lane_sets, text2text
from pats_jax.run import pe_modules
from pats_jax.run.lane_training import LaneTraining
from pats_jax.run.run_start import Start
from pats_jax.run.text2text_settings import Text2TextSettings
from pats_jax.training import runners, shape_costs, text_metrics
from pats_jax.training.lane_evaluation import LaneModels, LaneWriter
from pats_jax.training.pair_table import PairSource
from pats_jax.training.runners import CompiledProgram


def main(text: str, console: rich.console.Console) -> None:
    """Makes the runs of a set that are not finished; arguments and errors are those of `lane_sets.main`."""
    lane_sets.main(text, console, Text2TextSettings, Writers)


@dataclasses.dataclass(frozen=True)
class Writers(lane_sets.Shared[Text2TextSettings]):
    """What all runs of a set of encoder-decoders share.

    Attributes:
      splits: the data.
      texts: the splits, tokenised.
      generation: how texts are generated.
      losses: see `text2text.make_losses`.
    """

    splits: dict[str, TextPairs]
    texts: text2text.Texts
    generation: models.GenerationConfig
    losses: tuple[train_state.LossFn, train_state.LossFn]

    @classmethod
    def load(cls, settings: Text2TextSettings, runner: runners.MeshRunner, tokenizer: Any) -> "Writers":
        text_metrics.check_packages(settings.metrics)
        splits = text2text.load_data(settings)
        plain = text2text.load_model(settings.replace(adapters=()), splits)
        model, params = pe_modules.add_adapter(settings, *plain)
        generation = text2text.generation_config(settings, model)
        texts = text2text.Texts.of(splits, tokenizer, model, settings, generation)
        losses = text2text.make_losses(settings, model)
        return cls(plain, model, params, settings.main_metric, runner, splits, texts, generation, losses)

    @property
    def train_rows(self) -> int:
        return len(self.splits["train"])

    @property
    def num_layers(self) -> int | Mapping[str, int]:
        return self.model.config.num_layers_of

    @property
    def loss_fn(self) -> train_state.LossFn:
        return self.losses[0]

    def data_of(self, settings: Text2TextSettings) -> PairTokens:
        return self.texts.pairs("train")

    def source(self, settings: Text2TextSettings, data: PairTokens) -> PairSource:
        return text2text.make_source(settings, self.runner, data, self.params, self.losses[1])

    @functools.cached_property
    def generate(self) -> CompiledProgram:
        """The program that writes, for the parameters of one lane."""
        return self.runner.compile_predict(models.make_generate_step(self.model, self.generation))

    def evaluators(
        self,
        settings: Text2TextSettings,
        data: Sequence[PairTokens],
        training: LaneTraining,
        interrupt: Callable[[], None],
    ) -> tuple[LaneModels, list[LaneWriter]]:
        of_lanes = LaneModels(training.compiled, training.frozen, self.runner)
        return of_lanes, [
            LaneWriter(
                self.generate,
                self.runner,
                self.splits,
                self.texts.sources,
                self.texts.tokenizer,
                settings.metrics,
                settings.batches.per_device_eval_batch_size,
                interrupt,
                shape_costs.shape_cost(self.params, self.runner.platform, 1, training=True),
                training.rhythm.evaluations,
                of_lanes=of_lanes,
                lane=lane,
            )
            for lane in range(len(data))
        ]

    def add_adapter(self, settings: Text2TextSettings, model: Any, params: Any) -> tuple[Any, Any]:
        return pe_modules.add_adapter(settings, model, params)

    def describe(self, settings: Text2TextSettings, params: Any) -> JsonObject:
        return text2text.describe_run(settings, params, self.generation)

    def finish(
        self, start: Start[Text2TextSettings], model: Any, evaluator: Any, keeps_model: bool
    ) -> text2text.Finish:
        return text2text.Finish(start, model, self.texts.tokenizer, self.generation, evaluator, keeps_model)
