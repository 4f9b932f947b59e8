"""Loops by hand in flax and optax: a launch a step, and everything in one ``lax.scan``, which is the limit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.compare.jax_models import linen
from benchmarks.compare.peers import Train
from benchmarks.compare.workloads import LEARNING_RATE, MAX_GRAD_NORM, Workload, weights


def make_step(workload: Workload, extras: bool = False) -> tuple[Callable[..., Any], Any]:
    """One step, and what it carries; with ``extras`` the gradient's norm and an average of the weights, too."""
    model = linen(workload.model)
    optimizer = optax.chain(optax.clip_by_global_norm(MAX_GRAD_NORM), optax.adam(LEARNING_RATE))

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        inputs, targets = batch
        logits: Any = model.apply({"params": params}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def step(carry: Any, batch: Any) -> tuple[Any, Any]:
        params, opt_state, average = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        norm = optax.tree.norm(grads) if extras else None
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, 0.001) if extras else None
        return (params, opt_state, average), (loss, norm)

    params = jax.tree.map(jnp.asarray, weights(workload.model))
    return step, jax.tree.map(jnp.copy, (params, optimizer.init(params), params if extras else None))


def fused(workload: Workload, extras: bool = False) -> Train:
    """All steps of an epoch in one launch; state and batches are on the device before the clock starts."""
    step, carry = make_step(workload, extras)
    epoch = jax.jit(functools.partial(jax.lax.scan, step), donate_argnums=0)
    batches = jax.device_put(tuple(np.stack(leaves) for leaves in zip(*workload.batches(), strict=True)))

    def train(epochs: int) -> float:
        nonlocal carry
        losses = jnp.zeros(1)
        for _ in range(epochs):
            carry, (losses, _) = epoch(carry, batches)
        return float(losses.mean())

    return train


def per_step(workload: Workload, batches: Iterable[Any] | None = None) -> Train:
    """One launch a step; each batch, by default from numpy, goes to the device as the loop comes to it."""
    step, carry = make_step(workload)
    jitted = jax.jit(step, donate_argnums=0)
    batches = workload.batches() if batches is None else batches

    def train(epochs: int) -> float:
        nonlocal carry
        losses: list[jax.Array] = []
        for _ in range(epochs):
            losses = []
            for batch in batches:
                carry, (loss, _) = jitted(carry, batch)
                losses.append(loss)
        return float(np.mean(jax.device_get(losses)))

    return train
