"""Callbacks that change hyper-parameters while training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ant_jax._arguments import (
    check_choice,
    check_count,
    check_fraction,
    check_function,
    check_name,
    check_not_negative,
    refuse,
)
from ant_jax._hooks.callback import Callback
from ant_jax._hooks.returns import is_number
from ant_jax._state.hyperparams import HyperparamError


def learning_rate_schedule(
    schedule: Callable[[Any], Any],
    *,
    per: Literal["step", "epoch"] = "step",
    hyperparam: str = "learning_rate",
    name: str = "learning_rate_schedule",
) -> Callback:
    """Set the learning rate by a schedule, and log it.

    The optimizer must keep its learning rate in the state:
    ``optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)``; nothing is compiled again when it changes.

    Per step it is set in ``on_before_update``, inside the step, to ``schedule(update)``; per epoch on the host, in
    ``on_epoch_begin``, to ``schedule(epoch)``. ``logs[hyperparam]`` is what the last update used; before the first,
    what that will use.

    Args:
        schedule: any optax schedule, or another function of a count that begins at 0. Per step the count is traced, so
            the function must be JAX; per epoch it is a Python int, and any function will do.
        per: what the count counts: ``"step"``, updates of the optimizer (not batches, which are more when gradients are
            accumulated); ``"epoch"``, epochs.
        hyperparam: which one to set, by its name in ``state.hyperparams``. For one of a callback, list that callback
            first.
        name: of the callback. Per step its memory is ``{"count": int32 scalar}``, the updates so far; per epoch it
            keeps none. The count stays at 2**31 - 1 when it is there, as those of optax's own schedules do.

    Returns:
        A callback that changes a hyper-parameter.

    Raises:
        TypeError: ``schedule`` is not a function of one argument.
        ValueError: ``per`` is neither; per epoch, while training, if ``schedule`` returns no finite number.
        HyperparamError: in ``Trainer.init``, if the optimizer does not keep its learning rate in the state.

    References:
        Loshchilov and Hutter, SGDR: stochastic gradient descent with warm restarts, 2016,
        https://arxiv.org/abs/1608.03983

    >>> import optax
    >>> learning_rate_schedule(optax.cosine_decay_schedule(0.1, decay_steps=1000))
    Callback(name='learning_rate_schedule', hooks=on_batch_begin, on_before_update, on_batch_end)
    >>> learning_rate_schedule(lambda epoch: 0.1 if epoch < 10 else 0.01, per="epoch")
    Callback(name='learning_rate_schedule', hooks=on_epoch_begin, on_epoch_end)
    """
    check_function("learning_rate_schedule", "schedule", schedule, "count")
    check_choice("learning_rate_schedule", "per", per, "step", "epoch")
    check_name("learning_rate_schedule", "hyperparam", hyperparam)

    def scheduled(state: Any, count: Any) -> Any:
        # optax's schedules are not written for jax_numpy_dtype_promotion="strict", which a user may have set.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            value = schedule(count)
        if per == "epoch" and not _is_finite(value):
            refuse("learning_rate_schedule", f"what schedule({count}) returns", "a finite number", value)
        return state.with_hyperparams(**{hyperparam: value})

    def init(state: Any) -> Any:
        state.with_hyperparams(**{hyperparam: 0.0})  # to raise now if it cannot be set
        return {"count": jnp.int32(0)} if per == "step" else None

    def on_batch_begin(batch_idx: Any, trainer: Any, state: Any, logs: Any) -> Any:
        del batch_idx, trainer
        # The first update may be some batches away, and the number that the optimizer was made with is never used.
        first = scheduled(state, jnp.int32(0)).hyperparams[hyperparam]
        begun = state.callback_states[name]["count"] > 0
        value = jnp.where(begun, state.hyperparams[hyperparam], first)
        return state.with_hyperparams(**{hyperparam: value}), logs

    def on_before_update(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        del batch_idx, trainer
        count = state.callback_states[name]["count"]
        state = scheduled(state, count).with_callback_state(name, {"count": optax.safe_increment(count)})
        return state, grads, logs

    def on_epoch_begin(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        return scheduled(state, epoch), logs

    def publish(position: Any, trainer: Any, state: Any, logs: Any) -> Any:
        del position, trainer
        return state, {**logs, hyperparam: state.hyperparams[hyperparam]}

    if per == "epoch":
        return Callback(name=name, init=init, on_epoch_begin=on_epoch_begin, on_epoch_end=publish)
    return Callback(
        name=name,
        init=init,
        traced=True,
        on_batch_begin=on_batch_begin,
        on_before_update=on_before_update,
        on_batch_end=publish,
    )


def reduce_on_plateau(
    monitor: str = "val_loss",
    *,
    factor: float = 0.1,
    patience: int = 10,
    mode: Literal["min", "max"] = "min",
    threshold: float = 1e-4,
    threshold_mode: Literal["rel", "abs"] = "rel",
    cooldown: int = 0,
    min_value: float = 0.0,
    eps: float = 1e-8,
    hyperparam: str = "learning_rate",
    name: str = "reduce_on_plateau",
) -> Callback:
    """Reduce the learning rate when a log has stopped improving, and log it.

    Traced, in ``on_epoch_end``; it takes the decisions of ``torch.optim.lr_scheduler.ReduceLROnPlateau``, with its
    arguments. (``optax.contrib.reduce_on_plateau`` watches the training loss at every update instead.) The optimizer
    must keep its learning rate in the state: ``optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)``.

    Args:
        monitor: a log of ``on_epoch_end``. A NaN is no improvement.
        factor: what to multiply the learning rate by; between 0 and 1.
        patience: epochs without an improvement that are borne: it is reduced after one more.
        mode: ``"min"`` if smaller is better, ``"max"`` if larger is.
        threshold: how much better than the best so far a value must be to count; not negative.
        threshold_mode: ``"rel"``: by that share of the best; ``"abs"``: by that much.
        cooldown: epochs after a reduction in which none is counted.
        min_value: the learning rate is not reduced below it.
        eps: a reduction by no more than this is not made.
        hyperparam: which one to reduce, by its name in ``state.hyperparams``.
        name: of the callback. Its memory is ``{"best": float scalar, "wait": int32 scalar, "cooldown": int32
            scalar}``: the best value, the epochs since, and those of the cooldown that are left.

    Returns:
        A callback that changes a hyper-parameter, and publishes ``logs[hyperparam]``, the value that holds from now on.

    Raises:
        ValueError: an argument out of range.
        HyperparamError: in ``Trainer.init``, if the optimizer does not keep its learning rate in the state.
        KeyError: at the end of the first epoch, if there is no log named ``monitor``; the message lists those there
            are.

    >>> reduce_on_plateau("val_loss", factor=0.5, patience=3)
    Callback(name='reduce_on_plateau', hooks=on_epoch_end)
    """
    owner = "reduce_on_plateau"
    check_name(owner, "monitor", monitor)
    check_name(owner, "hyperparam", hyperparam)
    check_fraction(owner, "factor", factor)
    patience = check_count(owner, "patience", patience, least=0, unit="epochs")
    check_choice(owner, "mode", mode, "min", "max")
    check_not_negative(owner, "threshold", threshold)
    check_choice(owner, "threshold_mode", threshold_mode, "rel", "abs")
    cooldown = check_count(owner, "cooldown", cooldown, least=0, unit="epochs")
    check_not_negative(owner, "min_value", min_value)
    check_not_negative(owner, "eps", eps)
    sign = 1.0 if mode == "min" else -1.0

    def init(state: Any) -> Any:
        state.with_hyperparams(**{hyperparam: 0.0})  # to raise now if it cannot be set
        worst = sign * jnp.finfo(jnp.result_type(float)).max  # finite, because jax_debug_infs is to find none
        return {"best": jnp.asarray(worst, float), "wait": jnp.int32(0), "cooldown": jnp.int32(0)}

    def bar(best: Any) -> Any:
        """What a value must get below, times ``sign``."""
        return best * (1 - sign * threshold) if threshold_mode == "rel" else best - sign * threshold

    def on_epoch_end(epoch: Any, trainer: Any, state: Any, logs: Any) -> Any:
        del epoch, trainer
        memory = state.callback_states[name]
        value = jnp.asarray(logs[monitor], float)
        improved = sign * value < sign * bar(memory["best"])
        cooling = memory["cooldown"] > 0
        wait = jnp.where(improved | cooling, 0, memory["wait"] + 1)
        due = wait > patience
        left = jnp.where(due, cooldown, jnp.maximum(memory["cooldown"] - 1, 0))
        best = jnp.where(improved, value, memory["best"])
        old = state.hyperparams[hyperparam]
        new = jnp.maximum(old * factor, min_value)
        new = jnp.where(due & (old - new > eps), new, old)
        memory = {"best": best, "wait": jnp.where(due, 0, wait), "cooldown": left}
        state = state.with_hyperparams(**{hyperparam: new}).with_callback_state(name, memory)
        return state, {**logs, hyperparam: new}

    return Callback(name=name, init=init, traced=True, on_epoch_end=on_epoch_end)


def log_hyperparams(*names: str, name: str = "log_hyperparams") -> Callback:
    """Log hyper-parameters at every batch, as they were when its update was made.

    Traced, in ``on_batch_end``.

    Args:
        *names: which ones, by their names in ``state.hyperparams``; without any, all of them.
        name: of the callback; it keeps no memory.

    Returns:
        A callback that publishes each under its name.

    Raises:
        ValueError: what is no name is given.
        HyperparamError: at the first batch, if there is none of a name, or none at all.

    >>> log_hyperparams("learning_rate")
    Callback(name='log_hyperparams', hooks=on_batch_end)
    """
    for number, hyperparam in enumerate(names):
        check_name("log_hyperparams", f"names[{number}]", hyperparam)

    def on_batch_end(batch_idx: Any, trainer: Any, state: Any, logs: Any) -> Any:
        del batch_idx, trainer
        there = state.hyperparams
        if not there:
            raise HyperparamError(
                "log_hyperparams: the state has no hyper-parameter to log. An optimizer keeps its numbers in the state "
                "when it is made with optax.inject_hyperparams(optax.adam)(learning_rate=0.001) instead of "
                "optax.adam(learning_rate=0.001), a callback when it is given ant_jax.Hyperparam(value) instead of "
                "value"
            )
        return state, {**logs, **{hyperparam: there[hyperparam] for hyperparam in names or there}}

    return Callback(name=name, traced=True, on_batch_end=on_batch_end)


def _is_finite(value: Any) -> bool:
    return is_number(value) and not isinstance(value, bool) and bool(np.all(np.isfinite(np.asarray(value))))
