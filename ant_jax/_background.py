"""A queue in the background for everything that writes, so that writing does not hold up the loop."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any


# Tasks of one queue that may wait; who submits one more waits until there is room.
MOST_WAITING = 1000

# Who is told of the tasks that failed; ``None``: their failures are raised.
_bear: ContextVar[Callable[[Exception], bool] | None] = ContextVar("_bear", default=None)


@contextlib.contextmanager
def bearing(bear: Callable[[Exception], bool]) -> Iterator[None]:
    """While the body runs, tell ``bear`` of every task that failed, instead of raising what it raised.

    Args:
        bear: returns whether to go on; if not, what the queue has not begun is given up.
    """
    token = _bear.set(bear)
    try:
        yield
    finally:
        _bear.reset(token)


def is_borne() -> bool:
    """Whether somebody bears failures at this moment."""
    return _bear.get() is not None


class Queue:
    """The tasks of one callback, which run in their order, in a thread of their own.

    There is not one queue for all callbacks, because a tracker that waits for its server would then hold up the files
    of others. The thread is started for the first task, and ends when the queue is drained or the process ends.

    A task that fails raises out of the next ``submit`` or ``drain``, that is, out of a hook of the callback whose task
    it was, or is told to who bears it (:func:`bearing`). The tasks after it run all the same.
    """

    def __init__(self) -> None:
        self._tasks: deque[Future[Any]] = deque()
        self._room = threading.BoundedSemaphore(MOST_WAITING)
        self._thread: ThreadPoolExecutor | None = None

    def submit(self, task: Callable[..., Any], *arguments: Any) -> None:
        """Run ``task(*arguments)`` in the background, after everything that was submitted before.

        Nothing is run any more when who bears an earlier failure gives up at that.

        Raises:
            Exception: an earlier task's. This one runs nevertheless, so that nothing else is lost.
        """
        failure: BaseException | None = None
        while failure is None and self._tasks and self._tasks[0].done():
            failure, goes_on = self._outcome()
            if not goes_on:
                return
        self._room.acquire()
        try:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ant_jax-writer")
            future = self._thread.submit(task, *arguments)
        except BaseException:
            self._room.release()
            raise
        future.add_done_callback(lambda _: self._room.release())
        self._tasks.append(future)
        if failure is not None:
            raise failure

    def replace(self, task: Callable[..., Any], *arguments: Any) -> None:
        """Submit a task that makes the one before it needless: that one is left out, if it has not begun."""
        if self._tasks and self._tasks[-1].cancel():
            self._tasks.pop()
        self.submit(task, *arguments)

    def drain(self) -> None:
        """Wait for the tasks, and end the thread; raise the first failure among them, when all have run.

        Ctrl-C meanwhile gives up those that have not begun, so that nothing waits for them once more. The thread is
        then left to the one that has, so that what is submitted later still comes after it.
        """
        failure: BaseException | None = None
        try:
            while self._tasks:
                unborne, _ = self._outcome()
                failure = failure or unborne
        except BaseException:
            self._give_up()
            self._tasks.clear()
            raise
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown()
        if failure is not None:
            raise failure

    def _outcome(self) -> tuple[BaseException | None, bool]:
        """Wait for the first task.

        Returns:
            its failure, unless it is borne, and whether to go on.
        """
        failure, bear = self._tasks[0].exception(), _bear.get()
        self._tasks.popleft()
        if bear is None or not isinstance(failure, Exception):
            return failure, True
        goes_on = bear(failure)
        if not goes_on:
            self._give_up()
        return None, goes_on

    def _give_up(self) -> None:
        """Leave out what has not begun, and forget what is done; what is running is still waited for."""
        self._tasks = deque(task for task in self._tasks if not task.cancel() and not task.done())
