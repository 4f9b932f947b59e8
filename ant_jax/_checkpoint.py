"""Checkpoints: the one file that knows Orbax.

A checkpoint is a directory ``step_<N>`` with two items. ``arrays`` is a nested dict of all arrays of the state by their
paths, the parameters under ``params``, so that Orbax alone can read it. ``host`` is one file of JSON: what the host
knows, what it takes to put the arrays back into their containers, and the checksums of all of it, since Orbax has none
of array data. Orbax writes in the background and renames the directory when all is written, so that a checkpoint is
there or not, whenever the process dies.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Never, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import future

from ant_jax._encoding import decoded, encoded
from ant_jax._finite import NonFiniteError, first_nonfinite
from ant_jax._host_fields import StateMismatch
from ant_jax._interrupt import held_back
from ant_jax._lock import DirectoryLock
from ant_jax._seal import CheckpointCorrupt, CheckpointError, Damage, sealed, unsealed, verify
from ant_jax._snapshot import Path, Snapshot, read_back, taken
from ant_jax._state import TrainState


_logger = logging.getLogger("ant_jax")

# Steps are directories "step_120": a stray directory of another name is no checkpoint.
PREFIX = "step"
# What a checkpoint is called whose step has got a later one, until that is written.
SUPERSEDED = ".superseded"
# No save takes longer, unless something hangs; then an error is better than silence.
TIMEOUT_SECONDS = 600
# How long checksums wait for a save to return. It takes milliseconds; who waits longer loses nothing but a little time.
HAND_OVER_SECONDS = 1.0
# The fields of a state where neither a NaN nor an infinity may be; an optimizer may well start from an infinity.
_FINITE = ("params", "model_state", "accumulator")


class Checkpointer:
    """Saves the states of a run into a directory, in the background; made by ``Trainer.checkpointer``.

    Use it as a context manager, or ``close`` it: leaving the process with a save under way loses that checkpoint.

    Args:
        directory: where to; it is made. It is locked, so that no other run saves into it meanwhile.
        device_names: the callbacks whose memory is arrays.
        keep: how many of the newest checkpoints to keep; ``None``: all.
        keep_best: how many of the best to keep beside them.
        mode: whether a smaller (``"min"``) or a larger (``"max"``) metric is better, ``None`` when there is no metric.
        allow_nonfinite: whether parameters, model state and accumulated gradients may be NaN or infinite.

    Raises:
        NotADirectoryError: ``directory``, or what it is in, is a file.
        OSError: it cannot be written to.
        CheckpointError: something else is saving into it.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        device_names: frozenset[str],
        *,
        keep: int | None = None,
        keep_best: int = 0,
        mode: Literal["min", "max"] | None = None,
        allow_nonfinite: bool = False,
    ):
        self.directory, self._device_names = directory_of(directory), device_names
        self._keep, self._keep_best, self._mode = keep, keep_best, mode
        self._allow_nonfinite = allow_nonfinite
        self._saving: tuple[int, int] | None = None  # step and bytes of the save that is under way
        self._abandoned = False
        self._held: Any = None  # its arrays: Orbax reads them while the run goes on
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            file = next(path for path in (self.directory, *self.directory.parents) if path.exists())
            raise NotADirectoryError(f"cannot save into {self.directory}: {file} is no directory") from None
        self._lock = DirectoryLock(self.directory)
        try:
            self._set_junk_aside()
            self._metrics: dict[int, float] = {}
            self._moments: dict[int, tuple[int, int]] = {}
            steps = steps_in(self.directory)
            for step in steps if mode else steps[-1:]:  # the metrics of all, or the moment of the newest
                self._look_at(step)
            self._manager = _Manager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    step_prefix=PREFIX,
                    cleanup_tmp_directories=True,
                    preservation_policy=_Retention(self._kept),
                    async_options=ocp.options.AsyncOptions(
                        timeout_secs=TIMEOUT_SECONDS, post_finalization_callback=self._let_go
                    ),
                ),
            )
        except BaseException:
            self._lock.release()
            raise

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order; with the one that is being saved."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The newest step that has a checkpoint; ``None`` when there is none."""
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint; ``None`` when none has a finite metric.

        Waits for what is being saved.

        Raises:
            ValueError: the checkpointer was made without a ``mode``.
        """
        if self._mode is None:
            raise ValueError("which step is best depends on metrics; make the checkpointer with mode='min' or 'max'")
        self.wait()
        ranked = self._ranked(self.steps)
        return ranked[0] if ranked else None

    def save(self, state: TrainState, metric: float | None = None) -> None:
        """Save a state under its step, in the background.

        Returns when Orbax has taken the state over. Its arrays are read until the checkpoint is written, so do not
        donate them to a compiled function of your own before ``wait`` (``fit`` and ``train_step`` leave them intact).

        Args:
            state: to save.
            metric: how good it is; without one, or with one that is not finite, a checkpoint is never among the best.

        Raises:
            TypeError: a callback's memory cannot be saved.
            FileExistsError: the directory has a checkpoint of that step, or of a later one.
            CheckpointError: the save before this one has failed, or this one has, at once.
            NonFiniteError: the save before this one was of a state with numbers that are not finite.
        """
        self.wait()
        step, moment = state.total_steps, _moment(state)
        replaces = step == self.latest_step and moment > self._moments.get(step, moment)
        if self.steps and step <= self.steps[-1] and not replaces:
            raise FileExistsError(
                f"{self.directory} has checkpoints of steps {', '.join(map(str, self.steps))}, and the state to save "
                f"is at step {step}; save another run into another directory"
            )
        if not self._lock.held:
            raise CheckpointError(
                f"the checkpoint of step {step} cannot be written: {self.directory} has been removed or replaced "
                f"since the run began"
            )
        arrays, host = taken(state, self._device_names)
        if replaces:  # set aside until the new one is there
            path_of(self.directory, step).rename(self.directory / f"{PREFIX}_{step}{SUPERSEDED}")
            self._manager.reload()
        self._moments[step] = moment
        # Orbax refuses arrays without elements.
        empty = [(keys, np.asarray(leaf)) for keys, leaf in arrays.items() if leaf.size == 0]
        arrays = {keys: leaf for keys, leaf in arrays.items() if leaf.size > 0}
        metric = None if metric is None else float(metric)
        host |= {"empty": encoded(empty, "the arrays without elements"), "metric": encoded(metric, "the metric")}
        self._metrics[step] = math.nan if metric is None else metric
        handed_over = threading.Event()
        items = ocp.args.Composite(
            arrays=ocp.args.StandardSave(_nested(arrays)),
            host=_SealArgs(step, host, arrays, self._allow_nonfinite, handed_over),
        )
        self._saving, self._held = (step, sum(leaf.nbytes for leaf in arrays.values())), arrays
        try:
            with held_back():  # or Orbax's threads would wait, long and in vain, for a save that Ctrl-C has ended
                accepted = self._manager.save(step, args=items)
        except Exception as error:
            self._fail(error)
        finally:
            handed_over.set()
        if not accepted:
            raise CheckpointError(f"Orbax declined to save step {step} into {self.directory}")

    def poll(self) -> None:
        """Raise what went wrong in the background, if something did; does not wait."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait until what was saved is on disk.

        Raises:
            CheckpointError: it could not be written; the message says why.
            NonFiniteError: it has numbers that are not finite, and so was not written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._fail(error)
        except BaseException:  # Ctrl-C: nobody waits any more
            self._abandoned = True
            raise
        self._saving = None
        for path in self.directory.glob(f"*{SUPERSEDED}"):
            shutil.rmtree(path, ignore_errors=True)

    def has(self, state: TrainState) -> bool:
        """Whether the newest checkpoint is of this very moment: an epoch ends at the step of its last batch."""
        step = state.total_steps
        return step == self.latest_step and self._moments.get(step) == _moment(state)

    def _let_go(self) -> None:
        self._held = None

    def close(self) -> None:
        """Wait, and give everything back; does not wait once Ctrl-C has ended a wait."""
        try:
            if not self._abandoned:
                self.wait()
        finally:
            try:
                if not self._abandoned:
                    self._manager.close()
            finally:
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fail(self, error: Exception) -> Never:
        """Clear up after a save that failed, so that the next one works, and say what happened."""
        step, size = self._saving or (-1, 0)
        self._saving = self._held = None
        self._metrics.pop(step, None)
        self._moments.pop(step, None)
        for left in self.directory.glob(f"{PREFIX}_{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)
        superseded = self.directory / f"{PREFIX}_{step}{SUPERSEDED}"
        if superseded.exists():
            superseded.rename(path_of(self.directory, step))
            self._look_at(step)
        good = steps_in(self.directory)
        with_room = ""
        if self.directory.is_dir():
            self._manager.reload()  # or it would count the step that is not there
            free = shutil.disk_usage(self.directory).free
            with_room = f" (it takes {_megabytes(size)}, and {_megabytes(free)} are free)"
        last = f"the last good one is of step {good[-1]}" if good else "there is no other"
        if isinstance(error, NonFiniteError):
            raise NonFiniteError(f"{error}; {last}") from None
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written into {self.directory}: {_in_short(error)}{with_room}; "
            f"{last}"
        ) from error

    def _set_junk_aside(self) -> None:
        """Move what is named like a checkpoint, and is none, out of Orbax's sight, or it would count it."""
        steps = {f"{PREFIX}_{step}" for step in steps_in(self.directory)}
        for path in sorted(self.directory.glob(f"{PREFIX}_*")):
            if re.fullmatch(rf"{PREFIX}_\d+", path.name) and path.name not in steps:
                _logger.warning("%s is no checkpoint; it is renamed to %s", path, set_aside(path).name)

    def _look_at(self, step: int) -> None:
        """Note the metric and the moment of a checkpoint that is there."""
        try:
            description = _description_of(path_of(self.directory, step))
        except (Damage, FileNotFoundError):
            return
        metric, fields = decoded(description["metric"]), decoded(description["fields"])
        self._metrics[step] = math.nan if metric is None else metric
        self._moments[step] = fields["epoch"], fields["batch_idx"]

    def _ranked(self, steps: Sequence[int]) -> list[int]:
        """The steps that have a finite metric, the best first; of equals the oldest."""
        sign = -1.0 if self._mode == "max" else 1.0
        metrics = {step: self._metrics.get(step, math.nan) for step in steps}
        finite = [step for step, metric in metrics.items() if math.isfinite(metric)]
        return sorted(finite, key=lambda step: (sign * metrics[step], step))

    def _kept(self, steps: Sequence[int]) -> set[int]:
        newest = steps if self._keep is None else sorted(steps)[-self._keep :]
        return {*newest, *(self._ranked(steps)[: self._keep_best] if self._mode else ())}


