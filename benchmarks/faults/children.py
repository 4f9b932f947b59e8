"""Jobs in processes of their own, and what they print."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks.faults.job import Job


LIMIT_SECONDS = 300
AT_A_TIME = 2


class Child:
    """A job that runs in a process of its own.

    Args:
        job: to run.
    """

    def __init__(self, job: Job):
        command = [sys.executable, "-m", "benchmarks.faults.job", json.dumps(dataclasses.asdict(job))]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: list[str] = []
        self._new_line = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return "".join(self._lines)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait_for(self, text: str, times: int = 1) -> bool:
        """Wait until it has printed a text so many times; False if it ends before."""

        def said() -> bool:
            return sum(text in line for line in self._lines) >= times

        with self._new_line:
            self._new_line.wait_for(lambda: said() or not self._reader.is_alive(), LIMIT_SECONDS)
            return said()

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        """Wait for its end; returns the exit status, and kills what hangs."""
        try:
            status = self._process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise AssertionError(f"it hangs; it has printed:\n{self.output[-2000:]}") from None
        finally:
            self._reader.join(LIMIT_SECONDS)
        return status

    def kill(self) -> None:
        self._process.kill()
        self.end()

    def value(self, pattern: str) -> str | None:
        """What the pattern's group matched last in what it has printed."""
        found = re.findall(pattern, self.output)
        return found[-1] if found else None

    def _read(self) -> None:
        assert_stdout: Any = self._process.stdout
        for line in assert_stdout:
            with self._new_line:
                self._lines.append(line)
                self._new_line.notify_all()
        with self._new_line:
            self._new_line.notify_all()


@contextlib.contextmanager
def compiled_once(place: pathlib.Path) -> Iterator[None]:
    """Let jobs in processes of their own find what another has compiled, so that they start sooner."""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            del os.environ[name]
        shutil.rmtree(place / "compiled", ignore_errors=True)


def finished(job: Job) -> Child:
    """Run a job to its end, which must be a good one."""
    child = Child(job)
    status = child.end()
    if status != 0:
        raise AssertionError(f"the job has ended with status {status}:\n{child.output[-3000:]}")
    return child


def digest_of(job: Job) -> str:
    """Run a job to its end, and return its digest."""
    found = finished(job).value(r"digest (\w+)")
    if found is None:
        raise AssertionError("the job has printed no digest")
    return found


def each(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Do work on items, some at a time."""
    with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as pool:
        return list(pool.map(work, items))


def committed(directory: pathlib.Path) -> list[int]:
    """The steps that a directory has, in order."""
    names = (re.fullmatch(r"step_(\d+)", path.name) for path in directory.glob("step_*"))
    return sorted(int(match[1]) for match in names if match)


def unfinished(directory: pathlib.Path) -> list[str]:
    """The names of temporary directories."""
    return [path.name for path in directory.glob("*.orbax-checkpoint-tmp*")]


def sleep(seconds: float) -> None:
    time.sleep(max(0.0, seconds))
