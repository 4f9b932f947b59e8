"""Run one hook over the callbacks: in order, checked, and with the blame where it belongs."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ant_jax._callback import (
    BATCH_HOOKS,
    GRADIENT_HOOKS,
    HOOKS,
    HOST_HOOKS,
    Callback,
    HookFn,
    checked,
    hooks_of,
    in_step,
)
from ant_jax._logs import Logs
from ant_jax._state import TrainState, scalar, strong
from ant_jax._trees import PyTree, describe, differences, in_lines


class CallbackReturnError(TypeError):
    """A hook returned something else than what went in, in the same order; the message says what and which hook."""


class Events:
    """The callbacks of a trainer, resolved once into the functions that each hook calls.

    Args:
        callbacks: in the order in which they run.
        trainer: what traced hooks are given as ``trainer``.

    Attributes:
        callbacks: the same, as a tuple.
        device_names: the callbacks whose memory lives on the device.
        watchers: the host callbacks that have batch hooks, each with those hooks by name.
    """

    def __init__(self, callbacks: Iterable[Callback], trainer: Any):
        self.callbacks = checked(callbacks)
        self.device_names = frozenset(callback.name for callback in self.callbacks if in_step(callback))
        self._trainer = trainer
        self._in_step: dict[str, list[tuple[Callback, HookFn]]] = {name: [] for name in HOOKS}
        self._outside: dict[str, list[tuple[Callback, HookFn]]] = {name: [] for name in HOOKS}
        for callback in self.callbacks:
            for name, function in hooks_of(callback).items():
                inside = name in GRADIENT_HOOKS or (name in BATCH_HOOKS and callback.traced)
                if callback.traced and not inside and name not in HOST_HOOKS:
                    function = _Compiled(name, function, trainer, self.device_names)
                (self._in_step if inside else self._outside)[name].append((callback, function))
        self.watchers: list[tuple[Callback, dict[str, HookFn]]] = []
        for callback in self.callbacks:
            hooks = {name: hook for name in BATCH_HOOKS for owner, hook in self._outside[name] if owner is callback}
            if hooks:
                self.watchers.append((callback, hooks))

    def step_hook(self, name: str, batch_idx: chex.Array, state: TrainState, *values: Any) -> tuple[Any, ...]:
        """Run a hook inside the step, over its traced callbacks.

        Args:
            name: the hook.
            batch_idx: int32 scalar.
            state: without host fields.
            *values: the gradients, for a hook that has them, and the logs.

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
    ) -> tuple[TrainState, Mapping[str, Any]]:
        """Run a hook between launches, over all callbacks that have it.

        Args:
            name: the hook.
            lead: the epoch or the exception; ``None`` for a hook that has no such argument.
            trainer: passed on.
            state: with its host fields.
            logs: what the first callback is given.

        Returns:
            The state and the logs as the last callback left them.
        """
        logs = Logs(logs)
        for callback, function in self._outside[name]:
            state, logs = _call(callback, name, function, lead, trainer, (state, logs), self.device_names)
        return state, logs

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
        given = (state, logs)
        state, logs = _call(callback, name, hook, batch_idx, trainer, given, self.device_names, watch_assignment)
        return state, logs

    def tell(self, error: BaseException, trainer: Any, state: TrainState) -> None:
        """Run ``on_exception``; a callback that fails at it hides neither the error nor the other callbacks' turn."""
        for callback, function in self._outside["on_exception"]:
            try:
                state, _ = _call(
                    callback, "on_exception", function, error, trainer, (state, Logs({})), self.device_names
                )
            except Exception as second:
                error.add_note(f"on_exception of callback {callback.name!r} failed too: {second!r}")

    def has(self, name: str) -> bool:
        """Whether any callback has this hook outside the step."""
        return bool(self._outside[name])


