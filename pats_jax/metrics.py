"""`pats_jax.training.metrics` under its name in earlier versions."""

from pats_jax.training.metrics import (
    METRICS as METRICS,
    accuracy as accuracy,
    compute_metrics as compute_metrics,
    f1 as f1,
    macro_f1 as macro_f1,
    matthews_correlation as matthews_correlation,
    pearson as pearson,
    spearmanr as spearmanr,
)
