from .divergences import (
    squared_difference as squared_difference,
    symmetric_kl as symmetric_kl,
)
from .hype import hype as hype
from .lnsr import lnsr as lnsr
from .neftune import neftune as neftune
from .objective import (
    Objective as Objective,
    Step as Step,
    Term as Term,
    View as View,
    with_objectives as with_objectives,
)
from .orthogonality import with_orthogonality as with_orthogonality
from .r3f import r3f as r3f
from .r_drop import r_drop as r_drop
from .smart import smart as smart
