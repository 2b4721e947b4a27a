"""Regexes of the parameters that methods act on: the same parts of every encoder, T5 and BART."""

from pats_jax.models.config import HEAD_PARTS

HEAD = rf"^({'|'.join(HEAD_PARTS)})\."
LAYERS = r"(encoder|decoder|transformer|model)\.(layers?|block)\."
MATRICES = rf"{LAYERS}.*\.kernel$"
ATTENTION = (
    r"(attention\.(self\.(query|key|value)(_proj)?|output\.dense|(q|k|v|out)_lin|attn\.[qkvo])|attn\.(Wqkv|Wo)"
    r"|(Self|EncDec)Attention\.[qkvo]|(self|encoder)_attn\.([qkv]|out)_proj)\.kernel$"
)
# what earlier versions wrote for MATRICES
EARLIER_MATRICES = (r"encoder\.layer\..*\.kernel$", r"(encoder|decoder)\.(layers?|block)\..*\.kernel$")
