"""The signatures of hooks, for type checkers: what a hook is given comes back, in the same order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

from ant_jax._logs import Logs
from ant_jax._state import TrainState
from ant_jax._trees import PyTree


LogsOut: TypeAlias = Mapping[str, Any]


class RunHook(Protocol):
    """``on_train_begin``, ``on_train_end``, ``on_evaluate_begin``, ``on_evaluate_end`` and ``on_checkpoint``."""

    def __call__(self, trainer: Any, state: TrainState, logs: Logs, /) -> tuple[TrainState, LogsOut]: ...


class IndexedHook(Protocol):
    """``on_epoch_begin`` and ``on_epoch_end``, ``on_batch_begin`` and ``on_batch_end``."""

    def __call__(self, index: Any, trainer: Any, state: TrainState, logs: Logs, /) -> tuple[TrainState, LogsOut]: ...


class TreeHook(Protocol):
    """``on_backward_end`` and ``on_before_update`` with gradients, ``on_before_apply`` with updates."""

    def __call__(
        self, batch_idx: Any, trainer: Any, state: TrainState, tree: PyTree, logs: Logs, /
    ) -> tuple[TrainState, PyTree, LogsOut]: ...


class ExceptionHook(Protocol):
    """``on_exception``."""

    def __call__(
        self, exception: BaseException, trainer: Any, state: TrainState, logs: Logs, /
    ) -> tuple[TrainState, LogsOut]: ...
