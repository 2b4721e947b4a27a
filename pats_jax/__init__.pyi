from . import data as data, models as models, random as random
from .companions.anchors import (
    l2_sp as l2_sp,
    mixout as mixout,
)
from .companions.sparse_updates import sift as sift
from .companions.subnetworks import (
    child_tuning_d as child_tuning_d,
    child_tuning_f as child_tuning_f,
    dps_dense as dps_dense,
    dps_mix as dps_mix,
    fisher_mask as fisher_mask,
    freeze_unselected as freeze_unselected,
)
from .errors import InputError as InputError
from .objectives import (
    Objective as Objective,
    lnsr as lnsr,
    r3f as r3f,
    r_drop as r_drop,
    smart as smart,
    with_objectives as with_objectives,
)
from .train_state import (
    TrainState as TrainState,
    make_loss_fn as make_loss_fn,
    make_predict_step as make_predict_step,
    make_train_step as make_train_step,
)
from .transforms import (
    PatsNoiseState as PatsNoiseState,
    noisy_tune as noisy_tune,
    pats as pats,
    pats_noise as pats_noise,
    scale_by_sage as scale_by_sage,
    sensitivity as sensitivity,
    with_raw_gradient as with_raw_gradient,
)
from .trees import forward_params as forward_params

__version__: str
