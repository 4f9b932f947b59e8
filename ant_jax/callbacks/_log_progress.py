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
    times = {"epoch": 0.0, "line": 0.0}
    waiting: list[tuple[int, Any, int]] = []
    window = {"from": 0, "batch_size": 0}

    def say(line: str) -> None:
        if printer is not None:
            printer(line)
        else:
            from tqdm import tqdm

            tqdm.write(line)

    def print_waiting(trainer: Any) -> float:
        """Print the line that waits; returns the seconds that its batches took."""
        if not waiting:
            return 0.0
        batch_idx, logs, examples = waiting.pop()
        means = {log: np.mean(values) for log, values in logs.window.items() if np.ndim(values) == 1}
        now = clock()
        seconds, times["line"] = max(now - times["line"], 1e-9), now
        total = f"/{trainer.steps_per_epoch}" if trainer.steps_per_epoch else ""
        say(f"  batch {batch_idx + 1}{total}: {_in_words(means)} ({examples / seconds:,.0f} examples/s)")
        return seconds

    def on_epoch_begin(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        waiting.clear()
        times["epoch"] = times["line"] = clock()
        say(f"epoch {epoch + 1}/{trainer.num_epochs}")
        return state, logs

    def on_batch_begin(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        window["from"], window["batch_size"] = batch_idx, logs["batch_size"]
        return state, logs

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        # Reading the logs waits for the device, which then waits for its next launch. So while lines come fast, each is
        # printed when the next one is due, by when its values are there.
        seconds = print_waiting(trainer)
        # Only the last batch of a window may be shorter than the others.
        examples = (batch_idx - window["from"]) * window["batch_size"] + logs["batch_size"]
        waiting.append((batch_idx, logs, examples))
        if seconds > _LATE_SECONDS:
            print_waiting(trainer)
        return state, logs

    def on_evaluate_begin(trainer: Any, state: Any, logs: Any) -> Any:
        print_waiting(trainer)
        return state, logs

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        print_waiting(trainer)
        seconds = clock() - times["epoch"]
        say(f"epoch {epoch + 1}/{trainer.num_epochs} took {seconds:.2f} s: {_in_words(logs)}")
        return state, logs

    def on_train_end(trainer: Any, state: Any, logs: Any) -> Any:
        if state.stop:
            say(f"stopped after epoch {state.epoch} of {trainer.num_epochs}, as a callback asked")
        return state, logs

    return Callback(
        name=name,
        every=every,
        on_epoch_begin=on_epoch_begin,
        on_batch_begin=on_batch_begin,
        on_batch_end=on_batch_end,
        on_evaluate_begin=on_evaluate_begin,
        on_epoch_end=on_epoch_end,
        on_train_end=on_train_end,
    )


def _in_words(values: Mapping[str, Any]) -> str:
    scalars = {name: to_python(value) for name, value in values.items() if np.ndim(value) == 0}
    return ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())
