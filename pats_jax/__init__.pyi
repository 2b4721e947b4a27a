from . import data as data, models as models, random as random
from .companions.adalora import adalora_allocation as adalora_allocation
from .companions.child_tuning import (
    child_tuning_d as child_tuning_d,
    child_tuning_f as child_tuning_f,
    fisher_mask as fisher_mask,
)
from .companions.dps import (
    dps_dense as dps_dense,
    dps_mix as dps_mix,
)
from .companions.freeze_unselected import freeze_unselected as freeze_unselected
from .companions.l2_sp import l2_sp as l2_sp
from .companions.lora_plus import lora_plus as lora_plus
from .companions.mixout import mixout as mixout
from .companions.noisy_tune import noisy_tune as noisy_tune
from .companions.perturbed import perturbed as perturbed
from .companions.rose import rose as rose
from .companions.sage import scale_by_sage as scale_by_sage
from .companions.sam import (
    asam as asam,
    sam as sam,
)
from .companions.sift import sift as sift
from .errors import InputError as InputError
from .objectives import (
    Objective as Objective,
    View as View,
    hype as hype,
    lnsr as lnsr,
    neftune as neftune,
    r3f as r3f,
    r_drop as r_drop,
    smart as smart,
    with_objectives as with_objectives,
    with_orthogonality as with_orthogonality,
)
from .programs.classifier import TextClassifier as TextClassifier, TextRegressor as TextRegressor
from .train_state import (
    TrainState as TrainState,
    label_counts as label_counts,
    make_loss_fn as make_loss_fn,
    make_predict_step as make_predict_step,
    make_seq2seq_loss_fn as make_seq2seq_loss_fn,
    make_train_step as make_train_step,
)
from .transforms import (
    PatsNoiseState as PatsNoiseState,
    pats as pats,
    pats_noise as pats_noise,
    sensitivity as sensitivity,
    with_raw_gradient as with_raw_gradient,
)
from .trees import forward_params as forward_params

__version__: str
