"""Run one hook over the callbacks: in order, checked, and with the blame where it belongs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax._hooks.callback import (
    BATCH_HOOKS,
    HOOKS,
    HOST_HOOKS,
    STEP_HOOKS,
    Callback,
    HookFn,
    check_callbacks,
    hooks_of,
    in_order_of_init,
    in_step,
    place_of,
)
from ant_jax._hooks.observed import ObservedState, call_observer, observed
from ant_jax._hooks.returns import check_return, is_number, refuse_assignment
from ant_jax._logs.logs import Logs
from ant_jax._state.leaves import scalar, strong
from ant_jax._state.train_state import TrainState
from ant_jax._trees import refuse_unsortable


class CallbackList:
    """The callbacks of a trainer, resolved once into the functions that each hook calls.

    Args:
        callbacks: in the order in which they run.
        trainer: what traced hooks are given as ``trainer``.

    Attributes:
        callbacks: the same, as a tuple.
        device_names: the callbacks whose memory lives on the device.
        watchers: the host callbacks that have batch hooks, each with those hooks by name, but for observers.
        observers: the observers that have batch hooks, in the same way.
        observe: what makes of a state what an observer sees of it.
        seconds: how long each callback's hooks have taken on the host so far, by the callback's name; of the run alone,
            where they are those of a run.
    """

    def __init__(self, callbacks: Iterable[Callback], trainer: Any):
        self.callbacks = check_callbacks(callbacks)
        self.device_names = frozenset(callback.name for callback in self.callbacks if in_step(callback))
        self.seconds = {callback.name: 0.0 for callback in self.callbacks}
        self._trainer = trainer
        self._in_step: dict[str, list[tuple[Callback, HookFn]]] = {name: [] for name in HOOKS}
        self._outside: dict[str, list[tuple[Callback, HookFn]]] = {name: [] for name in HOOKS}
        for callback in self.callbacks:
            for name, function in hooks_of(callback).items():
                inside = name in STEP_HOOKS or (name in BATCH_HOOKS and callback.traced)
                if callback.traced and not inside and name not in HOST_HOOKS:
                    function = _Compiled(name, function, trainer, self.device_names)
                (self._in_step if inside else self._outside)[name].append((callback, function))
        self.watchers: list[tuple[Callback, dict[str, HookFn]]] = []
        self.observers: list[tuple[Callback, dict[str, HookFn]]] = []
        self.observe: Callable[[TrainState], ObservedState] = observed
        for callback in self.callbacks:
            hooks = {name: hook for name in BATCH_HOOKS for owner, hook in self._outside[name] if owner is callback}
            if hooks:
                (self.observers if callback.observer else self.watchers).append((callback, hooks))

    def of_run(self) -> CallbackList:
        """Return the same callbacks for one run, which counts ``seconds`` of its own."""
        events = copy.copy(self)
        events.seconds = dict.fromkeys(self.seconds, 0.0)
        return events

    def step_hook(self, name: str, batch_idx: jax.Array, state: TrainState, *values: Any) -> tuple[Any, ...]:
        """Run a hook inside the step, over its traced callbacks.

        Args:
            name: the hook.
            batch_idx: int32 scalar.
            state: without host fields.
            *values: the gradients or updates, for a hook that has them, and the logs.

        Returns:
            ``state, *values`` as the last callback left them.
        """
        for callback, function in self._in_step[name]:
            state, *rest = _call(callback, name, function, batch_idx, self._trainer, (state, *values))
            values = tuple(rest)
        return state, *values

    def host_hook(
        self,
        name: str,
        lead: Any,
        trainer: Any,
        state: TrainState,
        logs: Mapping[str, Any],
        only: Container[str] | None = None,
    ) -> tuple[TrainState, Mapping[str, Any]]:
        """Run a hook between launches, over all callbacks that have it.

        Args:
            name: the hook.
            lead: the epoch or the exception; ``None`` for a hook that has no such argument.
            trainer: passed on.
            state: with its host fields.
            logs: what the first callback is given.
            only: of the callbacks of these names; ``None``: of all.

        Returns:
            The state and the logs as the last callback left them.
        """
        given = (state, Logs(logs))
        for callback, function in self._outside[name]:
            if only is None or callback.name in only:
                given = self._on_host(callback, name, function, lead, trainer, given)
        return given

    def batch_hook(
        self,
        callback: Callback,
        name: str,
        hook: HookFn,
        batch_idx: int,
        trainer: Any,
        state: TrainState,
        logs: Logs,
        watch_assignment: bool,
    ) -> tuple[TrainState, Logs]:
        """Run a batch hook of one host callback; arguments and returns as in ``host_hook``.

        Watching for changes in place flattens the state twice, which a hook at every batch would feel; so it may be
        left out.
        """
        return self._on_host(callback, name, hook, batch_idx, trainer, (state, logs), watch_assignment)

    def observer_hook(
        self, callback: Callback, name: str, hook: HookFn, lead: Any, trainer: Any, state: ObservedState, logs: Logs
    ) -> None:
        """Run a hook of one observer; arguments as in ``host_hook``."""
        began = time.perf_counter()
        try:
            call_observer(callback, name, hook, lead, trainer, state, logs)
        finally:
            self.seconds[callback.name] += time.perf_counter() - began

    def tell(self, error: BaseException, trainer: Any, state: TrainState) -> None:
        """Run ``on_exception``; a callback that fails at it hides neither the error nor the other callbacks' turn."""
        for callback, function in self._outside["on_exception"]:
            try:
                state, _ = self._on_host(callback, "on_exception", function, error, trainer, (state, Logs({})))
            except Exception as second:
                error.add_note(f"on_exception of callback {callback.name!r} failed too: {second!r}")

    def has(self, name: str) -> bool:
        """Whether any callback has this hook outside the step."""
        return bool(self._outside[name])

    def runs_on_host(self, name: str, only: Container[str] | None = None) -> bool:
        """Whether this hook of any callback, or of any among those of these names, is not compiled."""
        return any(
            not isinstance(function, _Compiled) and (only is None or callback.name in only)
            for callback, function in self._outside[name]
        )

    def _on_host(
        self,
        callback: Callback,
        name: str,
        function: HookFn,
        lead: Any,
        trainer: Any,
        given: tuple[TrainState, Logs],
        watch_assignment: bool = True,
    ) -> tuple[TrainState, Logs]:
        if callback.observer:
            self.observer_hook(callback, name, function, lead, trainer, self.observe(given[0]), given[1])
            return given
        began = time.perf_counter()
        try:
            state, logs = _call(callback, name, function, lead, trainer, given, self.device_names, watch_assignment)
            return state, logs
        finally:
            self.seconds[callback.name] += time.perf_counter() - began