def _moment(state: TrainState) -> tuple[int, int]:
    return state.epoch, state.batch_idx


class _Manager(ocp.CheckpointManager):
    """Does not ask JAX for its preemption notice: the loop does, and its count must be the only one that JAX sees."""

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


class _Retention:
    """Orbax's ``PreservationPolicy``: which steps stay is ours to say, for Orbax ranks what is not finite anywhere."""

    def __init__(self, kept: Any):
        self._kept = kept

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        kept = self._kept([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


class _SealHandler(ocp.AsyncCheckpointHandler):
    """Writes the ``host`` item; checksums are computed in Orbax's background thread."""

    async def async_save(self, directory: Any, args: _SealArgs) -> list[Any]:
        write = self._write(directory, args)
        return [future.CommitFutureAwaitingContractedSignals(write, name="ant_jax_seal")]

    def save(self, directory: Any, args: _SealArgs) -> None:
        asyncio.run(self._write(directory, args))

    def restore(self, directory: Any, args: Any = None) -> dict[str, Any]:
        del args
        return unsealed((directory / "metadata").read_text())

    async def _write(self, directory: Any, args: _SealArgs) -> None:
        # Not while the training thread still hands the state over: checksums would take the processor from it.
        args.handed_over.wait(HAND_OVER_SECONDS)
        arrays = {keys: np.asarray(leaf) for keys, leaf in args.arrays.items()}
        if not args.allow_nonfinite:
            _refuse_nonfinite(arrays, args.step)
        (directory / "metadata").write_text(sealed(args.host, arrays))


@ocp.args.register_with_handler(_SealHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _SealArgs(ocp.args.CheckpointArgs):
    step: int
    host: Mapping[str, Any]
    arrays: Mapping[Path, Any]
    allow_nonfinite: bool
    handed_over: threading.Event


def _refuse_nonfinite(arrays: Mapping[Path, np.ndarray], step: int) -> None:
    parts = {"/".join(keys): leaf for keys, leaf in arrays.items() if keys[0] in _FINITE}
    optimizer = {"/".join(keys): leaf for keys, leaf in arrays.items() if keys[0] == "opt_state"}
    bad = first_nonfinite(parts) or first_nonfinite(optimizer, infinities=False)
    if bad is not None:
        raise NonFiniteError(
            f"the state of step {step} was not saved: {bad} is not finite. skip_nonfinite, roll_back and "
            f"terminate_on_nan keep such numbers out; allow_nonfinite=True saves them"
        )


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
        snapshot = read_back({}, host)
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
    return unsealed((path / "host" / "metadata").read_text())


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


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _in_short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if "No space left" in text:
        return "no space is left on the device"
    return f"{type(error).__name__}: {text:.300}" if not isinstance(error, Damage) else text
