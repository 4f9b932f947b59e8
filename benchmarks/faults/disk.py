"""Disks that are full, read-only, or gone, and directories that two runs want. The mounts need root."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import ant_jax as ant
from ant_jax._checkpoint.manifest import CheckpointError
from benchmarks.faults.children import Child, committed, compiled_once, sleep, unfinished
from benchmarks.faults.job import Job, digest
from benchmarks.faults.trials import Bench, Row, expect


JOB = Job(width=256, epochs=3, batches=10, keep=2)  # a state of 1.3 MB, saved six times
EVERY, SAVES = 5, 6
TRIALS = 20


def rows(bench: Bench) -> Iterator[Row]:
    scene = Scene()
    yield full(bench, scene)
    yield other_faults(bench, scene)
    yield from two_runs(bench)


class Scene:
    """The job, what it ends with, and how it goes on."""

    def __init__(self) -> None:
        self.end = digest(JOB.run())

    def fails(self, directory: pathlib.Path | str, disturbing: ant.Callback | None = None) -> Exception:
        """Run the job into a directory until it fails, as it must."""
        return failure_of(lambda: self.run(directory, disturbing))

    def run(self, directory: pathlib.Path | str, disturbing: ant.Callback | None = None) -> ant.TrainState:
        job = dataclasses.replace(JOB, directory=str(directory))
        with contextlib.redirect_stdout(io.StringIO()):
            return job.run(job.trainer(*([disturbing] if disturbing else [])))

    def check_last_good(self, directory: pathlib.Path, step: int) -> None:
        """The newest checkpoint is of that step, and can be read; what could not be written has left nothing."""
        expect(committed(directory)[-1:] == ([step] if step else []), f"there are {committed(directory)}, not {step}")
        expect(not unfinished(directory), f"there is {unfinished(directory)}")
        if step:
            expect(int(JOB.trainer().restore(directory).step) == step, "what is restored is of another step")

    def check_goes_on(self, directory: pathlib.Path) -> None:
        """When the fault is mended, the same command leads to the right end, and saves it."""
        expect(digest(self.run(directory)) == self.end, "the run that went on ended otherwise")
        expect(committed(directory)[-1] == SAVES * EVERY, f"the end is not saved: {committed(directory)}")


def failure_of(run: Callable[[], Any]) -> Exception:
    try:
        run()
    except Exception as error:
        return error
    raise AssertionError("the run did not fail")


def at_save(directory: pathlib.Path, number: int, action: Callable[[], Any]) -> ant.Callback:
    """Do something before the save of that number, counted from 1, when the one before it is done."""

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        if int(state.step) == EVERY * number - 1:
            while number > 1 and int(state.step) + 1 - EVERY not in committed(directory):
                sleep(0.01)
            sleep(0.1)  # for what it deletes
            action()
        return state, logs

    return ant.Callback(name="disturbing", every=1, on_batch_end=on_batch_end)


@contextlib.contextmanager
def mounted(place: pathlib.Path, options: str) -> Iterator[pathlib.Path]:
    """A file system in memory."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)
        place.rmdir()


