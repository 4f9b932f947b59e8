"""The other end of the workers: peers in processes of their own, which take turns."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks.compare.peers import PEERS, Peer
from benchmarks.compare.workloads import Workload


# How far from the others' the mean losses of the first and of the second epoch may be, relatively: rounding makes
# trainings part, slowly at first.
TOLERANCES = (1e-3, 1e-2)


class PeerFailed(Exception):
    """A worker has ended before its time."""


class OtherTraining(Exception):
    """A peer's loss is not the others'."""


class Worker:
    """A peer's process.

    Args:
        workload: that it trains.
        peer: what runs there.
        settings: those of its choice; ``"choose"``: it only finds out which are best.
    """

    def __init__(self, workload: Workload, peer: Peer, settings: dict[str, Any] | str):
        self.peer, self.settings = peer, settings
        self._errors = tempfile.TemporaryFile("w+")
        words = settings if isinstance(settings, str) else json.dumps(settings)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.compare.worker", workload.name, peer.name, str(workload.steps), words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        self.began = self._answer()
        self.runs: list[dict[str, float]] = []

    def run(self) -> None:
        """Have it train for a timed run."""
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        self.runs.append(self._answer())

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        raise PeerFailed(f"{self.peer.name} has failed:\n{self._errors.read()[-3000:]}")


def installed(peer: Peer) -> bool:
    return peer.distribution is None or importlib.util.find_spec(peer.distribution) is not None


def measured(
    workload: Workload, names: list[str], rounds: int, tell: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Let peers take turns on a workload.

    Args:
        workload: that they train.
        names: of the peers.
        rounds: timed runs of each.
        tell: told what is under way.

    Returns:
        The results by peer, of those that did not fail.

    Raises:
        OtherTraining: one trains otherwise than the others.
    """
    workers: list[Worker] = []
    try:
        for name in names:
            tell(f"{workload.name}: {name} starts")
            try:
                workers.append(Worker(workload, PEERS[name], best_settings(workload, PEERS[name])))
            except PeerFailed as failure:
                print(f"{workload.name} without {name}: {failure}", file=sys.stderr)
        apart = refuse_other_trainings(workload, workers)
        for number in range(rounds + 1):
            for worker in workers[:: 1 if number % 2 else -1]:
                tell(f"{workload.name}: {worker.peer.name}, run {number} of {rounds}")
                worker.run()
    finally:
        for worker in workers:
            worker.end()
    return {worker.peer.name: summary(worker, apart[worker.peer.name]) for worker in workers}


def best_settings(workload: Workload, peer: Peer) -> dict[str, Any]:
    """Have a process of its own find them out, so that what it tries leaves nothing in the one that is measured."""
    if peer.choice is None:
        return {}
    chooser = Worker(workload, peer, "choose")
    chooser.end()
    return chooser.began


def refuse_other_trainings(workload: Workload, workers: list[Worker]) -> dict[str, float]:
    """How far each peer's losses are from the median of all, at most, after it is clear that none is far."""
    found: dict[str, float] = {}
    for epoch, tolerance in enumerate(TOLERANCES):
        middle = statistics.median([worker.began["losses"][epoch] for worker in workers])
        for worker in workers:
            loss = worker.began["losses"][epoch]
            apart = abs(loss / middle - 1)
            if not apart <= tolerance:  # nor NaN
                raise OtherTraining(
                    f"{worker.peer.name} trains something else on {workload.name}: its mean loss of epoch {epoch + 1} "
                    f"is {loss:.6f}, and that of the others {middle:.6f}"
                )
            found[worker.peer.name] = max(apart, found.get(worker.peer.name, 0.0))
    return found


def summary(worker: Worker, apart: float) -> dict[str, Any]:
    runs = worker.runs[1:]  # the first lets a trainer find its pace
    return {
        "label": worker.peer.label,
        "us_a_step": [round(run["us_a_step"], 3) for run in runs],
        "peak_mb": round(runs[-1]["peak_mb"]),
        "loss_apart": float(f"{apart:.1e}"),
        "chosen": worker.settings,
    }
