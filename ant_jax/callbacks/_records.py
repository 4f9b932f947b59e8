"""Callbacks that hand the logs of a run, record by record, to something that writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from ant_jax._callback import Callback
from ant_jax._history import to_python
from ant_jax.callbacks._arguments import check_count
from ant_jax.callbacks._background import Writer


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
    owner: str, name: str, sink: Sink, every: int | None, memory: Any = None, epochs: bool = True
) -> Callback:
    """Make a callback that hands records to a sink.

    Args:
        owner: the factory, for errors.
        name: of the callback.
        sink: what writes.
        every: a record of the mean over every so many batches; ``None``: none of batches.
        memory: what the callback remembers before ``sink.open`` says more; ``None``: nothing.
        epochs: whether there is a record of every epoch.
    """
    every = check_count(owner, "every", every, unit="batches", optional=True)
    writer = Writer()  # one for all runs, so that nothing of a run comes before the last task of one interrupted
    runs: list[_Run] = []  # the run under way: a resource of the host, no part of the run's state

    def begin(trainer: Any, state: Any, untold: int = 0) -> Any:
        end(None)  # a run whose last hooks this callback has not seen, such as inside `when`
        run = _Run(trainer, state)
        remembered = sink.open(state.callback_states.get(name), state.epoch, run.step(state) - untold)
        runs.append(run)
        return state if memory is None else state.with_callback_state(name, remembered)

    def under_way(trainer: Any, state: Any, untold: int = 0) -> Any:
        """Begin now what could not be opened, when that was borne, or whose opening hook was left out.

        The last ``untold`` batches have no record yet.
        """
        return state if runs and runs[0].trainer is trainer else begin(trainer, state, untold)

    def end(error: BaseException | None) -> None:
        if not runs:
            return
        try:
            runs.pop()
            writer.drain()
        except BaseException as failure:
            error = error or failure
            raise
        finally:
            sink.close(error)

    def on_train_begin(trainer: Any, state: Any, logs: Any) -> Any:
        return begin(trainer, state), logs

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        del batch_idx
        state = under_way(trainer, state, untold=1)
        # The task must not refer to the state: the trainer would copy it instead of overwriting it.
        epoch, step = state.epoch, runs[0].step(state)
        writer.submit(lambda: sink.write(_means(logs.window), epoch, step))
        return state, logs

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        state = under_way(trainer, state)
        step = runs[0].end_epoch(state)
        if epochs:
            writer.submit(lambda: sink.write({log: to_python(logs[log]) for log in logs}, epoch, step))
        return state, logs

    def on_train_end(trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        end(None)
        return state, logs

    def on_exception(exception: BaseException, trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        end(exception)
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
        trainer: of its hooks, by which the run is told from another.
        state: to begin with.
    """

    def __init__(self, trainer: Any, state: Any):
        self.trainer = trainer
        self._find(state)

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


def _means(window: Mapping[str, Any]) -> dict[str, float]:
    """The mean of every scalar over the examples; a log that not every batch has counts where it is there."""
    means: dict[str, float] = {}
    for name, values in window.items():
        if values.ndim == 1 and name != "batch_size":
            there = ~np.isnan(values)
            sizes = window["batch_size"][there]
            means[name] = float(np.average(values[there].astype(np.float64), weights=sizes)) if any(there) else math.nan
    return means
