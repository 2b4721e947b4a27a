from .adapters import AdapterConfig as AdapterConfig
from .bitfit import BitFitConfig as BitFitConfig
from .config import PeftConfig as PeftConfig
from .files import (
    is_peft_folder as is_peft_folder,
)
from .files import (
    load_peft as load_peft,
)
from .files import (
    load_peft_model as load_peft_model,
)
from .files import (
    save_peft as save_peft,
)
from .ia3 import Ia3Config as Ia3Config
from .lora import LoraConfig as LoraConfig
from .model import (
    KINDS as KINDS,
)
from .model import (
    PeftClassifier as PeftClassifier,
)
from .model import (
    add_peft as add_peft,
)
from .model import (
    config_of as config_of,
)
from .model import (
    count_parameters as count_parameters,
)
from .model import (
    disable as disable,
)
from .model import (
    merge as merge,
)
from .model import (
    merge_and_unload as merge_and_unload,
)
from .model import (
    trainable_mask as trainable_mask,
)
from .model import (
    unmerge as unmerge,
)
from .prefix import PrefixConfig as PrefixConfig
from .prompt import PromptConfig as PromptConfig
