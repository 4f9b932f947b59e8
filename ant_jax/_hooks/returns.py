"""Judge what a hook returns: the same things that went in, in the same order and of the same form."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax._hooks.callback import HOOKS
from ant_jax._logs.logs import Logs
from ant_jax._state.leaves import strong
from ant_jax._state.train_state import DATA_FIELDS, TrainState
from ant_jax._trees import PyTree, describe, differences, in_lines, refuse_unsortable


class CallbackReturnError(TypeError):
    """A hook returned something else than what went in, in the same order; the message says what and which hook."""


def refuse_assignment(name: str, before: list[Any], after: list[Any]) -> None:
    """Raise if a hook has assigned to a container that it was given, which would go unseen, or half seen in a trace."""
    if len(after) != len(before) or not all(map(operator.is_, after, before)):
        raise CallbackReturnError(
            f"{name} changed the state or the gradients in place; they are values: make a new tree, for example "
            f"{{**grads, 'bias': ...}} or state.replace(params=...), and return it"
        )


def check_return(
    name: str, given: tuple[Any, ...], result: Any, device_names: frozenset[str] | None = None
) -> tuple[Any, ...]:
    """Return ``result`` if it has the form of what was ``given``; raise CallbackReturnError, naming the fault, if not.

    Args:
        name: the hook.
        given: what went in: state, logs, and the gradients or updates between them if the hook has them.
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
    state = _check_state(name, given[0], state, device_names)
    logs = _check_logs(name, given[-1], logs)
    if len(values) == 2:
        return state, logs
    tree = result[1]
    if tree is not given[1]:
        _refuse_changes(name, values[1], given[1], tree)
        tree = jax.tree.map(strong, tree)
    return state, tree, logs


def _kind(value: Any) -> str:
    if isinstance(value, TrainState):
        return "state"
    if isinstance(value, Logs):
        return "logs"
    return describe(value)


def _check_state(name: str, old: TrainState, new: TrainState, device_names: frozenset[str] | None) -> TrainState:
    if new is old:
        return new
    if new.host is not old.host and not (new.host and old.host and old.host.differs_only_in_requests(new.host)):
        raise CallbackReturnError(
            f"{name} changed the state's epoch, batch_idx or history; those are the trainer's. To end the run early "
            f"return state.request_stop(), logs; for other batches return state.request_batch_size(...), logs"
        )
    if old.host is None and new.key is not old.key:
        raise CallbackReturnError(
            f"{name} replaced state.key inside the compiled step, where it never changes; draw from "
            f"state.random_key(name)"
        )
    updates: dict[str, Any] = {}
    for field in DATA_FIELDS:
        before, after = getattr(old, field), getattr(new, field)
        if after is not before:
            updates[field] = _check_tree(name, f"state.{field}", before, after, traced=old.host is None)
    before, after = old.callback_states, new.callback_states
    if after is not before:
        if before.keys() != after.keys():
            raise CallbackReturnError(
                f"{name} changed who has a memory: expected callback_states of {sorted(before)}, got {sorted(after)}"
            )
        for owner, memory in after.items():
            if memory is not before[owner]:
                refuse_unsortable(f"{name} returned state.callback_states[{owner!r}], which", memory)
        updates["callback_states"] = {
            owner: _check_tree(name, f"state.callback_states[{owner!r}]", memory, after[owner], old.host is None)
            if device_names is None or owner in device_names
            else after[owner]  # a host callback's memory is its own affair
            for owner, memory in before.items()
        }
    return new.replace(**updates) if updates else new


def _check_tree(name: str, what: str, before: PyTree, after: PyTree, traced: bool) -> PyTree:
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


def _check_logs(name: str, given: Mapping[str, Any], returned: Mapping[str, Any]) -> Mapping[str, Any]:
    if returned is given:
        return given
    dropped = [log for log in given if log not in returned]
    if dropped:
        raise CallbackReturnError(
            f"{name} dropped the log {dropped[0]!r}; to publish a value return {{**logs, 'name': value}}"
        )
    for log, value in returned.items():
        unchanged = log in given and value is given[log]
        if not isinstance(log, str) or not (unchanged or is_number(value)):
            raise CallbackReturnError(
                f"{name} published the log {log!r} as {describe(value)}; a log is a number or an array under a string"
            )
    return (given if isinstance(given, Logs) else Logs(given)).changed_to(returned)  # by hand it may be any mapping


def is_number(value: Any) -> bool:
    """Whether a value can be a log: a number or an array of numbers."""
    if isinstance(value, bool | int | float):
        return True
    return isinstance(value, jax.Array | np.ndarray | np.generic) and (
        value.dtype == bool or jnp.issubdtype(value.dtype, jnp.number)
    )
