from .masks import layer_mask as layer_mask
from .method import (
    Context as Context,
    Method as Method,
)
from .optimizer import (
    SENSITIVITY_BATCHES as SENSITIVITY_BATCHES,
    DropoutRates as DropoutRates,
    chosen_gradient as chosen_gradient,
    chosen_objectives as chosen_objectives,
    count_warmup_steps as count_warmup_steps,
    dropout_rates as dropout_rates,
    learning_rate_schedule as learning_rate_schedule,
    make_optimizer as make_optimizer,
    sensitivity_batches as sensitivity_batches,
    starting_params as starting_params,
    statistics as statistics,
    trainable_mask as trainable_mask,
    turns_dropout_off as turns_dropout_off,
)
from .settings import (
    AdamWSettings as AdamWSettings,
    OptimizerSettings as OptimizerSettings,
)
from .table import (
    METHODS as METHODS,
    as_table as as_table,
    get_methods as get_methods,
)
