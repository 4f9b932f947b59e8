"""The batch hooks of observers, called after the launches.

The host knows the logs of a launch when it is done. So the hooks for its batches are called when the next launch has
been dispatched, and the device is busy. Before any other hook runs on the host, what is pending is flushed: all hooks
come in the order of the loop.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ant_jax._engine.buffers import Buffers
from ant_jax._engine.launch import Launch
from ant_jax._hooks.callback import Callback, HookFn
from ant_jax._hooks.callback_list import CallbackList
from ant_jax._hooks.observed import Facts, ObservedLogs, ObservedState, Rows, facts_of, observed
from ant_jax._logs.logs import Logs, join_logs
from ant_jax._logs.windows import Window
from ant_jax._loop.hook_windows import HookWindow
from ant_jax._loop.run_info import RunInfo
from ant_jax._state.train_state import TrainState


class Part(NamedTuple):
    """Some batches of a launch that have passed in a window."""

    rows: Rows
    start: int
    stop: int

    def read(self) -> Window:
        """Return their logs; waits for the device."""
        return self.rows.between(self.start, self.stop)


class ObserverLook(HookWindow):
    """An observer's looks at the batches.

    With ``every=1`` each batch is a window of its own, which is never noted as open.

    Attributes:
        since: the batch of the launch at which the window that is open begins, or goes on.
    """

    __slots__ = ("since",)

    def __init__(self, callback: Callback, hooks: Mapping[str, HookFn]):
        super().__init__(callback, hooks)
        self.since = 0

    def begins(self, batch_idx: int) -> bool:
        """Whether a window begins before this batch."""
        return self.every == 1 or super().begins(batch_idx)

    def begin(self, published: Mapping[str, Any], since: int = 0) -> None:
        """Open the window, at a batch of the launch; observers publish nothing."""
        self.open, self.since = self.every != 1, since

    def next_after(self, batch_idx: int) -> int | None:
        """The next batch at which a window must begin or end; ``None`` when none must."""
        if isinstance(self.every, range):
            return next((at for at in (self.every.start, self.every.stop - 1) if at > batch_idx), None)
        if self.every is None:
            return None
        place = (batch_idx + 1) % self.every
        return batch_idx + 1 if place == 0 else batch_idx + self.every - place


class _Delivery(NamedTuple):
    """The batches of one launch, for which the hooks of observers are to be called.

    Attributes:
        launch: which one.
        rows: its logs.
        looks: of the epoch.
        after: the facts after its last batch.
        begun: whether ``on_batch_begin`` of its first batch has been called.
        over: whether no batch follows in the epoch.
    """

    launch: Launch
    rows: Rows
    looks: list[ObserverLook]
    after: Facts
    begun: bool
    over: bool = False

    @property
    def first(self) -> int:
        """The first batch."""
        return self.after.batch_idx - self.launch.steps


class Observers:
    """The observers of one call of ``fit``, and the launches that are pending.

    Args:
        events: the callbacks of the run.
        trainer: what hooks are given.
        live: the state of the run.
        run: the run's facts. While hooks of observers are called the run is not whole, because a run that goes on from
            there would leave out batches.

    Attributes:
        looks: those of the epoch under way.
    """

    def __init__(self, events: CallbackList, trainer: Any, live: Buffers, run: RunInfo):
        self._events, self._trainer, self._live, self._run = events, trainer, live, run
        self._order = [callback.name for callback in events.callbacks]
        self._pending: collections.deque[_Delivery] = collections.deque()
        self._last: _Delivery | None = None  # of which hooks have been called
        self._begun = False
        self.looks: list[ObserverLook] = []

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Let hooks of observers see the states of this run while the body runs."""
        self._events.observe = self.observe
        try:
            yield
        finally:
            self._events.observe = observed  # a cycle of references would keep the arrays of the run

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

    def launched(self, launch: Launch) -> None:
        """Note a launch that is dispatched, and deliver those before it that are done."""
        if not self.looks:
            return
        while self._pending and self._pending[0].rows.is_ready:
            self._deliver(self._pending.popleft())
        self._pending.append(_Delivery(launch, Rows(launch), self.looks, self._facts(launch), self._begun))
        self._begun = False

    def finish(self) -> None:
        """Note that no batch follows in the epoch."""
        if self._pending:
            self._pending[-1] = self._pending[-1]._replace(over=True)
            return
        for look in self.looks:
            if look.open:
                self.look("on_batch_end", look, self._live.host.batch_idx - 1, {})

    def flush(self) -> None:
        """Call the hooks for all batches that are trained on."""
        while self._pending:
            self._deliver(self._pending.popleft())

    def flush_before(self, name: str, only: Any = None) -> None:
        """Flush before a hook, if any of these callbacks has it on the host."""
        if self._pending and self._events.runs_on_host(name, only):
            self.flush()

    def flush_at(self, error: BaseException) -> None:
        """Flush before ``on_exception``; an observer that fails then does not hide the error."""
        try:
            self.flush()
        except BaseException as second:  # Ctrl-C, too, because the run ends anyway
            error.add_note(f"an observer failed too, at a batch before: {second!r}")

    def beginning(self, looks: Sequence[HookWindow], batch_idx: int) -> list[HookWindow]:
        """Flush before looks of other callbacks begin at a batch; add those of observers, in the order of the list."""
        self.flush()
        self._begun = True
        return self._in_order(looks, [look for look in self.looks if look.begins(batch_idx)])

    def ending(self, looks: Sequence[HookWindow], done: int, over: bool) -> list[HookWindow]:
        """Flush, but for the end of the last batch, where looks of other callbacks end; add as ``beginning`` does.

        Args:
            looks: that end.
            done: batches of the epoch that are done.
            over: whether no batch follows in the epoch.
        """
        ended_before = not self._pending
        while self._pending:
            self._deliver(self._pending.popleft(), hold_end=not self._pending)
        ending = [
            look
            for look in self.looks
            if (look.open and (over or look.ends(done))) or (look.every == 1 and not ended_before)
        ]
        return self._in_order(looks, ending)

    def look(self, name: str, look: HookWindow, batch_idx: int, logs: Mapping[str, Any]) -> None:
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
            own, values = launch.latest.unread(), join_logs(logs).unread()
            published = {log: value for log, value in values.items() if value is not own.get(log)}
            window = look.close() if look.every != 1 else None
            shown = ObservedLogs(self._last.rows, launch.steps - 1, window, published or None)
        self._call(look, name, batch_idx, state, shown)

    def _in_order(self, looks: Sequence[HookWindow], of_observers: Sequence[HookWindow]) -> list[HookWindow]:
        return sorted([*looks, *of_observers], key=lambda look: self._order.index(look.callback.name))

    def _facts(self, launch: Launch | None = None) -> Facts:
        host = self._live.host
        place = host.epoch, host.batch_idx, host.examples, host.batch_size
        each = 0 if launch is None else launch.examples
        return Facts(*place, host.history, self._live.total_steps, self._live.stop, each)

    def _deliver(self, delivery: _Delivery, hold_end: bool = False) -> None:
        """Call the hooks for the batches of a launch, but for ``on_batch_end`` of the last with ``hold_end``."""
        whole, self._run.whole = self._run.whole, False
        self._last = delivery
        try:
            self._deliver_each(delivery, hold_end)
        except BaseException:
            self._pending.clear()
            raise
        for look in delivery.looks:
            if look.open:
                look.passed(Part(delivery.rows, look.since, delivery.launch.steps))
                look.since = 0
        self._run.whole = whole

    def _deliver_each(self, delivery: _Delivery, hold_end: bool) -> None:
        looks, steps, first = delivery.looks, delivery.launch.steps, delivery.first
        beginning = [look for look in looks if look.every != 1 or "on_batch_begin" in look.hooks]
        at_begin = Logs({"batch_size": delivery.launch.examples})
        has_every = any(look.every == 1 for look in looks)
        row = 0
        while row < steps:
            if beginning and not (delivery.begun and row == 0):
                state = ObservedState(delivery.after, steps - row)
                for look in beginning:
                    if look.begins(first + row):
                        look.begin({}, row)
                        self._call(look, "on_batch_begin", first + row, state, at_begin)
            is_last = row == steps - 1
            if is_last and hold_end:
                return
            state, logs = ObservedState(delivery.after, steps - 1 - row), ObservedLogs(delivery.rows, row)
            for look in looks:
                if look.every == 1:
                    self._call(look, "on_batch_end", first + row, state, logs)
                elif look.open and self._ends(look, first + row + 1, is_last, delivery.over):
                    look.passed(Part(delivery.rows, look.since, row + 1))
                    self._call(look, "on_batch_end", first + row, state, ObservedLogs(delivery.rows, row, look.close()))
            row = row + 1 if has_every or is_last else self._next_row(delivery, row)

    def _ends(self, look: HookWindow, done: int, is_last: bool, over: bool) -> bool:
        if is_last and over:
            return True
        # With `every=None` the host has control after the launch, and not inside it.
        return (is_last or look.every is not None) and look.ends(done)

    def _next_row(self, delivery: _Delivery, row: int) -> int:
        """The next batch of the launch at which a window begins or ends; the last if there is none."""
        borders = (look.next_after(delivery.first + row) for look in delivery.looks)
        return min([delivery.launch.steps - 1, *(at - delivery.first for at in borders if at is not None)])

    def _call(self, look: HookWindow, name: str, batch_idx: int, state: ObservedState, logs: Logs) -> None:
        hook = look.hooks.get(name)
        if hook is not None:
            self._events.observer_hook(look.callback, name, hook, batch_idx, self._trainer, state, logs)