def initial_memories(callbacks: Iterable[Callback], state: TrainState) -> dict[str, Any]:
    """Make every callback's own memory, by name; what a step's hook must reach becomes device arrays."""
    memories: dict[str, Any] = {}
    for callback in callbacks:
        try:
            memory = callback.init(state)
        except Exception as error:
            error.add_note(f"in init of callback {callback.name!r}")
            raise
        if memory is not None:
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
        values = {name: value for name, value in logs.items() if _is_number(value)}
        lead = [scalar(epoch) for epoch in lead]
        changed, stop, published = self._compiled(treedef, lead, leaves, values)
        leaves = [changed.get(str(i), leaf) for i, leaf in enumerate(leaves)]
        stop = bool(state.stop) or (stop is not None and bool(stop))
        after: TrainState = jax.tree.unflatten(treedef, leaves)
        memories = {**state.callback_states, **after.callback_states}
        return after.replace(callback_states=memories, host=state.host, stop=stop), {**logs, **published}

    def _changes(
        self, treedef: Any, lead: list[Any], leaves: list[Any], values: dict[str, Any]
    ) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        stop = jnp.bool_(False)
        given = (jax.tree.unflatten(treedef, leaves).replace(stop=stop), Logs(values))
        after, logs = _judged(self._name, given, self._function(*lead, self._trainer, *given))
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
        before = jax.tree.leaves(given[:-1]) if watch_assignment else None
        arguments = (trainer, *given) if HOOKS[name].lead is None else (lead, trainer, *given)
        result = function(*arguments)
        if before is not None:
            _refuse_assignment(name, before, jax.tree.leaves(given[:-1]))
        return _judged(name, given, result, device_names)
    except Exception as error:
        error.add_note(_blame(callback, name, lead, given[0]))
        if isinstance(error, _BRANCHED):
            error.add_note(
                "A traced hook is compiled once for all steps, so Python can neither branch on a value that is known "
                "only when it runs nor turn it into a number. Instead of `if x > 0: a else: b` write "
                "jnp.where(x > 0, a, b) or jax.lax.cond; instead of `if done: state = state.request_stop()` write "
                "state.request_stop(when=done); or, for another hook than on_backward_end and on_before_update, make "
                "it a host callback (traced=False)."
            )
        raise


def _refuse_assignment(name: str, before: list[Any], after: list[Any]) -> None:
    """Raise if a hook has assigned to a container that it was given, which would go unseen, or half seen in a trace."""
    if len(after) != len(before) or not all(map(operator.is_, after, before)):
        raise CallbackReturnError(
            f"{name} changed the state or the gradients in place; they are values: make a new tree, for example "
            f"{{**grads, 'bias': ...}} or state.replace(params=...), and return it"
        )


def _blame(callback: Callback, name: str, lead: Any, state: TrainState) -> str:
    if state.host is None:
        return f"in {name} of callback {callback.name!r}, while tracing the compiled step"
    where = f"epoch {lead if HOOKS[name].lead == 'epoch' else state.host.epoch}"
    if HOOKS[name].lead == "batch_idx":
        where += f", batch {lead}"
    return f"in {name} of callback {callback.name!r} ({where})"


def _judged(
    name: str, given: tuple[Any, ...], result: Any, device_names: frozenset[str] | None = None
) -> tuple[Any, ...]:
    """Return ``result`` if it has the form of what was ``given``; raise CallbackReturnError, naming the fault, if not.

    Args:
        name: the hook.
        given: what went in: state, logs, and the gradients between them if the hook has them.
        result: what came out.
        device_names: the callbacks whose memory must keep its form; ``None``, inside compiled code, means all.
    """
    if type(result) is tuple and len(result) == len(given) and all(map(operator.is_, result, given)):
        return result
    values = HOOKS[name].values
    expected = ", ".join(values)
    if result is None:
        raise CallbackReturnError(f"{name} returned None instead of {expected}; did you forget `return {expected}`?")
    if not isinstance(result, tuple) or len(result) != len(values):
        got = f"{len(result)} values" if isinstance(result, tuple) else _kind(result)
        raise CallbackReturnError(f"{name} returned {got} instead of the {len(values)} values {expected}")
    state, logs = result[0], result[-1]
    if not isinstance(state, TrainState) or not isinstance(logs, Mapping) or isinstance(result[-2], Logs):
        got = ", ".join(map(_kind, result))
        raise CallbackReturnError(f"{name} returned ({got}) where ({expected}) belongs")
    state = _judged_state(name, given[0], state, device_names)
    logs = _judged_logs(name, given[-1], logs)
    if len(values) == 2:
        return state, logs
    grads = result[1]
    if grads is not given[1]:
        _refuse_changes(name, "grads", given[1], grads)
        grads = jax.tree.map(strong, grads)
    return state, grads, logs


