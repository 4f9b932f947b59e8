"""Progress as lines of text."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ant_jax._callback import Callback
from ant_jax._history import to_python


def log_progress(
    every: int = 100,
    *,
    printer: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    name: str = "log_progress",
) -> Callback:
    """Print a line every so many batches and one every epoch.

    A batch line has the means of all batches since the last line, and the examples per second of training alone,
    waiting for data included and evaluation not.

    Args:
        every: batches between lines; at least 1.
        printer: what prints a line; by default one that leaves a progress bar intact.
        clock: returns seconds.
        name: of the callback.

    Returns:
        A host callback; it keeps no memory.

    Raises:
        ValueError: ``every`` is below 1.

    >>> log_progress(every=50)
    Callback(name='log_progress', hooks=on_epoch_begin, on_batch_begin, on_batch_end, on_epoch_end, on_train_end)
    """
    times = {"epoch": 0.0, "window": 0.0}  # wall-clock readings: no part of the run, so no memory
    sizes = {"first": 0}

    def say(line: str) -> None:
        if printer is not None:
            printer(line)
        else:
            from tqdm import tqdm

            tqdm.write(line)

    def on_epoch_begin(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        times["epoch"] = clock()
        say(f"epoch {epoch + 1}/{trainer.num_epochs}")
        return state, logs

    def on_batch_begin(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        del batch_idx, trainer
        times["window"], sizes["first"] = clock(), logs["batch_size"]
        return state, logs

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        means = {log: np.mean(values) for log, values in logs.window.items() if np.ndim(values) == 1}
        batches = len(next(iter(logs.window.values())))
        examples = (batches - 1) * sizes["first"] + logs["batch_size"]  # only the last batch may be shorter
        rate = examples / max(clock() - times["window"], 1e-9)
        total = f"/{trainer.steps_per_epoch}" if trainer.steps_per_epoch else ""
        say(f"  batch {batch_idx + 1}{total}: {_in_words(means)} ({rate:,.0f} examples/s)")
        return state, logs

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
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
        on_epoch_end=on_epoch_end,
        on_train_end=on_train_end,
    )


def _in_words(values: Mapping[str, Any]) -> str:
    scalars = {name: to_python(value) for name, value in values.items() if np.ndim(value) == 0}
    return ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())
