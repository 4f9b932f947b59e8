"""A functional trainer for JAX: pure callbacks, an immutable state, one compiled program."""

from importlib.metadata import version as _version

from ant_jax import _requirements as _requirements, callbacks as callbacks, metrics as metrics, writers as writers
from ant_jax._checkpoint.manifest import CheckpointCorrupt as CheckpointCorrupt, CheckpointError as CheckpointError
from ant_jax._data.array_loader import ArrayLoader as ArrayLoader
from ant_jax._data.batches import BatchError as BatchError
from ant_jax._finite import NonFiniteError as NonFiniteError
from ant_jax._hooks.callback import HOOKS as HOOKS, Callback as Callback
from ant_jax._hooks.returns import CallbackReturnError as CallbackReturnError
from ant_jax._logs.logs import Logs as Logs
from ant_jax._models.pure_model import PureModel as PureModel, pure_functions as pure_functions
from ant_jax._state.history import History as History
from ant_jax._state.host_fields import StateMismatch as StateMismatch
from ant_jax._state.hyperparams import Hyperparam as Hyperparam, HyperparamError as HyperparamError
from ant_jax._state.train_state import TrainState as TrainState
from ant_jax._step.precision import Precision as Precision
from ant_jax._trainer.trainer import Trainer as Trainer


__version__ = _version("ant_jax")
