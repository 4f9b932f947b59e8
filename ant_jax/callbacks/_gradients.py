"""Callbacks that rewrite gradients. The arithmetic is optax's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from ant_jax._arguments import check_not_negative, check_positive, number
from ant_jax._hooks.callback import Callback
from ant_jax._state.hyperparams import Hyperparam
from ant_jax._state.objective import update_with


def from_optax(transformation: optax.GradientTransformation, *, name: str = "from_optax") -> Callback:
    """Make a callback of any optax transformation of gradients.

    It runs in ``on_before_update``: once per update, on the mean gradient of the accumulation window. One of them is
    the same, to the bit, as ``optax.chain(transformation, optimizer)``, and is given the same extra arguments as an
    optimizer (see :class:`ant_jax.Trainer`). Made with ``optax.inject_hyperparams``, it has its numbers in
    ``state.hyperparams``.

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
    return _transforming(name, "on_before_update", transformation)


def clip_by_global_norm(max_norm: float | Hyperparam, *, name: str = "clip_by_global_norm") -> Callback:
    """Scale the gradients down where their global norm exceeds ``max_norm``.

    It runs in ``on_before_update``, on the mean gradient of the accumulation window, and the arithmetic is
    ``optax.clip_by_global_norm``'s: ``max_norm / norm``, without the 1e-6 that torch adds to the norm.

    Args:
        max_norm: the largest norm that the gradients keep; positive. As a ``Hyperparam`` it can be changed while
            training.
        name: of the callback; its memory is optax's state, which holds nothing but the ``Hyperparam``.

    Returns:
        A callback that changes the gradients.

    Raises:
        ValueError: ``max_norm`` is not positive.

    References:
        Pascanu et al., On the difficulty of training recurrent neural networks, 2013, https://arxiv.org/abs/1211.5063

    >>> clip_by_global_norm(1.0)
    Callback(name='clip_by_global_norm', hooks=on_before_update)
    """
    check_positive("clip_by_global_norm", "max_norm", number(max_norm))
    return _transforming(name, "on_before_update", _made(optax.clip_by_global_norm, max_norm=max_norm))


def clip_by_value(max_value: float | Hyperparam, *, name: str = "clip_by_value") -> Callback:
    """Clip every element of the gradients to ``[-max_value, max_value]``.

    It runs in ``on_before_update``, on the mean gradient of the accumulation window: ``optax.clip``.

    Args:
        max_value: the largest magnitude that an element keeps; positive. As a ``Hyperparam`` (named ``max_delta``, as
            in optax) it can be changed while training.
        name: of the callback; its memory is optax's state, which holds nothing but the ``Hyperparam``.

    Returns:
        A callback that changes the gradients.

    Raises:
        ValueError: ``max_value`` is not positive.

    >>> clip_by_value(0.5)
    Callback(name='clip_by_value', hooks=on_before_update)
    """
    check_positive("clip_by_value", "max_value", number(max_value))
    return _transforming(name, "on_before_update", _made(optax.clip, max_delta=max_value))


def adaptive_grad_clip(
    clipping: float | Hyperparam = 0.01, *, eps: float | Hyperparam = 1e-3, name: str = "adaptive_grad_clip"
) -> Callback:
    """Clip the gradient of every unit to a share of the norm of that unit's weights (AGC).

    It runs in ``on_before_update``, on the mean gradient of the accumulation window: ``optax.adaptive_grad_clip``. A
    unit is what feeds one output: a column of a dense kernel, a filter of a convolution.

    Args:
        clipping: the largest ratio of the norm of a unit's gradient to the norm of its weights; positive.
        eps: the norm that weights have at least, so that a unit that starts at zero can leave it; positive. Both can be
            a ``Hyperparam``.
        name: of the callback; its memory is optax's state, which holds nothing but a ``Hyperparam``.

    Returns:
        A callback that changes the gradients.

    Raises:
        ValueError: an argument is not positive.

    References:
        Brock et al., High-performance large-scale image recognition without normalization, 2021,
        https://arxiv.org/abs/2102.06171

    >>> adaptive_grad_clip(0.01)
    Callback(name='adaptive_grad_clip', hooks=on_before_update)
    """
    check_positive("adaptive_grad_clip", "clipping", number(clipping))
    check_positive("adaptive_grad_clip", "eps", number(eps))
    return _transforming(name, "on_before_update", _made(optax.adaptive_grad_clip, clipping=clipping, eps=eps))


