"""The library's own callbacks: factories of pure functions."""

from ant_jax.callbacks._batch_size import batch_size_schedule as batch_size_schedule
from ant_jax.callbacks._checkpoint import checkpoint as checkpoint
from ant_jax.callbacks._combinators import chain as chain, every as every, tolerate as tolerate, when as when
from ant_jax.callbacks._freeze import freeze as freeze
from ant_jax.callbacks._gradients import (
    adaptive_grad_clip as adaptive_grad_clip,
    centralize as centralize,
    clip_by_global_norm as clip_by_global_norm,
    clip_by_value as clip_by_value,
    from_optax as from_optax,
    gradient_noise as gradient_noise,
    zero_nans as zero_nans,
)
from ant_jax.callbacks._guards import (
    NonFiniteError as NonFiniteError,
    roll_back as roll_back,
    skip_nonfinite as skip_nonfinite,
    terminate_on_nan as terminate_on_nan,
)
from ant_jax.callbacks._log_progress import log_progress as log_progress
from ant_jax.callbacks._log_to import log_to as log_to
from ant_jax.callbacks._logs import (
    csv_log as csv_log,
    json_log as json_log,
    mlflow as mlflow,
    tensorboard as tensorboard,
    wandb as wandb,
)
from ant_jax.callbacks._measures import memory as memory, throughput as throughput
from ant_jax.callbacks._plot import plot_history as plot_history
from ant_jax.callbacks._profiling import profile as profile, profile_steps as profile_steps
from ant_jax.callbacks._progress_bar import progress_bar as progress_bar
from ant_jax.callbacks._schedules import (
    learning_rate_schedule as learning_rate_schedule,
    log_hyperparams as log_hyperparams,
    reduce_on_plateau as reduce_on_plateau,
)
from ant_jax.callbacks._statistics import gradient_norm as gradient_norm, gradient_statistics as gradient_statistics
from ant_jax.callbacks._stopping import early_stopping as early_stopping, stop_at as stop_at, time_limit as time_limit
from ant_jax.callbacks._weights import ema as ema, swa as swa
