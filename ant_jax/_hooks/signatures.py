"""The signatures of hooks, for type checkers: what a hook is given comes back, in the same order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias, TypedDict

from ant_jax._logs.logs import Logs
from ant_jax._state.train_state import TrainState
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


class Hooks(TypedDict, total=False):
    """The hooks of a callback, by name."""

    on_train_begin: RunHook | None
    on_epoch_begin: IndexedHook | None
    on_batch_begin: IndexedHook | None
    on_backward_end: TreeHook | None
    on_before_update: TreeHook | None
    on_before_apply: TreeHook | None
    on_batch_end: IndexedHook | None
    on_evaluate_begin: RunHook | None
    on_evaluate_end: RunHook | None
    on_epoch_end: IndexedHook | None
    on_checkpoint: RunHook | None
    on_train_end: RunHook | None
    on_exception: ExceptionHook | None


class ObserverHooks(TypedDict, total=False):
    """The hooks of an observer, which may return nothing."""

    on_train_begin: Callable[..., Any] | None
    on_epoch_begin: Callable[..., Any] | None
    on_batch_begin: Callable[..., Any] | None
    on_batch_end: Callable[..., Any] | None
    on_evaluate_begin: Callable[..., Any] | None
    on_evaluate_end: Callable[..., Any] | None
    on_epoch_end: Callable[..., Any] | None
    on_checkpoint: Callable[..., Any] | None
    on_train_end: Callable[..., Any] | None
    on_exception: Callable[..., Any] | None
