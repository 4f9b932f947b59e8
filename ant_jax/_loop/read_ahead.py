"""How far a loader is read ahead of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ant_jax._engine.launch import MAX_ROWS
from ant_jax._loop.hook_windows import HookWindow


class ReadAhead(NamedTuple):
    """How far a loader is read ahead of training.

    Attributes:
        most: batches in a chunk, at most.
        peek: whether the batch after a chunk is read with it.
        pauses: returns whether, when so many batches of the epoch are read, nothing is read before the hooks after the
            last of them have run.
    """

    most: int = MAX_ROWS
    peek: bool = True
    pauses: Callable[[int], bool] = lambda done: False


def read_ahead(
    prefetch: int | None,
    windows: Sequence[HookWindow],
    is_read_once: bool,
    stops: Callable[[int], bool],
    must_peek: bool,
) -> ReadAhead:
    """How far to read ahead, as ``prefetch`` says, or as the loader and the windows let it.

    Args:
        prefetch: of ``fit``.
        windows: of the host callbacks.
        is_read_once: whether what is read of the loader cannot be read again.
        stops: returns whether the run ends when so many batches of the epoch are done.
        must_peek: whether a batch must be known to be the last.
    """
    if prefetch is not None:
        # A chunk is read, with the batch after it, while the one before it runs.
        return ReadAhead(max(1, prefetch - 1), prefetch > 0, lambda done: prefetch < 2)
    pausing = [window for window in windows if window.every is not None]
    if not pausing or not is_read_once:
        return ReadAhead()

    def pauses(done: int) -> bool:
        # A hook may stop the run, which loses what is read, and may change what the loader is to give.
        return stops(done) or any(window.ends(done) for window in pausing)

    intervals = [window.every for window in pausing if isinstance(window.every, int)]
    return ReadAhead(min(intervals, default=MAX_ROWS), must_peek, pauses)
