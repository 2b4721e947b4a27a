from . import data as data
from . import models as models
from . import random as random
from .anchors import (
    forward_params as forward_params,
)
from .anchors import (
    l2_sp as l2_sp,
)
from .anchors import (
    mixout as mixout,
)
from .errors import InputError as InputError
from .objectives import (
    Objective as Objective,
)
from .objectives import (
    lnsr as lnsr,
)
from .objectives import (
    r3f as r3f,
)
from .objectives import (
    r_drop as r_drop,
)
from .objectives import (
    smart as smart,
)
from .objectives import (
    with_objectives as with_objectives,
)
from .sparse_updates import sift as sift
from .subnetworks import (
    child_tuning_d as child_tuning_d,
)
from .subnetworks import (
    child_tuning_f as child_tuning_f,
)
from .subnetworks import (
    dps_dense as dps_dense,
)
from .subnetworks import (
    dps_mix as dps_mix,
)
from .subnetworks import (
    fisher_mask as fisher_mask,
)
from .subnetworks import (
    freeze_unselected as freeze_unselected,
)
from .train_state import (
    TrainState as TrainState,
)
from .train_state import (
    make_loss_fn as make_loss_fn,
)
from .train_state import (
    make_predict_step as make_predict_step,
)
from .train_state import (
    make_train_step as make_train_step,
)
from .transforms import (
    PatsNoiseState as PatsNoiseState,
)
from .transforms import (
    noisy_tune as noisy_tune,
)
from .transforms import (
    pats as pats,
)
from .transforms import (
    pats_noise as pats_noise,
)
from .transforms import (
    scale_by_sage as scale_by_sage,
)
from .transforms import (
    sensitivity as sensitivity,
)
from .transforms import (
    with_raw_gradient as with_raw_gradient,
)

__version__: str
