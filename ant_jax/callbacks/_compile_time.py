"""The time that JAX spends compiling, as JAX itself reports it."""

from __future__ import annotations

import threading
import time

import jax


# Tracing, lowering and compiling; the reports of programs inside one that is being traced come before its own.
_EVENTS = "/jax/core/compile/"


class CompileTime:
    """Adds up how long JAX has traced, lowered and compiled in this thread since it was made, until ``stop``.

    Another thread may compile for another run, at the same time.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._thread = threading.get_ident()
        self._spans: list[tuple[float, float]] = []  # those that a later, longer one may yet contain
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def stop(self) -> None:
        """Stop listening."""
        jax.monitoring.unregister_event_duration_listener(self._add)

    def _add(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if not event.startswith(_EVENTS) or threading.get_ident() != self._thread:
            return
        end = time.perf_counter()
        begin = end - duration_secs
        while self._spans and self._spans[-1][0] >= begin:
            inner_begin, inner_end = self._spans.pop()
            self.seconds -= inner_end - inner_begin
        self._spans.append((begin, end))
        self.seconds += duration_secs
