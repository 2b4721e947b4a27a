from .adalora import AdaLoraConfig as AdaLoraConfig
from .adapted import (
    PeftBart as PeftBart,
    PeftClassifier as PeftClassifier,
    PeftT5 as PeftT5,
)
from .adapters import AdapterConfig as AdapterConfig
from .bitfit import BitFitConfig as BitFitConfig
from .config import PeftConfig as PeftConfig
from .files import (
    is_peft_folder as is_peft_folder,
    load_peft as load_peft,
    load_peft_model as load_peft_model,
    load_peft_seq2seq as load_peft_seq2seq,
    save_peft as save_peft,
)
from .ia3 import Ia3Config as Ia3Config
from .lora import LoraConfig as LoraConfig
from .model import (
    KINDS as KINDS,
    add_peft as add_peft,
    config_of as config_of,
    count_parameters as count_parameters,
    disable as disable,
    merge as merge,
    merge_and_unload as merge_and_unload,
    trainable_mask as trainable_mask,
    unmerge as unmerge,
)
from .prefix import PrefixConfig as PrefixConfig
from .prompt import PromptConfig as PromptConfig
