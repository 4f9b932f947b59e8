"""How many steps a launch should have."""

from __future__ import annotations

import collections
import copy
import time
from typing import NamedTuple

import jax


# The time that a launch should take: short enough for Ctrl-C and a progress bar, long enough to cost nothing.
LAUNCH_SECONDS = 0.1

# Launches are waited for in groups, and no more groups may be under way: while one runs, the next one's batches are
# made. A group is complete when it has so many seconds, or so many bytes of batches; a launch may have more. On a CPU,
# every wait costs the step that runs, and batches made much further ahead have left its caches when they are used;
# elsewhere they take the device's memory.
GROUPS = {"cpu": (0.03, 8 * 2**20)}
OTHER_GROUPS = (LAUNCH_SECONDS, 32 * 2**20)
MAX_IN_FLIGHT = 2


class _Group(NamedTuple):
    """Launches that are waited for together.

    Attributes:
        steps: in them.
        under_way: steps in them and in the groups that the device had yet to finish when the last launch was made.
        launched_at: when that was.
        log: one of its logs.
    """

    steps: int
    under_way: int
    launched_at: float
    log: jax.Array


class LaunchSizer:
    """Chooses how many steps a launch should have, and keeps the host from running ahead of the device.

    Args:
        step_bytes: of the batch of a step.

    Attributes:
        steps: of the next launch, at most; found by doubling until they take ``LAUNCH_SECONDS``.
    """

    def __init__(self, step_bytes: int):
        self.steps = 1
        seconds, size = GROUPS.get(jax.default_backend(), OTHER_GROUPS)
        self._group, self._most_steps = seconds / LAUNCH_SECONDS, size / max(1, step_bytes)
        self._new_steps = 0
        self._under_way: collections.deque[_Group] = collections.deque()

    def of_next_run(self) -> LaunchSizer:
        """Return one for another run: it begins with what was learnt, and without launches, which may have failed."""
        pace = copy.copy(self)
        pace._new_steps, pace._under_way = 0, collections.deque()
        return pace

    def launched(self, steps: int, log: jax.Array) -> None:
        """Note a launch of so many steps, and one of its logs.

        After every group of steps, wait for those before the last ``MAX_IN_FLIGHT`` groups.
        """
        self._new_steps += steps
        if self._new_steps < min(self.steps * self._group, self._most_steps):
            return
        under_way = self._new_steps + sum(group.steps for group in self._under_way)
        self._under_way.append(_Group(self._new_steps, under_way, time.perf_counter(), log))
        self._new_steps = 0
        if len(self._under_way) <= MAX_IN_FLIGHT:
            return
        # From the launch of a group to its end the device runs all that was under way then. An evaluation or a slow
        # hook in that time makes steps seem slow, but not for long.
        oldest = self._under_way.popleft()
        oldest.log.block_until_ready()
        wanted = LAUNCH_SECONDS * oldest.under_way / max(time.perf_counter() - oldest.launched_at, 1e-9)
        self.steps = max(1, self.steps // 2, min(2 * self.steps, int(wanted)))
