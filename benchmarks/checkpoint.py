"""What a checkpoint costs: over plain Orbax, for its checksums, and in a training run.

    python -m benchmarks.checkpoint [--rounds 7] [--sizes 1 100 1000] [--pairs 3] [--seconds 25] [--json FILE]

Both sides save the very same arrays, in the background, and a small file of JSON; they take turns, after a save of each
that does not count, and keep one checkpoint. Only the ratios of the two say much: the disk is whatever is under the
directory for temporary files. Beside the time that a save blocks stands the time that the processor spends on it in the
thread that saves: where other work takes turns on the processors, the clock measures that work, too. Targets are those
that the project has set itself; a missed one is printed as missed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
import pathlib
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import ant_jax as ant
from ant_jax._checkpoint import checkpointer as _checkpoint, storage
from ant_jax._checkpoint.manifest import read_manifest, verify, write_manifest
from ant_jax._checkpoint.snapshot import take_snapshot
from ant_jax._hooks.callback import hooks_of
from benchmarks._common import BATCH, STEPS, data, machine, mlp_trainer, timed, write


LEAVES = 8  # of the parameters; with Adam there are three times as many
LARGE_MB, LARGE_ROUNDS = 1000, 3
EVERY_SECONDS = 10.0
BLOCKING_TARGET, CHECKSUM_TARGET, RUN_TARGET = 1.5, 0.15, 1.02
LARGE_SPREAD = 0.25


def state_of(megabytes: int) -> tuple[ant.Trainer, ant.TrainState]:
    """A trainer and a state of about so many megabytes: parameters, and the two moments of Adam, all noise."""
    rows = max(1, round(megabytes * 1e6 / (3 * LEAVES * 4 * 1000)))
    rng = np.random.default_rng(0)

    def noise(leaf: Any) -> Any:
        shape, dtype = leaf.shape, leaf.dtype
        return jnp.asarray(rng.standard_normal(shape, dtype)) if dtype == jnp.float32 and leaf.ndim else leaf

    def init(key: Any, inputs: Any) -> Any:
        del key, inputs
        return {f"layer_{i}": jnp.zeros((rows, 1000)) for i in range(LEAVES)}, {}

    def apply(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
        del key
        return inputs * params["layer_0"][0, 0], model_state

    trainer = ant.Trainer((init, apply), optax.adam(1e-3), lambda outputs, targets: (outputs - targets) ** 2)
    state = trainer.init((np.zeros(2, np.float32), np.zeros(2, np.float32)))
    params, opt_state = jax.tree.map(noise, (state.params, state.opt_state))
    return trainer, state.replace(params=params, opt_state=opt_state)


def nested(arrays: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*outer, last), leaf in arrays.items():
        functools.reduce(lambda inner, key: inner.setdefault(key, {}), outer, tree)[last] = leaf
    return tree


class Saving:
    """One way to save: what to call to save a step, and to wait for it."""

    def __init__(self, save: Callable[[int], Any], wait: Callable[[], Any]):
        self.save, self.wait = save, wait
        self.blocking: list[float] = []
        self.processor: list[float] = []
        self.total: list[float] = []

    def round(self, step: int, count: bool) -> None:
        processor = time.thread_time()
        blocking, _ = timed(lambda: self.save(step))
        processor = time.thread_time() - processor
        waiting, _ = timed(self.wait)
        if count:
            self.blocking.append(blocking)
            self.processor.append(processor)
            self.total.append(blocking + waiting)


def compared(
    ours: Sequence[float],
    theirs: Sequence[float],
    target: float | None = None,
    names: tuple[str, str] = ("ours", "orbax"),
) -> dict[str, Any]:
    """Medians, minima and their ratios; times in milliseconds."""
    ratio = statistics.median(ours) / statistics.median(theirs)
    spread = max(_spread(ours), _spread(theirs))
    sides = list(zip(names, (ours, theirs), strict=True))
    return {
        "ratio": round(ratio, 4),
        "ratio_of_minima": round(min(ours) / min(theirs), 4),
        "target": target,
        "met": None if target is None else ratio <= target,
        **{f"{name}_ms": round(1e3 * statistics.median(side), 3) for name, side in sides},
        **{f"{name}_min_ms": round(1e3 * min(side), 3) for name, side in sides},
        "spread": round(spread, 3),
        "spread_is_large": spread > LARGE_SPREAD,
    }


def _spread(times: Sequence[float]) -> float:
    """The distance of the quartiles, in medians."""
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return (high - low) / statistics.median(times)


def saves_and_restores(megabytes: int, rounds: int, directory: pathlib.Path) -> dict[str, Any]:
    trainer, state = state_of(megabytes)
    device_names = trainer._events.device_names
    arrays = take_snapshot(state, device_names).arrays
    size = sum(leaf.nbytes for leaf in arrays.values())
    tree, note = nested(arrays), {"epoch": 3, "batch_idx": 17, "history": [{"train_loss": 0.5}]}
    options = ocp.CheckpointManagerOptions(
        step_prefix=_checkpoint.PREFIX,
        cleanup_tmp_directories=True,
        max_to_keep=1,
        async_options=ocp.options.AsyncOptions(timeout_secs=_checkpoint.TIMEOUT_SECONDS),
    )
    sealing_threads: set[threading.Thread] = set()

    def noting_thread(*arguments: Any) -> str:
        sealing_threads.add(threading.current_thread())
        return write_manifest(*arguments)

    storage.write_manifest = noting_thread
    try:
        with (
            trainer.checkpointer(directory / "ours", keep=1) as checkpointer,
            ocp.CheckpointManager(directory / "orbax", options=options) as manager,
        ):
            ours = Saving(lambda step: checkpointer.save(state.replace(step=jnp.int32(step))), checkpointer.wait)
            items = ocp.args.Composite(arrays=ocp.args.StandardSave(tree), host=ocp.args.JsonSave(note))
            orbax = Saving(lambda step: manager.save(step, args=items), manager.wait_until_finished)
            for i in range(rounds + 1):
                for side in (ours, orbax) if i % 2 else (orbax, ours):
                    side.round(i + 1, count=i > 0)
            assert threading.main_thread() not in sealing_threads and sealing_threads

            form = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
            like = ocp.args.Composite(arrays=ocp.args.StandardRestore(form), host=ocp.args.JsonRestore())
            restores = [], []
            for i in range(rounds + 1):
                a, _ = timed(lambda: jax.block_until_ready(trainer.restore(directory / "ours")))
                b, _ = timed(lambda: jax.block_until_ready(manager.restore(rounds + 1, args=like)["arrays"]))
                if i > 0:
                    restores[0].append(a)
                    restores[1].append(b)
    finally:
        storage.write_manifest = write_manifest

    plain = {keys: np.asarray(leaf) for keys, leaf in arrays.items()}
    sealing = [timed(lambda: write_manifest({}, plain)) for _ in range(rounds)]
    rows = read_manifest(sealing[0][1])["arrays"]
    verifying = [timed(lambda: verify(plain, rows))[0] for _ in range(rounds)]
    hundreds = size / 1e8
    per_100_mb = {
        "seconds_to_seal_100_mb": round(statistics.median(seconds for seconds, _ in sealing) / hundreds, 4),
        "seconds_to_verify_100_mb": round(statistics.median(verifying) / hundreds, 4),
        "target": CHECKSUM_TARGET,
    }
    return {
        "megabytes": round(size / 1e6, 2),
        "arrays": len(arrays),
        "rounds": rounds,
        "load": round(os.getloadavg()[0], 1),
        "blocking": compared(ours.blocking, orbax.blocking, BLOCKING_TARGET),
        "processor": compared(ours.processor, orbax.processor),
        "total": compared(ours.total, orbax.total),
        "restore": compared(*restores),
        "checksums": {**per_100_mb, "met": max(list(per_100_mb.values())[:2]) <= CHECKSUM_TARGET},
    }


def run_with_and_without(pairs: int, seconds: float, directory: pathlib.Path) -> dict[str, Any]:
    """The same training with a checkpoint every ten seconds and without, in turn, by the clock and in CPU time.

    Both sides run one trainer, and so one compiled program: two that were compiled from the same source differ by more
    than what is measured here. Without, the callback's hooks return at once.
    """
    loader = ant.ArrayLoader(data(STEPS, (64,)), BATCH, shuffle=False)
    checkpoint = ant.callbacks.checkpoint(directory, every_seconds=EVERY_SECONDS, every_epochs=None, keep=100)
    is_on = [True]
    hook_seconds: list[float] = []  # of the callback, in which it also waits for the steps before

    def switched(hook: Callable[..., Any]) -> Any:
        @functools.wraps(hook)  # with its parameters, which the trainer looks at
        def switched_hook(*arguments: Any) -> Any:
            return hook(*arguments) if is_on[0] else arguments[-2:]

        return switched_hook

    def report(trainer: Any, state: Any, logs: Any) -> Any:
        if is_on[0]:
            hook_seconds.append(trainer.costs.hook_seconds["checkpoint"])
        return state, logs

    hooks = {name: switched(hook) for name, hook in hooks_of(checkpoint).items()}
    mlp = mlp_trainer(
        ant.Callback(name="checkpoint", every=checkpoint.every, **hooks),
        ant.Callback(name="reporter", on_train_end=report),
    )

    def run(name: str, epochs: int) -> tuple[float, float]:
        is_on[0] = name == "with"
        state = mlp.init(tuple(array[:BATCH] for array in data(1, (64,))))
        cpu = time.process_time()
        wall, _ = timed(lambda: jax.block_until_ready(mlp.fit(state, loader, epochs)[0].params))
        return wall, time.process_time() - cpu

    run("with", 50)  # compiles, and imports what Orbax needs
    epochs = max(1, round(seconds * 100 / run("without", 100)[0]))
    hook_seconds.clear()
    names, saved = ("with", "without"), []
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for i in range(pairs):
        shutil.rmtree(directory)
        for name in names[:: 1 if i % 2 else -1]:
            times[name].append(run(name, epochs))
        saved.append(len(_checkpoint.steps_in(directory)))
    wall, cpu = zip(*times["with"], strict=True)
    wall_without, cpu_without = zip(*times["without"], strict=True)
    clock = compared(wall, wall_without, RUN_TARGET, ("with", "without"))
    processors = compared(cpu, cpu_without, None, ("with", "without"))
    shares = [hooks / whole for hooks, whole in zip(hook_seconds, wall, strict=True)]
    return {
        "pairs": pairs,
        "load": round(os.getloadavg()[0], 1),
        "steps": epochs * STEPS,
        "saves_in_each_run": saved,
        "share_of_time_in_hooks": round(statistics.median(shares), 5),
        "clock": clock,
        "processors": processors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help=f"saves of each side; at most {LARGE_ROUNDS} of 1000 MB")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 100, 1000], help="of the states, in megabytes")
    parser.add_argument("--pairs", type=int, default=3, help="of training runs, with and without; 0: none")
    parser.add_argument("--seconds", type=float, default=25.0, help="that a training run should take")
    parser.add_argument("--json", help="also write the results to this file")
    options = parser.parse_args()
    where = machine() | {"orbax": importlib.metadata.version("orbax-checkpoint")}
    verdict = {True: "met", False: "MISSED", None: "no target"}
    results: dict[str, Any] = {"sizes": []}
    for megabytes in options.sizes:
        rounds = min(options.rounds, LARGE_ROUNDS) if megabytes >= LARGE_MB else options.rounds
        with tempfile.TemporaryDirectory() as directory:
            result = saves_and_restores(megabytes, rounds, pathlib.Path(directory))
        results["sizes"].append(result)
        print(f"{result['megabytes']} MB in {result['arrays']} arrays, {rounds} rounds, at a load of {result['load']}")
        for what in ("blocking", "processor", "total", "restore"):
            found = result[what]
            print(
                f"  {what:9} {found['ratio']:.2f}x plain Orbax (of minima {found['ratio_of_minima']:.2f}x), target "
                f"{found['target']} {verdict[found['met']]}; {found['ours_ms']} ms / {found['orbax_ms']} ms"
                f"{'; large spread' if found['spread_is_large'] else ''}"
            )
        found = result["checksums"]
        print(
            f"  checksums of 100 MB: {found['seconds_to_seal_100_mb']} s to seal, "
            f"{found['seconds_to_verify_100_mb']} s to verify, target {CHECKSUM_TARGET} s {verdict[found['met']]}"
        )
    if options.pairs:
        with tempfile.TemporaryDirectory() as directory:
            results["run"] = found = run_with_and_without(options.pairs, options.seconds, pathlib.Path(directory))
        clock, processors = found["clock"], found["processors"]
        print(
            f"run of {found['steps']} steps with {found['saves_in_each_run']} saves, at a load of {found['load']}: "
            f"{clock['ratio']:.4f}x the time "
            f"of one without (of minima {clock['ratio_of_minima']:.4f}x), target {RUN_TARGET}x "
            f"{verdict[clock['met']]}; processors' time {processors['ratio']:.4f}x; "
            f"its hooks took {found['share_of_time_in_hooks']:.2%} of the time; "
            f"{clock['with_ms']:.0f} ms / {clock['without_ms']:.0f} ms"
            f"{'; large spread' if clock['spread_is_large'] else ''}"
        )
    write(options.json, {**where, **results})


if __name__ == "__main__":
    main()
