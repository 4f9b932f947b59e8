"""How often host callbacks look at the batches, and what they see when they do."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ant_jax._engine.launch_size import LAUNCH_SECONDS
from ant_jax._hooks.callback import Callback, HookFn
from ant_jax._logs.logs import Logs
from ant_jax._logs.windows import Window, join_windows
from ant_jax._state.host_fields import OpenHookWindow


class Passed(Protocol):
    """Batches that have passed in a window: a launch, a part of one, or those before the run went on."""

    def read(self) -> Window:
        """Return their logs; waits for the device."""
        ...


class HookWindow:
    """One host callback's looks at the batches: which ones, and the batches that have passed since the last.

    A look is a window of batches with an ``on_batch_begin`` before it and an ``on_batch_end`` after it. With
    ``every=N`` windows begin at batches 0, N, 2N, ...; with ``every=range(a, b)`` there is one, of those batches; with
    ``every=None`` they begin wherever the host next has control.

    Args:
        callback: whose looks.
        hooks: its batch hooks, by name.

    Attributes:
        callback: the same.
        hooks: the same.
        every: the callback's.
        open: whether the window has begun and not ended.
    """

    __slots__ = ("_ended_at", "_launches", "_published", "_seen", "callback", "every", "hooks", "open")

    def __init__(self, callback: Callback, hooks: Mapping[str, HookFn]):
        self.callback, self.hooks, self.every = callback, hooks, callback.every
        self.open = False
        self._published: Mapping[str, Any] = {}
        self._launches: list[Passed] = []
        self._seen: set[str] = set()
        self._ended_at = time.monotonic()

    def is_first(self, name: str) -> bool:
        """Whether this is the first time in the epoch that this hook of the callback runs."""
        if name in self._seen:
            return False
        self._seen.add(name)
        return True

    @property
    def window(self) -> OpenHookWindow:
        """What has passed in the window that is open."""
        return OpenHookWindow(self._published, functools.partial(_read, list(self._launches)))

    def resume(self, batch_idx: int, windows: Mapping[str, OpenHookWindow] | None) -> None:
        """Open the window that a run which goes on inside an epoch was in; its beginning has been seen.

        Args:
            batch_idx: where the run goes on.
            windows: those that were open there, by the callback's name; ``None``, if nobody kept them.
        """
        if windows is not None:
            window = windows.get(self.callback.name)
            if window is not None:
                self.open, self._published = True, window.published
                self._launches.append(_Before(window))
        elif isinstance(self.every, range):
            self.open = self.every.start < batch_idx < self.every.stop
        else:
            self.open = self.every is not None and batch_idx % self.every > 0

    def begins(self, batch_idx: int) -> bool:
        """Whether a window begins before this batch."""
        if isinstance(self.every, range):
            return not self.open and batch_idx == self.every.start
        return not self.open and (self.every is None or batch_idx % self.every == 0)

    def until_border(self, batch_idx: int) -> int | None:
        """Batches from here on until a window must begin or end; ``None`` when none must."""
        if isinstance(self.every, range):
            return next((at - batch_idx for at in (self.every.start, self.every.stop) if at > batch_idx), None)
        return None if self.every is None else self.every - batch_idx % self.every

    def begin(self, published: Mapping[str, Any]) -> None:
        """Open the window, at whose beginning the callback has published something, or nothing."""
        self.open, self._published = True, published

    def passed(self, launch: Passed) -> None:
        """Note the logs of a launch or of a part of one, if the window is open."""
        if self.open:
            self._launches.append(launch)

    def ends(self, batches_done: int) -> bool:
        """Whether the window, if it is open, ends when so many batches of the epoch are done."""
        if self.every is None:
            return time.monotonic() - self._ended_at > LAUNCH_SECONDS / 2
        return batches_done == self.every.stop if isinstance(self.every, range) else batches_done % self.every == 0

    def end(self, logs: Mapping[str, Any]) -> Logs:
        """Close the window; returns ``logs`` for its end, with all that has passed in it."""
        read = self.close()
        return Logs({**logs, **self._published} if self._published else logs, read)

    def close(self) -> Callable[[], Window]:
        """Close the window; returns what reads all that has passed in it."""
        launches, self._launches = self._launches, []
        self.open = False
        if self.every is None:
            self._ended_at = time.monotonic()
        return lambda: _read(launches)


class _Before:
    """The batches of a window that had passed before the run went on."""

    def __init__(self, window: OpenHookWindow):
        self.read = window.read


def _read(launches: Sequence[Passed]) -> Window:
    """Join the logs of launches; waits for the device."""
    return join_windows([launch.read() for launch in launches])
