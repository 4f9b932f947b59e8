"""Read checkpoints, and name the damaged ones."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ant_jax._checkpoint.manifest import CheckpointCorrupt, Damage, read_manifest, verify
from ant_jax._checkpoint.snapshot import Path, Snapshot, decode_snapshot
from ant_jax._state.host_fields import StateMismatch


# Steps are directories "step_120": a stray directory of another name is no checkpoint.
PREFIX = "step"


def directory_of(directory: Any) -> pathlib.Path:
    """Return the absolute path of a directory of checkpoints.

    Raises:
        TypeError: it is no path.

    >>> directory_of(None)
    Traceback (most recent call last):
    TypeError: directory must be the path of a directory of checkpoints, got None
    """
    if not isinstance(directory, str | os.PathLike) or not isinstance(os.fspath(directory), str):
        raise TypeError(f"directory must be the path of a directory of checkpoints, got {directory!r}")
    return pathlib.Path(directory).absolute()


def steps_in(directory: pathlib.Path) -> list[int]:
    """The steps that a directory has checkpoints of, in order; damaged ones among them."""
    found = (re.fullmatch(rf"{PREFIX}_(0|[1-9]\d*)", path.name) for path in directory.glob(f"{PREFIX}_*/"))
    return sorted(int(match[1]) for match in found if match)


def path_of(directory: pathlib.Path, step: int) -> pathlib.Path:
    """Where the checkpoint of a step is."""
    return directory / f"{PREFIX}_{step}"


def set_aside(path: pathlib.Path) -> pathlib.Path:
    """Rename a damaged checkpoint, so that it is neither restored nor in the way of later ones; returns where to."""
    taken_names = {other.name for other in path.parent.iterdir()}
    names = (f"{path.name}.corrupt{f'.{i}' if i else ''}" for i in range(len(taken_names) + 1))
    return path.rename(path.with_name(next(name for name in names if name not in taken_names)))


def read(directory: str | os.PathLike[str], step: int | None = None) -> Snapshot:
    """Read a checkpoint and compare it with its checksums; its arrays are numpy's.

    Args:
        directory: that was saved into.
        step: which one; ``None``: the newest.

    Raises:
        FileNotFoundError: there is none; the message says which steps there are.
        CheckpointCorrupt: it is damaged.
        StateMismatch: it is of a format that this version does not read.
    """
    directory = directory_of(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory} to restore from")
    steps = steps_in(directory)
    if not steps or step not in (None, *steps):
        wanted, there = "" if step is None else f" of step {step}", ", ".join(map(str, steps)) or "none"
        raise FileNotFoundError(f"{directory} has no checkpoint{wanted}; the steps there are: {there}")
    step = steps[-1] if step is None else step
    path = path_of(directory, step)
    try:
        host = _description_of(path)
        snapshot = decode_snapshot({}, host)
        return snapshot._replace(arrays=_arrays_of(path, host["arrays"]) | dict(snapshot.host["empty"]))
    except (StateMismatch, MemoryError):
        raise
    except OSError as error:  # which may be over the next time, and says nothing of the checkpoint
        if not isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
            raise
        raise _corrupt(directory, step, steps, error) from error
    except Exception as error:  # Orbax's are of many unrelated types
        raise _corrupt(directory, step, steps, error) from error


def _corrupt(directory: pathlib.Path, step: int, steps: Sequence[int], error: Exception) -> CheckpointCorrupt:
    others = ", ".join(str(other) for other in steps if other != step)
    sound = f"; the other checkpoints there are of steps {others}" if others else ""
    return CheckpointCorrupt(directory, step, _in_short(error), sound)


def _description_of(path: pathlib.Path) -> dict[str, Any]:
    return read_manifest((path / "host" / "metadata").read_text())


def _arrays_of(path: pathlib.Path, rows: list[list[Any]]) -> dict[Path, np.ndarray]:
    as_numpy = _nested({tuple(keys): ocp.RestoreArgs(restore_type=np.ndarray) for keys, *_ in rows})
    restored = read_arrays(path / "arrays", as_numpy)
    verify(restored, rows)
    return restored


def read_arrays(path: pathlib.Path, restore_args: Any = None) -> dict[Path, np.ndarray]:
    """Read the arrays of any tree that Orbax wrote, by their paths."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        if restore_args is None:
            tree = reader.metadata(path).item_metadata.tree
            restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore_args))
    return {
        tuple(jax.tree_util.keystr((key,), simple=True) for key in keys): np.asarray(leaf)
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _nested(arrays: Mapping[Path, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for (*outer, last), leaf in arrays.items():
        inner = nested
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = leaf
    return nested


def _in_short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if "No space left" in text:
        return "no space is left on the device"
    return f"{type(error).__name__}: {text:.300}" if not isinstance(error, Damage) else text
