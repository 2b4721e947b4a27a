from . import peft as peft
from .bart import Bart as Bart
from .config import EncoderConfig as EncoderConfig
from .encoders.table import (
    encoder_config as encoder_config,
    read_encoder_config as read_encoder_config,
)
from .generation import (
    generate as generate,
    make_generate_step as make_generate_step,
)
from .generation_config import GenerationConfig as GenerationConfig
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
from .seq2seq import from_pretrained_seq2seq as from_pretrained_seq2seq
from .seq2seq_config import (
    BartConfig as BartConfig,
    T5Config as T5Config,
)
from .sequence_classifier import SequenceClassifier as SequenceClassifier
from .sources import checkpoint_folder as checkpoint_folder
from .t5 import T5 as T5
from .tokenizer import load_tokenizer as load_tokenizer
from .vocabulary import resize_vocabulary as resize_vocabulary
