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
from benchmarks._common import BATCH, data, machine, mlp_trainer, timed, write
from benchmarks.compare.targets import quartiles


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
    times: dict[str, list[float]] = {name: [] for name in sides}

    def run(name: str) -> None:
        state = sides[name].init(tuple(array[:BATCH] for array in data(1, (64,))))
        # To the end of the last step: fit returns before the device is done, and not equally long before on both sides.
        seconds, _ = timed(lambda: jax.block_until_ready(sides[name].fit(state, loader, EPOCHS)[0].params))
        times[name].append(1e6 * seconds / (EPOCHS * STEPS))

    for number in range(options.rounds + 2):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            run(name)
    times = {name: values[2:] for name, values in times.items()}  # without compilation
    ratios = [a / b for a, b in zip(times["with"], times["without"], strict=True)]
    ratio, (low, high) = statistics.median(ratios), quartiles(ratios)
    print(
        f"a host callback every 100 batches: {ratio:.4f}x (quartiles {low:.4f}, {high:.4f}), target {TARGET}x "
        f"{'met' if ratio <= TARGET else 'MISSED'}; {statistics.median(times['with']):.2f} us a step / "
        f"{statistics.median(times['without']):.2f} us"
    )
    write(options.json, {**where, "us_a_step": times, "ratio": ratio, "quartiles": [low, high], "target": TARGET})


if __name__ == "__main__":
    main()
