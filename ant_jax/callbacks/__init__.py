"""The library's own callbacks: factories of pure functions."""

from ant_jax.callbacks._gradients import (
    clip_by_global_norm as clip_by_global_norm,
    from_optax as from_optax,
    gradient_norm as gradient_norm,
)
from ant_jax.callbacks._log_progress import log_progress as log_progress
from ant_jax.callbacks._progress_bar import progress_bar as progress_bar
from ant_jax.callbacks._stopping import early_stopping as early_stopping
from ant_jax.callbacks._weights import ema as ema
