"""Progress as lines of text."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import jax
import numpy as np

from ant_jax._arguments import check_count, check_function
from ant_jax._hooks.callback import Callback
from ant_jax._hooks.observed import ObservedLogs
from ant_jax._logs.windows import Window, join_windows
from ant_jax._state.history import to_python
from ant_jax.callbacks._printing import print_beside_bars
from ant_jax.callbacks._runs import PerRun


# A shorter epoch ends without waiting for the device; by how little it is ahead, the next one begins too early.
SHORT_SECONDS = 0.5


def log_progress(
    every: int = 100,
    *,
    printer: Callable[[str], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    name: str = "log_progress",
) -> Callback:
    """Print a line every so many batches and one every epoch.

    A batch line has the means of all batches since the last line, weighted as in the history, and the examples per
    second of training alone, waiting for data included and evaluation not. Lines are printed when the host has control
    anyhow, which is about ten times a second, so that training does not wait for them.

    Args:
        every: batches between lines; at least 1.
        printer: what prints a line; by default one that leaves a progress bar intact.
        clock: returns seconds.
        name: of the callback.

    Returns:
        An observer.

    Raises:
        ValueError: ``every`` is below 1.
        TypeError: ``printer`` or ``clock`` is not a function of what it is called with.

    >>> log_progress(every=50).every is None
    True
    """
    every = check_count("log_progress", "every", every, unit="batches")
    check_function("log_progress", "printer", printer, "line", optional=True)
    check_function("log_progress", "clock", clock)
    runs: PerRun[_Report] = PerRun()

    def report_of(trainer: Any, done: int = 0) -> _Report:
        # A combinator may have left out the beginning of the run.
        return runs.of(trainer) or runs.open(trainer, _Report(printer or print_beside_bars, every, clock, done))

    def on_train_begin(trainer: Any, state: Any, logs: Any) -> None:
        runs.close(trainer)
        report_of(trainer, state.batch_idx)

    def on_epoch_begin(epoch: int, trainer: Any, state: Any, logs: Any) -> None:
        report = report_of(trainer)
        report.begin_epoch()
        text = f"epoch {epoch + 1}/{trainer.num_epochs}"
        report.lines.add(lambda: [text], logs)

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> None:
        del batch_idx
        report = report_of(trainer)
        report.lines.catch_up()  # what was launched before the last look has run by now
        total = f"/{trainer.steps_per_epoch}" if trainer.steps_per_epoch else ""
        report.lines.add(functools.partial(report.batches.lines, logs, total), logs)

    def on_evaluate_begin(trainer: Any, state: Any, logs: Any) -> None:
        report = runs.of(trainer)
        if report is not None:  # there is none when Trainer.evaluate is called by itself
            if report.batches.seconds() > SHORT_SECONDS:
                report.lines.catch_up()
            report.lines.add(report.batches.finished(), logs)

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> None:
        report = report_of(trainer)
        lines, batches = report.lines, report.batches
        more = epoch + 1 < trainer.num_epochs and not state.stop
        if not more or batches.seconds() > SHORT_SECONDS:
            lines.catch_up()  # so that what is measured is the device's time, and not only the host's
        lines.add(batches.finished(), {})
        place, seconds = f"epoch {epoch + 1}/{trainer.num_epochs}", batches.seconds()
        lines.add(lambda: [f"{place} took {seconds:.2f} s: {_in_words(logs)}"], logs)

    def on_train_end(trainer: Any, state: Any, logs: Any) -> None:
        lines = report_of(trainer).lines
        lines.catch_up()
        if state.stop:
            text = f"stopped after epoch {state.epoch} of {trainer.num_epochs}, as a callback asked"
            lines.add(lambda: [text], {})
        runs.close(trainer)

    def on_exception(exception: BaseException, trainer: Any, state: Any, logs: Any) -> None:
        del exception
        report = runs.take(trainer)
        if report is not None:
            report.lines.add(report.batches.finished(), {})
            report.lines.catch_up()

    return Callback(
        name=name,
        observer=True,
        every=None,  # it gets every batch's logs all the same, in few calls
        on_train_begin=on_train_begin,
        on_epoch_begin=on_epoch_begin,
        on_batch_end=on_batch_end,
        on_evaluate_begin=on_evaluate_begin,
        on_epoch_end=on_epoch_end,
        on_train_end=on_train_end,
        on_exception=on_exception,
    )


class _Report:
    """What a run prints, which goes on in an epoch of which so many batches are done.

    Attributes:
        lines: where to.
        batches: those of the epoch under way.
    """

    def __init__(self, printer: Callable[[str], Any], every: int, clock: Callable[[], float], done: int):
        self.lines, self._every, self._clock = _Lines(printer), every, clock
        self.batches = _Batches(every, clock, done)

    def begin_epoch(self) -> None:
        self.batches = _Batches(self._every, self._clock)


class _Lines:
    """Prints lines in their order; those whose numbers are yet to be computed when it is next told to catch up.

    Reading numbers that are not there waits for the device, and then the device for its next launch.
    """

    def __init__(self, printer: Callable[[str], Any]):
        self._printer = printer
        self._waiting: list[Callable[[], Iterable[str]]] = []

    def add(self, lines: Callable[[], Iterable[str]], needed: Mapping[str, Any]) -> None:
        """Print lines: at once if nothing else waits, and the logs that they need are there."""
        waits = bool(self._waiting) or not _are_ready(needed)
        self._waiting.append(lines)
        if not waits:
            self.catch_up()

    def catch_up(self) -> None:
        """Print all that waits, and wait for it."""
        while self._waiting:
            for line in self._waiting.pop(0)():
                self._printer(line)


class _Batches:
    """Collects the logs of an epoch's batches as they pass, and makes a line of every so many."""

    def __init__(self, every: int, clock: Callable[[], float], done: int = 0):
        self._every, self._clock = every, clock
        self._began = self._line_began = self._read_at = self._ended = clock()
        self._over_at: float | None = None
        self._done, self._total = done, ""
        self._parts: list[Window] = []  # of the next line

    def seconds(self) -> float:
        """Since the epoch began."""
        return self._clock() - self._began

    def finished(self) -> Callable[[], Iterable[str]]:
        """Note that no more batches follow; returns what makes the last line, which may stand for fewer."""
        if self._over_at is None:
            self._over_at = self._clock()
        return lambda: [self._line()] if self._parts else []

    def lines(self, logs: Any, total: str) -> Iterator[str]:
        """The lines that the batches of a look complete."""
        window = logs.window
        count, before, self._total = len(window["loss"]), self._read_at, total
        self._read_at = self._clock() if self._over_at is None else self._over_at
        start = 0
        while start < count:
            end = min(count, start + self._every - (self._done % self._every))
            self._parts.append(window.between(start, end))
            self._done += end - start
            self._ended = before + (self._read_at - before) * end / count
            if self._done % self._every == 0:
                yield self._line()
            start = end

    def _line(self) -> str:
        window, self._parts = join_windows(self._parts), []
        rate = sum(window["batch_size"]) / max(self._ended - self._line_began, 1e-9)
        self._line_began = self._ended
        return f"  batch {self._done}{self._total}: {_in_words(window.means())} ({rate:,.0f} examples/s)"


def _are_ready(logs: Mapping[str, Any]) -> bool:
    if isinstance(logs, ObservedLogs):
        return logs.is_ready
    return all(not isinstance(value, jax.Array) or cast(Any, value).is_ready() for value in logs.values())


def _in_words(values: Mapping[str, Any]) -> str:
    scalars = {name: to_python(value) for name, value in values.items() if np.ndim(value) == 0}
    return ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())
