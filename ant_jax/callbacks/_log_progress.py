"""Progress as lines of text."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ant_jax._callback import Callback
from ant_jax._history import to_python
from ant_jax.callbacks._arguments import check_count, check_function
from ant_jax.callbacks._printing import print_beside_bars


def log_progress(
    every: int = 100,
    *,
    printer: Callable[[str], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    name: str = "log_progress",
) -> Callback:
    """Print a line every so many batches and one every epoch.

    A batch line has the means of all batches since the last line, and the examples per second of training alone,
    waiting for data included and evaluation not. Lines are printed when the host has control anyhow, which is about ten
    times a second, so that training does not wait for them.

    Args:
        every: batches between lines; at least 1.
        printer: what prints a line; by default one that leaves a progress bar intact.
        clock: returns seconds.
        name: of the callback.

    Returns:
        A host callback; it keeps no memory.

    Raises:
        ValueError: ``every`` is below 1.
        TypeError: ``printer`` or ``clock`` is not a function of what it is called with.

    >>> log_progress(every=50).every is None
    True
    """
    every = check_count("log_progress", "every", every, unit="batches")
    check_function("log_progress", "printer", printer, "line", optional=True)
    check_function("log_progress", "clock", clock)
    lines = _Lines(every, clock, printer or print_beside_bars)  # no part of the run's state, so no memory keeps it

    def on_train_begin(trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        lines.begin_epoch(state.batch_idx)
        return state, logs

    def on_epoch_begin(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        lines.begin_epoch()
        lines.say(f"epoch {epoch + 1}/{trainer.num_epochs}")
        return state, logs

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        del batch_idx
        lines.look(logs, trainer.steps_per_epoch)
        return state, logs

    def on_evaluate_begin(trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        lines.finish()
        return state, logs

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        lines.finish()
        lines.say(f"epoch {epoch + 1}/{trainer.num_epochs} took {lines.seconds():.2f} s: {_in_words(logs)}")
        return state, logs

    def on_train_end(trainer: Any, state: Any, logs: Any) -> Any:
        if state.stop:
            lines.say(f"stopped after epoch {state.epoch} of {trainer.num_epochs}, as a callback asked")
        return state, logs

    def on_exception(exception: BaseException, trainer: Any, state: Any, logs: Any) -> Any:
        del exception, trainer
        lines.finish()
        return state, logs

    return Callback(
        name=name,
        every=None,  # it gets every batch's logs all the same, so it need not make the host look at any of them
        on_train_begin=on_train_begin,
        on_epoch_begin=on_epoch_begin,
        on_batch_end=on_batch_end,
        on_evaluate_begin=on_evaluate_begin,
        on_epoch_end=on_epoch_end,
        on_train_end=on_train_end,
        on_exception=on_exception,
    )


class _Lines:
    """Collects the logs of batches as they pass, and prints a line for every so many."""

    def __init__(self, every: int, clock: Callable[[], float], printer: Callable[[str], Any]):
        self._every, self._clock, self.say = every, clock, printer
        self.begin_epoch()

    def begin_epoch(self, batches_done: int = 0) -> None:
        self._began = self._line_began = self._read_at = self._ended = self._clock()
        self._done, self._total = batches_done, ""
        self._waiting: Any = None
        self._parts: list[dict[str, np.ndarray]] = []  # the logs of the next line

    def look(self, logs: Any, steps_per_epoch: int | None) -> None:
        # Reading logs that are not there yet waits for the device, and then the device for its next launch. So what was
        # launched last is read at the next look, by when it has run.
        self._read()
        self._waiting, self._total = logs, f"/{steps_per_epoch}" if steps_per_epoch else ""
        if logs["loss"].is_ready():
            self._read()

    def finish(self) -> None:
        """Print what there is; the last line of an epoch may stand for fewer batches."""
        self._read()
        if self._parts:
            self._print()

    def seconds(self) -> float:
        """Since the epoch began."""
        return self._clock() - self._began

    def _read(self) -> None:
        if self._waiting is None:
            return
        logs, self._waiting = self._waiting, None
        window = {name: values for name, values in logs.window.items() if np.ndim(values) == 1}
        count, before = len(window["loss"]), self._read_at
        self._read_at = self._clock()
        start = 0
        while start < count:
            end = min(count, start + self._every - (self._done % self._every))
            self._parts.append({name: values[start:end] for name, values in window.items()})
            self._done += end - start
            self._ended = before + (self._read_at - before) * end / count
            if self._done % self._every == 0:
                self._print()
            start = end

    def _print(self) -> None:
        parts, self._parts = self._parts, []
        values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        rate = sum(values.pop("batch_size")) / max(self._ended - self._line_began, 1e-9)
        means = {name: np.mean(of_batches) for name, of_batches in values.items()}
        self._line_began = self._ended
        self.say(f"  batch {self._done}{self._total}: {_in_words(means)} ({rate:,.0f} examples/s)")


def _in_words(values: Mapping[str, Any]) -> str:
    scalars = {name: to_python(value) for name, value in values.items() if np.ndim(value) == 0}
    return ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())
