"""How many steps a launch should have."""

from __future__ import annotations

import collections
import time

import jax


# The time that a launch should take: short enough for Ctrl-C and a progress bar, long enough to cost nothing.
LAUNCH_SECONDS = 0.1

# Launches are waited for in groups of so many seconds, and no more groups may be under way: while one runs, the next
# one's batches are made. On a CPU, batches made much further ahead have left its caches when they are used.
GROUP_SECONDS = {"cpu": 0.003}
MAX_IN_FLIGHT = 2


class Pace:
    """Chooses how many steps a launch should have, and keeps the host from running ahead of the device.

    Attributes:
        steps: of the next launch, at most; found by doubling until they take ``LAUNCH_SECONDS``.
    """

    def __init__(self):
        self.steps = 1
        self._group = GROUP_SECONDS.get(jax.default_backend(), LAUNCH_SECONDS) / LAUNCH_SECONDS
        self._new_steps = 0
        self._under_way: collections.deque[tuple[jax.Array, int]] = collections.deque()
        self._finished_at: float | None = None

    def launched(self, steps: int, log: jax.Array) -> None:
        """Note a launch of so many steps, and one of its logs.

        After every group of steps, wait for those before the last ``MAX_IN_FLIGHT`` groups.
        """
        self._new_steps += steps
        if self._new_steps < self.steps * self._group:
            return
        self._under_way.append((log, self._new_steps))
        self._new_steps = 0
        if len(self._under_way) <= MAX_IN_FLIGHT:
            return
        oldest, steps = self._under_way.popleft()
        oldest.block_until_ready()
        now = time.perf_counter()
        if self._finished_at is not None:
            wanted = LAUNCH_SECONDS * steps / max(now - self._finished_at, 1e-9)
            self.steps = max(1, min(2 * self.steps, int(wanted)))
        self._finished_at = now

    def interrupted(self) -> None:
        """Forget the clock: something else than training comes between this launch and the next."""
        self._new_steps = 0
        self._under_way.clear()
        self._finished_at = None
