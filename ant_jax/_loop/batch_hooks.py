"""The batch hooks of host callbacks and of observers, around launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ant_jax._engine.buffers import Buffers
from ant_jax._engine.launch import Launch
from ant_jax._hooks.callback_list import CallbackList
from ant_jax._logs.logs import Logs
from ant_jax._logs.sums import plus
from ant_jax._loop.hook_windows import HookWindow
from ant_jax._loop.observers import Observers
from ant_jax._loop.run_info import RunInfo


class BatchHooks:
    """Runs the batch hooks of one call of ``fit``.

    Args:
        events: the callbacks of the run.
        trainer: what hooks are given.
        live: the state of the run.
        run: the run's facts.
        at_once: whether observers are told of each launch before the next batch is read.

    Attributes:
        observers: the observers among the callbacks.
        windows: those of the epoch under way, of other host callbacks.
    """

    def __init__(self, events: CallbackList, trainer: Any, live: Buffers, run: RunInfo, at_once: bool):
        self._events, self._trainer, self._live, self._at_once = events, trainer, live, at_once
        self.observers = Observers(events, trainer, live, run)
        self.windows: list[HookWindow] = []

    def begin_epoch(self) -> None:
        """Make the windows of an epoch."""
        self.windows = [HookWindow(*watcher) for watcher in self._events.watchers]
        self.observers.begin_epoch()

    def end_epoch(self) -> None:
        """Drop them."""
        self.windows = []
        self.observers.end_epoch()

    @property
    def all_windows(self) -> list[HookWindow]:
        """The windows of the epoch under way, of observers, too."""
        return [*self.windows, *self.observers.looks]

    def begin(self, batch_idx: int, examples: int) -> None:
        """Begin the windows that begin at a batch, of so many examples."""
        beginning = [look for look in self.windows if look.begins(batch_idx)]
        if beginning:
            beginning = self.observers.beginning(beginning, batch_idx)
            self._look("on_batch_begin", beginning, batch_idx, {"batch_size": examples})

    def end(self, done: int, launch: Launch, is_over: Callable[[], bool]) -> tuple[bool, Mapping[str, Any], set[str]]:
        """End the windows that end after a launch, or all when no more batches follow.

        Args:
            done: batches of the epoch that are done.
            launch: the last.
            is_over: returns whether no more batches follow; a hook may have asked to stop.

        Returns:
            Whether no more batches follow, the logs as the last hook left them, and the names of the callbacks whose
            windows ended.
        """
        for look in self.windows:
            look.passed(launch)
        self.observers.launched(launch)
        over = is_over()
        logs: Mapping[str, Any] = launch.latest
        ending = [look for look in self.windows if look.open and (over or look.ends(done))]
        if ending:
            logs = self._look("on_batch_end", self.observers.ending(ending, done, over), done - 1, logs)
            if not over and is_over():  # one has asked to stop: then the other windows end, too
                over, still_open = True, [look for look in self.windows if look.open]
                logs = self._look("on_batch_end", self.observers.ending(still_open, done, over), done - 1, logs)
        elif over:
            self.observers.finish()
        if self._at_once:
            self.observers.flush()  # what is read next may depend on what they have seen
        self._sum_published(logs, launch)
        return over, logs, {look.callback.name for look in ending}

    def end_open(self, done: int, launch: Launch) -> None:
        """End the windows that are open after the last batch."""
        ending = [look for look in self.windows if look.open]
        if ending:
            ending = self.observers.ending(ending, done, over=True)
            self._sum_published(self._look("on_batch_end", ending, done - 1, launch.latest), launch)
        else:
            self.observers.finish()

    def _look(self, name: str, looks: list[HookWindow], batch_idx: int, logs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Run a batch hook of some host callbacks, in their order, and begin or end their windows."""
        given = state = None
        for look in looks:
            if look.callback.observer:
                self.observers.look(name, look, batch_idx, logs)
                continue
            before = logs = look.end(logs) if name == "on_batch_end" else Logs(logs)
            if name in look.hooks:
                if state is None:
                    given = state = self._live.get()
                first = look.is_first(name)
                state, logs = self._events.batch_hook(
                    look.callback, name, look.hooks[name], batch_idx, self._trainer, state, logs, watch_assignment=first
                )
            if name == "on_batch_begin":
                changed = () if logs is before else logs.items()
                look.begin({log: value for log, value in changed if value is not before.get(log)})
        if state is not None and state is not given:
            self._live.put(state)
        return logs

    def _sum_published(self, logs: Mapping[str, Any], launch: Launch) -> None:
        """Add what host callbacks have published, weighted by the examples of the batch that they looked at."""
        if len(logs) <= len(launch.latest):
            return
        sums, examples = dict(self._live.host.published), launch.examples
        for name, value in logs.items():
            if name not in launch.latest:
                total, weight = sums.get(name, (None, 0))
                sums[name] = plus(total, value, examples), weight + examples
        self._live.move(published=sums)
