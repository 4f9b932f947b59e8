"""Callbacks that keep averages of the weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ant_jax._arguments import check_count, check_flag, check_fraction, number
from ant_jax._hooks.callback import Callback
from ant_jax._state.hyperparams import Hyperparam
from ant_jax.callbacks._averages import evaluated_in


def ema(decay: float | Hyperparam = 0.999, *, evaluate: bool = False, name: str = "ema") -> Callback:
    """Keep an exponential moving average of the parameters.

    Traced, in ``on_batch_end``: after every update, ``average = decay * average + (1 - decay) * params``, from the
    initial parameters on. With ``evaluate=True`` every evaluation sees the average in the place of the parameters, and
    so do callbacks that monitor it: the best checkpoint is then the one with the best average. The average is kept in
    float32 at least, since small steps get lost in a lower precision. To use the average by hand::

        average = optax.tree.cast_like(state.callback_states["ema"]["average"], state.params)
        trainer.predict(state.replace(params=average), inputs)

    Args:
        decay: between 0 and 1; averages over about ``1 / (1 - decay)`` updates. As a ``Hyperparam`` it can be changed
            while training.
        evaluate: whether to evaluate the average. Only one callback of a trainer may.
        name: of the callback. Its memory is ``{"average": like the parameters, "updated": bool scalar}``, the latter
            true between an update and the end of its batch, the ``Hyperparam``, and with ``evaluate`` also
            ``{"swapped": bool scalar, "set_aside": tuple}``: whether the average has taken the place of the parameters
            for an evaluation, and where those of a low precision are meanwhile.

    Returns:
        A callback that keeps an average.

    Raises:
        ValueError: ``decay`` is not between 0 and 1; or, in ``Trainer.init``, another callback has ``evaluate``, too.

    References:
        Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992,
        https://doi.org/10.1137/0330046

    >>> ema(0.99)
    Callback(name='ema', hooks=on_before_apply, on_batch_end)
    >>> ema(evaluate=True)
    Callback(name='ema', hooks=on_before_apply, on_batch_end, on_evaluate_begin, on_evaluate_end)
    """
    check_fraction("ema", "decay", number(decay))
    check_flag("ema", "evaluate", evaluate)
    changing = isinstance(decay, Hyperparam)

    def init(state: Any) -> Any:
        numbers = {"hyperparams": {"decay": jnp.asarray(number(decay), float)}} if changing else {}
        return {
            "average": _begun(state.params),
            "updated": jnp.bool_(False),
            **numbers,
            **_swapped(name, evaluate, state),
        }

    # Not every batch brings an update: windows of accumulation are open, and batches are skipped.
    def on_before_apply(batch_idx: Any, trainer: Any, state: Any, updates: Any, logs: Any) -> Any:
        del batch_idx, trainer
        memory = {**state.callback_states[name], "updated": jnp.bool_(True)}
        return state.with_callback_state(name, memory), updates, logs

    def on_batch_end(batch_idx: Any, trainer: Any, state: Any, logs: Any) -> Any:
        del batch_idx, trainer
        memory = state.callback_states[name]
        share = 1 - (memory["hyperparams"]["decay"] if changing else number(decay))
        average = _chosen(memory["updated"], _moved(memory["average"], state.params, share), memory["average"])
        memory = {**memory, "average": average, "updated": jnp.bool_(False)}
        return state.with_callback_state(name, memory), logs

    hooks = {"on_before_apply": on_before_apply, "on_batch_end": on_batch_end, **_swaps(name, evaluate)}
    return Callback(name=name, init=init, traced=True, **hooks)


def swa(start_epoch: int, *, evaluate: bool = False, name: str = "swa") -> Callback:
    """Keep the plain average of the parameters at the ends of epochs (stochastic weight averaging).

    Traced, in ``on_epoch_end``. It goes with a learning rate that is high and constant, or cyclic, from ``start_epoch``
    on; see :func:`learning_rate_schedule`. A model with batch normalisation needs its statistics estimated anew for the
    average; this callback averages parameters only.

    Args:
        start_epoch: the first epoch, from 0, whose last parameters count.
        evaluate: whether evaluations see the average of the epochs before, as soon as there is one, in the place of
            the parameters. Only one callback of a trainer may.
        name: of the callback. Its memory is ``{"average": like the parameters, "count": int32 scalar}``: the average,
            which is the initial parameters as long as there is none, and how many epochs are in it; with ``evaluate``
            also what that of :func:`ema` has then. The average is of the same dtypes as there.

    Returns:
        A callback that keeps an average.

    Raises:
        ValueError: ``start_epoch`` is negative; or, in ``Trainer.init``, another callback has ``evaluate``, too.

    References:
        Izmailov et al., Averaging weights leads to wider optima and better generalization, 2018,
        https://arxiv.org/abs/1803.05407

    >>> swa(start_epoch=15)
    Callback(name='swa', hooks=on_epoch_end)
    """
    start_epoch = check_count("swa", "start_epoch", start_epoch, least=0)
    check_flag("swa", "evaluate", evaluate)

    def init(state: Any) -> Any:
        return {"average": _begun(state.params), "count": jnp.int32(0), **_swapped(name, evaluate, state)}

    def on_epoch_end(epoch: Any, trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        memory = state.callback_states[name]
        counts = jnp.asarray(epoch >= start_epoch)
        count = jnp.where(counts, optax.safe_increment(memory["count"]), memory["count"])
        share = 1 / jnp.maximum(count, 1).astype(float)
        average = _chosen(counts, _moved(memory["average"], state.params, share), memory["average"])
        return state.with_callback_state(name, {**memory, "average": average, "count": count}), logs

    return Callback(name=name, init=init, traced=True, on_epoch_end=on_epoch_end, **_swaps(name, evaluate))


def _swaps(name: str, evaluate: bool) -> dict[str, Any]:
    """The hooks that put the average in the place of the parameters while evaluating, and those where it was."""

    def swapped(state: Any, due: Any) -> Any:
        """The state in which average and parameters have changed places, where that is due."""
        memory = state.callback_states[name]
        params, structure = jax.tree.flatten(state.params)
        averages, set_aside = jax.tree.leaves(memory["average"]), iter(memory["set_aside"])
        aside = []
        for i, (param, average) in enumerate(zip(params, averages, strict=True)):
            if param.dtype == average.dtype:
                params[i], averages[i] = _chosen(due, (average, param), (param, average))
            else:  # a low precision, which cannot hold the average: that stays where it is
                kept = next(set_aside)
                evaluated = jnp.where(memory["swapped"], kept, average.astype(param.dtype))
                new, kept = _chosen(due, (evaluated, param), (param, kept))
                params[i] = new
                aside.append(kept)
        memory = {**memory, "average": structure.unflatten(averages), "set_aside": tuple(aside)}
        memory["swapped"] = memory["swapped"] ^ due
        return state.replace(params=structure.unflatten(params)).with_callback_state(name, memory)

    # Each hook does what its name says, whether or not a condition has left the other out.
    def on_evaluate_begin(trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        memory = state.callback_states[name]
        due = ~memory["swapped"]
        if "count" in memory:  # before that there is nothing to evaluate
            due &= memory["count"] > 0
        return swapped(state, due), logs

    def on_evaluate_end(trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        return swapped(state, state.callback_states[name]["swapped"]), logs

    return {"on_evaluate_begin": on_evaluate_begin, "on_evaluate_end": on_evaluate_end} if evaluate else {}


def _swapped(name: str, evaluate: bool, state: Any) -> dict[str, Any]:
    """What the memory of a callback with ``evaluate`` has; refuse a second such one, which would mix up the weights."""
    if not evaluate:
        return {}

    for other, memory in state.callback_states.items():
        if evaluated_in(memory):
            raise ValueError(f"{name}: only one callback of a trainer may have evaluate=True, and {other!r} has it")
    params = jax.tree.leaves(state.params)
    return {"swapped": jnp.bool_(False), "set_aside": tuple(param for param in params if _is_low(param.dtype))}


def _is_low(dtype: Any) -> bool:
    """Whether it is a floating dtype of a lower precision than float32."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def _begun(params: Any) -> Any:
    """The average of one set of parameters: of float32 at least."""
    return jax.tree.map(lambda param: param.astype(jnp.float32) if _is_low(param.dtype) else param, params)


def _moved(average: Any, params: Any, share: Any) -> Any:
    """The average, moved by a share of the way to the parameters."""

    def moved(old: Any, new: Any) -> Any:
        # The share in the precision of the average: in a lower one, what is added and what is left do not make one.
        step = jnp.asarray(share, jnp.finfo(old.dtype).dtype)
        updated: Any = optax.incremental_update(new.astype(old.dtype), old, step)
        return updated.astype(old.dtype)

    with jax.numpy_dtype_promotion("standard"):
        return jax.tree.map(moved, average, params)


def _chosen(condition: Any, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
