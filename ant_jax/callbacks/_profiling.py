"""Where the time of a run goes: a trace of chosen steps, and a table of the whole."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ant_jax._arguments import check_count, check_function, check_path
from ant_jax._hooks.callback import Callback
from ant_jax.callbacks._compile_time import CompileTime
from ant_jax.callbacks._measures import memory_in_gib
from ant_jax.callbacks._printing import print_beside_bars
from ant_jax.callbacks._runs import PerRun


_logger = logging.getLogger("ant_jax")

_tracing: set[Any] = set()  # the callbacks whose trace is under way
_beginning = threading.Lock()


def profile(
    directory: str | os.PathLike[str], *, start: int = 10, steps: int = 10, epoch: int = 0, name: str = "profile"
) -> Callback:
    """Trace chosen steps with ``jax.profiler``, to look at with XProf, TensorBoard or Perfetto.

    On the host, once an epoch at those batches. It waits for the device before and after the steps, so that the trace
    has these and no others; writing it holds up the loop. A run that comes to its steps while another one of this
    trainer is traced, in a thread or around it, is not traced, and says so.

    Args:
        directory: where the trace goes; it is made.
        start: the first batch of the epoch to trace, counted from 0. The first ones of a run compile.
        steps: batches to trace; fewer where the epoch ends.
        epoch: which epoch, counted from 0.
        name: of the callback; it keeps no memory.

    Returns:
        A host callback. When the run ends and there were no such steps, it says so (logger ``ant_jax``, a warning).

    Raises:
        ValueError: ``directory`` is no path, or a number is out of range.
        RuntimeError: at the steps, when something else than this callback is tracing already.

    >>> profile("runs/digits", start=20, steps=5).every
    range(20, 25)
    """
    check_path("profile", "directory", directory)
    start = check_count("profile", "start", start, least=0, unit="batches")
    steps = check_count("profile", "steps", steps, unit="batches")
    epoch = check_count("profile", "epoch", epoch, least=0)
    traces: PerRun[_Trace] = PerRun(lambda trace: trace.stop())

    def on_batch_begin(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        del batch_idx
        if state.epoch == epoch:
            traces.close(trainer)
            jax.block_until_ready(state.params)
            traces.open(trainer, _Trace(traces, os.fspath(directory)))
        return state, logs

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        del batch_idx
        trace = traces.of(trainer)
        if trace is not None:
            jax.block_until_ready(state.params)
            trace.stop()
        return state, logs

    def on_train_end(trainer: Any, state: Any, logs: Any) -> Any:
        trace = traces.take(trainer)
        if trace is None:
            _logger.warning("profile: nothing was traced: this run had no batch %d in epoch %d", start, epoch)
        else:
            trace.stop()  # where a combinator has left out the end of the steps
        return state, logs

    def on_exception(exception: BaseException, trainer: Any, state: Any, logs: Any) -> Any:
        del exception
        traces.close(trainer)
        return state, logs

    return Callback(
        name=name,
        every=range(start, start + steps),
        on_batch_begin=on_batch_begin,
        on_batch_end=on_batch_end,
        on_train_end=on_train_end,
        on_exception=on_exception,
    )


class _Trace:
    """JAX's trace of the steps of a run; none while another run of the callback is traced, which a warning says.

    Args:
        callback: a key of the callback, the same in all runs.
        directory: where to write it.
    """

    def __init__(self, callback: Any, directory: str):
        self._callback = callback
        with _beginning:
            self._under_way = callback not in _tracing
            if self._under_way:
                jax.profiler.start_trace(directory)
                _tracing.add(callback)
            else:
                _logger.warning("profile: nothing was traced: another run of this trainer was traced at the time")

    def stop(self) -> None:
        """Stop it, if it has not been stopped."""
        if self._under_way:
            self._under_way = False
            try:
                jax.profiler.stop_trace()
            finally:
                _tracing.discard(self._callback)


def profile_steps(
    *,
    every: int | None = None,
    printer: Callable[[str], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    name: str = "profile_steps",
) -> Callback:
    """Print where the time goes: a line an epoch, and a table when the run ends, also when it fails.

    On the host. It waits for the device where a measured span begins or ends, at the ends of epochs and of their
    batches, so what it prints is the device's time and not that of handing it work. The spans are compilation (tracing
    and lowering included), training (the epoch's batches, without compilation), evaluation (the same), and what
    of it the host spent on data (loading, stacking, starting the transfer, some of it while the device computes) and in
    the hooks of each callback; and there is the memory of the fullest device, as in :func:`memory`.

    Args:
        every: also wait at every so many batches, and print the median and the longest time of a batch over those
            spans; ``None``: the mean over the epochs' batches only, which keeps the run as fast as it is.
        printer: what prints a line; by default one that leaves a progress bar intact.
        clock: returns seconds.
        name: of the callback; it keeps no memory.

    Returns:
        A host callback.

    Raises:
        ValueError: ``every`` is below 1.
        TypeError: ``printer`` or ``clock`` is not a function of what it is called with.

    >>> profile_steps(every=50).every
    50
    """
    every = check_count("profile_steps", "every", every, unit="batches", optional=True)
    check_function("profile_steps", "printer", printer, "line", optional=True)
    check_function("profile_steps", "clock", clock)
    tables: PerRun[_Table] = PerRun(lambda table: table.compiling.stop())

    def begin(trainer: Any, state: Any) -> None:
        jax.block_until_ready(state.params)
        tables.open(trainer, _Table(name, clock, printer or print_beside_bars, trainer.num_epochs, state))

    def on_train_begin(trainer: Any, state: Any, logs: Any) -> Any:
        tables.close(trainer)
        begin(trainer, state)
        return state, logs

    def on_epoch_begin(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        del epoch
        table = tables.of(trainer)
        if table is not None:
            table.begin_epoch(state)
        else:  # a combinator has left out the beginning of the run
            begin(trainer, state)
        return state, logs

    def of_epoch(trainer: Any, state: Any) -> _Table | None:
        """The table, unless it has not seen this epoch begin."""
        table = tables.of(trainer)
        return table if table is not None and table.epoch == state.epoch else None

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        table = of_epoch(trainer, state)
        if table is not None:
            table.look(batch_idx + 1, logs)
        return state, logs

    def on_evaluate_begin(trainer: Any, state: Any, logs: Any) -> Any:
        table = of_epoch(trainer, state)
        if table is not None:
            table.end_batches(state)
        return state, logs

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        del epoch
        table = of_epoch(trainer, state)
        if table is not None:
            table.end_epoch(state, logs)
        return state, logs

    def finish(trainer: Any) -> None:
        table = tables.of(trainer)
        if table is not None:
            tables.close(trainer)
            table.finish(trainer.costs)

    def on_train_end(trainer: Any, state: Any, logs: Any) -> Any:
        finish(trainer)
        return state, logs

    def on_exception(exception: BaseException, trainer: Any, state: Any, logs: Any) -> Any:
        del exception
        finish(trainer)
        return state, logs

    looks: dict[str, Any] = {} if every is None else {"every": every, "on_batch_end": on_batch_end}
    return Callback(
        name=name,
        on_train_begin=on_train_begin,
        on_epoch_begin=on_epoch_begin,
        on_evaluate_begin=on_evaluate_begin,
        on_epoch_end=on_epoch_end,
        on_train_end=on_train_end,
        on_exception=on_exception,
        **looks,
    )


class _Table:
    """The times of one run."""

    def __init__(self, name: str, clock: Callable[[], float], printer: Callable[[str], Any], epochs: int, state: Any):
        self._name, self._clock, self._print, self._num_epochs = name, clock, printer, epochs
        self.compiling = CompileTime()
        self._began, self._epochs, self._batches = clock(), 0, 0
        self._training = self._evaluating = 0.0
        self._spans: list[float] = []  # seconds a batch, between looks
        self.begin_epoch(state)

    def begin_epoch(self, state: Any) -> None:
        self._epoch_began, self._mark, self._compiled = self._clock(), self._clock(), self.compiling.seconds
        self.epoch, self._first, self._trained = state.epoch, state.batch_idx, None
        self._look_began, self._looked_at, self._look_compiled = self._mark, state.batch_idx, self._compiled

    def look(self, batches_done: int, logs: Any) -> None:
        """End a span of batches."""
        jax.block_until_ready(logs["loss"])
        now, compiled = self._clock(), self.compiling.seconds
        seconds = now - self._look_began - (compiled - self._look_compiled)
        self._spans.append(max(seconds, 0.0) / (batches_done - self._looked_at))
        self._look_began, self._looked_at, self._look_compiled = now, batches_done, compiled

    def end_batches(self, state: Any) -> None:
        """End the epoch's training, if it has not ended before the evaluation."""
        if self._trained is None:
            jax.block_until_ready(state.params)
            self._trained = self._since_mark()
            self._training += self._trained
            self._batches += state.batch_idx - self._first

    def end_epoch(self, state: Any, logs: Any) -> None:
        self.end_batches(state)
        jax.block_until_ready([*logs.values()])
        evaluated = self._since_mark()
        self._evaluating += evaluated
        self._epochs += 1
        seconds, trained = self._clock() - self._epoch_began, self._trained or 0.0
        each = _per_batch(trained, state.batch_idx - self._first)
        self._print(
            f"{self._name}: epoch {state.epoch + 1}/{self._num_epochs} took {seconds:.2f} s: "
            f"training {trained:.2f} s, {each}; evaluation {evaluated:.2f} s"
        )

    def finish(self, costs: Any) -> None:
        """Print the table."""
        hooks = {name: seconds for name, seconds in costs.hook_seconds.items() if name != self._name}
        slowest = sorted(hooks.items(), key=lambda item: -item[1])
        spans = ""
        if self._spans:
            median, longest = 1000 * np.median(self._spans), 1000 * max(self._spans)
            spans = f"; of {len(self._spans)} spans median {median:.3g} ms, longest {longest:.3g} ms"
        rows = {
            "in all": f"{self._clock() - self._began:.2f} s, {self._epochs} epochs",
            "compiling": f"{self.compiling.seconds:.2f} s",
            "training": f"{self._training:.2f} s, {_per_batch(self._training, self._batches)}{spans}",
            "evaluation": f"{self._evaluating:.2f} s",
            "data": f"{costs.data_seconds:.2f} s, some of it while the device computes",
            "callbacks": f"{sum(hooks.values()):.2f} s",
            **{f"  {name}": f"{seconds:.2f} s" for name, seconds in slowest},
            "memory": "{:.2f} GiB in use, {:.2f} GiB at most".format(*memory_in_gib()),
        }
        width = max(map(len, rows))
        self._print("\n".join([f"{self._name}:", *(f"  {row.ljust(width)}  {text}" for row, text in rows.items())]))

    def _since_mark(self) -> float:
        """Seconds since the last mark, without compilation; makes a new mark."""
        now, compiled = self._clock(), self.compiling.seconds
        seconds = now - self._mark - (compiled - self._compiled)
        self._mark, self._compiled = now, compiled
        return max(seconds, 0.0)


def _per_batch(seconds: float, batches: int) -> str:
    return f"{1000 * seconds / max(batches, 1):.3g} ms a batch"
