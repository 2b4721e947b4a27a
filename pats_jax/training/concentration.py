"""Measures sensitivity by gradients, and how it is spread over the parameters, in three figures.

The PATS paper reports that well-performing models have concentrated distributions of sensitivity; how to measure
concentration is ours.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pats_jax.train_state import Batch, LossFn, parameter_name

_BLOCK = 2**16
HISTOGRAM_EDGES = tuple(quarter / 4 for quarter in range(-80, 17))  # log10, from -20 to 4


def measure_sensitivity(
    loss_fn: LossFn, params: Any, batches: Iterable[Batch], in_turn: Callable[[Any], Any] = lambda total: total
) -> Any:
    """The mean over batches of |theta * g|, at fixed parameters theta, with g the gradient of a batch's mean loss.

    The moving average in `PatsNoiseState` follows one training with one method; this compares any two models.

    Args:
      loss_fn: as for `make_train_step`, without dropout: its key is None.
      params: a tree of parameters.
      batches: at least one batch; compiled once for each loss_fn and shape.
      in_turn: returns a program's result when the next program may start, see `MeshRunner.in_turn`.

    Returns:
      A tree like params, float32.
    """
    total, count = jax.tree.map(_zeros, params), 0
    for batch in batches:
        total, count = in_turn(_add(loss_fn, total, params, batch)), count + 1
    return _divide(total, count)


def _zeros(param):
    """Zeros with the sharding of the parameter, like the sums; otherwise the first batch would need its own program."""
    zeros = np.zeros(param.shape, np.float32)
    return jax.device_put(zeros, param.sharding) if isinstance(param, jax.Array) else zeros


@jax.jit  # one program: tensor by tensor, every shape would be one of its own
def _divide(total, count):
    return jax.tree.map(lambda t: t / count, total)


@functools.partial(jax.jit, static_argnums=0)
def _add(loss_fn, total, params, batch):
    grads, _ = jax.grad(loss_fn, has_aux=True)(params, batch, None)
    return jax.tree.map(lambda t, p, g: t + jnp.abs(p * g).astype(jnp.float32), total, params, grads)


def concentration(values: np.ndarray) -> dict[str, float]:
    """Measures how concentrated non-negative values are, in three figures.

    Args:
      values: (n,) float, n >= 1.

    Returns:
      ``gini``, the Gini coefficient: 0 if all values are equal, (n-1)/n if one holds everything; ``entropy``, -sum(p
      log p) / log(n) with p the shares: 1 if all are equal, 0 if one holds everything; and ``top_10_percent_share``,
      the share of the largest tenth (rounded up) in the sum. If all values are 0, they count as equal.
    """
    ordered = np.sort(np.ravel(values))
    count, total = ordered.size, float(ordered.sum(dtype=np.float64))
    if total == 0:
        ordered, total = np.ones(count), float(count)
    ranked, entropy = 0.0, 0.0
    for start in range(0, count, _BLOCK):  # whole, arrays of float64 would take most of the time to make
        share = ordered[start : start + _BLOCK] / np.float64(total)
        ranked += float(np.arange(start + 1.0, start + 1.0 + share.size) @ share)
        positive = share[np.searchsorted(share, 0, "right") :]
        entropy -= float(positive @ np.log(positive))
    return {
        "gini": 2 * ranked / count - (count + 1) / count,
        "entropy": entropy / float(np.log(count)) if count > 1 else 1.0,
        "top_10_percent_share": float(ordered[-max(1, -(-count // 10)) :].sum(dtype=np.float64)) / total,
    }


def by_tensor(tensors: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """`concentration` of every tensor by its name, and of all their entries together as ``all``."""
    figures = {name: concentration(values) for name, values in tensors.items()}
    return {"all": concentration(np.concatenate(list(tensors.values()))), **figures}


def log10_histogram(ordered: np.ndarray) -> list[float]:
    """The share of non-negative values in every bin between the powers of ten `HISTOGRAM_EDGES`.

    The bins are the same for all runs, so histograms can be averaged; the outermost bins include all values beyond.
    Zeros are in no bin: their share is 1 minus the sum of the others.

    Args:
      ordered: (n,), n >= 1, sorted.

    Examples:
      >>> shares = log10_histogram(np.array([0.0, 1e-3, 1.1e-3, 1.0]))
      >>> [(HISTOGRAM_EDGES[i], share) for i, share in enumerate(shares) if share]
      [(-3.0, 0.5), (0.0, 0.25)]
    """
    inner = np.searchsorted(ordered, 10.0 ** np.array(HISTOGRAM_EDGES[1:-1]))
    places = np.concatenate([[np.searchsorted(ordered, 0, "right")], inner, [ordered.size]])
    return (np.diff(places) / ordered.size).tolist()


def log10_histograms(before: np.ndarray, after: np.ndarray) -> dict[str, list[float]]:
    """`log10_histogram` of the sorted values before and after training, (n,) each, with its ``edges``."""
    shares = {"before": log10_histogram(before), "after": log10_histogram(after)}
    return {"edges": list(HISTOGRAM_EDGES), **shares}


def selected(tree: Any, mask: Any) -> dict[str, np.ndarray]:
    """The tensors that a mask (a tree of bools) keeps, flattened, by parameter name; empty ones are left out."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    keep = jax.tree.leaves(mask)
    kept = ((path, x) for (path, x), keeps in zip(leaves, keep, strict=True) if keeps and x.size)
    return {parameter_name(path): np.asarray(x).ravel() for path, x in kept}
