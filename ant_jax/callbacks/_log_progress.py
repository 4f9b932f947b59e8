"""Progress as lines of text."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ant_jax._callback import Callback
from ant_jax._history import to_python


# A line may be as late as this.
_LATE_SECONDS = 0.1


def log_progress(
    every: int = 100,
    *,
    printer: Callable[[str], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    name: str = "log_progress",
) -> Callback:
    """Print a line every so many batches and one every epoch.

    A batch line has the means of all batches since the last line, and the examples per second of training alone,
    waiting for data included and evaluation not. Lines that come faster than ten a second are printed one line late,
    so that training does not wait for them.

    Args:
        every: batches between lines; at least 1.
        printer: what prints a line; by default one that leaves a progress bar intact.
        clock: returns seconds.
        name: of the callback.

    Returns:
        A host callback; it keeps no memory.

    Raises:
        ValueError: ``every`` is below 1.

    >>> log_progress(every=50).every
    50
    """
    # Clock readings and a line that waits to be printed: nothing of them decides the run, so no memory keeps them.
    began = {"epoch": 0.0, "line": 0.0}
    first = {"batch_size": 0}
    waiting: list[tuple[str, Any]] = []

    def say(line: str) -> None:
        if printer is not None:
            printer(line)
        else:
            from tqdm import tqdm

            tqdm.write(line)

    def print_waiting() -> None:
        while waiting:
            place, logs = waiting.pop()
            window = {log: values for log, values in logs.window.items() if np.ndim(values) == 1}
            now = clock()
            # Only the last batch of a window may be shorter than the others.
            examples = (len(window["loss"]) - 1) * first["batch_size"] + logs["batch_size"]
            rate = examples / max(now - began["line"], 1e-9)
            say(f"  {place}: {_in_words({log: np.mean(v) for log, v in window.items()})} ({rate:,.0f} examples/s)")
            began["line"] = now

    def on_train_begin(trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        waiting.clear()
        began["epoch"] = began["line"] = clock()
        return state, logs

    def on_epoch_begin(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        began["epoch"] = began["line"] = clock()
        say(f"epoch {epoch + 1}/{trainer.num_epochs}")
        return state, logs

    def on_batch_begin(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        del batch_idx, trainer
        first["batch_size"] = logs["batch_size"]
        return state, logs

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        print_waiting()
        total = f"/{trainer.steps_per_epoch}" if trainer.steps_per_epoch else ""
        waiting.append((f"batch {batch_idx + 1}{total}", logs))
        # Reading logs that are not there yet waits for the device, and then the device for its next launch. So while
        # lines come fast, such a line waits for the next one, by when its values are there.
        if logs["loss"].is_ready() or clock() - began["line"] > _LATE_SECONDS:
            print_waiting()
        return state, logs

    def on_evaluate_begin(trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        print_waiting()
        return state, logs

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        print_waiting()
        values = _in_words(logs)
        say(f"epoch {epoch + 1}/{trainer.num_epochs} took {clock() - began['epoch']:.2f} s: {values}")
        return state, logs

    def on_train_end(trainer: Any, state: Any, logs: Any) -> Any:
        if state.stop:
            say(f"stopped after epoch {state.epoch} of {trainer.num_epochs}, as a callback asked")
        return state, logs

    def on_exception(exception: BaseException, trainer: Any, state: Any, logs: Any) -> Any:
        del exception, trainer
        print_waiting()
        return state, logs

    return Callback(
        name=name,
        every=every,
        on_train_begin=on_train_begin,
        on_epoch_begin=on_epoch_begin,
        on_batch_begin=on_batch_begin,
        on_batch_end=on_batch_end,
        on_evaluate_begin=on_evaluate_begin,
        on_epoch_end=on_epoch_end,
        on_train_end=on_train_end,
        on_exception=on_exception,
    )


def _in_words(values: Mapping[str, Any]) -> str:
    scalars = {name: to_python(value) for name, value in values.items() if np.ndim(value) == 0}
    return ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())
