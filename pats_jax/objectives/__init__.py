"""Regularisers of the loss: R3F, R-Drop, SMART and LNSR; and noise in the forward pass: NEFTune and HyPe.

An `Objective` computes one number per row from the forward passes of a step; `with_objectives` adds any number of
objectives, weighted, to the task loss::

    loss_fn = with_objectives(model.apply, r3f())
    loss_fn = with_objectives(model.apply, r3f(lam=0.5), lnsr(2))   # both terms share one plain pass
    step = make_train_step(loss_fn)

A `View`, NEFTune or HyPe, changes what every forward pass reads; it adds no term and is given in the same place.

An objective or a view changes only the loss, so it works with any optimizer: PATS, DPS, Mixout and the others.

Notation: f(x) are the logits of a row with word embeddings x, p = softmax(f(x)), q is the same for a second pass, and
J(p, q) = KL(p||q) + KL(q||p) = sum over classes of (p - q) (log p - log q). Each pass draws its own dropout, except in
LNSR. The source of a rule is marked: *code* is the authors' code, *readme* and *abstract* the readme or abstract alone,
and *ours* a choice that we made because no source settles it.
"""

import lazy_loader

# The stub file beside this one lists the names; each is imported on first use. Since lazy_loader 0.6 a function keeps
# its name when the file of that name, such as r3f.py, is imported.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
