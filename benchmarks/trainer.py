"""What `fit` costs over loops written by hand: ratios of medians, measured in one process, in alternating runs.

    python -m benchmarks.trainer [--rounds 15] [--json FILE]
    python -m benchmarks.trainer --rounds 3 --only "fuse=True"      # the convolution trap; takes minutes

Every pair trains the same model from the same weights on the same batches; the final loss of both sides is compared
before a time is printed. Targets are those that the project has set itself; a missed one is printed as missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import statistics
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import ant_jax as ant
from benchmarks._common import BATCH, MLP, STEPS, data, machine, timed, write


CNN_STEPS = 40
EPOCHS = 3  # of a timed run


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


@dataclasses.dataclass
class Pair:
    """Two ways to do the same training: each a function that trains some epochs and returns the last loss."""

    name: str
    target: float | None  # of the ratio; None for a pair that shows something and is no promise
    ours: Callable[[], float]
    by_hand: Callable[[], float]


class Terminal(io.StringIO):
    """Stands in for a screen, so that the progress bar draws as often as on one."""

    def isatty(self) -> bool:
        return True


def stacked(arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    return tuple(array.reshape(-1, BATCH, *array.shape[1:]) for array in arrays)


def make_step(model: nn.Module, optimizer: optax.GradientTransformation, extras: bool = False) -> Callable[..., Any]:
    """One step as a person would write it: clip and Adam, and with ``extras`` the gradient norm and an EMA."""

    def loss_fn(params, batch):
        inputs, targets = batch
        logits: Any = model.apply({"params": params}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def step(carry, batch):
        params, opt_state, average = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        norm = optax.tree.norm(grads) if extras else None
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, 0.001) if extras else None
        return (params, opt_state, average), (loss, norm)

    return step


def by_hand_fused(model: nn.Module, arrays: tuple[np.ndarray, ...], params: Any, extras: bool) -> Callable[[], float]:
    """All steps of the epoch in one `lax.scan`; state and batches are on the device before the clock starts."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    epoch = jax.jit(functools.partial(jax.lax.scan, make_step(model, optimizer, extras)), donate_argnums=0)
    batches = jax.device_put(stacked(arrays))
    carry = jax.tree.map(jnp.copy, (params, optimizer.init(params), params if extras else None))

    def run() -> float:
        nonlocal carry
        losses = jnp.zeros(1)
        for _ in range(EPOCHS):
            carry, (losses, _) = epoch(carry, batches)
        return float(losses[-1])

    return run


