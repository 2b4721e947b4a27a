"""LNSR: stability of the upper layers under noise on the output of one layer."""

import jax
import jax.numpy as jnp

from pats_jax.objectives.objective import Objective, Step, Term, check_positive, check_weight
from pats_jax.trees import is_plainly


def lnsr(layer: int, lam: float | jax.Array = 1.0, noise_std: float | jax.Array = 0.05) -> Objective:
    r"""LNSR: noise on the output of one layer should change the outputs of the layers above only a little.

    ::

        h_r: output of layer r, (batch, length, hidden);   k = ``layer``;   z ~ N(0, noise_std^2) for each entry
        h'_k = h_k + z;   h'_r for r > k: the output of layer r with h'_k in place of h_k
        change = sum over layers r > k of the mean over tokens and units of (h'_r - h_r)^2
        loss   = task_loss + lam * mean over rows of change

    The paper's rule (*abstract*): Gaussian noise enters one layer, and the change above is penalised. *Ours*: the
    squared difference, its mean over units and tokens (without padding), the default values, the same dropout in both
    passes, so that they differ only by the noise, and gradients through both. With the model's ``first_token_only``,
    the last layer counts only by its first token. Layers up to k are computed once.

    Args:
      layer: k, at least 0; 0 is the output of the embeddings. The model must have a layer above.
      lam: weight of the regulariser, >= 0.
      noise_std: standard deviation of the noise, > 0, in units of the hidden states' entries, which are around 1 after
        LayerNorm.

    Raises:
      ValueError: if layer or lam is negative or noise_std is not positive (traced numbers are not checked); from the
        loss, if the model has no layer above k.

    References:
      Hua et al., `Noise Stability Regularization for Improving BERT Fine-tuning <https://arxiv.org/abs/2107.04835>`_,
      2021, and `Fine-tuning Pre-trained Language Models with Noise Stability Regularization
      <https://arxiv.org/abs/2206.05658>`_, 2022
    """
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise ValueError(f"layer={layer!r} must be a number of a layer, from 0 (the embeddings)")
    check_weight("lam", lam)
    check_positive("noise_std", noise_std)

    def term(step: Step, key: jax.Array) -> Term:
        if is_plainly(lam, 0):
            return Term(jnp.zeros(len(step.logits)))
        if layer + 1 >= len(step.hidden_states):
            raise ValueError(f"lnsr: layer={layer} has no layer above, of {len(step.hidden_states) - 1}")
        hidden = step.hidden_states[layer]
        noised = hidden + noise_std * jax.random.normal(key, hidden.shape, hidden.dtype)
        _, above = step.apply(
            step.params, step.key, continue_from=(layer, noised), output_hidden_states=True, **step.rest
        )
        mask = step.inputs.get("attention_mask", jnp.ones(hidden.shape[:2]))
        pairs = zip(above[1:], step.hidden_states[layer + 1 :], strict=True)
        changes = [_mean_over_tokens(jnp.square(a.astype(jnp.float32) - b), mask) for a, b in pairs]
        return Term(sum(changes, start=jnp.zeros(len(hidden))))

    return Objective("lnsr", lam, term, needs_hidden_states=not is_plainly(lam, 0))


def _mean_over_tokens(values, mask):
    """Means over units and the mask's tokens, (batch,), from (batch, length, units) or (batch, 1, units)."""
    mask = mask[:, : values.shape[1], None]
    return jnp.sum(values * mask, axis=(1, 2)) / jnp.maximum(values.shape[2] * jnp.sum(mask, axis=(1, 2)), 1)
