"""Callbacks that hand the logs of a run, record by record, to something that writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ant_jax._arguments import check_count
from ant_jax._callback import Callback
from ant_jax._history import to_python
from ant_jax.callbacks._background import Writer
from ant_jax.callbacks._runs import PerRun


class Sink(Protocol):
    """What writes. ``open`` and ``close`` run in hooks; ``write`` between them in the background, in order."""

    def open(self, memory: Any, epoch: int, step: int) -> Any:
        """Begin to write, for a run whose next epoch to end is ``epoch`` and that has trained on ``step`` batches.

        Returns:
            What the run is to remember.
        """
        ...

    def write(self, record: Mapping[str, Any], epoch: int, step: int) -> None:
        """Write numbers and arrays, of an epoch or of the batches since the last record."""
        ...

    def close(self, error: BaseException | None) -> None:
        """End; ``error`` is what ended the run, if anything did."""
        ...


def recording(
    owner: str, name: str, make_sink: Callable[[], Sink], every: int | None, memory: Any = None, epochs: bool = True
) -> Callback:
    """Make a callback that hands records to a sink.

    Args:
        owner: the factory, for errors.
        name: of the callback.
        make_sink: makes what writes, for each run.
        every: a record of the mean over every so many batches; ``None``: none of batches.
        memory: what the callback remembers before ``sink.open`` says more; ``None``: nothing.
        epochs: whether there is a record of every epoch.
    """
    every = check_count(owner, "every", every, unit="batches", optional=True)
    runs: PerRun[_Run] = PerRun(lambda run: run.end(None))

    def begun(trainer: Any, state: Any, untold: int = 0) -> tuple[_Run, Any]:
        """Begin a run; returns it and the state, with what the sink remembers.

        The last ``untold`` batches have no record yet.
        """
        runs.close(trainer)
        run = _Run(make_sink(), state)
        remembered = run.sink.open(state.callback_states.get(name), state.epoch, run.step(state) - untold)
        runs.open(trainer, run)
        return run, state if memory is None else state.with_callback_state(name, remembered)

    def under_way(trainer: Any, state: Any, untold: int = 0) -> tuple[_Run, Any]:
        """Begin now what could not be opened, when that was borne, or whose opening hook was left out."""
        run = runs.of(trainer)
        return begun(trainer, state, untold) if run is None else (run, state)

    def on_train_begin(trainer: Any, state: Any, logs: Any) -> Any:
        _, state = begun(trainer, state)
        return state, logs

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        del batch_idx
        run, state = under_way(trainer, state, untold=1)
        # The task must not refer to the state: the trainer would copy it instead of overwriting it.
        epoch, step = state.epoch, run.step(state)
        run.writer.submit(lambda: run.sink.write(logs.window.means(), epoch, step))
        return state, logs

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        run, state = under_way(trainer, state)
        epoch, step = int(epoch), run.end_epoch(state)  # by hand it may be an array
        if epochs:
            run.writer.submit(lambda: run.sink.write({log: to_python(logs[log]) for log in logs}, epoch, step))
        return state, logs

    def on_train_end(trainer: Any, state: Any, logs: Any) -> Any:
        runs.close(trainer)
        return state, logs

    def on_exception(exception: BaseException, trainer: Any, state: Any, logs: Any) -> Any:
        run = runs.take(trainer)
        if run is not None:
            run.end(exception)
        return state, logs

    looks: dict[str, Any] = {} if every is None else {"every": every, "on_batch_end": on_batch_end}
    return Callback(
        name=name,
        init=None if memory is None else lambda state: memory,
        on_train_begin=on_train_begin,
        on_epoch_end=on_epoch_end,
        on_train_end=on_train_end,
        on_exception=on_exception,
        **looks,
    )


class _Run:
    """One run, and how far it is, counted on the host so that no record waits for the device.

    Args:
        sink: of the run alone.
        state: to begin with.

    Attributes:
        sink: the same.
        writer: the queue of what it is to write.
    """

    def __init__(self, sink: Sink, state: Any):
        self.sink, self.writer = sink, Writer()
        self._find(state)

    def end(self, error: BaseException | None) -> None:
        """Wait for what is still to be written; ``error`` is what ended the run, if anything did."""
        try:
            self.writer.drain()
        except BaseException as failure:
            error = error or failure
            raise
        finally:
            self.sink.close(error)

    def _find(self, state: Any) -> None:
        self._epoch, self._before = state.epoch, state.total_steps - state.batch_idx  # batches before this epoch

    def step(self, state: Any) -> int:
        """Batches trained on since the state was made."""
        if state.epoch != self._epoch:  # the hooks of an epoch were left out, as `every` does: the device knows
            self._find(state)
        return self._before + state.batch_idx

    def end_epoch(self, state: Any) -> int:
        """Count the epoch's batches; returns the step."""
        self._before = self.step(state)
        self._epoch += 1
        return self._before
