"""Callbacks that rewrite or watch gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import batches, trainer

import ant_jax as ant


def test_gradient_norm_logs_the_norm_before_clipping():
    norms: list[float] = []
    a_trainer = trainer(ant.callbacks.clip_by_global_norm(1e-3), ant.callbacks.gradient_norm(name="norm"))
    start = a_trainer.init(batches()[0])
    state = start
    for batch in batches(3):
        grads, _ = a_trainer.grad_step(state, batch)
        state, logs = a_trainer.train_step(state, batch)
        norms.append(float(logs["norm"]))
        np.testing.assert_allclose(logs["norm"], optax.tree.norm(grads), rtol=1e-6)
    _, history = a_trainer.fit(start, batches(3), 1)
    np.testing.assert_allclose(history[0]["train_norm"], np.mean(norms), rtol=1e-6)


def test_clip_by_global_norm_leaves_small_gradients_alone():
    plain, clipped = trainer(), trainer(ant.callbacks.clip_by_global_norm(1e6))
    start = plain.init(batches()[0])
    expected, _ = plain.fit(start, batches(), 1)
    actual, _ = clipped.fit(clipped.init(batches()[0]), batches(), 1)
    jax.tree.map(np.testing.assert_array_equal, actual.params, expected.params)


def test_from_optax_keeps_its_memory():
    a_trainer = trainer(ant.callbacks.from_optax(optax.trace(0.9), name="momentum"))
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(), 1)
    trace = state.callback_states["momentum"].trace
    assert any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(trace))


def test_refuses():
    with pytest.raises(TypeError, match="expected an optax.GradientTransformation, got 3"):
        ant.callbacks.from_optax(3)  # pyright: ignore[reportArgumentType]
    for bad in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"clip_by_global_norm: max_norm must be positive, got {bad!r}"):
            ant.callbacks.clip_by_global_norm(bad)
