"""R-Drop: agreement of two passes with different dropout."""

import jax

from pats_jax.objectives.divergences import squared_difference, symmetric_kl
from pats_jax.objectives.objective import Objective, Step, Term, check_weight


def r_drop(alpha: float | jax.Array = 1.0) -> Objective:
    r"""R-Drop: two passes with different dropout learn the task, and should agree.

    ::

        loss = (task_loss_1 + task_loss_2) / 2 + alpha * mean over rows of J(p, q) / 2
        loss = (task_loss_1 + task_loss_2) / 2 + alpha * mean over rows of (f_1(x) - f_2(x))^2     for regression

    The rule is the authors' description of their code (*readme*); gradients pass through both p and q. The mean over
    the rows, as in R3F, and the default alpha are *ours*. It makes two forward passes. Without dropout the regulariser
    is 0.

    Args:
      alpha: weight of the regulariser, >= 0.

    Raises:
      ValueError: if alpha < 0 (traced numbers are not checked).

    References:
      Liang et al., `R-Drop: Regularized Dropout for Neural Networks <https://arxiv.org/abs/2106.14448>`_, 2021
    """
    check_weight("alpha", alpha)

    def term(step: Step, key: jax.Array) -> Term:
        second = step.apply(step.params, key, **step.inputs)
        if step.regression:
            return Term(squared_difference(step.logits, second), (second,))
        return Term(symmetric_kl(step.logits, second) / 2, (second,))

    return Objective("r_drop", alpha, term, compares_classes=True)
