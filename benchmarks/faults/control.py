"""The control arm: runs that nobody disturbs end alike, and different moments differ."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.faults.children import digest_of, each
from benchmarks.faults.job import Job
from benchmarks.faults.trials import Bench, Row, expect


def rows(bench: Bench) -> Iterator[Row]:
    trials = bench.trials("control: uninterrupted runs with one digest", 10)
    count = bench.count(10)
    digests = each(digest_of, [Job()] * count)
    for found in digests:
        with trials.one("run"):
            expect(found == digests[0], f"{found} is not {digests[0]}")
    yield trials.row(digest=digests[0][:16])
    trials = bench.trials("control: a run of one epoch more ends otherwise", 1)
    with trials.one("other"):
        expect(digest_of(Job(epochs=5)) != digests[0], "the comparison is dead: two different steps have one digest")
    yield trials.row()
