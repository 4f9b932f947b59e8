"""What callbacks that write share: one queue in the background, so that writing does not hold up the loop."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
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
    """One callback's access to the queue, for one run.

    A task that fails raises out of the next ``submit`` or ``drain`` of the same writer, that is, out of a hook of the
    callback whose task it was. The tasks after it run all the same.
    """

    def __init__(self) -> None:
        self._tasks: deque[Future[Any]] = deque()

    def submit(self, task: Callable[..., Any], *arguments: Any) -> None:
        """Run ``task(*arguments)`` in the background, after everything that was submitted before.

        Raises:
            Exception: an earlier task's. This one runs nevertheless, so that who bears the failure loses nothing else.
        """
        failure = self._failure()
        _room.acquire()
        try:
            future = _queue().submit(task, *arguments)
        except BaseException:
            _room.release()
            raise
        future.add_done_callback(lambda _: _room.release())
        self._tasks.append(future)
        if failure is not None:
            raise failure

    def replace(self, task: Callable[..., Any], *arguments: Any) -> None:
        """Submit a task that makes the one before it needless: that one is left out, if it has not begun."""
        if self._tasks and self._tasks[-1].cancel():
            self._tasks.pop()
        self.submit(task, *arguments)

    def drain(self) -> None:
        """Wait for this writer's tasks; raise the first failure among them, when all have run.

        Ctrl-C meanwhile gives up those that have not begun, so that nothing waits for them once more.
        """
        failure: BaseException | None = None
        try:
            while self._tasks:
                failure = failure or self._tasks[0].exception()
                self._tasks.popleft()
        except BaseException:
            for task in self._tasks:
                task.cancel()
            self._tasks.clear()
            raise
        if failure is not None:
            raise failure

    def _failure(self) -> BaseException | None:
        """The first failure, that nobody has been told, among the tasks that are done."""
        while self._tasks and self._tasks[0].done():
            failure = self._tasks.popleft().exception()
            if failure is not None:
                return failure
        return None


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give a path to write to; the file takes the place of ``path`` at once, or, after an exception, not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".new.{path.name}")  # with the suffix, which may say what to write
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
