"""A run goes on from what a checkpoint holds."""

from __future__ import annotations

import logging
import os
import pathlib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np

from ant_jax._checkpoint.lock import DirectoryLock
from ant_jax._checkpoint.manifest import CheckpointCorrupt
from ant_jax._checkpoint.reading import directory_of, path_of, read, read_arrays, set_aside, steps_in
from ant_jax._checkpoint.snapshot import Path, Snapshot, fill_state, parameters_of, with_keys
from ant_jax._engine.state_spec import StateSpec
from ant_jax._hooks.callback_list import initial_memories
from ant_jax._state.host_fields import StateMismatch
from ant_jax._state.leaves import strong
from ant_jax._state.train_state import TrainState
from ant_jax._trees import describe, in_lines, named_leaves


_logger = logging.getLogger("ant_jax")


def find_newest_sound(directory: str | os.PathLike[str]) -> Snapshot:
    """Read the newest checkpoint that is sound; rename those that are damaged, and say so (logger ``ant_jax``).

    A damaged one that stayed would be in the way of those that a run saves from the sound one on.

    Raises:
        FileNotFoundError: there is none at all.
        CheckpointCorrupt: all are damaged; none is renamed.
        CheckpointError: a run is saving into the directory.
    """
    directory = directory_of(directory)
    damaged: list[CheckpointCorrupt] = []
    for step in reversed(steps_in(directory)):
        try:
            snapshot = read(directory, step)
        except CheckpointCorrupt as error:
            damaged.append(error)
            continue
        if damaged:
            _set_aside(directory, damaged, step)
        return snapshot
    if not damaged:
        return read(directory)  # which says what is there
    raise CheckpointCorrupt(
        directory, damaged[0].step, f"{damaged[0].reason}{in_lines([str(error) for error in damaged[1:]])}",
        "\nThere is no sound one to go on from; to begin afresh, choose another directory",
    )  # fmt: skip


def _set_aside(directory: pathlib.Path, damaged: list[CheckpointCorrupt], sound: int) -> None:
    lock = DirectoryLock(directory)
    try:
        for error in damaged:
            renamed = set_aside(path_of(directory, error.step))
            _logger.warning("%s. It is renamed to %s, and step %d is taken instead", error, renamed.name, sound)
    finally:
        lock.release()


def restore_state(saved: Snapshot, states: StateSpec, like: TrainState | None) -> TrainState:
    """Make the state that was saved; arguments and errors as those of ``Trainer.restore``."""
    form = like
    if form is None:
        key = jax.random.key(0)
        parameters = parameters_of(saved, "params"), parameters_of(saved, "model_state")
        form = jax.eval_shape(states.without_memories, *parameters, key).replace(key=key)
    events = states.events
    state = fill_state(saved, form, events.device_names, lambda state: initial_memories(events.callbacks, state))
    states.check(state)
    return _with_hyperparams_of_code(state, states)


def _with_hyperparams_of_code(state: TrainState, states: StateSpec) -> TrainState:
    """Give the hyper-parameters that the code has changed since the run began the values that it has now.

    Those that it has not changed stay as the run left them, for a callback may have changed them on its way.
    """
    code, began = states.hyperparams(state), state.on_host().hyperparams
    changed = {name: value for name, value in code.items() if name in began and began[name] != value}
    for name, value in changed.items():
        _logger.warning(
            "restore: %s is %s in the code by now, where the run began with %s; that replaces the checkpoint's %s",
            name,
            value,
            began[name],
            np.asarray(state.hyperparams[name]).tolist(),
        )
    return states.noting_hyperparams(state.with_hyperparams(**changed), code)


def in_words(state: TrainState, saved: Snapshot) -> str:
    """Say where a run goes on: ``step 4200, epoch 3, batch 17; saved 2026-11-25T12:00:00+00:00``."""
    return f"step {state.total_steps}, epoch {state.epoch}, batch {state.batch_idx}; saved {saved.host['saved_at']}"


