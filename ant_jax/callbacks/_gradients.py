"""Callbacks that rewrite gradients, or look at them."""

from __future__ import annotations

from typing import Any

import optax

from ant_jax._callback import Callback


def from_optax(transformation: optax.GradientTransformation, *, name: str = "from_optax") -> Callback:
    """Make a callback of any optax transformation of gradients.

    It runs in ``on_before_update``: once per update, on the mean gradient of the accumulation window. One of them is
    the same, to the bit, as ``optax.chain(transformation, optimizer)``.

    Args:
        transformation: for example ``optax.add_noise(...)`` or ``optax.adaptive_grad_clip(...)``.
        name: of the callback; its memory is the transformation's state.

    Returns:
        A callback that changes the gradients.

    Raises:
        TypeError: not an ``optax.GradientTransformation``.

    >>> from_optax(optax.centralize(), name="centralize")
    Callback(name='centralize', hooks=on_before_update)
    """
    if not isinstance(transformation, optax.GradientTransformation):
        raise TypeError(f"from_optax: expected an optax.GradientTransformation, got {transformation!r}")

    def init(state: Any) -> Any:
        return transformation.init(state.params)

    def on_before_update(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        del batch_idx, trainer
        grads, memory = transformation.update(grads, state.callback_states[name], state.params)
        return state.with_callback_state(name, memory), grads, logs

    return Callback(name=name, init=init, on_before_update=on_before_update)


def clip_by_global_norm(max_norm: float, *, name: str = "clip_by_global_norm") -> Callback:
    """Scale the gradients down where their global norm exceeds ``max_norm``.

    It runs in ``on_before_update``, on the mean gradient of the accumulation window, and the arithmetic is
    ``optax.clip_by_global_norm``'s: ``max_norm / norm``, without the 1e-6 that torch adds to the norm.

    Args:
        max_norm: the largest norm that the gradients keep; positive.
        name: of the callback.

    Returns:
        A callback that changes the gradients.

    Raises:
        ValueError: ``max_norm`` is not positive.

    References:
        Pascanu et al., On the difficulty of training recurrent neural networks, 2013, https://arxiv.org/abs/1211.5063

    >>> clip_by_global_norm(1.0)
    Callback(name='clip_by_global_norm', hooks=on_before_update)
    """
    if not max_norm > 0:
        raise ValueError(f"clip_by_global_norm: max_norm must be positive, got {max_norm!r}")
    return from_optax(optax.clip_by_global_norm(max_norm), name=name)


def gradient_norm(*, name: str = "grad_norm") -> Callback:
    """Log the global norm of the gradients of every batch.

    It runs in ``on_backward_end``, so it sees what the callbacks before it left of the gradients of this batch, before
    accumulation and before anything that runs in ``on_before_update``, clipping for instance.

    Args:
        name: of the callback and of the log.

    Returns:
        A callback that publishes ``logs[name]``, a float32 scalar.

    >>> gradient_norm()
    Callback(name='grad_norm', hooks=on_backward_end)
    """

    def on_backward_end(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        del batch_idx, trainer
        return state, grads, {**logs, name: optax.tree.norm(grads)}

    return Callback(name=name, on_backward_end=on_backward_end)
