"""Averages of the weights."""

import jax
import numpy as np
import pytest
from problems import batches, trainer

import ant_jax as ant


@pytest.mark.parametrize("accumulate", [1, 3])
def test_ema_averages_after_every_update(accumulate):
    a_trainer = trainer(ant.callbacks.ema(0.8), gradient_accumulation_steps=accumulate)
    start = a_trainer.init(batches()[0])
    state, average = start, start.params
    for i, batch in enumerate(batches(6)):
        state, _ = a_trainer.train_step(state, batch)
        if (i + 1) % accumulate == 0:
            average = jax.tree.map(lambda old, new: 0.8 * old + 0.2 * new, average, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.callback_states["ema"], average)
    fitted, _ = a_trainer.fit(start, batches(6), 1)
    jax.tree.map(np.testing.assert_array_equal, fitted.callback_states, state.callback_states)


@pytest.mark.parametrize("decay", [0, 1, -0.5, 2])
def test_refuses(decay):
    with pytest.raises(ValueError, match=f"ema: decay must be between 0 and 1, got {decay}"):
        ant.callbacks.ema(decay)
