"""The cost of one more batch shape, to choose the number of length buckets.

XLA compiles a program for each shape. That takes seconds, which grow with the number of parameter tensors: separate
layers are compiled one by one, stacked layers once. Padding takes seconds too, which grow with the number of parameters
that every token is multiplied with. A shape is worth its compilation if it saves more seconds of padding:

    seconds of a compilation      = fixed + per_tensor * tensors
    seconds of a training token   = 6 * encoder parameters / flops_per_second
    cost of a shape in tokens     = the first / (the second * how often the data is gone through)

The rates are rounded figures by platform, not measurements of the current machine, so a run is the same on any machine
of a platform. They only need to be right within a factor of two: on an accelerator a compilation is worth millions of
tokens, on a CPU ten thousand.
"""

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Rates:
    """The cost of compiling and computing on a platform.

    Attributes:
      fixed: seconds of a compilation, for any model, tracing included.
      per_tensor: additional seconds per parameter tensor.
      flops_per_second: speed of a training step, in floating-point operations per second.
    """

    fixed: float
    per_tensor: float
    flops_per_second: float


RATES = {
    # Two cores, float32, MiniLM's width, 32 rows: 6, 9 to 13 and 17 s to compile a step of 1, 6 and 12 layers (23, 103
    # and 199 tensors), and 0.5 ms for one more token in a step of 6 layers (10.6 million parameters).
    "cpu": Rates(fixed=4.0, per_tensor=0.06, flops_per_second=1.3e11),
    # One H100: BERT-base's step took 85 s to compile with 199 tensors and 23 s with its layers stacked (25 tensors),
    # and 15 to 20 ms for 4,096 tokens in bfloat16 (85 million parameters in the encoder).
    "gpu": Rates(fixed=14.0, per_tensor=0.35, flops_per_second=1.2e14),
    # Not measured: compiling as on the GPU, half its speed, as of the peaks of a TPU v5e and an H100 (197 and 989).
    "tpu": Rates(fixed=14.0, per_tensor=0.35, flops_per_second=6e13),
}

# A prediction against a training step: a forward pass of three, and an eighth of the compilation (1.0 s of 8.7 on CPU).
PREDICT_FLOPS, PREDICT_COMPILATION = 1 / 3, 1 / 8

MOST_BUCKETS = 7


def shape_cost(params: Any, platform: str, passes: float, *, training: bool) -> float:
    """The cost of one more batch shape, in tokens of one pass over the data; see `bucket_boundaries`.

    Args:
      params: the model's parameters, or their shapes.
      platform: "cpu", "gpu" or "tpu"; any other counts as "gpu".
      passes: the number of passes over the data.
      training: whether the program is a training step or a prediction.
    """
    rates, seconds = RATES.get(platform, RATES["gpu"]), compile_seconds(params, platform)
    operations = 6.0 * num_encoder_parameters(params)
    if not training:
        seconds, operations = PREDICT_COMPILATION * seconds, PREDICT_FLOPS * operations
    return seconds * rates.flops_per_second / (operations * passes)


def compile_seconds(params: Any, platform: str) -> float:
    """A rough estimate of the seconds to compile a training step; the arguments are as for `shape_cost`."""
    rates = RATES.get(platform, RATES["gpu"])
    return rates.fixed + rates.per_tensor * len(jax.tree.leaves(params))


def num_encoder_parameters(params: Any) -> int:
    """The number of parameters that every token is multiplied with: all but the embeddings."""
    sized = ((jax.tree_util.keystr(path), leaf.size) for path, leaf in jax.tree_util.tree_leaves_with_path(params))
    return sum(size for name, size in sized if "embedding" not in name)