def _kind(value: Any) -> str:
    if isinstance(value, TrainState):
        return "state"
    if isinstance(value, Logs):
        return "logs"
    return describe(value)


def _judged_state(name: str, old: TrainState, new: TrainState, device_names: frozenset[str] | None) -> TrainState:
    if new is old:
        return new
    if new.host is not old.host:
        raise CallbackReturnError(
            f"{name} changed the state's epoch, batch_idx or history; those are the trainer's. To end the run early "
            f"return state.request_stop(), logs"
        )
    if old.host is None and new.key is not old.key:
        raise CallbackReturnError(
            f"{name} replaced state.key inside the compiled step, where it never changes; draw from "
            f"state.random_key(name)"
        )
    updates: dict[str, Any] = {}
    for field in ("step", "params", "model_state", "opt_state", "key", "accumulator", "loss_scale", "log_sums"):
        before, after = getattr(old, field), getattr(new, field)
        if after is not before:
            updates[field] = _judged_tree(name, f"state.{field}", before, after, traced=old.host is None)
    before, after = old.callback_states, new.callback_states
    if after is not before:
        if before.keys() != after.keys():
            raise CallbackReturnError(
                f"{name} changed who has a memory: expected callback_states of {sorted(before)}, got {sorted(after)}"
            )
        updates["callback_states"] = {
            owner: _judged_tree(name, f"state.callback_states[{owner!r}]", memory, after[owner], old.host is None)
            if device_names is None or owner in device_names
            else after[owner]  # a host callback's memory is its own affair
            for owner, memory in before.items()
        }
    return new.replace(**updates) if updates else new


def _judged_tree(name: str, what: str, before: PyTree, after: PyTree, traced: bool) -> PyTree:
    """Refuse another structure, shape or dtype; give every new leaf the type and the place of the one it replaces."""
    if after is before:
        return after
    _refuse_changes(name, what, before, after)
    if traced:
        return jax.tree.map(strong, after)
    return jax.tree.map(lambda old, new: new if new is old else strong(new, old), before, after)


def _refuse_changes(name: str, what: str, before: PyTree, after: PyTree) -> None:
    lines = differences(before, after)
    if lines:
        raise CallbackReturnError(f"{name} returned {what} of another structure, shape or dtype:{in_lines(lines)}")


def _judged_logs(name: str, given: Logs, returned: Mapping[str, Any]) -> Logs:
    if returned is given:
        return given
    dropped = [log for log in given if log not in returned]
    if dropped:
        raise CallbackReturnError(
            f"{name} dropped the log {dropped[0]!r}; to publish a value return {{**logs, 'name': value}}"
        )
    for log, value in returned.items():
        unchanged = log in given and value is given[log]
        if not isinstance(log, str) or not (unchanged or _is_number(value)):
            raise CallbackReturnError(
                f"{name} published the log {log!r} as {describe(value)}; a log is a number or an array under a string"
            )
    return Logs(returned, given._window)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool | int | float):
        return True
    return isinstance(value, jax.Array | np.ndarray | np.generic) and (
        value.dtype == bool or jnp.issubdtype(value.dtype, jnp.number)
    )
