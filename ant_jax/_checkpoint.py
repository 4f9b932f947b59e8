"""Checkpoints: the one file that knows Orbax.

A checkpoint has two items. ``arrays`` is a nested dict of all arrays of the state by their paths, the parameters under
``params``, so that Orbax alone can read it. ``host`` is JSON: what the host knows, and what it takes to put the arrays
back into their containers.
"""

from __future__ import annotations

import math
import os
import pathlib
import weakref
from collections.abc import Mapping
from typing import Any, Literal, Self

import jax
import numpy as np

from ant_jax._encoding import decoded, encoded
from ant_jax._snapshot import Path, Snapshot, read_back, taken
from ant_jax._state import TrainState


# Steps are directories "step_120": a stray directory of another name is no checkpoint.
PREFIX = "step"
# Those that are open, by directory: two managers of one directory know nothing of each other's checkpoints.
_open: weakref.WeakValueDictionary[pathlib.Path, Checkpointer] = weakref.WeakValueDictionary()


class Checkpointer:
    """Saves the states of a run into a directory, in the background; made by ``Trainer.checkpointer``.

    Use it as a context manager, or ``close`` it: leaving the process with a save under way loses that checkpoint.

    Args:
        directory: where to; it is made.
        device_names: the callbacks whose memory is arrays.
        keep: how many checkpoints to keep, the newest, or the best when ``save`` is given metrics; ``None``: all.
        mode: whether a smaller (``"min"``) or a larger (``"max"``) metric is better, ``None`` when there is no metric.
        save_last: whether to keep the newest beside the best.

    Raises:
        NotADirectoryError: ``directory`` is a file.
        RuntimeError: another checkpointer of this process is open on the directory.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        device_names: frozenset[str],
        *,
        keep: int | None = None,
        mode: Literal["min", "max"] | None = None,
        save_last: bool = True,
    ):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        def score(metrics: Any) -> float:
            value = metrics["metric"] if mode == "max" else -metrics["metric"]
            return value if math.isfinite(value) else -math.inf  # a metric that is not finite is never the best

        newest = policies.LatestN(keep if mode is None else 1 if save_last else 0)
        best = policies.BestN(get_metric_fn=score, n=keep, keep_checkpoints_without_metrics=False)
        self.directory, self._device_names = pathlib.Path(directory).absolute(), device_names
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(f"cannot save into {self.directory}, which is no directory")
        self._place = self.directory.resolve()
        if self._place in _open:
            raise RuntimeError(
                f"something else is saving into {self.directory} at the moment; give each checkpoint callback a "
                f"directory of its own, and close checkpointers"
            )
        self._args = ocp.args
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                step_prefix=PREFIX,
                cleanup_tmp_directories=True,
                preservation_policy=policies.AnyPreservationPolicy([newest] if mode is None else [newest, best]),
                best_fn=None if mode is None else score,
                best_mode="max",
            ),
        )
        self._score = None if mode is None else score
        _open[self._place] = self

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The newest step that has a checkpoint; ``None`` when there is none."""
        return max(self._manager.all_steps(), default=None)

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint; ``None`` when none has a finite metric.

        Waits for what is being saved.

        Raises:
            ValueError: the checkpointer was made without a ``mode``.
        """
        if self._score is None:
            raise ValueError("which step is best depends on metrics; make the checkpointer with mode='min' or 'max'")
        self.wait()
        step = self._manager.best_step()
        found = step is not None and math.isfinite(self._score(self._manager.metrics(step)))
        return step if found else None

    def save(self, state: TrainState, metric: float | None = None) -> None:
        """Save a state under its step; returns when the state has been copied, and before it is written.

        Args:
            state: to save.
            metric: how good it is; without one, or with one that is not finite, a checkpoint ranks behind all others.

        Raises:
            TypeError: a callback's memory cannot be saved.
            FileExistsError: the directory has a checkpoint of that step, or of a later one.
        """
        step = int(state.step)
        if self.steps and step <= self.steps[-1]:
            raise FileExistsError(
                f"{self.directory} has checkpoints of steps {', '.join(map(str, self.steps))}, and the state to save "
                f"is at step {step}; save another run into another directory"
            )
        arrays, host = taken(state, self._device_names)
        # Orbax refuses arrays without elements.
        empty = [(keys, np.asarray(leaf)) for keys, leaf in arrays.items() if leaf.size == 0]
        nested = _nested({keys: leaf for keys, leaf in arrays.items() if leaf.size > 0})
        host = {**host, "empty": encoded(empty, "the arrays without elements")}
        metrics = {"metric": -math.inf if metric is None else float(metric)} if self._score else None
        items = self._args.Composite(arrays=self._args.StandardSave(nested), host=self._args.JsonSave(host))
        if not self._manager.save(step, args=items, metrics=metrics):
            raise RuntimeError(f"Orbax declined to save step {step} into {self.directory}")

    def wait(self) -> None:
        """Wait until what was saved is on disk; raises what went wrong there."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and give everything back."""
        try:
            self.wait()
        finally:
            if _open.get(self._place) is self:
                del _open[self._place]
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(directory: str | os.PathLike[str], step: int | None = None) -> Snapshot:
    """Read a checkpoint; its arrays are numpy's.

    Args:
        directory: that was saved into.
        step: which one; ``None``: the newest.

    Raises:
        FileNotFoundError: there is none; the message says which steps there are.
        StateMismatch: it is of a format that this version does not read.
    """
    import orbax.checkpoint as ocp

    directory = pathlib.Path(directory).absolute()
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory} to restore from")
    options = ocp.CheckpointManagerOptions(step_prefix=PREFIX, create=False, enable_async_checkpointing=False)
    handlers: Any = {"arrays": ocp.PyTreeCheckpointHandler(), "host": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(directory, options=options, item_handlers=handlers) as manager:
        steps = sorted(manager.all_steps())
        if not steps or step not in (None, *steps):
            wanted, there = "" if step is None else f" of step {step}", ", ".join(map(str, steps)) or "none"
            raise FileNotFoundError(f"{directory} has no checkpoint{wanted}; the steps there are: {there}")
        step = steps[-1] if step is None else step
        forms = manager.item_metadata(step)["arrays"]
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), forms.tree)
        items = ocp.args.Composite(arrays=ocp.args.PyTreeRestore(restore_args=as_numpy), host=ocp.args.JsonRestore())
        restored = manager.restore(step, args=items)
    arrays = {
        tuple(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(restored["arrays"])[0]
    }
    return read_back(arrays | dict(decoded(restored["host"].get("empty", []))), restored["host"])


def _nested(arrays: Mapping[Path, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for (*outer, last), leaf in arrays.items():
        inner = nested
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = leaf
    return nested
