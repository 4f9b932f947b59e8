"""Counting trials: what was done, what came out as it should, and the seed and the files of what did not."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all groups share.

    Attributes:
        scale: what part of the trials to do.
        seed: of everything that is drawn.
        root: where directories are made.
    """

    scale: float
    seed: int
    root: pathlib.Path

    def count(self, asked: int) -> int:
        return max(1, math.ceil(self.scale * asked))

    def rng(self, *names: Any) -> np.random.Generator:
        """Random numbers of their own for every trial, so that each can be had again alone."""
        return np.random.default_rng([self.seed, *(sum(map(ord, str(name))) for name in names)])

    def trials(self, name: str, asked: int) -> Trials:
        return Trials(self, name, asked)


class Trials:
    """The trials of one row of the table.

    Args:
        bench: which they belong to.
        name: of the row.
        asked: how many the table asks for.
    """

    def __init__(self, bench: Bench, name: str, asked: int):
        self._bench, self.name, self.asked = bench, name, asked
        self.passed = self.done = 0
        self.failures: list[str] = []
        self._began = time.monotonic()

    @contextlib.contextmanager
    def one(self, what: str) -> Iterator[pathlib.Path]:
        """One trial: a directory for it, which is kept, and named, if the body raises."""
        directory = pathlib.Path(tempfile.mkdtemp(prefix=f"{self.name.replace(' ', '-')[:40]}-", dir=self._bench.root))
        self.done += 1
        try:
            yield directory
        except Exception as error:
            failure = f"{what}: {type(error).__name__}: {error} (seed {self._bench.seed}, kept in {directory})"
            failure = failure.replace(str(self._bench.root), "...")  # what is written down is of no one machine
            (directory / "failure.txt").write_text(traceback.format_exc())
            self.failures.append(failure)
            print(f"  FAILED {self.name}: {failure:.1500}", flush=True)
        else:
            self.passed += 1
            shutil.rmtree(directory)

    def row(self, **figures: Any) -> Row:
        seconds = round(time.monotonic() - self._began, 1)
        return Row(self.name, self.passed, self.done, self.asked, figures, self.failures, seconds)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: what was done.
        passed: trials that came out as they should.
        done: trials in all.
        asked: trials that the table asks for.
        figures: what else was counted.
        failures: in words.
        seconds: that it took.
    """

    name: str
    passed: int
    done: int
    asked: int
    figures: dict[str, Any]
    failures: list[str]
    seconds: float

    def __str__(self) -> str:
        short = f", of {self.asked} asked" if self.done < self.asked else ""
        verdict = "ok" if self.passed == self.done else "FAILED"
        more = "".join(f"; {name} {value}" for name, value in self.figures.items())
        return f"{self.name:58} {self.passed}/{self.done}{short} {verdict}{more} ({self.seconds} s)"


def expect(condition: Any, message: str) -> None:
    if not condition:
        raise AssertionError(message)
