from .batches import (
    Tokens as Tokens,
    bucket_boundaries as bucket_boundaries,
    epoch_plan as epoch_plan,
    eval_batches as eval_batches,
    fill_batch as fill_batch,
    padding_share as padding_share,
    tokenize as tokenize,
    train_batches as train_batches,
)
from .builtin import write_builtin as write_builtin
from .builtin_gym.files import write_builtin_gym as write_builtin_gym
from .columns import Columns as Columns
from .few_shot import FewShotTask as FewShotTask
from .gym import load_gym as load_gym
from .low_resource import stratified_rows as stratified_rows
from .out_of_domain import load_out_of_domain as load_out_of_domain
from .own_files import (
    load_files as load_files,
    load_set as load_set,
    read_file as read_file,
    read_texts as read_texts,
)
from .partitions import (
    load_partition as load_partition,
    load_partitioned_gym as load_partitioned_gym,
)
from .prefetch import prefetch as prefetch
from .readers import (
    Split as Split,
    load_task as load_task,
    read_glue as read_glue,
    read_hub as read_hub,
)
from .tasks import (
    TASKS as TASKS,
    Task as Task,
    get_task as get_task,
    own_task as own_task,
)
