"""The other end of the workers: peers in processes of their own, which take turns."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks.compare.peers import PEERS, Peer
from benchmarks.compare.workloads import Workload


TOLERANCE = 1e-3  # of the mean loss of the first epoch, relative; rounding makes trainings part slowly


class PeerFailed(Exception):
    """A worker has ended before its time."""


class OtherTraining(Exception):
    """A peer's loss is not the others'."""


class Worker:
    """A peer's process.

    Args:
        workload: that it trains.
        peer: what runs there.
    """

    def __init__(self, workload: Workload, peer: Peer):
        self.peer = peer
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.compare.worker", workload.name, peer.name, str(workload.steps)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.began = self._answer()
        self.times: list[float] = []
        self.peak_mb = 0.0

    def run(self) -> None:
        """Have it train for a timed run."""
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.times.append(answer["seconds"])
        self.peak_mb = answer["peak_mb"]

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
        The results by peer.

    Raises:
        PeerFailed: one has ended before its time.
        OtherTraining: one trains otherwise than the others.
    """
    workers: list[Worker] = []
    try:
        for name in names:
            tell(f"{workload.name}: {name} starts")
            workers.append(Worker(workload, PEERS[name]))
        apart = refuse_other_trainings(workload, workers)
        for number in range(rounds + 1):
            for worker in workers[:: 1 if number % 2 else -1]:
                tell(f"{workload.name}: {worker.peer.name}, run {number} of {rounds}")
                worker.run()
    finally:
        for worker in workers:
            worker.end()
    steps = workload.steps * workload.epochs
    return {worker.peer.name: summary(worker, steps, apart[worker.peer.name]) for worker in workers}


def refuse_other_trainings(workload: Workload, workers: list[Worker]) -> dict[str, float]:
    """How far each peer's loss is from the median of all, after it is clear that none is far."""
    middle = [statistics.median(worker.began["losses"][i] for worker in workers) for i in range(2)]
    apart = {
        worker.peer.name: [abs(loss / m - 1) for loss, m in zip(worker.began["losses"], middle, strict=True)]
        for worker in workers
    }
    for name, (first, _) in apart.items():
        if first > TOLERANCE:
            raise OtherTraining(
                f"{name} trains something else on {workload.name}: its mean loss of the first epoch is {first:.2%} "
                f"from the others' {middle[0]:.6f}"
            )
    return {name: max(both) for name, both in apart.items()}


def summary(worker: Worker, steps: int, apart: float) -> dict[str, Any]:
    times = [1e6 * seconds / steps for seconds in worker.times[1:]]  # the first lets a trainer find its pace
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {
        "label": worker.peer.label,
        "us_a_step": round(middle, 2),
        "quartiles": [round(low, 2), round(high, 2)],
        "runs": len(times),
        "peak_mb": round(worker.peak_mb),
        "loss_apart": float(f"{apart:.1e}"),
        "chosen": worker.began["chosen"],
    }
