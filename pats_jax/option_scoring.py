"""`pats_jax.priming.option_scoring` under its name in earlier versions."""

from pats_jax.priming.option_scoring import (
    choose as choose,
    encode_rows as encode_rows,
    get_head as get_head,
    load_scorer as load_scorer,
    make_option_loss as make_option_loss,
    option_scores as option_scores,
    trainable_mask as trainable_mask,
)
