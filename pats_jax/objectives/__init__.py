"""Regularisers of the loss: what R3F, R-Drop, SMART and LNSR add to it.

An `Objective` gives one number a row from the forward passes of a step; `with_objectives` adds any of them, weighted,
to the task loss::

    loss_fn = with_objectives(model.apply, r3f())
    loss_fn = with_objectives(model.apply, r3f(lam=0.5), lnsr(2))   # both terms, one plain forward pass for the two
    step = make_train_step(loss_fn)

An objective changes the loss and nothing else, so it goes with any optimizer: PATS, DPS, Mixout and the others.

Notation: f(x) are the logits of a row for its word embeddings x, p = softmax(f(x)), q the same of a second pass, and
J(p, q) = KL(p||q) + KL(q||p) = sum over classes of (p - q) (log p - log q). Every pass draws its own dropout, but for
LNSR's.
"""

import lazy_loader

# The stub file beside this one lists the names; each is imported on first use. Since lazy_loader 0.6 a function keeps
# its name when the file of that name, such as r3f.py, is imported.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
