"""Ctrl-C at a moment when nothing is lost."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class LaunchGuard:
    """Holds a Ctrl-C back while a launch overwrites the state, since between the launch and the assignment of what it
    returns there is no state that anybody could read.

    The first one during a launch is raised when the launch is made, a second one at once.
    """

    def __init__(self):
        self._launching = self._pressed = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle SIGINT while a run goes on, if Python's own handler would otherwise; put that back afterwards."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, number: int, frame: Any) -> None:
        if not self._launching or self._pressed:
            signal.default_int_handler(number, frame)
        self._pressed = True

    def __enter__(self) -> None:
        self._launching = True

    def __exit__(self, *exception: object) -> None:
        self._launching = False
        if self._pressed:
            self._pressed = False
            raise KeyboardInterrupt
