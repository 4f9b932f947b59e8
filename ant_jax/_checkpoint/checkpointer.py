"""Checkpoints: the one file that knows Orbax.

A checkpoint is a directory ``step_<N>`` with two items. ``arrays`` is a nested dict of all arrays of the state by their
paths, the parameters under ``params``, so that Orbax alone can read it. ``host`` is one file of JSON: what the host
knows, what it takes to put the arrays back into their containers, and the checksums of all of it, since Orbax has none
of array data. Orbax writes in the background and renames the directory when all is written, so that a checkpoint is
there or not, whenever the process dies.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import threading
from collections.abc import Sequence
from typing import Any, Literal, Never, Self

import numpy as np
import orbax.checkpoint as ocp

from ant_jax._checkpoint.lock import DirectoryLock
from ant_jax._checkpoint.manifest import CheckpointError, Damage
from ant_jax._checkpoint.reading import (
    PREFIX,
    _description_of,
    _in_short,
    _nested,
    directory_of,
    path_of,
    set_aside,
    steps_in,
)
from ant_jax._checkpoint.snapshot import take_snapshot
from ant_jax._checkpoint.storage import _Manager, _Retention, _SealArgs
from ant_jax._finite import NonFiniteError
from ant_jax._interrupt import held_back
from ant_jax._state.encoding import decode, encode
from ant_jax._state.train_state import TrainState


_logger = logging.getLogger("ant_jax")

# What a checkpoint is called whose step has got a later one, until that is written.
SUPERSEDED = ".superseded"
# No save takes longer, unless something hangs; then an error is better than silence.
TIMEOUT_SECONDS = 600


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
        arrays, host = take_snapshot(state, self._device_names)
        if replaces:  # set aside until the new one is there
            path_of(self.directory, step).rename(self.directory / f"{PREFIX}_{step}{SUPERSEDED}")
            self._manager.reload()
        self._moments[step] = moment
        # Orbax refuses arrays without elements.
        empty = [(keys, np.asarray(leaf)) for keys, leaf in arrays.items() if leaf.size == 0]
        arrays = {keys: leaf for keys, leaf in arrays.items() if leaf.size > 0}
        metric = None if metric is None else float(metric)
        host |= {"empty": encode(empty, "the arrays without elements"), "metric": encode(metric, "the metric")}
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
        metric, fields = decode(description["metric"]), decode(description["fields"])
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


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
