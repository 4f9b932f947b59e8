"""Callbacks that keep averages of the weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ant_jax._callback import Callback
from ant_jax._hyperparams import Hyperparam
from ant_jax.callbacks._arguments import check_count, check_flag, check_fraction, number
from ant_jax.callbacks._averages import evaluated_in


def ema(decay: float | Hyperparam = 0.999, *, evaluate: bool = False, name: str = "ema") -> Callback:
    """Keep an exponential moving average of the parameters.

    Traced, in ``on_batch_end``: after every update, ``average = decay * average + (1 - decay) * params``, from the
    initial parameters on. With ``evaluate=True`` every evaluation sees the average in the place of the parameters, and
    so do callbacks that monitor it: the best checkpoint is then the one with the best average. To use the average by
    hand::

        trainer.predict(state.replace(params=state.callback_states["ema"]["average"]), inputs)

    Args:
        decay: between 0 and 1; averages over about ``1 / (1 - decay)`` updates. As a ``Hyperparam`` it can be changed
            while training.
        evaluate: whether to evaluate the average. Only one callback of a trainer may.
        name: of the callback. Its memory is ``{"average": like the parameters, "updated": bool scalar}``, the latter
            true between an update and the end of its batch, the ``Hyperparam``, and with ``evaluate`` also
            ``{"swapped": bool scalar}``, whether average and parameters have changed places for an evaluation.

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
        numbers = {"hyperparams": {"decay": jnp.float32(number(decay))}} if changing else {}
        return {"average": state.params, "updated": jnp.bool_(False), **numbers, **_swapped(name, evaluate, state)}

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
            also ``{"swapped": bool scalar}``, whether they have changed places for an evaluation.

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
        return {"average": state.params, "count": jnp.int32(0), **_swapped(name, evaluate, state)}

    def on_epoch_end(epoch: Any, trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        memory = state.callback_states[name]
        counts = epoch >= start_epoch
        count = memory["count"] + counts.astype(jnp.int32)
        share = 1 / jnp.maximum(count, 1).astype(jnp.float32)
        average = _chosen(counts, _moved(memory["average"], state.params, share), memory["average"])
        return state.with_callback_state(name, {**memory, "average": average, "count": count}), logs

    return Callback(name=name, init=init, traced=True, on_epoch_end=on_epoch_end, **_swaps(name, evaluate))


def _swaps(name: str, evaluate: bool) -> dict[str, Any]:
    """The hooks that put the average in the place of the parameters while evaluating, and those where it was."""

    def swapped(state: Any, due: Any) -> Any:
        """The state in which average and parameters have changed places, where that is due."""
        memory = state.callback_states[name]
        params, average = _chosen(due, (memory["average"], state.params), (state.params, memory["average"]))
        memory = {**memory, "average": average, "swapped": memory["swapped"] ^ due}
        return state.replace(params=params).with_callback_state(name, memory)

    # Each hook does what its name says, whether or not a condition has left the other out.
    def on_evaluate_begin(trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        memory = state.callback_states[name]
        there = memory["count"] > 0 if "count" in memory else True  # before that there is nothing to evaluate
        return swapped(state, ~memory["swapped"] & there), logs

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
    return {"swapped": jnp.bool_(False)}


def _moved(average: Any, params: Any, share: Any) -> Any:
    """The average, moved by a share of the way to the parameters; computed in float32 at least, whatever its dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        moved = optax.incremental_update(params, average, jnp.float32(share))
    return jax.tree.map(lambda new, old: new.astype(old.dtype), moved, average)


def _chosen(condition: Any, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
