"""The callback that feeds writers."""

from __future__ import annotations

import dataclasses
from typing import Any

from ant_jax._arguments import check_count, check_flag
from ant_jax._hooks.callback import Callback
from ant_jax._state.history import to_python
from ant_jax.callbacks._runs import PerRun
from ant_jax.writers._run_writer import RunWriter, record_of
from ant_jax.writers._writer import Writer


def log_to(writer: Writer, *, every: int | None = None, epochs: bool = True, name: str | None = None) -> Callback:
    """Write the logs with a writer: a record an epoch, and one every so many batches.

    On the host; the logs are read and written in the background. The callback changes neither state nor logs, and costs
    no launch unless the writer ``has_runs``. With ``every``, where a callback listed before this one raises in
    ``on_batch_end``, this one does not see the batch, so a run that goes on from the exception's ``train_state`` has no
    record of it.

    Args:
        writer: of :mod:`ant_jax.writers`, or of your own; see :class:`ant_jax.writers.Writer`.
        every: also a record of the means over every so many batches; ``None``: epochs only.
        epochs: whether to write a record of ``on_epoch_end``'s logs at every epoch.
        name: of the callback; ``None``: that of the writer's class. It has a memory, ``{"run_id": str}``, only where
            the writer ``has_runs``; the id is ``None`` before the run begins.

    Returns:
        A callback, and an observer unless the writer ``has_runs``.

    Raises:
        TypeError: ``writer`` is not a writer.
        ValueError: ``every`` is below 1, or ``epochs`` not a bool.

    >>> from ant_jax.writers import CSVWriter
    >>> log_to(CSVWriter("runs/digits.csv"))
    Callback(name='CSVWriter', hooks=on_train_begin, on_epoch_end, on_train_end, on_exception)
    """
    if not isinstance(writer, Writer):
        raise TypeError(f"log_to: writer must be an ant_jax.writers.Writer, got {writer!r}")
    named = type(writer).__name__ if name is None else name
    owner = "log_to" if name is None else name
    every = check_count(owner, "every", every, unit="batches", optional=True)
    check_flag(owner, "epochs", epochs)
    hooks = _Hooks(writer, named, epochs)
    looks: dict[str, Any] = {} if every is None else {"every": every, "on_batch_end": hooks.on_batch_end}
    # The id of a tracker's run is remembered in the state, which an observer cannot change.
    kind: dict[str, Any] = {"init": hooks.init} if writer.has_runs else {"observer": True}
    return Callback(
        name=named,
        **kind,
        on_train_begin=hooks.on_train_begin,
        on_epoch_end=hooks.on_epoch_end,
        on_train_end=hooks.on_train_end,
        on_exception=hooks.on_exception,
        **looks,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Hooks:
    """The hooks of ``log_to``; what a run has open is in ``trainer.resources``.

    Attributes:
        writer: not opened.
        name: of the callback.
        epochs: whether epochs have a record.
    """

    writer: Writer
    name: str
    epochs: bool
    _runs: PerRun[RunWriter] = dataclasses.field(init=False, default_factory=lambda: PerRun(RunWriter.end))

    def init(self, state: Any) -> dict[str, Any]:
        del state
        return {"run_id": None}

    def on_train_begin(self, trainer: Any, state: Any, logs: Any) -> Any:
        self._runs.close(trainer)
        _, state = self._opened(trainer, state)
        return state, logs

    def on_batch_end(self, batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        run, state = self._opened(trainer, state, unwritten=1)
        step = run.step(int(batch_idx) + 1, state)
        run.submit(lambda: record_of(logs.window.means()), state.epoch, step)
        return state, logs

    def on_epoch_end(self, epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        run, state = self._opened(trainer, state)
        epoch, step = int(epoch), run.end_epoch(state)  # by hand it may be an array
        if self.epochs:
            run.submit(lambda: record_of({log: to_python(logs[log]) for log in logs}), epoch, step)
        return state, logs

    def on_train_end(self, trainer: Any, state: Any, logs: Any) -> Any:
        self._runs.close(trainer)
        return state, logs

    def on_exception(self, exception: BaseException, trainer: Any, state: Any, logs: Any) -> Any:
        run = self._runs.take(trainer)
        if run is not None:
            run.end(exception)
        return state, logs

    def _opened(self, trainer: Any, state: Any, unwritten: int = 0) -> tuple[RunWriter, Any]:
        """Return the run's writer, and the state with the id of the tracker's run.

        It is opened in a later hook than ``on_train_begin`` where that failed and was tolerated, or was left out.
        """
        run = self._runs.of(trainer)
        if run is not None:
            return run, state
        has_runs = self.writer.has_runs
        run_id = state.callback_states[self.name]["run_id"] if has_runs else None
        run = self._runs.open(trainer, RunWriter(self.writer, state, run_id, unwritten))
        return run, state.with_callback_state(self.name, {"run_id": run.writer.run_id}) if has_runs else state
