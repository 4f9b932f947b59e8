"""What ``repr`` says of a state and of a trainer: a summary that fits on a screen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.core import Tracer

from ant_jax._trees import describe, named_leaves


# Parameters that a summary lists, one a line.
MOST_LINES = 20


def summary_of_state(state: Any) -> str:
    """Say where a state is, and list its parameters; waits for the device where it still computes the step."""
    params = named_leaves(state.params)
    lines = [f"  {path or 'params'}: {describe(leaf)} ({_size(leaf):,})" for path, leaf in params.items()]
    if len(lines) > MOST_LINES:
        rest = list(params.values())[MOST_LINES:]
        lines = [*lines[:MOST_LINES], f"  and {len(rest)} more ({sum(map(_size, rest)):,})"]
    place, callback_states = _place(state)
    names = ("params", "model_state", "opt_state", "accumulator")
    sizes = {name: _bytes(getattr(state, name)) for name in names} | {"callback_states": _bytes(callback_states)}
    held = ", ".join(f"{name} {_in_units(size)}" for name, size in sizes.items() if size)
    memories = ", ".join(callback_states) or "none"
    return "\n".join(
        [
            f"TrainState({place})",
            f"parameters: {sum(map(_size, params.values())):,}",
            *lines,
            f"bytes: {_in_units(sum(sizes.values()))}" + (f" ({held})" if held else ""),
            f"memories of callbacks: {memories}",
        ]
    )


def summary_of_trainer(name: str, fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Name a trainer's arguments, one a line, but for those that have their default.

    Args:
        name: of its class.
        fields: the arguments by name.
        defaults: of those that have one.
    """
    shown = {field: value for field, value in fields.items() if field not in defaults or value is not defaults[field]}
    lines = [f"    {field}={_shown(field, value)}," for field, value in shown.items()]
    return "\n".join([f"{name}(", *lines, ")"])


def _shown(field: str, value: Any) -> str:
    if field == "callbacks":
        return f"[{', '.join(callback.name for callback in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(map(str, value))}}}"
    if type(value) is tuple:
        return f"({', '.join(_shown('', item) for item in value)})"
    if isinstance(value, str | int | float | None):
        return repr(value)
    names = (getattr(value, "__qualname__", None), type(value).__qualname__)
    return next(name for name in names if name).replace(".<locals>", "")


def _place(state: Any) -> tuple[str, Mapping[str, Any]]:
    """Say where a state is; return its callbacks' memories, too, which are lost where the place is."""
    try:
        host, memories = state.host, state.callback_states
    except (ValueError, RuntimeError):  # several states in one, or with a leaf that was computed with or deleted
        return "of no known epoch", {}
    if host is None:
        return f"step={state.step}, in compiled code" if isinstance(state.step, Tracer) else "without epoch", memories
    stop = ", stop requested" if _known(state.stop) and bool(state.stop) else ""
    step = state.total_steps if _known(state.step) and _known(state.cycle) else "?"
    return f"step={step}, epoch={host.epoch}, batch_idx={host.batch_idx}{stop}", memories


def _known(leaf: Any) -> bool:
    """Whether a leaf has a number: a deleted array, or one that is only described, has none."""
    if isinstance(leaf, Tracer | jax.ShapeDtypeStruct):
        return False
    return not (isinstance(leaf, jax.Array) and leaf.is_deleted())


def _size(leaf: Any) -> int:
    return math.prod(getattr(leaf, "shape", ()))


def _bytes(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(_size(leaf) * leaf.dtype.itemsize for leaf in leaves if hasattr(leaf, "dtype"))


def _in_units(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
