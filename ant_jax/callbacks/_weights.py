"""Callbacks that keep other versions of the weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ant_jax._callback import Callback


def ema(decay: float = 0.999, *, name: str = "ema") -> Callback:
    """Keep an exponential moving average of the parameters.

    After every update, ``average = decay * average + (1 - decay) * params``, from the initial parameters on. Its
    memory, ``state.callback_states[name]``, is that average; to evaluate it::

        trainer.evaluate(state.replace(params=state.callback_states["ema"]), loader)

    Args:
        decay: in (0, 1); averages over about ``1 / (1 - decay)`` updates.
        name: of the callback.

    Returns:
        A traced callback with an ``on_batch_end``.

    Raises:
        ValueError: ``decay`` is not in (0, 1).

    References:
        Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992,
        https://doi.org/10.1137/0330046

    >>> ema(0.99)
    Callback(name='ema', hooks=on_batch_end)
    """
    if not 0 < decay < 1:
        raise ValueError(f"ema: decay must be between 0 and 1, got {decay!r}")

    def init(state: Any) -> Any:
        return state.params

    def on_batch_end(batch_idx: Any, trainer: Any, state: Any, logs: Any) -> Any:
        del batch_idx, trainer
        before = state.callback_states[name]
        average = optax.incremental_update(state.params, before, 1 - decay)
        if state.accumulator is not None:  # between the batches of a window nothing is updated
            average = jax.tree.map(lambda old, new: jnp.where(state.window_open, old, new), before, average)
        return state.with_callback_state(name, average), logs

    return Callback(name=name, init=init, traced=True, on_batch_end=on_batch_end)
