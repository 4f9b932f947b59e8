"""One queue in the background for everything that callbacks write, so that writing does not hold up the loop."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


# Tasks that may wait; a callback that submits one more waits until there is room.
MOST_WAITING = 1000

_room = threading.BoundedSemaphore(MOST_WAITING)


@functools.cache
def _queue() -> ThreadPoolExecutor:
    """The queue of this process; its only thread is why tasks run in their order, whoever submitted them."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="ant_jax-writer")


class Writer:
    """One callback's access to the queue.

    A task that fails raises out of the next ``submit`` or ``drain`` of the same writer, that is, out of a hook of the
    callback whose task it was.
    """

    def __init__(self) -> None:
        self._tasks: deque[Future[Any]] = deque()

    def submit(self, task: Callable[..., Any], *arguments: Any) -> None:
        """Run ``task(*arguments)`` in the background, after everything that was submitted before."""
        while self._tasks and self._tasks[0].done():
            self._tasks.popleft().result()
        _room.acquire()
        try:
            future = _queue().submit(task, *arguments)
        except BaseException:
            _room.release()
            raise
        future.add_done_callback(lambda _: _room.release())
        self._tasks.append(future)

    def drain(self) -> None:
        """Wait for this writer's tasks; raise the first failure among them, when all have run."""
        failure: BaseException | None = None
        while self._tasks:
            failure = failure or self._tasks[0].exception()
            self._tasks.popleft()
        if failure is not None:
            raise failure
