"""SMART: stability under noise on the word embeddings in the direction that changes the prediction most."""

import jax
import jax.numpy as jnp

from pats_jax.objectives.divergences import squared_difference, symmetric_kl
from pats_jax.objectives.objective import Objective, Step, Term, check_positive, check_weight
from pats_jax.trees import is_plainly


def smart(
    alpha: float | jax.Array = 1.0,
    step_size: float | jax.Array = 1e-5,
    noise_std: float | jax.Array = 1e-5,
    eps: float | jax.Array = 1e-6,
) -> Objective:
    r"""SMART: predictions should not change when the word embeddings move in the direction that changes them most.

    ::

        l(x, x') = J(softmax(f(x)), softmax(f(x')));   (f(x) - f(x'))^2 for regression
        d_0 ~ N(0, noise_std^2) for each entry
        g    = gradient of l(x, x + d_0) with respect to d_0
        d    = d_0 + step_size * g / (max |g| + eps)      max over the entries of each token's embedding
        loss = task_loss + alpha * mean over rows of l(x, x + d)

    Default values, l, the norm and what is held fixed follow the authors' code (*code*). d is a constant. In the loss,
    each KL treats the distribution that it averages over as a constant, so its gradient is p - q at the logits of x and
    q - p at those of x + d; gradients pass through x on both sides. Each pass draws its own dropout. *Ours*: the
    normalised step is added to d_0, and g is the gradient of l itself. In the authors' code, the earlier of two
    releases drops d_0, and the later divides d_0 + step_size * g by its own largest entry, so d has size 1 whatever the
    step; g is the gradient of a one-sided KL or of an approximation. It makes three forward passes, and besides the
    loss's backward pass one to the embeddings alone. The paper's second part, Bregman proximal point optimisation, is
    not implemented.

    Args:
      alpha: weight of the regulariser, >= 0.
      step_size: largest entry of the step, > 0, in units of the embeddings' entries. In bfloat16, 1e-5 is lost in
        rounding.
      noise_std: standard deviation of d_0, > 0, in the same units; at d_0 = 0 the gradient would be 0.
      eps: a number > 0 that avoids division by 0 where the gradient is 0.

    Raises:
      ValueError: if alpha < 0, or another number is not positive (traced numbers are not checked).

    References:
      Jiang et al., `SMART: Robust and Efficient Fine-Tuning for Pre-trained Natural Language Models through Principled
      Regularized Optimization <https://arxiv.org/abs/1911.03437>`_, 2020
    """
    check_weight("alpha", alpha)
    for name, value in {"step_size": step_size, "noise_std": noise_std, "eps": eps}.items():
        check_positive(name, value)

    def worst_shift(step: Step, embeddings: jax.Array, key: jax.Array) -> jax.Array:
        noise_key, dropout_key = jax.random.split(key)
        # Held fixed before the inner gradient, so that the outer one neither sees nor keeps anything of it.
        params, embeddings, logits = jax.lax.stop_gradient((step.params, embeddings, step.logits))
        difference = squared_difference if step.regression else symmetric_kl

        def change(shift):
            moved = step.apply(params, dropout_key, inputs_embeds=embeddings + shift, **step.rest)
            return jnp.sum(difference(logits, moved))  # rows do not meet: each has its own gradient

        start = noise_std * jax.random.normal(noise_key, embeddings.shape, embeddings.dtype)
        gradient = jax.grad(change)(start)
        return start + step_size * gradient / (jnp.max(jnp.abs(gradient), axis=-1, keepdims=True) + eps)

    def term(step: Step, key: jax.Array) -> Term:
        if is_plainly(alpha, 0):
            return Term(jnp.zeros(len(step.logits)))
        shift_key, dropout_key = jax.random.split(key)
        embeddings = step.embed()
        shifted = embeddings + worst_shift(step, embeddings, shift_key)
        logits = step.apply(step.params, dropout_key, inputs_embeds=shifted, **step.rest)
        difference = squared_difference if step.regression else _symmetric_kl_of_fixed_targets
        return Term(difference(step.logits, logits))

    return Objective("smart", alpha, term, compares_classes=True)


def _symmetric_kl_of_fixed_targets(logits, other):
    """J(p, q), differentiated as KL(fixed p||q) + KL(fixed q||p): its gradients at the logits are p - q and q - p."""
    p, q = jax.nn.log_softmax(logits.astype(jnp.float32)), jax.nn.log_softmax(other.astype(jnp.float32))
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(p) - jnp.exp(q)) * (p - q), axis=-1)
