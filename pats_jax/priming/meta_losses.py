"""The upstream stage before few-shot fine-tuning: multi-task learning and meta-learning, as losses.

Each algorithm turns the loss of a batch of rows into the loss of a batch of tasks, whose gradient is the algorithm's
step. So `make_train_step` trains all of them, on any mesh, with any Optax chain as outer optimizer.

The arrays of a batch of tasks have additional leading axes: ``support_<name>`` (tasks, inner steps, rows, ...) for the
inner steps, and ``query_<name>`` (tasks, rows, ...) to evaluate the adapted parameters. Reptile needs no query, and
multi-task learning no support.

References:
  Priming: arXiv 2212.01032. MAML and its first-order form: Finn, Abbeel and Levine, ICML 2017, arXiv 1703.03400.
  Reptile: Nichol, Achiam and Schulman 2018, arXiv 1803.02999.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pats_jax import trees
from pats_jax.train_state import Batch, LossFn
from pats_jax.trees import check_number

ALGORITHMS = {
    "mtl": "multi-task learning: one step on rows of all tasks",
    "maml": "the loss after inner steps, differentiated through them",
    "fomaml": "the same without the second-order term",
    "reptile": "towards the parameters after inner steps",
}
SUPPORT, QUERY = "support_", "query_"


def adapt(
    loss_fn: LossFn,
    params: Any,
    batches: Batch,
    key: jax.Array,
    *,
    learning_rate: float | jax.Array,
    trainable: Any = None,
    first_order: bool = False,
    remat: bool = False,
) -> tuple[Any, jax.Array]:
    """Takes one SGD step per batch: theta <- theta - learning_rate * gradient.

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> (loss, metrics)``.
      params: the initial parameters.
      batches: arrays (steps, rows, ...).
      key: for dropout; folded with the number of the step.
      learning_rate: the learning rate of the steps.
      trainable: a tree of bools like params: which parameters to update; None: all.
      first_order: whether to treat the gradients as constants when the result is differentiated.
      remat: whether to recompute a step when it is differentiated, instead of storing its activations.

    Returns:
      The parameters after the steps, and the loss before each, (steps,) float32.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> square = lambda params, batch, key: (jnp.mean((params - batch["x"]) ** 2), {})
      >>> adapt(square, jnp.zeros(()), {"x": jnp.ones((2, 3))}, jax.random.key(0), learning_rate=0.25)
      (Array(0.75, dtype=float32), Array([1.  , 0.25], dtype=float32))
    """
    total, losses = _descend(loss_fn, params, batches, key, learning_rate, trainable, first_order, remat)
    taken, left = _partition(params, trainable)
    return trees.combine(_moved(taken, total, learning_rate), left), losses


def multi_task(loss_fn: LossFn) -> LossFn:
    """The mean over tasks of the loss on their query rows; with one task, ordinary training on it.

    Args:
      loss_fn: the loss of a batch of rows.

    Returns:
      ``meta_loss(params, batch, key) -> (loss, metrics)``, all means over the tasks.
    """
    return _mean_over_tasks(lambda params, support, query, key: loss_fn(params, query, key), QUERY)


def maml(
    loss_fn: LossFn,
    *,
    inner_learning_rate: float,
    trainable: Any = None,
    first_order: bool = False,
    remat: bool = False,
) -> LossFn:
    """The mean over tasks of L_query(theta - inner_learning_rate * grad L_support(theta)), or after several steps.

    Its gradient goes through the inner steps, second-order term included. First-order MAML (``first_order``) treats
    the gradients of the inner steps as constants, so its gradient is that of L_query at the adapted parameters.

    Args:
      loss_fn: the loss of a batch of rows.
      inner_learning_rate: the learning rate of the inner steps (plain SGD).
      trainable: a tree of bools like params: which parameters the inner steps update; None: all.
      first_order: whether to leave out the second-order term.
      remat: whether to recompute inner steps and query in the backward pass: less memory, more work.

    Returns:
      ``meta_loss(params, batch, key) -> (loss, metrics)``: metrics are those of loss_fn on the query rows, and
      ``support_loss``, the loss before the first inner step; all means over the tasks.

    Raises:
      ValueError: if inner_learning_rate is not positive; from the loss, if the batch lacks support or query arrays.
    """
    check_number("inner_learning_rate", inner_learning_rate, lambda x: x > 0, "greater than 0")

    def one_task(params, support, query, key):
        inner_key, outer_key = jax.random.split(key)
        adapted, losses = adapt(
            loss_fn,
            params,
            support,
            inner_key,
            learning_rate=inner_learning_rate,
            trainable=trainable,
            first_order=first_order,
            remat=remat,
        )
        loss, metrics = (jax.checkpoint(loss_fn) if remat else loss_fn)(adapted, query, outer_key)
        return loss, {**metrics, "support_loss": losses[0]}

    return _mean_over_tasks(one_task, SUPPORT, QUERY)


def reptile(loss_fn: LossFn, *, inner_learning_rate: float, trainable: Any = None) -> LossFn:
    """A loss whose gradient is the mean over tasks of (theta - phi) / inner_learning_rate, phi the adapted parameters.

    With SGD at a rate of epsilon * inner_learning_rate this is Reptile's step theta <- theta + epsilon (phi - theta),
    averaged over tasks; and with one inner step the gradient is that of multi-task learning on the support rows. The
    division is the authors' (their section 2): it makes the size that of a gradient, for clipping and Adam. It is
    computed as the equivalent sum of the inner gradients, because at inner rates like 1e-5, theta and phi differ by
    only a few roundings.

    Args:
      loss_fn: the loss of a batch of rows.
      inner_learning_rate: the learning rate of the inner steps (plain SGD).
      trainable: a tree of bools like params: which parameters the inner steps update; None: all.

    Returns:
      ``meta_loss(params, batch, key) -> (loss, metrics)``: the loss's value is the mean loss of the inner steps;
      ``support_loss`` is the loss before the first. The gradient with respect to other parameters is 0.

    Raises:
      ValueError: if inner_learning_rate is not greater than 0.
    """
    check_number("inner_learning_rate", inner_learning_rate, lambda x: x > 0, "greater than 0")

    def one_task(params, support, query, key):
        start = jax.lax.stop_gradient(params)
        total, losses = _descend(loss_fn, start, support, key, inner_learning_rate, trainable, first_order=True)
        taken, _ = _partition(params, trainable)
        direction = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, taken, total)))  # linear: its gradient is the total
        return jnp.mean(losses) + direction - jax.lax.stop_gradient(direction), {"support_loss": losses[0]}

    return _mean_over_tasks(one_task, SUPPORT)


def make_meta_loss(
    algorithm: str,
    loss_fn: LossFn,
    *,
    inner_learning_rate: float = 1e-5,
    trainable: Any = None,
    remat: bool = False,
) -> LossFn:
    """The loss of an algorithm of ``ALGORITHMS``; see `multi_task`, `maml` and `reptile`.

    Raises:
      ValueError: if there is no such algorithm.
    """
    makers: dict[str, Callable[..., LossFn]] = {
        "mtl": lambda loss_fn, **_: multi_task(loss_fn),
        "maml": functools.partial(maml, remat=remat),
        "fomaml": functools.partial(maml, first_order=True, remat=remat),
        "reptile": reptile,
    }
    if algorithm not in makers:
        raise ValueError(f"algorithm={algorithm!r} is not one of {', '.join(map(repr, makers))}")
    return makers[algorithm](loss_fn, inner_learning_rate=inner_learning_rate, trainable=trainable)


def _descend(loss_fn, params, batches, key, learning_rate, trainable, first_order=False, remat=False):
    """The sum of the gradients of SGD's steps from params, and the loss before each step.

    The sum is a tree like params, with None at the leaves that do not move.
    """
    taken, left = _partition(params, trainable)

    def inner_step(total, numbered):
        index, batch = numbered

        def loss_of_taken(taken):
            return loss_fn(trees.combine(taken, left), batch, jax.random.fold_in(key, index))[0]

        loss, grads = jax.value_and_grad(loss_of_taken)(_moved(taken, total, learning_rate))
        if first_order:
            loss, grads = jax.lax.stop_gradient((loss, grads))
        return jax.tree.map(jnp.add, total, grads), loss

    steps = jax.tree.leaves(batches)[0].shape[0]
    body = jax.checkpoint(inner_step) if remat else inner_step
    return jax.lax.scan(body, jax.tree.map(jnp.zeros_like, taken), (jnp.arange(steps), batches))


def _moved(taken, total, learning_rate):
    return jax.tree.map(lambda p, g: (p - learning_rate * g).astype(p.dtype), taken, total)


def _partition(params, trainable):
    return (params, None) if trainable is None else trees.partition(trainable, params)


def _mean_over_tasks(one_task, *needed):
    def meta_loss(params, batch, key):
        for prefix in needed:
            if not any(name.startswith(prefix) for name in batch):
                raise ValueError(f"the batch has no arrays named {prefix}...; it has {', '.join(batch)}")
        support, query = _part(batch, SUPPORT), _part(batch, QUERY)
        keys = jax.random.split(key, jax.tree.leaves(batch)[0].shape[0])
        loss, metrics = jax.vmap(one_task, in_axes=(None, 0, 0, 0))(params, support, query, keys)
        return jnp.mean(loss), jax.tree.map(jnp.mean, metrics)

    return meta_loss


def _part(batch, prefix):
    return {name.removeprefix(prefix): x for name, x in batch.items() if name.startswith(prefix)}
