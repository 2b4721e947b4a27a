"""AdaLoRA's rank allocation: sets the singular values of the least important triplets of all adapters to zero."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pats_jax import trees
from pats_jax.trees import check_number

PARTS = ("lora_A", "lora_B", "lora_E")
_EXPECTED = "a number of steps >= 0"


class AdaLoraState(NamedTuple):
    """State of `adalora_allocation`.

    Attributes:
      count: t, the number of updates so far, () int32.
      sensitivity: S_t, a tree like params, float32; None outside adapters.
      uncertainty: U_t, a tree like params, float32; None outside adapters.
      kept: which triplets the last allocation kept, bools at each E; None elsewhere.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it, which hides tuple.count
    sensitivity: Any
    uncertainty: Any
    kept: Any


def adalora_allocation(
    target_r: int,
    total_steps: int,
    *,
    tinit: int = 0,
    tfinal: int = 0,
    delta_t: int = 1,
    beta1: float | jax.Array = 0.85,
    beta2: float | jax.Array = 0.85,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaLoRA: lowers the rank of adapters ``x A diag(E) B`` during training, where it matters least.

    A triplet is a column of A, a row of B and their entry of E. With the parameters theta after the update and the raw
    gradient g, at step t = 1, 2, ..., for all entries of A, B and E::

        I = |theta * g|
        S = beta1 * S + (1 - beta1) * I                     S starts from 0
        U = beta2 * U + (1 - beta2) * |I - S|               U starts from 0
        score of a triplet = S U of E + mean of S U in its column of A + mean of S U in its row of B
        budget = floor((b_0 - b_1) * (1 - (t - tinit) / (T - tfinal - tinit))^3 + b_1)
                 b_0 all triplets, b_1 = target_r * number of matrices, T = ``total_steps``

    At every step t that ``delta_t`` divides, tinit < t < T - tfinal, and at t = T - tfinal, E becomes exactly 0 in all
    triplets but the ``budget`` ones that score highest in ALL matrices together; of equal scores at the boundary, all
    are dropped. Until the next allocation a dropped E may grow again. After T - tfinal the selection stays, and E is 0
    outside it at every step; S and U stay from T - tfinal on. The rule is that of the authors' code and of the library
    PEFT (*code*), which also take theta after the update and g before it. *Ours*: t counts updates from 1, so that
    ``tinit`` and ``tfinal`` count steps; and an I that is not finite leaves S and U unchanged.

    Adapters are found by the names ``lora_A`` (..., inputs, r), ``lora_B`` (..., r, outputs) and ``lora_E`` (..., r) in
    the paths of the parameters, as `pats_jax.models.peft.AdaLoraConfig` has them. Leading axes, such as that of stacked
    layers, hold further matrices.

    Goes last in a chain, after noise too, inside `with_raw_gradient`. The loss needs `with_orthogonality`.

    Args:
      target_r: mean rank of a matrix in the end, at least 1.
      total_steps: number of optimizer steps, T.
      tinit: number of first steps without allocation.
      tfinal: number of last steps with a fixed selection.
      delta_t: number of steps between allocations, at least 1.
      beta1: decay of the moving average of sensitivity, in (0, 1).
      beta2: decay of the moving average of uncertainty, in (0, 1).

    Returns:
      A gradient transformation whose ``update`` requires params and the extra argument ``grad``.

    Raises:
      ValueError: if an argument is out of its range (traced numbers are not checked), or tinit and tfinal leave no step
        for the allocation; from ``init``, if there are no adapters, or their ranks are below ``target_r`` on average;
        from ``update`` without params or ``grad``.

    Examples:
      >>> import jax.numpy as jnp, optax, pats_jax
      >>> params = {"lora_A": jnp.ones((3, 2)), "lora_E": jnp.zeros(2), "lora_B": jnp.ones((2, 3))}
      >>> grads = {"lora_A": jnp.zeros((3, 2)), "lora_E": jnp.array([1.0, 2.0]), "lora_B": jnp.zeros((2, 3))}
      >>> tx = pats_jax.with_raw_gradient(optax.chain(optax.sgd(0.1), pats_jax.adalora_allocation(1, total_steps=2)))
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params["lora_E"])
      [ 0.  -0.2]
      [ 0.  -0.4]

    References:
      Zhang et al., `Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning
      <https://arxiv.org/abs/2303.10512>`_, 2023
    """
    _check(target_r, total_steps, tinit, tfinal, delta_t)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        check_number(name, beta, lambda x: 0 < x < 1, "in (0, 1)")
    end = total_steps - tfinal
    measured = max(end, 2)  # S and U stay from this step on

    def init(params):
        return _first_state(params, target_r)

    def update(updates, state, params=None, *, grad=None, **extra_args):
        del extra_args
        trees.require_raw_gradient("adalora_allocation", params, grad)
        triplets, leaves, treedef = _flattened(updates)
        columns = (params, grad, state.sensitivity, state.uncertainty, state.kept)
        thetas, grads, sensitivity, uncertainty, kept = (treedef.flatten_up_to(tree) for tree in columns)
        count = optax.safe_increment(state.count)
        for place in {place for triplet in triplets for place in triplet.values()}:
            theta = (thetas[place] + leaves[place]).astype(thetas[place].dtype)
            new = _moved(sensitivity[place], uncertainty[place], trees.saliency(theta, grads[place]), beta1, beta2)
            old = sensitivity[place], uncertainty[place]
            sensitivity[place], uncertainty[place] = (
                jnp.where(count < measured, a, b) for a, b in zip(new, old, strict=True)
            )
        scores = [_scores(triplet, sensitivity, uncertainty) for triplet in triplets]
        budget = _budget(count, sum(s.size for s in scores), target_r * _count_matrices(scores), tinit, end)
        allocates = (count > tinit) & (count <= end) & ((count % delta_t == 0) | (count == end))
        for triplet, chosen in zip(triplets, _best(scores, budget), strict=True):
            place = triplet["lora_E"]
            kept[place] = jnp.where(allocates, chosen, kept[place])
            dropped = (allocates | (count > end)) & ~kept[place]
            leaves[place] = jnp.where(dropped, -thetas[place], leaves[place]).astype(leaves[place].dtype)
        sensitivity, uncertainty, kept = (treedef.unflatten(tree) for tree in (sensitivity, uncertainty, kept))
        return treedef.unflatten(leaves), AdaLoraState(count, sensitivity, uncertainty, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def find_triplets(tree: Any) -> list[dict[str, int]]:
    """The adapters of AdaLoRA in a tree.

    Args:
      tree: a tree of parameters; optax.MaskedNode counts as a leaf.

    Returns:
      For each adapter, name in `PARTS` -> place of the leaf, counted as `jax.tree.leaves` does.

    Raises:
      ValueError: if an adapter has an E, but no A or no B.
    """
    found: dict[tuple[str, ...], dict[str, int]] = {}
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=trees.is_masked)
    for place, (path, leaf) in enumerate(leaves):
        names = [trees.entry_name(entry) for entry in path]
        part = next((name for name in names if name in PARTS), None)
        if part is not None and not trees.is_masked(leaf):
            found.setdefault(tuple(names[: names.index(part)]), {})[part] = place
    triplets = {layer: parts for layer, parts in found.items() if "lora_E" in parts}
    for layer, parts in triplets.items():
        lacking = next((name for name in PARTS if name not in parts), None)
        if lacking:
            raise ValueError(f"{'.'.join(layer)} has lora_E, but no {lacking}")
    return list(triplets.values())


def _first_state(params, target_r):
    """The state before the first step, in which all triplets are kept."""
    triplets, leaves, treedef = _flattened(params)
    _check_ranks(triplets, leaves, target_r)
    places = {place for triplet in triplets for place in triplet.values()}
    values = {triplet["lora_E"] for triplet in triplets}

    def held(chosen, make):
        def hold(place, leaf):
            return leaf if trees.is_masked(leaf) else make(leaf) if place in chosen else None

        return treedef.unflatten(hold(place, leaf) for place, leaf in enumerate(leaves))

    def zeros(leaf):
        return jnp.zeros_like(leaf, jnp.float32)

    return AdaLoraState(
        count=jnp.zeros([], jnp.int32),
        sensitivity=held(places, zeros),
        uncertainty=held(places, zeros),
        kept=held(values, lambda leaf: jnp.ones_like(leaf, bool)),
    )


def _flattened(tree):
    leaves, treedef = jax.tree.flatten(tree, is_leaf=trees.is_masked)
    return find_triplets(tree), leaves, treedef


def _check(target_r, total_steps, tinit, tfinal, delta_t):
    check_number("target_r", target_r, lambda x: x >= 1, "at least 1")
    check_number("tinit", tinit, lambda x: x >= 0, _EXPECTED)
    check_number("tfinal", tfinal, lambda x: x >= 0, _EXPECTED)
    check_number("delta_t", delta_t, lambda x: x >= 1, "at least 1")
    if tinit + tfinal >= total_steps:
        raise ValueError(f"tinit={tinit} and tfinal={tfinal} leave none of {total_steps} steps for the allocation")


def _check_ranks(triplets, leaves, target_r):
    """Raises ValueError if there is nothing to allocate, or more than there is."""
    if not triplets:
        raise ValueError("adalora_allocation: no parameters named lora_A, lora_B and lora_E")
    for triplet in triplets:
        a, b, e = (leaves[triplet[name]] for name in PARTS)
        if not (a.shape[:-2] == b.shape[:-2] == e.shape[:-1] and a.shape[-1:] == b.shape[-2:-1] == e.shape[-1:]):
            found = f"{a.shape}, {b.shape} and {e.shape}"
            raise ValueError(f"adalora_allocation: shapes {found} are not (inputs, r), (r, outputs) and (r,)")
    values = [leaves[triplet["lora_E"]] for triplet in triplets]
    ranks, matrices = sum(e.size for e in values), _count_matrices(values)
    if target_r * matrices > ranks:
        raise ValueError(f"adalora_allocation: target_r={target_r} is above the mean rank {ranks / matrices:g}")


def _count_matrices(values):
    return sum(int(np.prod(e.shape[:-1])) for e in values)


def _moved(sensitivity, uncertainty, saliency, beta1, beta2):
    """S and U after a step."""
    sensitivity = trees.moving_average(sensitivity, saliency, beta1)
    return sensitivity, trees.moving_average(uncertainty, jnp.abs(saliency - sensitivity), beta2)


def _scores(triplet, sensitivity, uncertainty):
    """The scores of the triplets of a leaf, (..., r)."""
    a, b, e = (sensitivity[triplet[name]] * uncertainty[triplet[name]] for name in PARTS)
    return e + (jnp.mean(a, axis=-2) + jnp.mean(b, axis=-1))


def _budget(count, first, last, tinit, end):
    """The number of triplets to keep at a step, () int32.

    The steps at which it falls are found in float64, where rounding cannot move them.
    """
    steps = np.arange(tinit + 1, end + 1)
    share = 1 - (steps - tinit) / (end - tinit)
    budgets = ((first - last) * share**3 + last).astype(np.int64)
    falls = np.repeat(steps, -np.diff(budgets, prepend=first)).astype(np.int32)
    return first - jnp.sum(falls <= count, dtype=jnp.int32)


def _best(scores, budget):
    """Bools like the scores: which are above the highest score that the budget leaves out."""
    ordered = jnp.sort(jnp.concatenate([s.ravel() for s in scores]))
    left_out = ordered.size - budget
    threshold = jnp.where(left_out > 0, ordered[jnp.maximum(left_out - 1, 0)], -1.0)
    return [s > threshold for s in scores]
