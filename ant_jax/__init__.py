"""A functional trainer for JAX: pure callbacks, an immutable state, one compiled program."""

from importlib.metadata import version as _version

from ant_jax import _requirements as _requirements, callbacks as callbacks, metrics as metrics, writers as writers
from ant_jax._callback import HOOKS as HOOKS, Callback as Callback
from ant_jax._finite import NonFiniteError as NonFiniteError
from ant_jax._history import History as History
from ant_jax._host_fields import StateMismatch as StateMismatch
from ant_jax._hyperparams import Hyperparam as Hyperparam, HyperparamError as HyperparamError
from ant_jax._judging import CallbackReturnError as CallbackReturnError
from ant_jax._logs import Logs as Logs
from ant_jax._models import PureModel as PureModel, pure_functions as pure_functions
from ant_jax._precision import Precision as Precision
from ant_jax._seal import CheckpointCorrupt as CheckpointCorrupt, CheckpointError as CheckpointError
from ant_jax._state import TrainState as TrainState
from ant_jax._trainer import Trainer as Trainer
from ant_jax.data import ArrayLoader as ArrayLoader, BatchError as BatchError


__version__ = _version("ant_jax")
