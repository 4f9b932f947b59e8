"""Save the run while it goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from ant_jax._arguments import (
    check_choice,
    check_count,
    check_flag,
    check_function,
    check_name,
    check_path,
    check_positive,
)
from ant_jax._checkpoint.manifest import CheckpointError
from ant_jax._hooks.callback import Callback
from ant_jax.callbacks._printing import print_beside_bars
from ant_jax.callbacks._runs import PerRun


def checkpoint(
    directory: str | os.PathLike[str],
    *,
    every: int | None = None,
    every_epochs: int | None = 1,
    every_seconds: float | None = None,
    keep: int = 3,
    monitor: str | None = None,
    mode: Literal["min", "max"] = "min",
    keep_best: int = 1,
    save_last: bool = True,
    allow_nonfinite: bool = False,
    clock: Callable[[], float] = time.monotonic,
    name: str = "checkpoint",
) -> Callback:
    """Save the run at the ends of epochs, every so many batches or seconds, and when it ends.

    On the host, in ``on_checkpoint``, when all callbacks of that moment have run, so that what they remember is saved
    as it then is. Orbax writes in the background: training waits only while the state is handed over, and, with a
    ``monitor``, until the epoch's metric is there. What is under way is finished on every way out of ``fit``; a run
    that Ctrl-C, SIGTERM or a failing loader ends is saved where it is. With ``fit(..., resume=directory)`` the same
    command, started again, goes on, bit for bit. After the run,
    ``with trainer.checkpointer(directory, mode="min") as saved: saved.best_step`` is the step of the best checkpoint.

    A save that fails ends the run, at the next save or look; ``tolerate(checkpoint(...))`` goes on instead.

    Args:
        directory: where to; it is made, and locked while the run goes on, so a run at the same time, such as a ``fit``
            in a hook, needs another one. It may hold checkpoints of this run up to where it goes on, and no later ones.
        every: also save every so many batches.
        every_epochs: save at the end of every so many epochs; ``None``: not there.
        every_seconds: also save when so many seconds have passed since the last save; not together with ``every``.
        keep: how many of the newest checkpoints to keep; at least 2 leave one to go on from if one is damaged.
        monitor: a log of ``on_epoch_end``: also keep the best epochs by it. What is not finite is never the best. With
            callbacks that evaluate averages, such as ``ema(evaluate=True)``, it judges these.
        mode: ``"min"`` if a smaller value of ``monitor`` is better, ``"max"`` if a larger is.
        keep_best: with a ``monitor``, how many of the best to keep.
        save_last: whether to save when the run ends, too, however it does. The end of the last epoch is saved before
            ``on_train_end``, so that the run can go on from there with more epochs.
        allow_nonfinite: whether to save parameters that are NaN or infinite, rather than to end the run with an error.
        clock: returns seconds.
        name: of the callback. It keeps no memory: what is best stands in the directory.

    Returns:
        A callback that saves the state.

    Raises:
        ValueError: an argument out of range, or no path.
        TypeError: ``clock`` is not a function without arguments.
        FileExistsError: when the run begins, if the directory holds later checkpoints than the state's step.
        CheckpointError: when the run begins, if something else is saving into the directory; while it goes on, if a
            checkpoint cannot be written.
        NonFiniteError: while the run goes on, if parameters are not finite.
        NotADirectoryError: when the run begins, if it is a file.
        OSError: when the run begins, if it cannot be written to.
        KeyError: at the end of the first epoch, if there is no log named ``monitor``; the message lists those there
            are.

    >>> checkpoint("runs/digits", monitor="val_loss")
    Callback(name='checkpoint', hooks=on_train_begin, on_checkpoint, on_train_end, on_exception)
    """
    check_path("checkpoint", "directory", directory)
    every = check_count("checkpoint", "every", every, unit="batches", optional=True)
    every_epochs = check_count("checkpoint", "every_epochs", every_epochs, unit="epochs", optional=True)
    if every_seconds is not None:
        check_positive("checkpoint", "every_seconds", every_seconds)
        if every is not None:
            raise ValueError(
                f"checkpoint: give either every={every!r} batches or every_seconds={every_seconds!r}, not both"
            )
    keep = check_count("checkpoint", "keep", keep, unit="checkpoints")
    keep_best = check_count("checkpoint", "keep_best", keep_best, unit="checkpoints")
    check_name("checkpoint", "monitor", monitor, optional=True)
    check_choice("checkpoint", "mode", mode, "min", "max")
    check_flag("checkpoint", "save_last", save_last)
    check_flag("checkpoint", "allow_nonfinite", allow_nonfinite)
    check_function("checkpoint", "clock", clock)
    runs: PerRun[_Saving] = PerRun(lambda run: run.checkpointer.close())

    def saving_of(trainer: Any, state: Any) -> _Saving:
        """What saves; opened when it is first asked for, since a combinator may leave out when the run begins."""
        run = runs.of(trainer)
        if run is None:
            options = {} if monitor is None else {"mode": mode, "keep_best": keep_best}
            checkpointer = trainer.checkpointer(directory, keep=keep, allow_nonfinite=allow_nonfinite, **options)
            run = runs.open(trainer, _Saving(checkpointer, clock))
            later = [step for step in checkpointer.steps if step > state.total_steps]
            if later:
                runs.close(trainer)
                raise FileExistsError(
                    f"checkpoint: {os.fspath(directory)!r} holds checkpoints of steps {', '.join(map(str, later))}, "
                    f"and this run is at step {state.total_steps}; go on from them with fit(..., "
                    f"resume={os.fspath(directory)!r}), or choose another directory"
                )
        return run

    def on_train_begin(trainer: Any, state: Any, logs: Any) -> Any:
        runs.close(trainer)
        saving_of(trainer, state)
        return state, logs

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        del batch_idx
        saving_of(trainer, state).checkpointer.poll()
        return state, logs

    def on_checkpoint(trainer: Any, state: Any, logs: Any) -> Any:
        run = saving_of(trainer, state)
        due = every_seconds is not None and clock() - run.saved_at >= every_seconds
        if state.batch_idx > 0:
            if due or every is not None:
                run.save(state)
            return state, logs
        check_monitor(logs)
        last = state.stop or state.epoch >= trainer.num_epochs
        if due or (last and save_last) or (every_epochs is not None and state.epoch % every_epochs == 0):
            run.save(state, None if monitor is None else float(logs[monitor]))
        return state, logs

    def check_monitor(logs: Any) -> None:
        if monitor is not None and np.ndim(logs[monitor]) > 0:
            raise ValueError(f"checkpoint: monitor={monitor!r} is an array of shape {np.shape(logs[monitor])}")

    def metric_of(state: Any) -> float | None:
        """The metric of the epoch that has just ended, if one has."""
        metric = state.history[-1].get(monitor) if state.batch_idx == 0 and len(state.history) > 0 else None
        return metric if isinstance(metric, int | float) else None

    def on_train_end(trainer: Any, state: Any, logs: Any) -> Any:
        try:
            if save_last:
                saving_of(trainer, state).save(state, metric_of(state))
        finally:
            runs.close(trainer)
        return state, logs

    def on_exception(exception: BaseException, trainer: Any, state: Any, logs: Any) -> Any:
        run = runs.of(trainer)
        try:
            if save_last and run is not None and trainer.whole and not isinstance(exception, CheckpointError):
                run.save(state, metric_of(state))
                run.checkpointer.wait()
                print_beside_bars(f"saved step {state.total_steps} in {os.fspath(directory)} ({exception!r})")
        finally:
            runs.close(trainer)
        return state, logs

    # A callback looks at batches when it has a batch hook, and on_checkpoint follows its looks.
    looks: dict[str, Any] = {}
    if every is not None or every_seconds is not None:
        looks = {"every": every, "on_batch_end": on_batch_end}
    return Callback(
        name=name,
        on_train_begin=on_train_begin,
        on_checkpoint=on_checkpoint,
        on_train_end=on_train_end,
        on_exception=on_exception,
        **looks,
    )


class _Saving:
    """What saves one run.

    Attributes:
        checkpointer: of its directory.
        saved_at: when it last saved, or was opened, by the clock.
    """

    def __init__(self, checkpointer: Any, clock: Callable[[], float]):
        self.checkpointer, self._clock, self.saved_at = checkpointer, clock, clock()

    def save(self, state: Any, metric: float | None = None) -> None:
        """Save a state, unless it is there, as where the run went on from, or ends."""
        if not self.checkpointer.has(state):
            self.checkpointer.save(state, metric)
        self.saved_at = self._clock()
