"""What the benchmarks share: a model, data, a clock, and the words for the machine."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, TypeVar

import flax
import jax
import numpy as np
import optax
from flax import linen as nn

import ant_jax as ant
from benchmarks.compare.targets import quartiles


T = TypeVar("T")

STEPS, BATCH = 1000, 32  # of an epoch


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


def data(steps: int, shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(steps * BATCH, *shape)).astype(np.float32)
    return inputs, rng.integers(0, 10, steps * BATCH).astype(np.int32)


def mlp_trainer(*callbacks: ant.Callback) -> ant.Trainer:
    """Trains the MLP, with gradients clipped, and any callbacks."""
    return ant.Trainer(
        MLP(),
        optax.adam(1e-3),
        optax.softmax_cross_entropy_with_integer_labels,
        callbacks=[ant.callbacks.clip_by_global_norm(1.0), *callbacks],
        progress_bar=False,
    )


def timed(function: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def in_turn(run: Callable[[str], float], rounds: int, discarded: int) -> dict[str, list[float]]:
    """Measure the sides "with" and "without" in turn, each first in every other round.

    Args:
        run: measures a side.
        rounds: to keep.
        discarded: rounds before them.
    """
    times: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(rounds + discarded):
        for side in list(times)[:: 1 if number % 2 else -1]:
            times[side].append(run(side))
    return {side: values[discarded:] for side, values in times.items()}


def ratio_of(times: dict[str, list[float]]) -> tuple[float, tuple[float, float]]:
    """Return the median over the rounds of "with" by "without", and the quartiles."""
    ratios = [a / b for a, b in zip(times["with"], times["without"], strict=True)]
    return statistics.median(ratios), quartiles(ratios)


def machine(*packages: str) -> dict[str, Any]:
    """When and on what the figures were made, with the versions of further packages, if installed; printed, too."""
    found = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.local_device_count()} "
        f"{jax.default_backend()} device(s)",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
    }
    found |= {name: version(name) for name in packages if importlib.util.find_spec(name)}
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    return found


def write(path: str | None, results: dict[str, Any]) -> None:
    if path:
        with open(path, "w") as file:
            json.dump(results, file, indent=2)
            file.write("\n")
