"""Callbacks that end a run."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp

from ant_jax._callback import Callback


def early_stopping(
    monitor: str = "val_loss",
    *,
    patience: int = 5,
    min_delta: float = 0.0,
    mode: Literal["min", "max"] = "min",
    name: str = "early_stopping",
) -> Callback:
    """End the run when a log has stopped improving.

    Traced: its memory is ``{"best": float32 scalar, "wait": int32 scalar}``, the best value so far and the epochs
    since, so that a run that is resumed waits as long as it should. A NaN is no improvement.

    Args:
        monitor: a log of ``on_epoch_end``.
        patience: end after so many epochs in a row without an improvement; at least 1.
        min_delta: how much better than the best so far a value must be to count; not negative.
        mode: ``"min"`` if smaller is better, ``"max"`` if larger is.
        name: of the callback.

    Returns:
        A callback that requests the stop in ``on_epoch_end``.

    Raises:
        ValueError: an argument out of range.
        KeyError: at the end of the first epoch, if there is no log of that name; the message lists those there are.

    References:
        Prechelt, Early stopping - but when?, 1998, https://doi.org/10.1007/3-540-49430-8_3

    >>> early_stopping("val_accuracy", mode="max", patience=3)
    Callback(name='early_stopping', hooks=on_epoch_end)
    """
    if patience < 1:
        raise ValueError(f"early_stopping: patience must be at least 1, got {patience!r}")
    if not min_delta >= 0:
        raise ValueError(f"early_stopping: min_delta must not be negative, got {min_delta!r}")
    if mode not in ("min", "max"):
        raise ValueError(f"early_stopping: mode must be 'min' or 'max', got {mode!r}")
    sign = 1.0 if mode == "min" else -1.0

    def init(state: Any) -> Any:
        del state
        return {"best": jnp.float32(sign * jnp.inf), "wait": jnp.int32(0)}

    def on_epoch_end(epoch: Any, trainer: Any, state: Any, logs: Any) -> Any:
        del epoch, trainer
        memory = state.callback_states[name]
        value = jnp.asarray(logs[monitor], jnp.float32)
        improved = sign * value < sign * memory["best"] - min_delta
        best = jnp.where(improved, value, memory["best"])
        wait = jnp.where(improved, 0, memory["wait"] + 1)
        state = state.with_callback_state(name, {"best": best, "wait": wait})
        return state.request_stop(when=wait >= patience), logs

    return Callback(name=name, init=init, traced=True, on_epoch_end=on_epoch_end)
