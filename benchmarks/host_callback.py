"""What a callback costs that looks on the host every 100 batches and does nothing.

    python -m benchmarks.host_callback [--rounds 31] [--json benchmarks/results/host-callback-cpu.json]

Two trainers, with it and without, train a 64-64-10 MLP in one process and in turn. They share one compiled program, for
a host callback is no part of it, and two programs compiled from one source differ by more than what is measured here.
(So epochs have 400 batches: on both sides that makes chunks of 200, and other chunks would be another program.)
"""

from __future__ import annotations

import argparse
import statistics

import jax

import ant_jax as ant
from benchmarks._common import BATCH, data, in_turn, machine, mlp_trainer, ratio_of, timed, write


EPOCHS, STEPS, TARGET = 80, 400, 1.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="runs of each side")
    parser.add_argument("--json", help="also write the results to this file")
    options = parser.parse_args()
    where = machine()
    idle = ant.Callback(name="idle", every=100, on_batch_end=lambda batch_idx, trainer, state, logs: (state, logs))
    sides = {"with": mlp_trainer(idle), "without": mlp_trainer()}
    object.__setattr__(sides["with"], "_programs", sides["without"]._programs)
    loader = ant.ArrayLoader(data(STEPS, (64,)), BATCH, shuffle=False)

    def run(name: str) -> float:
        state = sides[name].init(tuple(array[:BATCH] for array in data(1, (64,))))
        # To the end of the last step: fit returns before the device is done, and not equally long before on both sides.
        seconds, _ = timed(lambda: jax.block_until_ready(sides[name].fit(state, loader, EPOCHS)[0].params))
        return 1e6 * seconds / (EPOCHS * STEPS)

    times = in_turn(run, options.rounds, discarded=2)  # which compile
    ratio, (low, high) = ratio_of(times)
    print(
        f"a host callback every 100 batches: {ratio:.4f}x (quartiles {low:.4f}, {high:.4f}), target {TARGET}x "
        f"{'met' if ratio <= TARGET else 'MISSED'}; {statistics.median(times['with']):.2f} us a step / "
        f"{statistics.median(times['without']):.2f} us"
    )
    write(options.json, {**where, "us_a_step": times, "ratio": ratio, "quartiles": [low, high], "target": TARGET})


if __name__ == "__main__":
    main()
