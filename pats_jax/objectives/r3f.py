"""R3F: stability under random noise on the word embeddings."""

import jax
import jax.numpy as jnp

from pats_jax.objectives.divergences import symmetric_kl
from pats_jax.objectives.objective import Objective, Step, Term, check_positive, check_weight
from pats_jax.trees import is_plainly


def r3f(lam: float | jax.Array = 1.0, eps: float | jax.Array = 1e-5) -> Objective:
    r"""R3F: predictions should not change when the word embeddings get a little random noise.

    ::

        z ~ U(-eps, eps) for each entry;   q = softmax(f(stop_gradient(x) + z))
        loss = task_loss + lam * mean over rows of J(p, q)

    The rule is that of the authors' code (*code*): KL divergences are summed over classes and averaged over the batch,
    gradients pass through both p and q, the noisy pass starts from detached embeddings, each pass draws its own
    dropout, and regression has no regulariser. It makes two forward passes (one for regression).

    Args:
      lam: weight of the regulariser, >= 0.
      eps: half the width of the noise, > 0, in units of the embeddings' entries. In bfloat16, 1e-5 is lost in rounding.

    Raises:
      ValueError: if lam < 0 or eps <= 0 (traced numbers are not checked).

    References:
      Aghajanyan et al., `Better Fine-Tuning by Reducing Representational Collapse <https://arxiv.org/abs/2008.03156>`_,
      2021
    """
    check_weight("lam", lam)
    check_positive("eps", eps)

    def term(step: Step, key: jax.Array) -> Term:
        if step.regression or is_plainly(lam, 0):
            return Term(jnp.zeros(len(step.logits)))
        noise_key, dropout_key = jax.random.split(key)
        embeddings = jax.lax.stop_gradient(step.embed())
        noise = jax.random.uniform(noise_key, embeddings.shape, embeddings.dtype, -eps, eps)
        noised = step.apply(step.params, dropout_key, inputs_embeds=embeddings + noise, **step.rest)
        return Term(symmetric_kl(step.logits, noised))

    return Objective("r3f", lam, term, compares_classes=True)
