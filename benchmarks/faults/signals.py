"""Ctrl-C and SIGTERM at random instants, and at chosen places: the state is usable, and the run goes on exactly."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import itertools
import os
import pathlib
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import ant_jax as ant
from benchmarks.faults.children import Child, committed, each, sleep, unfinished
from benchmarks.faults.job import PLACES, Job, data, digest, held_out
from benchmarks.faults.trials import Bench, Row, expect


INTERRUPTS, DOUBLES, TERMINATIONS = 150, 30, 50
BATCHES = 10  # of an epoch
SECONDS = 60  # that the second Ctrl-C may take


def rows(bench: Bench) -> Iterator[Row]:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
    scene = Scene(bench)
    yield interrupts(bench, scene)
    yield from_outside(bench, scene, TWICE)
    yield from_outside(bench, scene, ONCE)
    shutil.rmtree(scene.directory, ignore_errors=True)


class Scene:
    """A job in one directory, with a trainer that has compiled all, and what the job ends with."""

    def __init__(self, bench: Bench):
        self.directory = bench.root / "signals"
        self.job = Job(directory=str(self.directory), epochs=3, batches=BATCHES)
        self._warm, self.place = self.trainer(), ""
        self._end = digest(self.job_without_directory.run())
        self.state = self._warm.init(tuple(leaf[:1] for leaf in data(1)))
        self.seconds = {False: self._seconds(self._warm), True: self._seconds(self._warm)}

    @property
    def job_without_directory(self) -> Job:
        return dataclasses.replace(self.job, directory=None)

    def trainer(self) -> ant.Trainer:
        return self.job.trainer(self._where())

    def check_goes_on(self) -> None:
        """What the directory has leads to the right end."""
        expect(digest(quietly(self.job, self._warm, self.state)) == self._end, "the run that went on ended otherwise")
        expect(not unfinished(self.directory), "temporary directories are left")

    def check_usable(self, state: ant.TrainState) -> None:
        """A state can be read, evaluated, and trained on to the right end without the directory."""
        expect(all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)), "parameters are not finite")
        self._warm.evaluate(state, held_out())
        shutil.rmtree(self.directory)
        end = quietly(dataclasses.replace(self.job, directory=None), self._warm, state)
        expect(digest(end) == self._end, "the run that went on from the exception's state ended otherwise")

    def interrupted(self, is_warm: bool, after: float) -> tuple[BaseException | None, str]:
        """Press Ctrl-C in a run after so many seconds; returns the exception, and where the run was."""
        shutil.rmtree(self.directory, ignore_errors=True)
        trainer, place = self._warm if is_warm else self.trainer(), ["after the end"]
        self.place = "starting"

        def press() -> None:
            place[0] = self.place
            os.kill(os.getpid(), signal.SIGINT)

        timer = threading.Timer(after, press)
        try:
            timer.start()
            quietly(self.job, trainer, self.state)
            self.place = "after the end"
            timer.join()
            time.sleep(0.1)  # what has come is raised here
        except KeyboardInterrupt as error:
            return error, place[0]
        return None, place[0]

    def _seconds(self, trainer: ant.Trainer) -> float:
        shutil.rmtree(self.directory, ignore_errors=True)
        began = time.monotonic()
        quietly(self.job, trainer, self.state)
        return time.monotonic() - began

    def _where(self) -> ant.Callback:
        def at(place: str) -> Any:
            def hook(*arguments: Any) -> Any:
                self.place = place
                return arguments[-2:]

            return hook

        def on_batch_begin(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
            self.place = "stepping" if int(state.step) else "compiling"
            return state, logs

        return ant.Callback(
            name="where",
            every=5,
            on_batch_begin=on_batch_begin,
            on_batch_end=at("hook"),
            on_checkpoint=at("saving"),
            on_evaluate_begin=at("evaluating"),
        )


def interrupts(bench: Bench, scene: Scene) -> Row:
    """In this process, as in a notebook; every fifth run compiles anew, so that many signals find it compiling.

    A signal that comes when the run has ended is no trial.
    """
    trials = bench.trials("Ctrl-C at random instants: usable state, exact resume", INTERRUPTS)
    counts: collections.Counter[str] = collections.Counter()
    for number in itertools.count():
        if trials.done == bench.count(INTERRUPTS):
            return trials.row(**counts)
        is_warm = number % 5 != 0
        error, place = scene.interrupted(is_warm, bench.rng("interrupt", number).uniform(0, scene.seconds[is_warm]))
        counts[place.replace(" ", "_")] += 1
        if place == "after the end":
            scene.seconds[is_warm] *= 0.9
            continue
        with trials.one(f"signal {number}") as kept, kept_on_failure(scene.directory, kept):
            check_interrupted(scene, error, place)
    raise AssertionError("itertools.count has ended")


def check_interrupted(scene: Scene, error: BaseException | None, place: str) -> None:
    state = getattr(error, "train_state", None)
    if state is not None:
        saved = committed(scene.directory)
        expect(saved[-1:] == [int(state.step)], f"step {int(state.step)} is not saved; there are {saved}")
    scene.check_goes_on()
    if state is not None:
        scene.check_usable(state)
    else:
        expect(error is not None, f"Ctrl-C was lost; the run was {place}")
        expect(place == "starting", f"the run was {place}, and the exception has no state")


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """What is done to a job in a process of its own.

    Attributes:
        name: of the row.
        asked: trials.
        signals: one after the other.
        statuses: with which the process may end.
    """

    name: str
    asked: int
    signals: tuple[int, ...]
    statuses: tuple[int, ...]

    def ended(self, child: Child, rng: np.random.Generator) -> bool:
        """Disturb a job, and see how it ends; False if that came too late, when it had done its work."""
        began = time.monotonic()
        for number in self.signals:
            child.send(number)
            began = time.monotonic()
            sleep(rng.exponential(0.02))
        status = child.end()
        seconds = time.monotonic() - began
        if child.value(r"(digest)"):
            return False
        expect(status in self.statuses, f"the status is {status}:\n{child.output[-2000:]}")
        # What XLA compiles, no signal can interrupt: Python sees it when that is done.
        expect(seconds < SECONDS, f"it took {seconds:.1f} s to end:\n{child.output[-2000:]}")
        return True


TWICE = Disturbance(
    "Ctrl-C twice: ends at once, the previous intact",
    DOUBLES,
    (signal.SIGINT, signal.SIGINT),
    (-signal.SIGINT, 128 + signal.SIGINT),
)
ONCE = Disturbance("SIGTERM: saved, exit 143, exact resume", TERMINATIONS, (signal.SIGTERM,), (143,))


def from_outside(bench: Bench, scene: Scene, disturbance: Disturbance) -> Row:
    """Disturb jobs in processes of their own, at each of the places."""
    trials, one_at_a_time = bench.trials(disturbance.name, disturbance.asked), threading.Lock()
    counts: collections.Counter[str] = collections.Counter()

    def trial(number: int) -> None:
        place, rng = PLACES[number % len(PLACES)], bench.rng(disturbance.name, number)
        with trials.one(f"{place}, {number}") as directory:
            while not disturbed(dataclasses.replace(scene.job, directory=str(directory)), disturbance, place, rng):
                counts["came_too_late"] += 1
                shutil.rmtree(directory)
            with one_at_a_time, kept_on_failure(scene.directory, directory):
                counts[place] += 1
                shutil.rmtree(scene.directory, ignore_errors=True)
                shutil.copytree(directory, scene.directory)
                scene.check_goes_on()

    each(trial, range(bench.count(disturbance.asked)))
    return trials.row(**counts)


def disturbed(job: Job, disturbance: Disturbance, place: str, rng: np.random.Generator) -> bool:
    """Start a job, and disturb it at a place, a random time after it has come there."""
    directory, child = pathlib.Path(job.directory or ""), Child(dataclasses.replace(job, marks=True))
    child.wait_for(f"at {place}", 1 if place == "compiling" else int(rng.integers(1, 4)))
    sleep(rng.exponential(0.2 if place == "compiling" else 0.01))
    before = committed(directory)
    if not disturbance.ended(child, rng):
        return False
    after = committed(directory)
    if disturbance is ONCE:
        said = child.value(r"saved step (\d+)")
        expect(after and said in (None, str(after[-1])), f"it says {said}, and has {after}")
    expect(not before or after and after[-1] >= before[-1], f"there was {before}, and is {after}")
    return True


def quietly(job: Job, trainer: ant.Trainer, state: ant.TrainState) -> ant.TrainState:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return job.run(trainer, state)


@contextlib.contextmanager
def kept_on_failure(directory: pathlib.Path, kept: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except Exception:
        if directory.exists():
            shutil.copytree(directory, kept / "directory")
        raise