def with_params_of(
    state: TrainState,
    directory: str | os.PathLike[str],
    step: int | None,
    *,
    only: tuple[str, ...],
    source: str | None,
    model_state: bool,
    cast: bool,
) -> TrainState:
    """Replace parameters by those of a checkpoint; arguments and errors as those of ``Trainer.restore_params``."""
    arrays, place = _parameters_in(directory_of(directory), step, source)
    params = _replaced(state.params, arrays, place, "params", only, cast)
    if not model_state:
        return state.replace(params=params)
    has_own_place = source is None and any(keys[0] == "model_state" for keys in arrays)
    root = ("model_state",) if has_own_place else place[:-1]
    others = _replaced(state.model_state, arrays, root, "model_state", ("*",), cast)
    return state.replace(params=params, model_state=others)


def _parameters_in(directory: pathlib.Path, step: int | None, source: str | None) -> tuple[dict[Path, Any], Path]:
    """Read all arrays of a checkpoint, ours or any that Orbax wrote, and say where in them the parameters are."""
    if steps_in(directory):
        arrays = with_keys(read(directory, step))
    else:
        arrays = _foreign(directory, step)
    if source is None:
        names = {keys[0] for keys in arrays}
        return arrays, ("params",) if "params" in names else ()
    place = tuple(part for part in source.split("/") if part)
    if not any(keys[: len(place)] == place for keys in arrays):
        there = ", ".join(sorted({keys[0] for keys in arrays}))
        raise StateMismatch(f"restore_params: {directory} has nothing under source={source!r}; there are: {there}")
    return arrays, place


def _foreign(directory: pathlib.Path, step: int | None) -> dict[Path, Any]:
    """Read a checkpoint that Orbax wrote for somebody else: a checkpoint itself, or a directory of steps."""
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory} to restore from")
    if step is None and (directory / "_METADATA").exists():
        return read_arrays(directory)
    steps = {int(path.name.rpartition("_")[2]): path for path in directory.iterdir() if _is_step(path)}
    if not steps or step not in (None, *steps):
        wanted = "" if step is None else f" of step {step}"
        there = ", ".join(map(str, sorted(steps))) or "none"
        raise FileNotFoundError(f"{directory} has no checkpoint{wanted} that Orbax could read; steps there: {there}")
    path = steps[max(steps) if step is None else step]
    items = [item for item in (path, *sorted(path.iterdir())) if (item / "_METADATA").exists()]
    if len(items) != 1:
        names = ", ".join(item.name for item in items) or "none"
        raise FileNotFoundError(
            f"{path} should have one item of arrays, and has: {names}; give the path of the one to read"
        )
    return read_arrays(items[0])


def _is_step(path: pathlib.Path) -> bool:
    return path.is_dir() and path.name.rpartition("_")[2].isdecimal()


def _replaced(tree: Any, arrays: Mapping[Path, Any], place: Path, what: str, only: tuple[str, ...], cast: bool) -> Any:
    """Replace the leaves of a tree whose paths match by the arrays of those paths under ``place``."""
    names = named_leaves(tree)
    wanted = {name for name in names if any(fnmatchcase(name, pattern) for pattern in only)}
    unused = [pattern for pattern in only if not any(fnmatchcase(name, pattern) for name in names)]
    if unused and (names or what == "params"):
        raise ValueError(
            f"restore_params: only={unused[0]!r} matches none of the {what}: {', '.join(names) or 'there are none'}"
        )
    found = {"/".join(keys[len(place) :]): leaf for keys, leaf in arrays.items() if keys[: len(place)] == place}
    lines = list(_misfits({name: names[name] for name in wanted}, found, cast))
    if lines:
        raise StateMismatch(
            f"restore_params: the checkpoint does not have the {what} that are wanted; nothing was restored. Leave "
            f"some out with only=[...], name the place of the parameters with source=..., allow other dtypes with "
            f"cast=True:{in_lines(lines)}"
        )
    leaves = [strong(found[name], leaf) if name in wanted else leaf for name, leaf in names.items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _misfits(wanted: Mapping[str, Any], found: Mapping[str, Any], cast: bool) -> Iterator[str]:
    for name, leaf in sorted(wanted.items()):
        if name not in found:
            near = ", ".join(sorted(found)[:8])
            yield f"{name}: missing, expected {describe(leaf)} (there are: {near})"
        elif found[name].shape != leaf.shape or not (cast or found[name].dtype == leaf.dtype):
            yield f"{name}: expected {describe(leaf)}, got {describe(found[name])}"
