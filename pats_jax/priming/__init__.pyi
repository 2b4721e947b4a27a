from .meta_losses import (
    ALGORITHMS as ALGORITHMS,
    adapt as adapt,
    make_meta_loss as make_meta_loss,
    maml as maml,
    multi_task as multi_task,
    reptile as reptile,
)
