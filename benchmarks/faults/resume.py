"""A run goes on from every one of its positions, and ends with the same bits."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import shutil
from collections.abc import Iterator

from benchmarks.faults.children import committed
from benchmarks.faults.job import Job, digest
from benchmarks.faults.trials import Bench, Row, expect


EPOCHS, BATCHES = 3, 20
POSITIONS = EPOCHS * BATCHES


def rows(bench: Bench) -> Iterator[Row]:
    for accumulation, fuse in itertools.product((1, 3), (True, False)):
        job = Job(epochs=EPOCHS, batches=BATCHES, every=1, keep=1000, accumulation=accumulation, fuse=fuse)
        how = f"accumulation {accumulation}, {'fused' if fuse else 'a launch a step'}"
        yield every_position(bench, job, f"resume from each position: {how}")


def every_position(bench: Bench, job: Job, name: str) -> Row:
    trials = bench.trials(name, POSITIONS)
    saved, goes_on = bench.root / f"{name}-saved", bench.root / f"{name}-on"
    straight = digest(dataclasses.replace(job, every=None).run())
    first = dataclasses.replace(job, directory=str(saved))
    expect(digest(first.run()) == straight, "saving changes the run")
    later = dataclasses.replace(job, directory=str(goes_on), every=7)
    trainer = later.trainer()
    places = [0, *committed(saved)[:-1]]  # from the last there is nothing to go on to
    for step in places[:: max(1, POSITIONS // bench.count(POSITIONS))]:
        with trials.one(f"from step {step}"):
            shutil.rmtree(goes_on, ignore_errors=True)
            if step:
                shutil.copytree(saved / f"step_{step}", goes_on / f"step_{step}")
            with contextlib.redirect_stdout(io.StringIO()):
                end = later.run(trainer)
            expect(digest(end) == straight, "the digest differs")
    shutil.rmtree(saved)
    shutil.rmtree(goes_on, ignore_errors=True)
    return trials.row()
