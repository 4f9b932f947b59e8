"""Callbacks that end a run."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ant_jax._arguments import (
    check_choice,
    check_count,
    check_finite,
    check_flag,
    check_function,
    check_name,
    check_not_negative,
    check_positive,
    number,
)
from ant_jax._hooks.callback import Callback
from ant_jax._state.hyperparams import Hyperparam
from ant_jax.callbacks._averages import evaluated_in, with_averages
from ant_jax.callbacks._runs import PerRun


def early_stopping(
    monitor: str = "val_loss",
    *,
    patience: int = 5,
    min_delta: float = 0.0,
    mode: Literal["min", "max"] = "min",
    baseline: float | None = None,
    start_epoch: int = 0,
    restore_best: bool = False,
    name: str = "early_stopping",
) -> Callback:
    """End the run when a log has stopped improving.

    Traced, in ``on_epoch_end``: a run that is resumed waits as long as it should. A NaN is no improvement.

    Args:
        monitor: a log of ``on_epoch_end``.
        patience: end after so many epochs in a row without an improvement; at least 1.
        min_delta: how much better than the best so far a value must be to count; not negative.
        mode: ``"min"`` if smaller is better, ``"max"`` if larger is.
        baseline: an improvement that does not reach it does not end the wait; the run goes on for that epoch, though.
        start_epoch: the first epoch, from 0, that is looked at; those before it are warm-up.
        restore_best: whether the run ends with the parameters and the model state of the best epoch. It is done in
            ``on_train_end``; checkpoints hold the latest and, in the callback's memory, the best. With a callback that
            evaluates an average, ``ema(evaluate=True)``, the average of that epoch is restored, too; list this one
            after it. (Not with ``swa(evaluate=True)``, whose average has moved on by the end of the epoch.)
        name: of the callback. Its memory is ``{"best": float scalar, "wait": int32 scalar}``, the best value so far
            and the epochs since, and with ``restore_best`` also ``params``, ``model_state`` and ``averages`` of the
            best epoch, or of the latest as long as there is none.

    Returns:
        A callback that requests the stop.

    Raises:
        ValueError: an argument out of range.
        KeyError: at the end of the first epoch, if there is no log of that name; the message lists those there are.
        ValueError: with ``restore_best``, if a callback that evaluates an average is listed after it, or is a ``swa``.

    References:
        Prechelt, Early stopping - but when?, 1998, https://doi.org/10.1007/3-540-49430-8_3

    >>> early_stopping("val_accuracy", mode="max", patience=3)
    Callback(name='early_stopping', hooks=on_epoch_end)
    >>> early_stopping(restore_best=True)
    Callback(name='early_stopping', hooks=on_epoch_end, on_train_end)
    """
    check_name("early_stopping", "monitor", monitor)
    patience = check_count("early_stopping", "patience", patience, unit="epochs")
    check_not_negative("early_stopping", "min_delta", min_delta)
    check_choice("early_stopping", "mode", mode, "min", "max")
    if baseline is not None:
        check_finite("early_stopping", "baseline", baseline)
    start_epoch = check_count("early_stopping", "start_epoch", start_epoch, least=0)
    check_flag("early_stopping", "restore_best", restore_best)
    sign = 1.0 if mode == "min" else -1.0

    def worst(dtype: Any) -> Any:
        return sign * jnp.finfo(dtype).max  # finite, because jax_debug_infs is to find none in a sound run

    def weights(state: Any) -> dict[str, Any]:
        if not restore_best:
            return {}
        averages = {
            other: [inner["average"] for inner in evaluated_in(memory)]
            for other, memory in state.callback_states.items()
            if evaluated_in(memory)
        }
        return {"params": state.params, "model_state": state.model_state, "averages": averages}

    def init(state: Any) -> Any:
        return {"best": jnp.asarray(worst(jnp.result_type(float)), float), "wait": jnp.int32(0), **weights(state)}

    def on_epoch_end(epoch: Any, trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        memory = state.callback_states[name]
        value, counts = jnp.asarray(logs[monitor], float), jnp.asarray(epoch >= start_epoch)
        improved = counts & (sign * value < sign * memory["best"] - min_delta)
        reset = improved if baseline is None else improved & (sign * value < sign * baseline - min_delta)
        wait = jnp.where(reset | ~counts, 0, memory["wait"] + 1)
        best = jnp.where(improved, value, memory["best"])
        keeps, now = improved | (sign * best >= sign * worst(best.dtype)), weights(state)
        for other in now.get("averages", {}):
            if any("count" in inner for inner in evaluated_in(state.callback_states[other])):
                raise ValueError(
                    f"{name}: restore_best=True would restore another average than the one that {other!r} had when it "
                    f"was evaluated; leave out restore_best, or evaluate=True there"
                )
            if other not in memory["averages"]:
                raise ValueError(
                    f"{name}: restore_best=True restores what was evaluated, the average of {other!r}; list {name!r} "
                    f"after {other!r}"
                )
        kept = jax.tree.map(lambda new, old: jnp.where(keeps, new, old), now, {field: memory[field] for field in now})
        state = state.with_callback_state(name, {"best": best, "wait": wait, **kept})
        return state.request_stop(when=(wait >= patience) & ~improved), logs

    def on_train_end(trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        memory = state.callback_states[name]
        for other, averages in memory["averages"].items():
            state = state.with_callback_state(other, with_averages(state.callback_states[other], averages))
        return state.replace(params=memory["params"], model_state=memory["model_state"]), logs

    restore: dict[str, Any] = {"on_train_end": on_train_end} if restore_best else {}
    return Callback(name=name, init=init, traced=True, on_epoch_end=on_epoch_end, **restore)


def stop_at(
    threshold: float | Hyperparam,
    monitor: str = "val_loss",
    *,
    mode: Literal["min", "max"] = "min",
    per: Literal["epoch", "batch"] = "epoch",
    name: str = "stop_at",
) -> Callback:
    """End the run when a log has reached a value.

    Traced: per batch the run ends after the very batch that reached it, however many steps a launch has.

    Args:
        threshold: the value. As a ``Hyperparam`` it can be changed while training.
        monitor: a log of ``on_epoch_end``, or of ``on_batch_end`` when it is looked at per batch.
        mode: ``"min"``: stop at or below the threshold; ``"max"``: at or above it.
        per: when to look: at the end of every ``"epoch"`` or of every ``"batch"``.
        name: of the callback; its memory holds nothing but the ``Hyperparam``.

    Returns:
        A callback that requests the stop.

    Raises:
        ValueError: an argument out of range.
        KeyError: at the first look, if there is no log of that name; the message lists those there are.

    >>> stop_at(0.99, "val_accuracy", mode="max")
    Callback(name='stop_at', hooks=on_epoch_end)
    """
    check_finite("stop_at", "threshold", number(threshold))
    check_name("stop_at", "monitor", monitor)
    check_choice("stop_at", "mode", mode, "min", "max")
    check_choice("stop_at", "per", per, "epoch", "batch")
    changing = isinstance(threshold, Hyperparam)

    def init(state: Any) -> Any:
        del state
        return {"hyperparams": {"threshold": jnp.asarray(number(threshold), float)}} if changing else None

    def look(position: Any, trainer: Any, state: Any, logs: Any) -> Any:
        del position, trainer
        value = jnp.asarray(logs[monitor], float)
        bound = state.callback_states[name]["hyperparams"]["threshold"] if changing else number(threshold)
        return state.request_stop(when=value <= bound if mode == "min" else value >= bound), logs

    hooks: dict[str, Any] = {f"on_{per}_end": look}
    return Callback(name=name, init=init, traced=True, **hooks)


def time_limit(
    seconds: float | datetime.timedelta,
    *,
    clock: Callable[[], float] = time.monotonic,
    name: str = "time_limit",
) -> Callback:
    """End the run when it has trained for so long.

    On the host, whenever that has control, which is about ten times a second. The time counts on when a run is
    resumed; what passes between the two runs does not count.

    Args:
        seconds: the limit, in seconds or as a ``timedelta``; positive.
        clock: returns seconds.
        name: of the callback. Its memory is ``{"seconds": float}``, the time so far.

    Returns:
        A callback that requests the stop.

    Raises:
        ValueError: ``seconds`` is not positive.
        TypeError: ``clock`` is not a function without arguments.

    >>> time_limit(datetime.timedelta(hours=8))
    Callback(name='time_limit', hooks=on_train_begin, on_batch_end, on_epoch_end)
    """
    limit = seconds.total_seconds() if isinstance(seconds, datetime.timedelta) else seconds
    check_positive("time_limit", "seconds", limit)
    check_function("time_limit", "clock", clock)
    counted: PerRun[float] = PerRun()  # when time was last counted

    def init(state: Any) -> Any:
        del state
        return {"seconds": 0.0}

    def on_train_begin(trainer: Any, state: Any, logs: Any) -> Any:
        counted.open(trainer, clock())
        return state, logs

    def look(position: int, trainer: Any, state: Any, logs: Any) -> Any:
        del position
        now = clock()
        # A combinator may have left out the beginning of the run; then time counts from the first look on.
        before = counted.of(trainer)
        passed = state.callback_states[name]["seconds"] + (0.0 if before is None else now - before)
        counted.open(trainer, now)
        return state.with_callback_state(name, {"seconds": passed}).request_stop(when=passed >= limit), logs

    return Callback(
        name=name, every=None, init=init, on_train_begin=on_train_begin, on_batch_end=look, on_epoch_end=look
    )