def gradient_noise(
    eta: float | Hyperparam = 0.01, *, gamma: float | Hyperparam = 0.55, name: str = "gradient_noise"
) -> Callback:
    """Add Gaussian noise to the gradients, less and less of it.

    It runs in ``on_before_update``; at update ``t``, counted from 0, the noise has the variance
    ``eta / (1 + t) ** gamma``: ``optax.add_noise``. The seed of the run decides the noise.

    Args:
        eta: the variance at the first update; not negative.
        gamma: how fast it falls; not negative. Both can be a ``Hyperparam``.
        name: of the callback; its memory is optax's state: the number of updates and a random key.

    Returns:
        A callback that changes the gradients.

    Raises:
        ValueError: an argument is negative.

    References:
        Neelakantan et al., Adding gradient noise improves learning for very deep networks, 2015,
        https://arxiv.org/abs/1511.06807

    >>> gradient_noise(0.01)
    Callback(name='gradient_noise', hooks=on_before_update)
    """
    check_not_negative("gradient_noise", "eta", number(eta))
    check_not_negative("gradient_noise", "gamma", number(gamma))

    def made(key: Any) -> optax.GradientTransformation:
        return _made(optax.add_noise, eta=eta, gamma=gamma, key=key)

    # The key only begins the memory; updates draw from the one in it.
    return _transforming(name, "on_before_update", made(0), lambda state: made(state.random_key(name)))


def centralize(*, name: str = "centralize") -> Callback:
    """Subtract from the gradient of every matrix, or higher array, its mean over all axes but the last.

    It runs in ``on_before_update``: ``optax.centralize``. Vectors and scalars stay as they are.

    Args:
        name: of the callback; its memory is empty.

    Returns:
        A callback that changes the gradients.

    References:
        Yong et al., Gradient centralization: a new optimization technique for deep neural networks, 2020,
        https://arxiv.org/abs/2004.01461

    >>> centralize()
    Callback(name='centralize', hooks=on_before_update)
    """
    return _transforming(name, "on_before_update", optax.centralize())


def zero_nans(*, name: str = "zero_nans") -> Callback:
    """Put 0 where the gradients are NaN.

    It runs in ``on_backward_end``, on the gradient of every batch, before one NaN can spoil the sum of an accumulation
    window: ``optax.zero_nans``. To leave out the whole batch instead, see :func:`skip_nonfinite`.

    Args:
        name: of the callback; its memory is optax's state: for every parameter, whether the last gradient had a NaN.

    Returns:
        A callback that changes the gradients.

    >>> zero_nans()
    Callback(name='zero_nans', hooks=on_backward_end)
    """
    return _transforming(name, "on_backward_end", optax.zero_nans())


def _made(factory: Callable[..., optax.GradientTransformation], **arguments: Any) -> optax.GradientTransformation:
    """Call an optax factory; a ``Hyperparam`` among the arguments goes into the state, the other numbers do not."""
    # As floats: optax keeps a whole number as int32, and then 0.5 could not be put in its place.
    changing = {name: float(value.value) for name, value in arguments.items() if isinstance(value, Hyperparam)}
    if not changing:
        return factory(**arguments)
    return optax.inject_hyperparams(factory, static_args=arguments.keys() - changing)(**{**arguments, **changing})


def _transforming(
    name: str,
    hook: str,
    transformation: optax.GradientTransformation,
    initial: Callable[[Any], optax.GradientTransformation] | None = None,
) -> Callback:
    """Make a callback that runs a transformation in a hook.

    Args:
        name: of the callback.
        hook: which one.
        transformation: what to run.
        initial: makes of the first state the one whose ``init`` begins the memory; by default it is the same.
    """

    def init(state: Any) -> Any:
        return (transformation if initial is None else initial(state)).init(state.params)

    def rewrite(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        del batch_idx, trainer
        memory = state.callback_states[name]
        if state.objective is None:  # called by hand, or before there is an update
            extra_args = {"value": logs["loss"], "grad": grads}
        else:
            extra_args = state.objective.extra_args()
        grads, memory = update_with(transformation, grads, memory, state.params, extra_args)
        return state.with_callback_state(name, memory), grads, logs

    hooks: dict[str, Any] = {hook: rewrite}
    return Callback(name=name, init=init, **hooks)
