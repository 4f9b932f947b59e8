"""What an observer costs that reads the loss of every batch.

    python -m benchmarks.observer [--rounds 31] [--json benchmarks/results/observer-cpu.json]

Two trainers, with it and without, train a 64-64-10 MLP in one process and in turn, as in ``benchmarks.host_callback``:
they share one compiled program. A few rounds more have the same function as a host callback that is no observer.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import jax

import ant_jax as ant
from benchmarks._common import BATCH, STEPS, data, in_turn, machine, mlp_trainer, ratio_of, timed, write


EPOCHS, TARGET = 32, 1.10
FEW_ROUNDS = 5


def reads_every_loss(observer: bool) -> ant.Callback:
    losses: list[float] = []

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        losses.append(float(logs["loss"]))
        return None if observer else (state, logs)

    def on_train_end(trainer: Any, state: Any, logs: Any) -> Any:
        assert len(losses) == EPOCHS * STEPS
        losses.clear()
        return None if observer else (state, logs)

    return ant.Callback(name="reads", observer=observer, on_batch_end=on_batch_end, on_train_end=on_train_end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="runs of each side")
    parser.add_argument("--json", help="also write the results to this file")
    options = parser.parse_args()
    where = machine()
    without = mlp_trainer()
    loader = ant.ArrayLoader(data(STEPS, (64,)), BATCH, shuffle=False)

    def compared(callback: ant.Callback, rounds: int) -> tuple[dict[str, list[float]], float, tuple[float, float]]:
        sides = {"with": mlp_trainer(callback), "without": without}
        object.__setattr__(sides["with"], "_programs", without._programs)

        def run(name: str) -> float:
            state = sides[name].init(tuple(array[:BATCH] for array in data(1, (64,))))
            # To the end of the last step: fit returns before the device is done.
            seconds, _ = timed(lambda: jax.block_until_ready(sides[name].fit(state, loader, EPOCHS)[0].params))
            return 1e6 * seconds / (EPOCHS * STEPS)

        times = in_turn(run, rounds, discarded=2)  # which compile
        return times, *ratio_of(times)

    times, ratio, (low, high) = compared(reads_every_loss(observer=True), options.rounds)
    print(
        f"an observer at every batch: {ratio:.4f}x (quartiles {low:.4f}, {high:.4f}), target {TARGET}x "
        f"{'met' if ratio <= TARGET else 'MISSED'}; {statistics.median(times['with']):.2f} us a step / "
        f"{statistics.median(times['without']):.2f} us"
    )
    _, on_host, _ = compared(reads_every_loss(observer=False), FEW_ROUNDS)
    print(f"a host callback that is no observer, at every batch: {on_host:.2f}x")
    results = {"us_a_step": times, "ratio": ratio, "quartiles": [low, high], "target": TARGET, "host_callback": on_host}
    write(options.json, {**where, **results})


if __name__ == "__main__":
    main()
