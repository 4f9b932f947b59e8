"""SIGKILL at random instants, and at chosen ones; then the same command again."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.faults.children import Child, committed, compiled_once, digest_of, each, finished, sleep, unfinished
from benchmarks.faults.job import Job
from benchmarks.faults.trials import Bench, Row, Trials, expect


KILLS = 20
# A state of 17 MB, saved so often that a save is under way most of the time.
LARGE = Job(width=1000, epochs=40, every=2)
SMALL = Job(epochs=40, every=1, keep=2, monitor=True)

Counts = collections.Counter[str]
# Waits for the instant at which to kill.
Aim = Callable[[Child, pathlib.Path, np.random.Generator], None]


def rows(bench: Bench) -> Iterator[Row]:
    with compiled_once(bench.root):
        yield from random_kills(bench)
        yield aimed_kills(bench, "while it deletes old checkpoints", SMALL, at_deletion)
        yield aimed_kills(bench, "while it starts up", dataclasses.replace(SMALL, epochs=2), at_start)
        yield aimed_kills(bench, "while it restores", dataclasses.replace(SMALL, width=1000, epochs=2), at_restore)


def random_kills(bench: Bench) -> Iterator[Row]:
    expected = digest_of(LARGE)
    restarts = bench.trials("kill -9 at random instants: the same command resumes", 10 * KILLS)
    ends = bench.trials("kill -9 at random instants: the final digest is right", 10)
    counts: Counts = collections.Counter(inside_a_save=0)

    def run(number: int) -> None:
        rng = bench.rng("kill", number)
        with ends.one(f"run {number}") as directory:
            chain(dataclasses.replace(LARGE, directory=str(directory)), at_random, rng, restarts, counts, expected)

    each(run, range(bench.count(10)))
    yield restarts.row(**counts)
    yield ends.row()


def aimed_kills(bench: Bench, when: str, job: Job, aim: Aim) -> Row:
    trials, counts = bench.trials(f"kill -9 {when}", KILLS), collections.Counter()
    expected = digest_of(job)
    with bench.trials(f"kill -9 {when}: end", 1).one("chain") as directory:
        job = dataclasses.replace(job, directory=str(directory))
        chain(job, aim, bench.rng("kill", when), trials, counts, expected, bench.count(KILLS))
    return trials.row(**counts)


def chain(
    job: Job,
    aim: Aim,
    rng: np.random.Generator,
    restarts: Trials,
    counts: Counts,
    expected: str,
    kills: int = KILLS,
) -> None:
    """Kill a run so many times, starting the same command each time, and let it end then."""
    directory = pathlib.Path(job.directory or "")
    newest: int | None = None
    for kill in range(kills):
        child = Child(job)
        with restarts.one(f"start {kill} in {directory}") if kill else contextlib.nullcontext():
            aim(child, directory, rng)
            counts["early_ends"] += not child.running
            child.kill()
            check_beginning(child, newest)
        counts["inside_a_save"] += bool(unfinished(directory))
        counts["half_deleted"] += sum(is_half_deleted(directory, step) for step in committed(directory))
        newest = max(committed(directory), default=None)
    with restarts.one(f"the last start in {directory}"):
        child = finished(job)
        check_beginning(child, newest)
    expect(child.value(r"digest (\w+)") == expected, f"the digest differs:\n{child.output[-2000:]}")
    expect(not unfinished(directory), f"temporary directories are left: {unfinished(directory)}")


def check_beginning(child: Child, newest: int | None) -> None:
    """A run begins with the newest checkpoint; one that was killed before it could say so counts as right."""
    resumed, fresh = child.value(r"resumed from step (\d+)"), "the run begins" in child.output
    expect("Error" not in child.output and "damaged" not in child.output, f"it says:\n{child.output[-2000:]}")
    if newest is None:
        expect(resumed is None, f"it has resumed from {resumed}, where there was nothing")
    else:
        expect(not fresh, f"it has begun afresh, where there was step {newest}")
        expect(resumed in (None, str(newest)), f"it has resumed from {resumed}, where there was step {newest}")


def is_half_deleted(directory: pathlib.Path, step: int) -> bool:
    path = directory / f"step_{step}"
    return not all((path / part).exists() for part in ("host/metadata", "arrays/_METADATA", "arrays/manifest.ocdbt"))


def at_random(child: Child, directory: pathlib.Path, rng: np.random.Generator) -> None:
    """Mostly some time after the first save has begun, at times before."""
    before = committed(directory)
    if rng.random() < 0.1:
        return sleep(rng.uniform(0, 3))
    child.wait_for("resumed from" if before else "run begins")
    while child.running and committed(directory) == before:
        time.sleep(0.002)
    sleep(rng.exponential(0.3))


def at_start(child: Child, directory: pathlib.Path, rng: np.random.Generator) -> None:
    """Before the first save: in imports, while the model is made and compiled."""
    sleep(rng.uniform(0, 2.5))


def at_restore(child: Child, directory: pathlib.Path, rng: np.random.Generator) -> None:
    """Between the time that the state is made and the first steps."""
    child.wait_for("at begin")
    sleep(rng.uniform(0.2, 1.5))


def at_deletion(child: Child, directory: pathlib.Path, rng: np.random.Generator) -> None:
    """When, after a random time, a step that was there loses a file or goes."""
    child.wait_for("resumed from" if committed(directory) else "run begins")
    sleep(rng.uniform(0.5, 1.5))
    before = set(committed(directory))
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and child.running:
        if any(is_half_deleted(directory, step) for step in before):
            return
