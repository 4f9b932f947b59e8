"""The batch hooks of observers, called after the launches.

A launch trains on many batches, and the host knows their logs when it is done. So observers hear of the batches of a
launch when the next one has been dispatched and this one is done, while the device is busy. What they have not heard of
yet is told to them before any other hook runs on the host, so all hooks come in the order of the loop.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ant_jax._engine import Launch
from ant_jax._events import Events
from ant_jax._live import Live
from ant_jax._logs import Logs, joined
from ant_jax._looks import Look
from ant_jax._observed import Facts, ObservedLogs, ObservedState, Rows, facts_of
from ant_jax._run import Run
from ant_jax._state import OpenWindow, TrainState
from ant_jax._windows import Window


class Part(NamedTuple):
    """Some batches of a launch that have passed in a window."""

    rows: Rows
    start: int
    stop: int

    def read(self) -> Window:
        """Return their logs; waits for the device."""
        return self.rows.between(self.start, self.stop)


class ObserverLook(Look):
    """An observer's looks at the batches.

    With ``every=1`` each batch is a window of its own, which is never noted as open.

    Attributes:
        since: the batch of the launch at which the window that is open begins, or goes on.
    """

    __slots__ = ("since",)

    def begins(self, batch_idx: int) -> bool:
        """Whether a window begins before this batch."""
        return self.every == 1 or super().begins(batch_idx)

    def begin(self, published: Mapping[str, Any], since: int = 0) -> None:
        """Open the window, at a batch of the launch; observers publish nothing."""
        self.open, self.since = self.every != 1, since


class _Told(NamedTuple):
    """The batches of one launch, as observers are to hear of them.

    Attributes:
        launch: which one.
        rows: its logs.
        looks: of the epoch.
        after: the facts after its last batch.
        begun: whether observers have heard that its first batch begins.
        over: whether no batch follows in the epoch.
    """

    launch: Launch
    rows: Rows
    looks: list[ObserverLook]
    after: Facts
    begun: bool
    over: bool = False


class Observers:
    """The observers of one call of ``fit``, and what they have not heard of yet.

    Args:
        events: the callbacks of the run.
        trainer: what hooks are given.
        live: the state of the run.
        run: the run's facts. While observers hear of batches the run is not whole, so that one that goes on after an
            exception there tells them again.

    Attributes:
        looks: those of the epoch under way.
    """

    def __init__(self, events: Events, trainer: Any, live: Live, run: Run):
        self._events, self._trainer, self._live, self._run = events, trainer, live, run
        self._order = [callback.name for callback in events.callbacks]
        self._waiting: collections.deque[_Told] = collections.deque()
        self._last: _Told | None = None  # of those that observers have heard of
        self._begun = False
        self.looks: list[ObserverLook] = []

    def observe(self, state: TrainState) -> ObservedState:
        """Return what observers see of a state; does not wait for the device, unless a hook has replaced the step."""
        live = self._live
        is_live = state.step is live.part().step and state.cycle is live.cycle
        return ObservedState(facts_of(state, live.total_steps if is_live else state.total_steps))

    def begin_epoch(self) -> None:
        """Begin the looks of an epoch."""
        self.looks = [ObserverLook(*observer) for observer in self._events.observers]

    def end_epoch(self) -> None:
        """End them."""
        self.looks = []

    def open_windows(self) -> dict[str, OpenWindow]:
        """Return the windows that are open, by the callback's name."""
        return {look.callback.name: look.window for look in self.looks if look.open}

    def launched(self, launch: Launch) -> None:
        """Note a launch that is dispatched, and tell of those before it that are done."""
        if not self.looks:
            return
        while self._waiting and self._waiting[0].rows.is_ready:
            self._tell(self._waiting.popleft())
        self._waiting.append(_Told(launch, Rows(launch), self.looks, self._facts(launch), self._begun))
        self._begun = False

    def finish(self) -> None:
        """Note that no batch follows in the epoch."""
        if self._waiting:
            self._waiting[-1] = self._waiting[-1]._replace(over=True)
            return
        for look in self.looks:
            if look.open:
                self.look("on_batch_end", look, self._live.host.batch_idx - 1, {})

    def settle(self) -> None:
        """Tell of all batches that are trained on."""
        while self._waiting:
            self._tell(self._waiting.popleft())

    def settle_before(self, name: str, only: Any = None) -> None:
        """Do so before a hook, if any of these callbacks has it on the host."""
        if self._waiting and self._events.runs_on_host(name, only):
            self.settle()

    def settle_at(self, error: BaseException) -> None:
        """Do so before ``on_exception``; an observer that fails at it does not hide the error."""
        try:
            self.settle()
        except Exception as second:
            error.add_note(f"telling observers of the batches before failed too: {second!r}")

    def beginning(self, looks: Sequence[Look], batch_idx: int) -> list[Look]:
        """Tell of all batches before this one, at which some other callbacks' looks begin; add those of observers."""
        self.settle()
        self._begun = True
        return self._in_order(looks, [look for look in self.looks if look.begins(batch_idx)])

    def ending(self, looks: Sequence[Look], done: int, over: bool) -> list[Look]:
        """Do so where looks end, after which so many batches of the epoch are done; ``over``: or all batches."""
        ended_before = not self._waiting
        while self._waiting:
            self._tell(self._waiting.popleft(), but_for_the_end=not self._waiting)
        ending = [
            look
            for look in self.looks
            if (look.open and (over or look.ends(done))) or (look.every == 1 and not ended_before)
        ]
        return self._in_order(looks, ending)

    def look(self, name: str, look: Look, batch_idx: int, logs: Mapping[str, Any]) -> None:
        """Run a batch hook of an observer at the batch that the loop is at.

        Args:
            name: the hook.
            look: of the observer, which begins or ends.
            batch_idx: the batch.
            logs: with what other callbacks have published at this batch.
        """
        state = ObservedState(self._facts())
        if name == "on_batch_begin":
            look.begin({})
            shown = Logs(logs)
        else:
            if self._last is None:
                raise RuntimeError("a look ends before any launch")  # cannot be: it is the launch that ends it
            launch = self._last.launch
            own, values = launch.latest.unread(), joined(logs).unread()
            published = {log: value for log, value in values.items() if value is not own.get(log)}
            window = look.close() if look.every != 1 else None
            shown = ObservedLogs(self._last.rows, launch.steps - 1, window, published or None)
        self._call(look, name, batch_idx, state, shown)

    def _in_order(self, looks: Sequence[Look], of_observers: Sequence[Look]) -> list[Look]:
        return sorted([*looks, *of_observers], key=lambda look: self._order.index(look.callback.name))

    def _facts(self, launch: Launch | None = None) -> Facts:
        host = self._live.host
        place = host.epoch, host.batch_idx, host.examples, host.batch_size
        each = 0 if launch is None else launch.examples
        return Facts(*place, host.history, self._live.total_steps, self._live.stop, each)

    def _tell(self, told: _Told, but_for_the_end: bool = False) -> None:
        """Tell of the batches of a launch, but for the end of the last where others are told of it, too."""
        whole, self._run.whole = self._run.whole, False
        self._last = told
        try:
            self._tell_each(told, but_for_the_end)
        except BaseException:
            self._waiting.clear()
            raise
        for look in told.looks:
            if look.open:
                look.passed(Part(told.rows, look.since, told.launch.steps))
                look.since = 0
        self._run.whole = whole

    def _tell_each(self, told: _Told, but_for_the_end: bool) -> None:
        launch, rows, looks, after, begun, over = told
        beginning = [look for look in looks if look.every != 1 or "on_batch_begin" in look.hooks]
        at_begin = Logs({"batch_size": launch.examples})
        first, last = after.batch_idx - launch.steps, launch.steps - 1
        for row in range(launch.steps):
            batch_idx = first + row
            if beginning and not (begun and row == 0):
                before = ObservedState(after, launch.steps - row)
                for look in beginning:
                    if look.begins(batch_idx):
                        look.begin({}, row)
                        self._call(look, "on_batch_begin", batch_idx, before, at_begin)
            if but_for_the_end and row == last:
                return
            state = ObservedState(after, last - row)
            at_end = ObservedLogs(rows, row)
            for look in looks:
                if look.every == 1:
                    self._call(look, "on_batch_end", batch_idx, state, at_end)
                elif look.open and self._ends(look, batch_idx + 1, row == last, over):
                    look.passed(Part(rows, look.since, row + 1))
                    self._call(look, "on_batch_end", batch_idx, state, ObservedLogs(rows, row, look.close()))

    def _ends(self, look: Look, done: int, is_last: bool, over: bool) -> bool:
        if is_last and over:
            return True
        # With `every=None` the host has control after the launch, and not inside it.
        return look.ends(done) if look.every is not None else is_last and look.ends(done)

    def _call(self, look: Look, name: str, batch_idx: int, state: ObservedState, logs: Logs) -> None:
        hook = look.hooks.get(name)
        if hook is not None:
            self._events.observer_hook(look.callback, name, hook, batch_idx, self._trainer, state, logs)
