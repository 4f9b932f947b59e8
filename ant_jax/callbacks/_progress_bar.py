"""Progress as a bar."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import numpy as np

from ant_jax._arguments import check_function, refuse
from ant_jax._hooks.callback import Callback
from ant_jax._state.history import to_python
from ant_jax.callbacks._printing import QUIETLY, Stream
from ant_jax.callbacks._runs import PerRun


# Seconds between two drawings: of a bar on a screen, and of a line in a file or a pipe.
SCREEN_SECONDS = 0.1
FILE_SECONDS = 10.0
# What tqdm draws a bar of, unless it is told to use ASCII.
BLOCKS = "".join(map(chr, range(0x2588, 0x2590)))


def progress_bar(
    *, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic, name: str = "progress_bar"
) -> Callback:
    """Show a progress bar over the whole run: loss and metrics, steps per second, the time left.

    In a terminal and in a notebook it is a tqdm bar, drawn at most ten times a second; in a file or a pipe, a line of
    the same content at the beginning, at most every ten seconds, and at the end. It says when a program is being
    compiled: before the first batch, and before the first evaluation. It looks whenever the host has control, and reads
    logs only to draw: while batches run, their means since it last looked. Where it cannot write, since the stream is
    closed, broken or missing, it is silent.

    Args:
        file: where to write; by default, standard error.
        clock: returns seconds.
        name: of the callback. One of this name takes the place of the bar that the trainer makes by itself.

    Returns:
        An observer.

    Raises:
        ValueError: ``file`` has no ``write``, ``flush`` and ``isatty``.
        TypeError: ``clock`` is not a function without arguments.

    >>> progress_bar().every is None
    True
    """
    if file is not None and not all(callable(getattr(file, use, None)) for use in ("write", "flush", "isatty")):
        refuse("progress_bar", "file", "an open text file, or None", file)
    check_function("progress_bar", "clock", clock)
    bars: PerRun[_Bar] = PerRun(lambda bar: bar.close())

    def bar_of(trainer: Any, state: Any) -> _Bar:
        # A combinator may have left out the beginning of the run.
        stream = Stream(sys.stderr if file is None else file)
        return bars.of(trainer) or bars.open(trainer, _Bar(stream, clock, trainer, state))

    def on_train_begin(trainer: Any, state: Any, logs: Any) -> None:
        bars.close(trainer)
        bar_of(trainer, state)

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> None:
        bar_of(trainer, state).batch_done(trainer.steps_per_epoch, state.epoch, batch_idx, logs)

    def on_evaluate_begin(trainer: Any, state: Any, logs: Any) -> None:
        bar = bars.of(trainer)
        if bar is not None:  # there is none when Trainer.evaluate is called by itself
            bar.evaluating()

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> None:
        del epoch
        bar_of(trainer, state).epoch_done(state, logs)

    def on_train_end(trainer: Any, state: Any, logs: Any) -> None:
        bars.close(trainer)

    def on_exception(exception: BaseException, trainer: Any, state: Any, logs: Any) -> None:
        del exception
        bars.close(trainer)

    return Callback(
        name=name,
        observer=True,
        every=None,
        on_train_begin=on_train_begin,
        on_batch_end=on_batch_end,
        on_evaluate_begin=on_evaluate_begin,
        on_epoch_end=on_epoch_end,
        on_train_end=on_train_end,
        on_exception=on_exception,
    )


class _Bar:
    """The bar of one run, over its steps."""

    def __init__(self, file: Stream, clock: Callable[[], float], trainer: Any, state: Any):
        from tqdm.auto import tqdm

        self._file, self._clock, self._tqdm = file, clock, tqdm
        self._epochs: int = trainer.num_epochs
        self._steps_per_epoch: int | None = trainer.steps_per_epoch
        self._epoch = self._epochs_done = state.epoch
        self._steps = self._initial = state.total_steps
        self._steps_before = self._initial - state.batch_idx  # those of the epochs that are done
        self._description, self._val_logs = "compiling", {}
        self._read: Callable[[], Mapping[str, Any]] = dict
        self._evaluated = False
        self._began = self._drawn = clock()
        on_screen = file.isatty() or "ipykernel" in sys.modules
        self._seconds = SCREEN_SECONDS if on_screen else FILE_SECONDS
        self._ascii = not file.takes(BLOCKS)
        self._bar = None
        if on_screen:
            with QUIETLY:  # tqdm flushes standard output, too, which may be broken
                self._bar = tqdm(
                    total=self._total(),
                    initial=self._initial,
                    desc=self._description,
                    unit="step",
                    file=file,
                    mininterval=0,
                    dynamic_ncols=True,
                    ascii=self._ascii,
                )
        else:
            self._draw()

    def batch_done(self, steps_per_epoch: int | None, epoch: int, batch_idx: int, logs: Any) -> None:
        self._steps_per_epoch = steps_per_epoch or self._steps_per_epoch
        self._steps = self._steps_before + batch_idx + 1
        self._epoch, self._read = epoch, functools.partial(_latest, logs)
        self._description = f"epoch {epoch + 1}/{self._epochs}"
        self._draw_if_due()

    def evaluating(self) -> None:
        doing = "evaluating" if self._evaluated else "compiling evaluation"
        self._description, self._evaluated = f"epoch {self._epoch + 1}/{self._epochs}, {doing}", True
        if self._bar is not None:
            with QUIETLY:
                self._bar.set_description(self._description)

    def epoch_done(self, state: Any, logs: Mapping[str, Any]) -> None:
        self._steps_before, self._epochs_done = self._steps, state.epoch + 1
        if self._steps_per_epoch is None and not state.stop:
            self._steps_per_epoch = state.batch_idx  # now it is known
        means = {name.removeprefix("train_"): log for name, log in logs.items() if name.startswith("train_")}
        self._read = lambda: means
        self._val_logs = {name: log for name, log in logs.items() if not name.startswith("train_")}
        self._description = f"epoch {state.epoch + 1}/{self._epochs}" + (", stopped" if state.stop else "")
        self._draw_if_due()

    def close(self) -> None:
        self._draw()
        if self._bar is not None:
            with QUIETLY:
                self._bar.close()

    def _total(self) -> int | None:
        if self._steps_per_epoch is None:
            return None
        return self._steps_before + self._steps_per_epoch * (self._epochs - self._epochs_done)

    def _draw_if_due(self) -> None:
        if self._clock() - self._drawn >= self._seconds:
            self._draw()

    def _draw(self) -> None:
        values = _in_short({**self._read(), **self._val_logs})
        self._drawn = self._clock()
        if self._bar is not None:
            with QUIETLY:
                self._bar.total = self._total()
                self._bar.set_description(self._description, refresh=False)
                self._bar.set_postfix_str(values, refresh=False)
                self._bar.update(self._steps - self._bar.n)
                self._bar.refresh()
            return
        line = self._tqdm.format_meter(
            self._steps,
            self._total(),  # pyright: ignore[reportArgumentType]  # None is what tqdm itself passes
            self._drawn - self._began,
            initial=self._initial,
            prefix=self._description,
            postfix=values,
            unit="step",
            ascii=self._ascii,
        )
        self._file.write(f"{line}\n")
        self._file.flush()


def _latest(logs: Any) -> dict[str, Any]:
    """The means of the batches of a look, and what host callbacks have published at it."""
    window = logs.window
    return window.means() | {name: logs[name] for name in logs if name not in window}


def _in_short(values: Mapping[str, Any]) -> str:
    scalars = {name: to_python(value) for name, value in values.items() if name != "batch_size" and not np.ndim(value)}
    return ", ".join(f"{name}={value:.4g}" for name, value in scalars.items())
