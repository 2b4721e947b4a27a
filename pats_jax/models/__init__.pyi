from . import peft as peft
from .bert import SequenceClassifier as SequenceClassifier
from .config import EncoderConfig as EncoderConfig
from .layout import (
    has_stacked_layers as has_stacked_layers,
    layer_axis as layer_axis,
    stack_layers as stack_layers,
    unstack_layers as unstack_layers,
)
from .masked_lm import (
    load_mlm_head as load_mlm_head,
    mlm_logits as mlm_logits,
)
from .pretrained import (
    from_pretrained as from_pretrained,
    lacks_pooler as lacks_pooler,
    new_layers as new_layers,
    save_pretrained as save_pretrained,
)
from .sources import checkpoint_folder as checkpoint_folder
from .tokenizer import load_tokenizer as load_tokenizer
