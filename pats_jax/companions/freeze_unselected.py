"""`freeze_unselected`: a wrapper that freezes the weights which DPS or Child-Tuning D leaves out."""

import jax.numpy as jnp
import optax

from pats_jax import trees
from pats_jax.companions.child_tuning import ChildTuningDState
from pats_jax.companions.dps import DpsDenseState, DpsMixState
from pats_jax.companions.ranking import selected_entries

_SELECTING = (DpsDenseState, DpsMixState, ChildTuningDState)


def freeze_unselected(
    inner: optax.GradientTransformation | optax.MultiSteps,
) -> optax.GradientTransformationExtraArgs:
    r"""Freezes the weights that a subnetwork leaves out: they do not change at all.

    In the authors' code of DPS and Child-Tuning D, the gradient of these weights is zero, but momentum and weight decay
    still move them. This wrapper (*ours*) sets their final update to zero, whatever follows the subnetwork in the
    chain. It applies to `child_tuning_d` and to stage II of `dps_dense` and `dps_mix`. `child_tuning_f` and Mixout draw
    anew at each step and leave no weight out for longer; `sift` itself freezes the entries that it leaves out.

    It is a wrapper because the subnetwork comes first in the chain, and the transforms that move the weights come after
    it.

    Args:
      inner: the whole optimizer, which contains `dps_dense`, `dps_mix` or `child_tuning_d`.

    Returns:
      A gradient transformation; its state is ``inner``'s.

    Raises:
      TypeError: if ``inner`` is not an optimizer.
      ValueError: from ``init``, if ``inner`` contains no such transform.

    Examples:
      >>> import jax.numpy as jnp, optax, pats_jax
      >>> params = {"w": jnp.array([1.0, 1.0])}
      >>> subnetwork = pats_jax.child_tuning_d({"w": jnp.array([True, False])})
      >>> tx = optax.chain(subnetwork, optax.adamw(0.5, weight_decay=0.1))
      >>> for optimizer in (tx, pats_jax.freeze_unselected(tx)):
      ...     updates, _ = optimizer.update({"w": jnp.array([1.0, 1.0])}, optimizer.init(params), params)
      ...     print(updates["w"].round(3))
      [-0.55 -0.05]
      [-0.55  0.  ]
    """
    inner = trees.as_extra_args_transform("freeze_unselected", inner)

    def init(params):
        state = inner.init(params)
        if not trees.find_states(state, *_SELECTING):
            raise ValueError(
                "freeze_unselected: nothing inside selects parameters; chain dps_dense, dps_mix or child_tuning_d"
            )
        return state

    def update(updates, state, params=None, **extra_args):
        updates, state = inner.update(updates, state, params, **extra_args)
        for selecting in trees.find_states(state, *_SELECTING):
            updates = trees.replace_held(lambda u, kept: jnp.where(kept, u, 0), updates, _selection(selecting))
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def _selection(state):
    """The entries whose gradient the last update kept, for a state of one of the kinds in ``_SELECTING``."""
    return state.keep if isinstance(state, ChildTuningDState) else selected_entries(state.scores, state.threshold)
