"""A long run that saves all the time holds no more in the end than after its beginning."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import pathlib
import shutil
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from benchmarks.faults.children import Child
from benchmarks.faults.job import Job, data, held
from benchmarks.faults.trials import Bench, Row, expect


STEPS, SAVES, BATCHES = 20_000, 2000, 100
LIMIT = 0.05  # by which memory may grow


def rows(bench: Bench) -> Iterator[Row]:
    trials = bench.trials("soak: memory, threads and files stay as they are", 1)
    steps = bench.count(STEPS)
    epochs, every = max(5, steps // BATCHES), STEPS // SAVES
    saves = epochs * BATCHES // every
    ours = [{"rss": 1, "threads": 0, "files": 0}]
    with trials.one("soak") as directory:
        child = Child(Job(str(directory / "run"), epochs=epochs, batches=BATCHES, every=every, watch=True))
        expect(child.end() == 0, f"it has failed:\n{child.output[-2000:]}")
        lines = [line.removeprefix("holds ") for line in child.output.splitlines() if "holds" in line]
        ours = [json.loads(line) for line in lines]
        for what in ("threads", "files"):  # how many there are in the middle of a save differs from sample to sample
            before, after = most(what, warm(ours)), most(what, ours[-len(ours) // 5 :])
            expect(after <= before + 1, f"at most {before} {what} after the beginning, {after} in the end")
        expect(growth(ours) < LIMIT, f"memory has grown by {growth(ours):.1%}")
    spawning = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawning) as process:
        plain = process.submit(plain_orbax, bench.root / "plain", saves, BATCHES // every).result()
    shutil.rmtree(bench.root / "plain")
    yield trials.row(
        steps=epochs * BATCHES, saves=saves, growth=f"{growth(ours):.2%}", kB_a_save=per_save(ours, saves),
        plain_orbax_growth=f"{growth(plain):.2%}", plain_orbax_kB_a_save=per_save(plain, saves),
        threads=most("threads", ours), files=most("files", ours),
    )  # fmt: skip


def plain_orbax(directory: pathlib.Path, saves: int, every: int) -> list[dict[str, int]]:
    """What a process holds, now and then, that saves arrays like the job's with Orbax, and does nothing else."""
    jax.config.update("jax_platforms", "cpu")
    state = Job().trainer().init(tuple(leaf[:1] for leaf in data(1)))
    tree = {f"leaf_{i}": jnp.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves((state.params, state.opt_state)))}
    samples = []
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(max_to_keep=3)) as manager:
        for step in range(1, saves + 1):
            items = {"arrays": ocp.args.StandardSave(tree), "host": ocp.args.JsonSave({"step": step})}
            manager.save(step, args=ocp.args.Composite(**items))
            manager.wait_until_finished()
            if step % every == 0:
                samples.append(held())
    return samples


def warm(samples: list[dict[str, int]]) -> list[dict[str, int]]:
    """The second fifth of the samples: the first is a warm-up."""
    return samples[len(samples) // 5 : max(2, 2 * len(samples) // 5)]


def most(what: str, samples: list[dict[str, int]]) -> int:
    return max(sample[what] for sample in samples)


def growth(samples: list[dict[str, int]]) -> float:
    return samples[-1]["rss"] / samples[len(samples) // 5]["rss"] - 1


def per_save(samples: list[dict[str, int]], saves: int) -> float:
    grown = samples[-1]["rss"] - samples[len(samples) // 5]["rss"]
    return round(grown / (0.8 * saves), 1)