def fill(disk: pathlib.Path, leave: int) -> None:
    """Leave so many bytes free."""
    free = shutil.disk_usage(disk).free
    with open(disk / "ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - leave))


def full(bench: Bench, scene: Scene) -> Row:
    """Room for less than one checkpoint more, from the first, the second or a later save on; then there is room."""
    trials, counts = (
        bench.trials("disk full: named, last good intact, goes on when freed", TRIALS),
        collections.Counter(),
    )
    for number in range(bench.count(TRIALS)):
        save = 1 + number % SAVES
        leave = int(bench.rng("full", number).integers(0, 1 << 20))
        with (
            trials.one(f"save {save}, {leave} bytes left") as directory,
            mounted(directory / "disk", "size=24m") as disk,
        ):
            error = scene.fails(
                disk / "run", at_save(disk / "run", save, lambda disk=disk, leave=leave: fill(disk, leave))
            )
            expect(isinstance(error, CheckpointError), f"the error is {error!r}")
            good = EVERY * (save - 1)
            for text in ("no space is left", f"of step {good}" if good else "there is no other", "are free"):
                expect(text in str(error), f"{text!r} is not said: {error}")
            scene.check_last_good(disk / "run", good)
            (disk / "ballast").unlink()
            scene.check_goes_on(disk / "run")
            counts[f"at_save_{save}"] += 1
    return trials.row(**counts)


def other_faults(bench: Bench, scene: Scene) -> Row:
    trials = bench.trials("other faults of the disk: named, at the start if knowable", len(FAULTS))
    for fault in FAULTS:
        with trials.one(fault.__doc__ or "") as directory:
            fault(directory, scene)
    return trials.row()


def read_only_at_start(directory: pathlib.Path, scene: Scene) -> None:
    """read-only at the start"""
    with mounted(directory / "disk", "size=24m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        error = scene.fails(disk / "run", at_save(disk, 1, too_late))
        expect(isinstance(error, OSError) and "Read-only" in str(error), f"the error is {error!r}")


def forbidden_meanwhile(directory: pathlib.Path, scene: Scene) -> None:
    """writing is forbidden while the run goes on"""
    run = directory / "run"  # immutable, which holds for root, too; no disk becomes read-only while a file is open
    try:
        error = scene.fails(run, at_save(run, 3, lambda: subprocess.run(["chattr", "+i", run], check=True)))
    finally:
        subprocess.run(["chattr", "-i", run], check=True)
    expect(isinstance(error, CheckpointError) and "not permitted" in str(error), f"the error is {error!r}")
    scene.check_last_good(run, 10)
    scene.check_goes_on(run)


def no_inodes(directory: pathlib.Path, scene: Scene) -> None:
    """no inodes left"""
    with mounted(directory / "disk", "size=24m,nr_inodes=300") as disk:

        def use_up() -> None:
            (disk / "many").mkdir()
            with contextlib.suppress(OSError):
                for number in range(300):
                    (disk / "many" / str(number)).touch()

        error = scene.fails(disk / "run", at_save(disk / "run", 3, use_up))
        expect(isinstance(error, CheckpointError) and "no space is left" in str(error), f"the error is {error!r}")
        scene.check_last_good(disk / "run", 10)
        shutil.rmtree(disk / "many")
        scene.check_goes_on(disk / "run")


def file_instead(directory: pathlib.Path, scene: Scene) -> None:
    """the directory is a file"""
    (directory / "run").write_text("")
    error = scene.fails(directory / "run", at_save(directory, 1, too_late))
    expect(isinstance(error, NotADirectoryError) and "run is no directory" in str(error), f"the error is {error!r}")


def inside_a_file(directory: pathlib.Path, scene: Scene) -> None:
    """what the directory is in is a file"""
    (directory / "file").write_text("")
    error = scene.fails(directory / "file" / "run", at_save(directory, 1, too_late))
    expect(isinstance(error, NotADirectoryError) and "file" in str(error), f"the error is {error!r}")


def missing_parents(directory: pathlib.Path, scene: Scene) -> None:
    """a directory that does not exist, in one that does not either: they are made"""
    scene.check_goes_on(directory / "a" / "b" / "run")


def relative(directory: pathlib.Path, scene: Scene) -> None:
    """a relative path, and a working directory that changes"""
    before = pathlib.Path.cwd()
    elsewhere = directory / "elsewhere"
    elsewhere.mkdir()
    os.chdir(directory)
    try:
        scene.run("run", at_save(directory / "run", 2, lambda: os.chdir(elsewhere)))
        expect(committed(directory / "run")[-1] == SAVES * EVERY, f"there are {committed(directory / 'run')}")
        expect(not list(elsewhere.iterdir()), f"there is {list(elsewhere.iterdir())} elsewhere")
    finally:
        os.chdir(before)


def removed(directory: pathlib.Path, scene: Scene) -> None:
    """removed while the run goes on"""
    error = scene.fails(directory / "run", at_save(directory / "run", 3, lambda: shutil.rmtree(directory / "run")))
    expect(isinstance(error, CheckpointError) and "removed or replaced" in str(error), f"the error is {error!r}")
    shutil.rmtree(directory / "run", ignore_errors=True)
    scene.check_goes_on(directory / "run")


def made_anew(directory: pathlib.Path, scene: Scene) -> None:
    """removed and made anew while the run goes on"""

    def replace() -> None:
        shutil.rmtree(directory / "run")
        (directory / "run").mkdir()

    error = scene.fails(directory / "run", at_save(directory / "run", 3, replace))
    expect(isinstance(error, CheckpointError) and "removed or replaced" in str(error), f"the error is {error!r}")


def too_late() -> None:
    raise AssertionError("the run has begun to train")


FAULTS = (
    *(read_only_at_start, forbidden_meanwhile, no_inodes, file_instead, inside_a_file, missing_parents, relative),
    *(removed, made_anew),
)


def two_runs(bench: Bench) -> Iterator[Row]:
    refusals = bench.trials("a second run in one directory: refused, with the process", TRIALS)
    takeovers = bench.trials("a run after one that was killed: takes the directory over", TRIALS)
    with compiled_once(bench.root):
        for number in range(bench.count(TRIALS)):
            with refusals.one(f"refusal {number}") as directory, takeovers.one(f"takeover {number}"):
                two_runs_in(dataclasses.replace(JOB, directory=str(directory), epochs=100_000))
    yield refusals.row()
    yield takeovers.row()


def two_runs_in(job: Job) -> None:
    directory, said = pathlib.Path(job.directory or ""), io.StringIO()
    child = Child(job)
    child.wait_for("run begins")
    while child.running and not committed(directory):
        sleep(0.01)
    with contextlib.redirect_stdout(said):
        error = failure_of(job.run)
    child.kill()
    expect(isinstance(error, CheckpointError), f"the error is {error!r}")
    expect(f"is in use by process {child.pid} on " in str(error), f"the process is not named: {error}")
    begun_at = committed(directory)[-1]
    with contextlib.redirect_stdout(said):
        end = dataclasses.replace(job, epochs=begun_at // job.batches + 2).run()
    expect(f"resumed from step {begun_at}" in said.getvalue(), f"it says {said.getvalue()}")
    expect(committed(directory)[-1] == int(end.step) > begun_at, "the end is not saved")
    expect(not unfinished(directory), "temporary directories are left")
