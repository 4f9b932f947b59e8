"""Every way out of a run, right after an asynchronous save has begun: what was asked for is there, no hang."""

from __future__ import annotations

import pathlib
import signal
import time
from collections.abc import Iterator

from benchmarks.faults.children import Child, committed, compiled_once, unfinished
from benchmarks.faults.job import Job
from benchmarks.faults.trials import Bench, Row, expect


TIMES = 10
SECONDS = 60
# With the exit statuses that each may have.
WAYS = {"": (0,), "exit": (3,), "error": (1,), "interrupt": (-signal.SIGINT, 128 + signal.SIGINT)}


def rows(bench: Bench) -> Iterator[Row]:
    trials = bench.trials("ways out right after a save of 80 MB: committed, no hang", TIMES * len(WAYS))
    longest = 0.0
    with compiled_once(bench.root):
        for number in range(bench.count(TIMES)):
            for way, statuses in WAYS.items():
                with trials.one(f"{way or 'the end'}, {number}") as directory:
                    longest = max(longest, seconds_to_leave(directory / "run", way, statuses))
    yield trials.row(longest_seconds=round(longest, 1))


def seconds_to_leave(directory: pathlib.Path, way: str, statuses: tuple[int, ...]) -> float:
    # With the best epoch kept, the last epoch's save, too, has just begun when the run ends.
    child = Child(Job(str(directory), width=2200, epochs=2, batches=3, every=None, leave=way))
    child.wait_for("leaving at" if way else "run begins")
    began = time.monotonic()
    status = child.end()
    seconds = time.monotonic() - began
    expect(status in statuses, f"the status is {status}:\n{child.output[-2000:]}")
    expect(not way or seconds < SECONDS, f"it took {seconds:.0f} s to leave")
    asked = int(child.value(r"leaving at (\d+)") or 6)
    expect(committed(directory)[-1:] == [asked], f"step {asked} is not there, but {committed(directory)}")
    expect(not unfinished(directory), "temporary directories are left")
    return seconds if way else 0.0
