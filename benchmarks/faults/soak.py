"""A long run that saves all the time holds no more in the end than after its beginning."""

from __future__ import annotations

import json
from collections.abc import Iterator

from benchmarks.faults.children import Child
from benchmarks.faults.job import Job
from benchmarks.faults.trials import Bench, Row, expect


STEPS, SAVES, BATCHES = 20_000, 2000, 100
LIMIT = 0.05  # by which memory may grow


def rows(bench: Bench) -> Iterator[Row]:
    trials = bench.trials("soak: memory, threads and files stay as they are", 1)
    steps = bench.count(STEPS)
    epochs, every = max(4, steps // BATCHES), STEPS // SAVES
    first = last = {"rss": 1, "threads": 0, "files": 0}
    with trials.one("soak") as directory:
        child = Child(Job(str(directory / "run"), epochs=epochs, batches=BATCHES, every=every, watch=True))
        expect(child.end() == 0, f"it has failed:\n{child.output[-2000:]}")
        held = [json.loads(line.removeprefix("holds ")) for line in child.output.splitlines() if "holds" in line]
        first, last = held[len(held) // 5], held[-1]  # after a warm-up of a fifth
        growth = last["rss"] / first["rss"] - 1
        expect(growth < LIMIT, f"memory has grown by {growth:.1%}, from {first} to {last}")
        for what in ("threads", "files"):
            late = {row[what] for row in held[len(held) // 5 :]}
            expect(len(late) <= 2 and last[what] <= first[what] + 1, f"there are {sorted(late)} {what}")
    yield trials.row(
        steps=epochs * BATCHES, saves=epochs * BATCHES // every,
        growth=f"{last['rss'] / first['rss'] - 1:.2%}", threads=last["threads"], files=last["files"],
    )  # fmt: skip
