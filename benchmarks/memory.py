"""The most memory that a run takes, against a loop by hand that donates its state.

    python -m benchmarks.memory [--mib 64] [--steps 20] [--json benchmarks/results/memory-cpu.json]

Adam trains one matrix of parameters, which with its two moments makes a state of three times ``--mib``. Each side makes
its state and trains on it in a process of its own, which says the most resident memory that it ever took, less what a
run of the same program on a small matrix takes: that is the code, the compiler and the batches. In ``fit, held`` the
caller keeps the state that it gives to ``fit``, and so has two.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable

import jax
import numpy as np
import optax

import ant_jax as ant
from benchmarks._common import machine, write


TARGET = 1.1
COLUMNS = 1024
SMALL = 0.25  # MiB of parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, default=64, help="of the parameters; the state has three times as much")
    parser.add_argument("--steps", type=int, default=20, help="of an epoch, of which there are two")
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--side", choices=SIDES, help="run one side here and print its peak; for this script itself")
    options = parser.parse_args()
    if options.side:
        SIDES[options.side](round(options.mib * 2**20 / (4 * COLUMNS)), options.steps)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))
        return
    where, state_mib = machine(), 3 * options.mib
    peaks = {side: _peak(side, options.mib, options.steps) - _peak(side, SMALL, options.steps) for side in SIDES}
    base = peaks["by hand, donated"]
    print(f"\na state of {state_mib:g} MiB\n\n| side | peak MiB | times the state | times by hand |\n|---|---|---|---|")
    for side, peak in peaks.items():
        print(f"| {side} | {peak:.0f} | {peak / state_mib:.2f} | {peak / base:.2f} |")
    ratio = peaks["fit"] / base
    print(f"\nfit / by hand: {ratio:.2f}x, target {TARGET}x {'met' if ratio <= TARGET else 'MISSED'}")
    write(options.json, {**where, "state_mib": state_mib, "peak_mib": peaks, "ratio": ratio, "target": TARGET})


def _peak(side: str, mib: float, steps: int) -> float:
    command = [sys.executable, "-m", "benchmarks.memory", "--side", side, "--mib", str(mib), "--steps", str(steps)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _by_hand(rows: int, steps: int) -> None:
    optimizer, batch = optax.adam(1e-3), _batch(rows)
    params = jax.jit(_init, static_argnums=1)(jax.random.key(0), rows)
    opt_state = optimizer.init(params)

    def step(params, opt_state, inputs, targets):
        def loss_fn(params):
            return optax.l2_loss(_outputs(params, inputs), targets).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    compiled = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(2 * steps):
        params, opt_state, _ = compiled(params, opt_state, *batch)
    jax.block_until_ready(params)


def _fit(rows: int, steps: int) -> None:
    trainer = _trainer(rows)
    # The state has no other name than fit's own, so fit overwrites it.
    state, _ = trainer.fit(trainer.init(_batch(rows)), [_batch(rows)] * steps, 2)
    jax.block_until_ready(state.params)


def _fit_held(rows: int, steps: int) -> None:
    trainer = _trainer(rows)
    state = trainer.init(_batch(rows))
    trained, _ = trainer.fit(state, [_batch(rows)] * steps, 2)
    jax.block_until_ready((state.params, trained.params))


SIDES: dict[str, Callable[[int, int], None]] = {"by hand, donated": _by_hand, "fit": _fit, "fit, held": _fit_held}


def _trainer(rows: int) -> ant.Trainer:
    def init(key, inputs):
        del inputs
        return _init(key, rows), {}

    def apply(params, model_state, inputs, key):
        del key
        return _outputs(params, inputs), model_state

    return ant.Trainer((init, apply), optax.adam(1e-3), optax.l2_loss, progress_bar=False)


def _init(key, rows):
    return {"kernel": jax.random.normal(key, (COLUMNS, rows))}


def _outputs(params, inputs):
    return inputs @ params["kernel"]


def _batch(rows: int) -> tuple[np.ndarray, np.ndarray]:
    return np.ones((1, COLUMNS), np.float32), np.zeros((1, rows), np.float32)


if __name__ == "__main__":
    main()