def initial_memories(callbacks: Iterable[Callback], state: TrainState) -> dict[str, Any]:
    """Make every callback's own memory, by name; what a step's hook must reach becomes device arrays.

    Each ``init`` is given the state with the memories that are made before its own.
    """
    memories: dict[str, Any] = {}
    for callback in in_order_of_init(callbacks):
        try:
            memory = callback.init(state.replace(callback_states=dict(memories)))
        except Exception as error:
            error.add_note(f"in init of callback {callback.name!r}")
            raise
        if memory is not None:
            refuse_unsortable(f"what init of callback {callback.name!r} returned", memory)
            memories[callback.name] = _on_device(callback, memory) if in_step(callback) else memory
    return memories


def _on_device(callback: Callback, memory: Any) -> Any:
    try:
        return jax.tree.map(strong, memory)
    except TypeError as error:
        raise TypeError(
            f"callback {callback.name!r} has hooks inside the compiled step, so its memory must be arrays and numbers: "
            f"{error}"
        ) from None


class _Compiled:
    """An epoch or run hook of a traced callback: pure JAX, compiled on its own, run between launches.

    Only what the hook changes comes back from the compiled function; the rest of the state is passed by untouched.
    """

    def __init__(self, name: str, function: HookFn, trainer: Any, device_names: frozenset[str]):
        self._name, self._function, self._trainer, self._device_names = name, function, trainer, device_names
        self._compiled = jax.jit(self._changes, static_argnums=0)

    def __call__(self, *arguments: Any) -> tuple[TrainState, Mapping[str, Any]]:
        *lead, _, state, logs = arguments
        memories = {name: memory for name, memory in state.callback_states.items() if name in self._device_names}
        leaves, treedef = jax.tree.flatten(state.replace(callback_states=memories, host=None, stop=None))
        values = {name: value for name, value in logs.items() if is_number(value)}
        lead = [scalar(epoch) for epoch in lead]
        changed, stop, published = self._compiled(treedef, lead, leaves, values)
        leaves = [changed.get(str(i), leaf) for i, leaf in enumerate(leaves)]
        stop = np.bool_(bool(state.stop) or (stop is not None and bool(stop)))
        after: TrainState = jax.tree.unflatten(treedef, leaves)
        memories = {**state.callback_states, **after.callback_states}
        return after.replace(callback_states=memories, host=state.host, stop=stop), {**logs, **published}

    def _changes(
        self, treedef: Any, lead: list[Any], leaves: list[Any], values: dict[str, Any]
    ) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        stop = jnp.bool_(False)
        given = (jax.tree.unflatten(treedef, leaves).replace(stop=stop), Logs(values))
        after, logs = check_return(self._name, given, self._function(*lead, self._trainer, *given))
        new_leaves = jax.tree.leaves(after.replace(stop=None))
        changed = {str(i): new for i, (old, new) in enumerate(zip(leaves, new_leaves, strict=True)) if new is not old}
        published = {name: value for name, value in logs.items() if value is not values.get(name)}
        return changed, None if after.stop is stop else after.stop, published


# What JAX raises where Python asks for the value of something that is being traced.
_BRANCHED = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def _call(
    callback: Callback,
    name: str,
    function: HookFn,
    lead: Any,
    trainer: Any,
    given: tuple[Any, ...],
    device_names: frozenset[str] | None = None,
    watch_assignment: bool = True,
) -> tuple[Any, ...]:
    """Call one hook of one callback, judge what it returns, and add the blame to what it raises."""
    try:
        before = _leaves(given) if watch_assignment else None
        arguments = (trainer, *given) if HOOKS[name].lead is None else (lead, trainer, *given)
        result = function(*arguments)
        if before is not None:
            refuse_assignment(name, before, _leaves(given))
        return check_return(name, given, result, device_names)
    except Exception as error:
        error.add_note(_blame(callback, name, lead, given[0]))
        if isinstance(error, _BRANCHED):
            error.add_note(
                "A traced hook is compiled once for all steps, so Python can neither branch on a value that is known "
                "only when it runs nor turn it into a number. Instead of `if x > 0: a else: b` write "
                "jnp.where(x > 0, a, b) or jax.lax.cond; instead of `if done: state = state.request_stop()` write "
                "state.request_stop(when=done); or, for a hook that has neither gradients nor updates, make it a host "
                "callback (traced=False)."
            )
        raise


def _leaves(given: tuple[Any, ...]) -> list[Any]:
    """The leaves of what a hook is given but the logs."""
    state, *trees, _ = given
    return jax.tree.leaves((state.values(), trees))


def _blame(callback: Callback, name: str, lead: Any, state: TrainState) -> str:
    if state.host is None:
        return f"in {name} of callback {callback.name!r}, while tracing the compiled step"
    return place_of(callback, name, lead, state.epoch)
