"""Callbacks made of callbacks."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from ant_jax._arguments import check_count, check_function
from ant_jax._background import bearing
from ant_jax._hooks.callback import (
    BATCH_HOOKS,
    HOOKS,
    STEP_HOOKS,
    Callback,
    HookFn,
    LateInit,
    check_callbacks,
    hooks_of,
    in_order_of_init,
)
from ant_jax._hooks.observed import ObservedState, refuse_changes
from ant_jax._hooks.returns import check_return
from ant_jax._state.memories import Memories
from ant_jax._step.branches import run_if
from ant_jax.callbacks._averages import evaluated_in
from ant_jax.callbacks._runs import PerRun


_logger = logging.getLogger("ant_jax")

# (name of the hook, what stands before the trainer or None, state, logs) -> whether the hook is to run.
_Due = Callable[[str, Any, Any, Any], Any]


def every(callback: Callback, *, batches: int | None = None, epochs: int | None = None) -> Callback:
    """Run a callback more rarely.

    A host callback looks at every ``batches`` batches, as if it had been made with ``every=batches``. A traced one, and
    the hooks with gradients or updates of any, run at the last of every so many batches of an epoch
    (``on_batch_begin`` at the first). With ``epochs``, its other hooks run in the last of every so many epochs; those
    of the run always do. A log that a traced hook publishes is NaN where the hook does not run.

    Args:
        callback: which one; the result keeps its name and its memory.
        batches: 1 or more.
        epochs: 1 or more.

    Returns:
        The callback, run more rarely.

    Raises:
        TypeError: ``callback`` is none.
        ValueError: neither number is given, or one is out of range; or it has no hook that the number can be about
            (inside the step nobody knows the epoch).

    >>> from ant_jax.callbacks import gradient_norm, log_progress
    >>> every(gradient_norm(), batches=10)
    Callback(name='grad_norm', hooks=on_backward_end)
    """
    hooks = _hooks_of("every", callback)
    if batches is None and epochs is None:
        raise ValueError("every: give batches=, epochs= or both")
    check_count("every", "batches", batches, unit="batches", optional=True)
    check_count("every", "epochs", epochs, unit="epochs", optional=True)
    in_step = [name for name in hooks if name in STEP_HOOKS or (name in BATCH_HOOKS and callback.traced)]
    if batches and not any(name in BATCH_HOOKS or name in STEP_HOOKS for name in hooks):
        raise ValueError(f"every: callback {callback.name!r} has no hook of batches; give epochs= alone")
    if batches and isinstance(callback.every, range):
        raise ValueError(f"every: callback {callback.name!r} looks at {callback.every} alone; give epochs=")
    blind = in_step + [name for name in hooks if callback.traced and name.startswith("on_evaluate")]
    if epochs and blind:
        raise ValueError(
            f"every: {blind[0]} of callback {callback.name!r} runs in compiled code, where the epoch is not known; "
            f"give batches="
        )

    def due(name: str, lead: Any, state: Any, logs: Any) -> Any:
        del logs
        if batches and name in in_step:
            return (lead if name == "on_batch_begin" else lead + 1) % batches == 0
        if epochs and HOOKS[name].lead == "epoch":
            return (lead + 1) % epochs == 0
        if epochs and name not in ("on_train_begin", "on_train_end", "on_exception"):
            counted = name == "on_checkpoint" and state.batch_idx == 0  # the epoch is done, and has been counted
            return (state.epoch + (not counted)) % epochs == 0
        return True

    looks = batches if batches and not callback.traced and any(name in BATCH_HOOKS for name in hooks) else None
    return _wrap(callback, {name: _if(due, name, hook) for name, hook in hooks.items()}, looks)


def when(predicate: Callable[[Any, Any], Any], callback: Callback) -> Callback:
    """Run a callback's hooks only where a condition holds.

    Args:
        predicate: ``predicate(state, logs)``, asked before every hook with what the hook is given, so for an observer
            with what the host knows of the state: a bool, or for a traced hook a boolean scalar made of the state's
            arrays (``state.step < 1000``) and the logs. A traced hook is then left out at run time,
            and a log that it publishes is NaN.
        callback: which one; the result keeps its name and its memory. Parameters whose place an average has taken for
            an evaluation, ``ema(evaluate=True)``, come back at its end, whatever holds by then; what else a callback
            opens in one hook and closes in another stays open where the condition holds for the first alone.

    Returns:
        The callback, run where the condition holds.

    ``on_train_end`` and ``on_exception``, where a callback closes what it has open, are always run.

    Raises:
        TypeError: ``predicate`` is not a function or ``callback`` no callback.

    >>> from ant_jax.callbacks import gradient_noise
    >>> when(lambda state, logs: state.step < 1000, gradient_noise())
    Callback(name='gradient_noise', hooks=on_before_update)
    """
    check_function("when", "predicate", predicate, "state", "logs")

    def due(name: str, lead: Any, state: Any, logs: Any) -> Any:
        del lead
        if name in ("on_train_end", "on_exception"):
            return True
        holds = predicate(state, logs)
        if name == "on_evaluate_end":  # an average must not stay in the place of the parameters
            for memory in evaluated_in(state.callback_states.get(callback.name)):
                holds = jnp.logical_or(holds, memory["swapped"])
        return holds

    return _wrap(callback, {name: _if(due, name, hook) for name, hook in _hooks_of("when", callback).items()})


def chain(*callbacks: Callback, name: str = "chain") -> Callback:
    """Make one callback of several, which run one after the other at every hook.

    Args:
        *callbacks: those with other hooks than the ones of gradients and updates must be all traced or all on the
            host, and with the same ``every``.
        name: of the chain. Its memory is those of the callbacks, by their names; if one has hooks inside the step, all
            of it is on the device, so it must be arrays and numbers. A callback with a memory sees those of the chain
            beside the others'; one without, ``checkpoint`` for one, sees the state as it is outside of the chain.

    Returns:
        One callback; an observer, if all of them are. An observer among other callbacks is called where they are, so a
        chain with both looks as often as it says, with a launch to each look.

    Raises:
        TypeError: one is no callback.
        ValueError: there are none, two have the same name, or they differ in ``traced`` or ``every``.

    >>> from ant_jax.callbacks import centralize, clip_by_global_norm
    >>> chain(centralize(), clip_by_global_norm(1.0))
    Callback(name='chain', hooks=on_before_update)
    """
    members = check_callbacks(callbacks)
    if not members:
        raise ValueError("chain: give it callbacks")
    # The hooks of gradients and updates run at the same place whatever their callback says.
    placed = [member for member in members if not set(STEP_HOOKS) >= hooks_of(member).keys()] or members[:1]
    if len({(member.traced, member.every) for member in placed}) > 1:
        kinds = ", ".join(f"{member.name!r}: traced={member.traced}, every={member.every}" for member in placed)
        raise ValueError(f"chain: callbacks of one chain run at the same places and as often; got {kinds}")

    def init(state: Any) -> Any:
        memories: dict[str, Any] = {}
        for member in in_order_of_init(members):
            memory = member.init(state.replace(callback_states={**state.callback_states, **memories}))
            if memory is not None:
                memories[member.name] = memory
        return Memories(memories) if memories else None

    def hook_of(hook_name: str) -> HookFn:
        def hook(*arguments: Any) -> Any:
            place = len(arguments) - len(HOOKS[hook_name].values)
            lead, (state, *rest) = arguments[:place], arguments[place:]
            for member in members:
                function = hooks_of(member).get(hook_name)
                if function is not None and member.observer:
                    _call(member, hook_name, function, lead, (state, *rest))
                elif function is not None and member.name not in (state.callback_states.get(name) or {}):
                    state, *rest = _call(member, hook_name, function, lead, (state, *rest))
                elif function is not None:
                    inside = _unfold(name, state)
                    after, *rest = _call(member, hook_name, function, lead, (inside, *rest))
                    state = _fold(name, state, after)
            return state, *rest

        return hook

    hooks: dict[str, Any] = {hook: hook_of(hook) for hook in HOOKS if any(hook in hooks_of(m) for m in members)}
    if all(member.observer for member in members):
        return Callback(name=name, observer=True, every=placed[0].every, **hooks)
    late = any(isinstance(member.init, LateInit) for member in members)
    first = LateInit(init) if late else init
    return Callback(name=name, init=first, traced=placed[0].traced, every=placed[0].every, **hooks)


def _unfold(name: str, state: Any) -> Any:
    """The state with the memories of a chain's callbacks beside the others', and in the place of any of that name."""
    others = {owner: memory for owner, memory in state.callback_states.items() if owner != name}
    return state.replace(callback_states={**others, **state.callback_states[name]})


def _fold(name: str, before: Any, after: Any) -> Any:
    """Undo ``_unfold``, after a hook."""
    outer, memories, inner = before.callback_states, before.callback_states[name], after.callback_states
    kept = {owner: memory if owner in memories else inner[owner] for owner, memory in outer.items() if owner != name}
    folded = Memories({owner: inner[owner] for owner in memories})
    return after.replace(callback_states={**kept, name: folded})


def tolerate(callback: Callback, *, failures: int = 3) -> Callback:
    """Let a run go on when a host callback fails, such as a tracker whose server is down.

    An exception in one of its hooks is logged as a warning (logger ``ant_jax``), and the state and the logs stay as
    they were. Everything that it writes in the background and that fails is one failure more. After so many in a run it
    is given up on: what it has not begun to write is left out, and it is not called any more, but for ``on_train_end``
    and ``on_exception``, where it may close what it has open. Ctrl-C is no failure.

    Args:
        callback: which one; the result keeps its name and its memory.
        failures: how many to bear before giving up on it; at least 1.

    Returns:
        The callback, whose failures are borne.

    Raises:
        TypeError: ``callback`` is none.
        ValueError: ``failures`` is below 1, or the callback has hooks inside the step, where nothing can fail on its
            own.

    >>> from ant_jax.callbacks import log_progress
    >>> tolerate(log_progress(), failures=5).name
    'log_progress'
    """
    hooks = _hooks_of("tolerate", callback)
    check_count("tolerate", "failures", failures, unit="failures")
    if callback.traced or any(name in STEP_HOOKS for name in hooks):
        raise ValueError(
            f"tolerate: callback {callback.name!r} has hooks inside the step; only host callbacks can fail"
        )
    failed: PerRun[int] = PerRun()

    def bear(hook_name: str, trainer: Any, error: Exception) -> bool:
        """Count a failure of a run and say it; returns whether to go on."""
        number = failed.open(trainer, (failed.of(trainer) or 0) + 1)
        count = f"failure {number} of {failures}; "
        if number < failures:
            outlook = count + "the run goes on"
        else:
            outlook = count + "it is not called any more" if number == failures else "it had been given up on"
        _logger.warning(
            "callback %r failed in %s (%s): %s: %s", callback.name, hook_name, outlook, type(error).__name__, error
        )
        return number < failures

    def hook_of(hook_name: str, function: HookFn) -> HookFn:
        def hook(*arguments: Any) -> Any:
            place = len(arguments) - len(HOOKS[hook_name].values)
            lead, given = arguments[:place], arguments[place:]
            trainer = lead[-1]
            if (failed.of(trainer) or 0) >= failures and hook_name not in ("on_train_end", "on_exception"):
                return given
            try:
                with bearing(functools.partial(bear, hook_name, trainer)):
                    return _call(callback, hook_name, function, lead, given)
            except Exception as error:
                bear(hook_name, trainer, error)
                return given

        return hook

    wrapped = {name: hook_of(name, hook) for name, hook in hooks.items()}
    begin = wrapped.get("on_train_begin", lambda trainer, state, logs: (state, logs))

    def on_train_begin(trainer: Any, state: Any, logs: Any) -> Any:
        failed.close(trainer)
        return begin(trainer, state, logs)

    return _wrap(callback, {**wrapped, "on_train_begin": on_train_begin})


def _hooks_of(owner: str, callback: Callback) -> dict[str, HookFn]:
    (callback,) = check_callbacks([callback])
    hooks = hooks_of(callback)
    if not hooks:
        raise ValueError(f"{owner}: callback {callback.name!r} has no hooks")
    return hooks


def _wrap(callback: Callback, hooks: dict[str, Any], every: int | None = None) -> Callback:
    """The callback with other hooks, and other looks if they are given."""
    looks = callback.every if every is None else every
    kind: dict[str, Any] = {"traced": callback.traced, "observer": callback.observer}
    return Callback(name=callback.name, init=callback.init, every=looks, **kind, **hooks)


def _call(callback: Callback, name: str, function: HookFn, lead: tuple[Any, ...], given: tuple[Any, ...]) -> Any:
    """Call a hook of an inner callback, judge what it returns, and name it in what it raises."""
    try:
        if callback.observer:
            refuse_changes(callback, name, given, function(*lead, *given))
            return given
        # A host callback's memory is its own affair; those on the device are judged when the outer callback returns.
        device_names = None if given[0].host is None else frozenset[str]()
        return check_return(name, given, function(*lead, *given), device_names)
    except Exception as error:
        error.add_note(f"in {name} of callback {callback.name!r}")
        raise


def _if(due: _Due, name: str, function: HookFn) -> HookFn:
    """Make a hook that runs where ``due``: decided by Python where that can, and at run time in compiled code."""

    def hook(*arguments: Any) -> Any:
        place = len(arguments) - len(HOOKS[name].values)
        before, given = arguments[:place], arguments[place:]
        condition = due(name, before[0] if HOOKS[name].lead else None, given[0], given[-1])
        on_host = isinstance(given[0], ObservedState) or given[0].host is not None
        if isinstance(condition, bool | np.bool_) or on_host:
            return function(*arguments) if condition else given

        def run() -> Any:
            *tree, logs = check_return(name, given, function(*arguments))
            return tree, logs

        tree, logs = run_if(condition, run, list(given[:-1]), given[-1])
        return (*tree, logs)

    return hook
