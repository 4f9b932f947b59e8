"""What the logs of ``gradient_statistics`` add to the time that the first launches take, which is that of compiling.

    python -m benchmarks.compile_time [--parameters 200] [--rounds 11] [--json benchmarks/results/compile-time-cpu.json]

Two new trainers, with it and without, train a model of so many small parameters on 4 batches, in one process and in
turn. What is taken is processor time, because XLA compiles on several cores.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ant_jax as ant
from benchmarks._common import in_turn, machine, ratio_of, write


TARGET = 1.5


def first_fit(parameters: int, *callbacks: ant.Callback) -> float:
    """Make a trainer, and return the seconds of processor time of its first fit."""

    def init(key, x):
        return {f"p{i:04}": jnp.ones(3) for i in range(parameters)}, {}

    def apply(params, model_state, x, key):
        return x * sum(params.values()), model_state

    batch = np.ones((4, 3), np.float32), np.ones((4, 3), np.float32)
    trainer = ant.Trainer((init, apply), optax.sgd(0.1), optax.l2_loss, callbacks=callbacks, progress_bar=False)
    state, began = trainer.init(batch), time.process_time()
    jax.block_until_ready(trainer.fit(state, [batch] * 4, 1)[0].params)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=200, help="of the model")
    parser.add_argument("--rounds", type=int, default=11, help="first fits of each side")
    parser.add_argument("--json", help="also write the results to this file")
    options = parser.parse_args()
    where = machine()
    callbacks = {"with": [ant.callbacks.gradient_statistics()], "without": []}
    # The first round has what a process does once.
    times = in_turn(lambda side: first_fit(options.parameters, *callbacks[side]), options.rounds, discarded=1)
    ratio, (low, high) = ratio_of(times)
    print(
        f"gradient_statistics on {options.parameters} parameters: {ratio:.2f}x (quartiles {low:.2f}, {high:.2f}), "
        f"target {TARGET}x {'met' if ratio <= TARGET else 'MISSED'}; {statistics.median(times['with']):.2f} s / "
        f"{statistics.median(times['without']):.2f} s"
    )
    write(options.json, {**where, "seconds": times, "ratio": ratio, "quartiles": [low, high], "target": TARGET})


if __name__ == "__main__":
    main()
