"""Regexes of the parameters that methods act on: the same parts of BERT, T5 and BART."""

LAYERS = r"(encoder|decoder)\.(layers?|block)\."
MATRICES = rf"{LAYERS}.*\.kernel$"
ATTENTION = (
    r"(attention\.(self\.(query|key|value)|output\.dense)|(Self|EncDec)Attention\.[qkvo]"
    r"|(self|encoder)_attn\.([qkv]|out)_proj)\.kernel$"
)
ENCODERS_MATRICES = r"encoder\.layer\..*\.kernel$"  # what earlier versions wrote for MATRICES
