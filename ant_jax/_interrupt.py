"""Ctrl-C and SIGTERM at a moment when nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils


# What a shell reports of a process that a SIGTERM has ended.
TERMINATED = 128 + signal.SIGTERM


Handler = Callable[[int, FrameType | None], Any]


class _Replaced(NamedTuple):
    """A signal's handler that stands in for the one that was there before."""

    number: signal.Signals
    handler: Handler
    before: Any


# All that are installed, the newest last. Only the main thread may install one, so they are put back in that order.
_replaced: list[_Replaced] = []


@contextlib.contextmanager
def _handled(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    """Handle signals so while the body runs, in this process alone, and put back what was there."""
    depth = len(_replaced)
    try:
        for number, handler in handlers.items():
            # Noted first, because another thread may fork in between.
            _replaced.append(_Replaced(number, handler, signal.getsignal(number)))
            signal.signal(number, handler)
        yield
    finally:
        try:
            for replaced in reversed(_replaced[depth:]):  # Ctrl-C last: put back, its handler may raise here
                signal.signal(replaced.number, replaced.before)
        finally:
            del _replaced[depth:]


class _Mask(threading.local):
    """The signals that a thread, which may fork while another one does, had blocked before."""

    before: set[int] | None = None


class _Forks:
    """Gives a forked child the handlers that were there before, since the child is not the run.

    Such a child is a worker of a loader, or what a hook has started: a SIGTERM must end it. No signal can reach it
    while it still has the run's handlers, because they are blocked from before the fork until they are put back.
    """

    def __init__(self) -> None:
        self._mask = _Mask()

    def block(self) -> None:
        """Block the signals that are handled; before a fork."""
        numbers = {replaced.number for replaced in _replaced}
        self._mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers) if numbers else None

    def unblock(self) -> None:
        """Take up the signals that have come meanwhile; after a fork."""
        if self._mask.before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask.before)

    def put_back(self) -> None:
        """Put the former handlers back; in the child."""
        for replaced in reversed(_replaced):
            if signal.getsignal(replaced.number) is replaced.handler:
                signal.signal(replaced.number, replaced.before)
        _replaced.clear()
        self.unblock()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    _forks = _Forks()
    os.register_at_fork(before=_forks.block, after_in_parent=_forks.unblock, after_in_child=_forks.put_back)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Let signals that would raise an exception do so only when the body is over, which must not be torn apart."""
    waiting: list[tuple[int, FrameType | None]] = []
    raising: dict[signal.Signals, Handler] = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        raising = {number: handler for number, handler in found.items() if callable(handler)}
    try:
        with _handled(dict.fromkeys(raising, lambda number, frame: waiting.append((number, frame)))):
            yield
    finally:
        for number, frame in waiting:
            raising[signal.Signals(number)](number, frame)


class Interrupts:
    """Holds Ctrl-C and SIGTERM back until the run has come to a place that it could go on from.

    A launch overwrites the state, and hooks make the next one step by step; an exception in between would leave a
    state that nobody can read, or half of a moment. So a signal is noted, and ``check``, which the loop calls where
    the state is whole, raises it: ``KeyboardInterrupt`` for Ctrl-C, ``SystemExit(143)`` for SIGTERM. A second signal is
    raised at once.

    Where ``jax.distributed`` runs, SIGTERM is JAX's own: its preemption notice is asked instead, so that all processes
    stop at the same place.
    """

    def __init__(self) -> None:
        self._noted: signal.Signals | None = None
        self._checks = 0
        self._outer: Interrupts | None = None  # those of the run in whose hook this run is

    @property
    def terminating(self) -> bool:
        """Whether the process was asked to terminate."""
        return self._noted == signal.SIGTERM

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals while a run goes on, in the main thread; put back what was there afterwards.

        A signal that the user handles, or that the process ignores, is left alone.
        """
        expected = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        if jax.distributed.is_initialized():
            del expected[signal.SIGTERM]
        if threading.current_thread() is not threading.main_thread():
            expected = {}
        self._noted = None
        owner = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
        self._outer = owner if isinstance(owner, Interrupts) else None
        ours = [number for number, old in expected.items() if signal.getsignal(number) is old]
        with _handled(dict.fromkeys(ours, self._note)):
            yield

    def check(self) -> None:
        """Raise what has been noted; the state must be whole.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed.
            SystemExit: the process was asked to terminate.
        """
        if self._outer is not None:
            self._outer.check()
        elif jax.distributed.is_initialized() and self._noted is None:
            self._checks += 1
            if multihost_utils.reached_preemption_sync_point(self._checks):
                self._noted = signal.SIGTERM
        if self._noted is not None:
            self._raise(self._noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._noted is not None:
            self._raise(signal.Signals(number))
        self._noted = signal.Signals(number)
        text = f"\n{self._noted.name}: the run ends after this step; once more ends it at once\n"
        with contextlib.suppress(AttributeError, OSError, ValueError):  # there may be no standard error, or no more
            # Not by print: the signal may have come inside one.
            os.write(sys.__stderr__.fileno(), text.encode())  # pyright: ignore[reportOptionalMemberAccess]

    def _raise(self, number: signal.Signals) -> None:
        self._noted = number  # so that one that comes while the exception is on its way is raised at once, too
        if number == signal.SIGTERM:
            raise SystemExit(TERMINATED)
        raise KeyboardInterrupt
