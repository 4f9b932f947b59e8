"""The time that JAX spends compiling, as JAX itself reports it."""

from __future__ import annotations

import time

import jax


# Tracing, lowering and compiling; the reports of programs inside one that is being traced come before its own.
_EVENTS = "/jax/core/compile/"


class CompileTime:
    """Adds up how long JAX has traced, lowered and compiled since it was made, until ``stop``.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._spans: list[tuple[float, float]] = []  # those that a later, longer one may yet contain
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def stop(self) -> None:
        """Stop listening."""
        jax.monitoring.unregister_event_duration_listener(self._add)

    def _add(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if not event.startswith(_EVENTS):
            return
        end = time.perf_counter()
        begin = end - duration_secs
        while self._spans and self._spans[-1][0] >= begin:
            inner_begin, inner_end = self._spans.pop()
            self.seconds -= inner_end - inner_begin
        self._spans.append((begin, end))
        self.seconds += duration_secs
