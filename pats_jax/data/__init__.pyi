from .batches import (
    Tokens as Tokens,
)
from .batches import (
    bucket_boundaries as bucket_boundaries,
)
from .batches import (
    epoch_plan as epoch_plan,
)
from .batches import (
    eval_batches as eval_batches,
)
from .batches import (
    fill_batch as fill_batch,
)
from .batches import (
    padding_share as padding_share,
)
from .batches import (
    tokenize as tokenize,
)
from .batches import (
    train_batches as train_batches,
)
from .builtin import write_builtin as write_builtin
from .builtin_gym.files import write_builtin_gym as write_builtin_gym
from .few_shot import FewShotTask as FewShotTask
from .gym import load_gym as load_gym
from .low_resource import stratified_rows as stratified_rows
from .out_of_domain import load_out_of_domain as load_out_of_domain
from .partitions import (
    load_partition as load_partition,
)
from .partitions import (
    load_partitioned_gym as load_partitioned_gym,
)
from .prefetch import prefetch as prefetch
from .readers import (
    Split as Split,
)
from .readers import (
    load_files as load_files,
)
from .readers import (
    load_task as load_task,
)
from .readers import (
    read_file as read_file,
)
from .readers import (
    read_glue as read_glue,
)
from .readers import (
    read_hub as read_hub,
)
from .readers import (
    read_texts as read_texts,
)
from .tasks import (
    TASKS as TASKS,
)
from .tasks import (
    Task as Task,
)
from .tasks import (
    get_task as get_task,
)
from .tasks import (
    own_task as own_task,
)
