"""Checkpoints whose bytes have changed, or are gone, and strangers among them: never a wrong number."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import ant_jax as ant
from ant_jax._checkpoint.manifest import CheckpointCorrupt
from benchmarks.faults.children import committed, unfinished
from benchmarks.faults.job import Job, digest
from benchmarks.faults.trials import Bench, Row, expect


PAGE = 4096

Fault = Callable[[pathlib.Path, np.random.Generator], None]


def rows(bench: Bench) -> Iterator[Row]:
    scene = Scene(bench)
    yield some_damaged(bench, scene)
    yield all_damaged(bench, scene)
    yield strangers(bench, scene)
    scene.take_down()


class Scene:
    """A directory with three checkpoints of a run that has an epoch to go, put up anew for every trial."""

    def __init__(self, bench: Bench):
        self.place, self._sound = bench.root / "damaged", bench.root / "sound"
        job = Job(directory=str(self.place), every=7, epochs=3)
        with contextlib.redirect_stdout(io.StringIO()):
            job.run()
        self.place.rename(self._sound)
        self.steps = committed(self._sound)
        reader = job.trainer()
        self._known = {digest(reader.restore(self._sound, step)): step for step in self.steps}
        self._job = dataclasses.replace(job, epochs=4)
        self._end = digest(dataclasses.replace(self._job, directory=None).run())
        self._begun: list[int | None] = []
        self._trainer = self._job.trainer(ant.Callback(name="beginning", on_train_begin=self._note))

    def put_up(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self._sound, self.place)

    def take_down(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.rmtree(self._sound)

    def resumed(self) -> int:
        """Go on to the end, see that it is the right one and saved, and return the step that the run went on from."""
        self._begun.clear()
        end = self.go_on()
        (began,) = self._begun
        expect(began is not None, "the run went on from a state that is none of those that were saved")
        expect(digest(end) == self._end, f"the run that went on from step {began} has another digest")
        expect(committed(self.place)[-1] == int(end.step), f"the end is not saved; there are {committed(self.place)}")
        expect(digest(self._trainer.restore(self.place)) == self._end, "what was saved in the end is something else")
        expect(not unfinished(self.place), "temporary directories are left")
        return began or 0

    def go_on(self) -> ant.TrainState:
        with contextlib.redirect_stdout(io.StringIO()):
            return self._job.run(self._trainer)

    def _note(self, trainer: Any, state: Any, logs: Any) -> Any:
        self._begun.append(self._known.get(digest(state)))
        return state, logs


def some_damaged(bench: Bench, scene: Scene) -> Row:
    trials, counts = bench.trials("random damage: the exact newest or previous state", 300), collections.Counter()
    *_, previous, newest = scene.steps
    for number in range(bench.count(300)):
        rng = bench.rng("damage", number)
        scene.put_up()
        step = newest if rng.random() < 0.7 else int(rng.choice(scene.steps))
        what = damaged(scene.place / f"step_{step}", rng)
        with trials.one(f"damage {number}, {what}") as kept:
            try:
                began = scene.resumed()
                expect(began in (newest, previous if step == newest else newest), f"it went on from step {began}")
            except Exception:
                shutil.copytree(scene.place, kept / "directory")
                raise
            counts["from_the_newest" if began == newest else "from_the_previous"] += 1
    return trials.row(**counts)


def all_damaged(bench: Bench, scene: Scene) -> Row:
    trials = bench.trials("all checkpoints damaged: a clear CheckpointCorrupt", 20)
    for number in range(bench.count(20)):
        rng = bench.rng("all", number)
        scene.put_up()
        what = [damaged(scene.place / f"step_{step}", rng, FATAL, "arrays/manifest.ocdbt") for step in scene.steps]
        with trials.one(f"damage {number}, {what}"):
            before = sorted(path.name for path in scene.place.iterdir())
            try:
                scene.go_on()
            except CheckpointCorrupt as error:
                expect(str(scene.place) in str(error), f"the directory is not named: {error}")
                missing = [step for step in scene.steps if f"step {step}" not in str(error)]
                expect(not missing, f"the steps {missing} are not named: {error}")
            else:
                raise AssertionError("the run went on")
            expect(sorted(path.name for path in scene.place.iterdir()) == before, "something was renamed or made")
    return trials.row()


def strangers(bench: Bench, scene: Scene) -> Row:
    trials = bench.trials("strangers in the directory: the exact newest state", 10)
    for name, make in STRANGERS.items():
        scene.put_up()
        make(scene.place)
        with trials.one(name):
            began = scene.resumed()
            expect(began == scene.steps[-1], f"it went on from step {began}")
    return trials.row()


def damaged(step: pathlib.Path, rng: np.random.Generator, faults: Sequence[Fault] = (), only: str = "") -> str:
    """Do something to a file of a checkpoint, or to all of it; returns what."""
    faults = faults or FAULTS
    fault = faults[int(rng.integers(len(faults)))]
    files = sorted(
        path for path in step.rglob("*") if str(path).endswith(only) and path.is_file() and path.stat().st_size
    )
    weights = np.array([1 + np.log2(path.stat().st_size) for path in files])  # large files more often, small ones too
    file = files[rng.choice(len(files), p=weights / weights.sum())]
    fault(step if fault in WHOLE else file, rng)
    return f"{fault.__name__} {file.relative_to(step.parent) if fault not in WHOLE else step.name}"


def flip_bit(file: pathlib.Path, rng: np.random.Generator) -> None:
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    file.write_bytes(content)


def flip_byte(file: pathlib.Path, rng: np.random.Generator) -> None:
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 0xFF
    file.write_bytes(content)


def truncate(file: pathlib.Path, rng: np.random.Generator) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.integers(len(content))])


def zero_page(file: pathlib.Path, rng: np.random.Generator) -> None:
    content = bytearray(file.read_bytes())
    start = int(rng.integers(len(content))) // PAGE * PAGE
    content[start : start + PAGE] = bytes(len(content[start : start + PAGE]))
    file.write_bytes(content)


def empty(file: pathlib.Path, rng: np.random.Generator) -> None:
    file.write_bytes(b"")


def delete(file: pathlib.Path, rng: np.random.Generator) -> None:
    file.unlink()


def delete_description(step: pathlib.Path, rng: np.random.Generator) -> None:
    (step / "host" / "metadata").unlink()


def delete_all(step: pathlib.Path, rng: np.random.Generator) -> None:
    """Leave an empty directory, as a deletion that was cut short does."""
    shutil.rmtree(step)
    step.mkdir()


def delete_half(step: pathlib.Path, rng: np.random.Generator) -> None:
    for file in sorted(path for path in step.rglob("*") if path.is_file()):
        if rng.random() < 0.5:
            file.unlink()


def stray_number(step: pathlib.Path, rng: np.random.Generator) -> None:
    (step.parent / "999").mkdir()


def stray_step(step: pathlib.Path, rng: np.random.Generator) -> None:
    (step.parent / "step_999").mkdir()


FAULTS: tuple[Fault, ...] = (
    *(flip_bit, flip_byte, truncate, zero_page, empty, delete),
    *(delete_description, delete_all, delete_half, stray_number, stray_step),
)
FATAL = (truncate, empty, delete, delete_description, delete_all)
WHOLE = (delete_description, delete_all, delete_half, stray_number, stray_step)

STRANGERS: dict[str, Callable[[pathlib.Path], Any]] = {
    "an empty 999": lambda place: (place / "999").mkdir(),
    "an empty 2024": lambda place: (place / "2024").mkdir(),
    "an empty step_999": lambda place: (place / "step_999").mkdir(),
    "a step_999 without a description": lambda place: (place / "step_999" / "arrays").mkdir(parents=True),
    "a file step_999": lambda place: (place / "step_999").write_text("something"),
    "a step_0999 that is a copy": lambda place: shutil.copytree(place / "step_60", place / "step_0999"),
    "a step_60_old that is a copy": lambda place: shutil.copytree(place / "step_60", place / "step_60_old"),
    "a temporary directory of Orbax": lambda place: (place / "step_67.orbax-checkpoint-tmp").mkdir(),
    "notes, and a directory of them": lambda place: [
        (place / "notes.txt").write_text("step_999"),
        (place / "notes").mkdir(),
    ],
    "a link to nowhere": lambda place: (place / "step_70").symlink_to(place / "nowhere"),
}
