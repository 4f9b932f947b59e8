"""Callbacks that hand the logs of a run, record by record, to something that writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from ant_jax._callback import Callback
from ant_jax._history import to_python
from ant_jax.callbacks._arguments import check_count
from ant_jax.callbacks._background import Writer


class Sink(Protocol):
    """What writes. ``open`` runs in ``on_train_begin``, the others in the background, one after the other."""

    def open(self, memory: Any, step: int) -> Any:
        """Begin to write, for a run that has trained on ``step`` batches; return what the run is to remember."""
        ...

    def write(self, record: Mapping[str, Any], epoch: int, step: int, of_epoch: bool) -> None:
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
    check_count(owner, "every", every, unit="batches", optional=True)
    writer, place = Writer(), _Place()

    def on_train_begin(trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        place.begin(state)
        remembered = sink.open(state.callback_states.get(name), place.step_before + state.batch_idx)
        return state if memory is None else state.with_callback_state(name, remembered), logs

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        # The task must not refer to the state: the trainer would copy it instead of overwriting it.
        epoch, step = state.epoch, place.step_before + batch_idx + 1
        writer.submit(lambda: sink.write(_means(logs.window), epoch, step, False))
        return state, logs

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        place.step_before += state.batch_idx
        step = place.step_before
        if epochs:
            writer.submit(lambda: sink.write({log: to_python(value) for log, value in logs.items()}, epoch, step, True))
        return state, logs

    def close(error: BaseException | None) -> None:
        try:
            writer.drain()
        finally:
            if place.open:
                place.open = False
                sink.close(error)

    def on_train_end(trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        close(None)
        return state, logs

    def on_exception(exception: BaseException, trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        close(exception)
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


class _Place:
    """Where a run is: known on the host, so that no record waits for the device."""

    def __init__(self) -> None:
        self.step_before, self.open = 0, False  # batches before this epoch

    def begin(self, state: Any) -> None:
        self.step_before, self.open = int(state.step) - state.batch_idx, True


def _means(window: Mapping[str, Any]) -> dict[str, float]:
    """The mean of every scalar over its batches; a log that not every batch has is NaN where it is missing."""
    means: dict[str, float] = {}
    for name, values in window.items():
        if values.ndim == 1:
            there = values[~np.isnan(values)] if np.issubdtype(values.dtype, np.floating) else values
            means[name] = float(np.mean(there)) if len(there) else float("nan")
    return means
