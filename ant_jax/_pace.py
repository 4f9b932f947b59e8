"""How many steps a launch should have."""

from __future__ import annotations

import collections
import time
from typing import NamedTuple

import jax


# The time that a launch should take: short enough for Ctrl-C and a progress bar, long enough to cost nothing.
LAUNCH_SECONDS = 0.1

# Launches are waited for in groups, and no more groups may be under way: while one runs, the next one's batches are
# made. A group has so many seconds and so many bytes of batches at most. On a CPU, every wait costs the step that runs,
# and batches made much further ahead have left its caches when they are used; elsewhere they take the device's memory.
GROUP_SECONDS = {"cpu": 0.03}
GROUP_BYTES = {"cpu": 8 * 2**20}
MAX_GROUP_BYTES = 32 * 2**20
MAX_IN_FLIGHT = 2


class _Group(NamedTuple):
    """Launches that are waited for together: their steps, when the last was made, and one of its logs."""

    steps: int
    launched_at: float
    log: jax.Array


class Pace:
    """Chooses how many steps a launch should have, and keeps the host from running ahead of the device.

    Args:
        step_bytes: of the batch of a step.

    Attributes:
        steps: of the next launch, at most; found by doubling until they take ``LAUNCH_SECONDS``.
    """

    def __init__(self, step_bytes: int):
        self.steps = 1
        backend = jax.default_backend()
        self._group = GROUP_SECONDS.get(backend, LAUNCH_SECONDS) / LAUNCH_SECONDS
        self._most_steps = GROUP_BYTES.get(backend, MAX_GROUP_BYTES) / max(1, step_bytes)
        self._new_steps = 0
        self._under_way: collections.deque[_Group] = collections.deque()

    def launched(self, steps: int, log: jax.Array) -> None:
        """Note a launch of so many steps, and one of its logs.

        After every group of steps, wait for those before the last ``MAX_IN_FLIGHT`` groups.
        """
        self._new_steps += steps
        if self._new_steps < min(self.steps * self._group, self._most_steps):
            return
        self._under_way.append(_Group(self._new_steps, time.perf_counter(), log))
        self._new_steps = 0
        if len(self._under_way) <= MAX_IN_FLIGHT:
            return
        # While the oldest group was under way, the device ran it and what was launched before it: as many groups as
        # are under way now. An evaluation or a slow hook in that time makes steps seem slow, but not for long.
        steps_run = sum(group.steps for group in self._under_way)
        oldest = self._under_way.popleft()
        oldest.log.block_until_ready()
        wanted = LAUNCH_SECONDS * steps_run / max(time.perf_counter() - oldest.launched_at, 1e-9)
        self.steps = max(1, self.steps // 2, min(2 * self.steps, int(wanted)))
