"""A peer in a process of its own, which trains when it is told to.

    python -m benchmarks.compare.worker WORKLOAD PEER STEPS

Answers with lines of JSON: first what it found in two epochs from the initial weights, then, for every line that it
reads, the seconds of a timed run.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

from benchmarks.compare.peers import PEERS
from benchmarks.compare.workloads import WORKLOADS


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the peer prints is no answer
    workload_name, peer_name, steps = sys.argv[1:]
    workload = WORKLOADS[workload_name].of_steps(int(steps))

    def answer(**found: Any) -> None:
        answers.write(json.dumps(found) + "\n")

    train, chosen = PEERS[peer_name].make(workload)
    answer(losses=[train(1), train(1)], chosen=chosen)
    for _ in sys.stdin:
        began = time.perf_counter()
        train(workload.epochs)
        seconds = time.perf_counter() - began
        answer(seconds=seconds, peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
