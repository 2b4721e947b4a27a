"""The study: does noise by sensitivity help, and at which scale? ``python -m benchmarks.study run|report``.

Fine-tunes MiniLM on small GLUE tasks over many seeds, in lanes (`pats_jax.training.lanes`): plain, with PATS at several
noise scales, and with controls that have noise of the same energy without regard to sensitivity. Then, on a GPU, come
more tasks, other forms of PATS, and other methods at their authors' settings; `grid.PARTS` has the order.
"""
