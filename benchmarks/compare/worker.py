"""A peer in a process of its own, which trains when it is told to; on the CPU.

    python -m benchmarks.compare.worker WORKLOAD PEER STEPS SETTINGS

Answers with lines of JSON. If ``SETTINGS`` is ``choose``: the settings that are best for the workload, and no more.
Else first the losses of two epochs from the initial weights, and then, for every line that it reads, the time of a step
in a timed run, and the run's loss.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from typing import Any

from benchmarks.compare.peers import PEERS
from benchmarks.compare.workloads import WORKLOADS


RUN_SECONDS = 0.7  # that a timed run takes at least


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the peer prints is no answer
    workload_name, peer_name, steps, settings = sys.argv[1:]
    workload, peer = WORKLOADS[workload_name].of_steps(int(steps)), PEERS[peer_name]

    def answer(**found: Any) -> None:
        answers.write(json.dumps(found) + "\n")

    if settings == "choose":
        return answer(**peer.best(workload))
    train = peer.make(workload, **json.loads(settings))
    answer(losses=[train(1), train(1)])
    epochs = 1
    while (seconds := timed(train, epochs)[0]) < RUN_SECONDS:
        epochs = max(2 * epochs, math.ceil(epochs * RUN_SECONDS / seconds)) if seconds < RUN_SECONDS / 2 else epochs + 1
    for _ in sys.stdin:
        seconds, loss = timed(train, epochs)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kilobytes, on Linux
        answer(us_a_step=1e6 * seconds / (epochs * workload.steps), loss=loss, peak_mb=peak_mb)
    return None


def timed(train: Any, epochs: int) -> tuple[float, float]:
    began = time.perf_counter()
    loss = train(epochs)
    return time.perf_counter() - began, loss


if __name__ == "__main__":
    main()