def by_hand_per_step(model: nn.Module, arrays: tuple[np.ndarray, ...], params: Any) -> Callable[[], float]:
    """One launch a step; each batch goes from numpy to the device as the loop comes to it."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    step = jax.jit(make_step(model, optimizer), donate_argnums=0)
    batches = list(zip(*stacked(arrays), strict=True))
    carry = jax.tree.map(jnp.copy, (params, optimizer.init(params), None))

    def run() -> float:
        nonlocal carry
        loss = jnp.zeros(())
        for _ in range(EPOCHS):
            for batch in batches:
                carry, (loss, _) = step(carry, batch)
        return float(loss)

    return run


def by_trainer(
    model: nn.Module,
    arrays: tuple[np.ndarray, ...],
    callbacks: list[ant.Callback],
    loader: Any = None,
    fuse: Literal["auto"] | bool = "auto",
) -> tuple[Callable[[], float], Any]:
    """`fit` for some more epochs; everything that it does is inside the clock."""
    last: list[Any] = []

    def keep_last(batch_idx, trainer, state, logs):
        last[:] = [logs["loss"]]
        return state, logs

    watcher = ant.Callback(name="last_loss", every=10**9, on_batch_end=keep_last)
    trainer = ant.Trainer(
        model,
        optax.adam(1e-3),
        optax.softmax_cross_entropy_with_integer_labels,
        callbacks=[ant.callbacks.clip_by_global_norm(1.0), *callbacks, watcher],
        fuse=fuse,
        progress_bar=False,
    )
    loader = ant.ArrayLoader(arrays, BATCH, shuffle=False) if loader is None else loader
    state = trainer.init(tuple(array[:BATCH] for array in arrays))
    params = jax.tree.map(jnp.copy, state.params)

    def run() -> float:
        nonlocal state
        state, _ = trainer.fit(state, loader, num_epochs=state.epoch + EPOCHS)
        return float(last[0])

    return run, params


def pairs() -> list[Pair]:
    arrays, images = data(STEPS, (64,)), data(CNN_STEPS, (28, 28, 1))
    found = []

    ours, params = by_trainer(MLP(), arrays, [])
    found.append(
        Pair("MLP, traced callbacks / hand-fused loop", 1.10, ours, by_hand_fused(MLP(), arrays, params, False))
    )

    standard = [
        ant.callbacks.gradient_norm(),
        ant.callbacks.ema(0.999),
        ant.callbacks.log_progress(every=100, printer=io.StringIO().write),
        ant.callbacks.progress_bar(file=Terminal()),
    ]
    ours, params = by_trainer(MLP(), arrays, standard)
    found.append(
        Pair("MLP, the standard set / hand-fused loop", 1.25, ours, by_hand_fused(MLP(), arrays, params, True))
    )

    idle = ant.Callback(name="idle", on_batch_end=lambda batch_idx, trainer, state, logs: (state, logs))
    batches = list(zip(*stacked(arrays), strict=True))
    ours, params = by_trainer(MLP(), arrays, [idle], loader=batches)
    found.append(Pair("MLP, every=1 / hand-written loop", 1.30, ours, by_hand_per_step(MLP(), arrays, params)))

    ours, params = by_trainer(CNN(), images, [])
    found.append(Pair("CNN / hand-written loop", 1.05, ours, by_hand_per_step(CNN(), images, params)))

    ours, params = by_trainer(CNN(), images, [], fuse=True)
    found.append(Pair("CNN, fuse=True / hand-written loop", None, ours, by_hand_per_step(CNN(), images, params)))
    return found


def measure(pair: Pair, rounds: int) -> dict[str, Any]:
    for _ in range(3):  # compile, and let the trainer find its pace
        pair.ours()
        pair.by_hand()
    losses = 0.0, 0.0
    ours, by_hand = [], []
    for _ in range(rounds):
        (a, loss_a), (b, loss_b) = timed(pair.ours), timed(pair.by_hand)
        ours.append(a)
        by_hand.append(b)
        losses = loss_a, loss_b
    np.testing.assert_allclose(
        *losses, rtol=1e-4, atol=1e-4, err_msg=f"{pair.name}: the two sides did not train the same"
    )
    ratios = [a / b for a, b in zip(ours, by_hand, strict=True)]
    return {
        "pair": pair.name,
        "ratio": round(statistics.median(ours) / statistics.median(by_hand), 3),
        "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)],
        "target": pair.target,
        "ours_ms": round(1e3 * statistics.median(ours), 2),
        "by_hand_ms": round(1e3 * statistics.median(by_hand), 2),
        "bit_equal_loss": losses[0] == losses[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed epochs of each side, in turn")
    parser.add_argument(
        "--only",
        default="",
        help="measure only pairs whose name contains this; those without a target are measured only so",
    )
    parser.add_argument("--json", help="also write the results to this file")
    options = parser.parse_args()
    where = machine()
    results = []
    for pair in pairs():
        if options.only in pair.name and (options.only or pair.target):
            result = measure(pair, options.rounds)
            results.append(result)
            target = result["target"]
            verdict = (
                f"target {target:.2f}x {'met' if result['ratio'] <= target else 'MISSED'}" if target else "no target"
            )
            print(
                f"{result['pair']:42} {result['ratio']:.3f}x (quartiles {result['ratio_quartiles']}), {verdict}; "
                f"{result['ours_ms']} ms / {result['by_hand_ms']} ms; losses "
                f"{'bit-equal' if result['bit_equal_loss'] else 'equal to 1e-4'}"
            )
    write(options.json, {**where, "results": results})


if __name__ == "__main__":
    main()
