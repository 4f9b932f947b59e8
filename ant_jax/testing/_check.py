"""Check that a callback keeps every promise."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ant_jax._callback import BATCH_HOOKS, HOOKS, HOST_HOOKS, STEP_HOOKS, Callback, hooks_of
from ant_jax._judging import judged
from ant_jax._logs import Logs
from ant_jax._state import TrainState
from ant_jax._trainer import Trainer
from ant_jax.testing._compare import CallbackFault, as_text, bytes_of, described, difference, host_memories
from ant_jax.testing._problem import Problem, problem


EPOCHS = 3


def check_callback(make: Callable[[], Callback], *, twice: bool = True, **options: Any) -> None:
    """Check that a callback keeps the promises that the library's own keep, by training a tiny problem with it.

    Its traced hooks give the same program whenever they are traced, without side effects and leaked tracers; every hook
    returns what went in, in the same form, and changes nothing in place; its memory survives saving and restoring; a
    run that goes on from the end of any epoch ends like the one that was not interrupted, a second run with the same
    trainer like the first, and one with a launch a step like a fused one, all to the bit; and nothing is compiled after
    the first epoch.

    Args:
        make: makes the callback. Each call must give one that shares nothing with the others; what is written should go
            to another place each time, and clocks should stand still, or what they measure differs between runs.
        twice: whether two runs that begin at the same state are to end in the same one. (They do not with a tracker,
            which gives each an id of its own, nor with a checkpoint, which refuses to mix two runs in one directory.)
        **options: other arguments of the trainer: the optimizer that the callback needs, for example.

    Raises:
        CallbackFault: it does not keep them; the message says which, and how to mend it.

    >>> import ant_jax
    >>> check_callback(lambda: ant_jax.callbacks.gradient_norm())
    >>> seen = []
    >>> def on_backward_end(batch_idx, trainer, state, grads, logs):
    ...     seen.append(batch_idx)
    ...     return state, grads, logs
    >>> check_callback(lambda: ant_jax.Callback(name="spy", on_backward_end=on_backward_end))
    Traceback (most recent call last):
    ...
    ant_jax.testing._compare.CallbackFault: callback 'spy', on_backward_end: it leaks a tracer; keep it in the state
    """
    if isinstance(make, Callback):
        raise TypeError("check_callback: give it a function that makes the callback: check_callback(lambda: callback)")
    callback = make()
    moments = _Moments()
    fused = problem(callback, moments.callback(), **{**options, "fuse": True})
    _check_traces(callback, fused)
    before = described(fused.state)
    with _counted_compilations() as compiled:
        moments.compiled = compiled
        whole = _trained(callback, fused)
        _refuse(before != described(fused.state), callback, "it changed the state that fit was given, in place")
        _check_compilations_of_epochs(callback, moments)
        _check_memories(callback, moments)
        if twice:
            compiled.clear()
            moments.states.clear()
            again = _trained(callback, fused)
            _refuse(bool(compiled), callback, "a second run with the same trainer compiles something anew; keep shapes")
            _check_same(
                callback, whole, again, "a second run with the same trainer", "the callback keeps what it must not"
            )
    _check_resume_and_fusion(make, callback, whole, moments.states, twice, options)


class _Moments:
    """The states at the ends of epochs, what host memories were then, and what had been compiled by then."""

    def __init__(self) -> None:
        self.states: list[TrainState] = []
        self.memories: list[Any] = []
        self.counts: list[int] = []
        self.compiled: list[str] = []

    def callback(self) -> Callback:
        def on_checkpoint(trainer: Any, state: Any, logs: Any) -> Any:
            del trainer
            on_host = host_memories(state)
            # Copies: an array that somebody refers to would be copied by the trainer, which compiles the copying.
            copied = jax.tree.map(lambda leaf: jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf, state)
            self.states.append(copied.replace(callback_states={**copied.callback_states, **on_host}))
            self.memories.append(copy.deepcopy(on_host))
            self.counts.append(len(self.compiled))
            return state, logs

        return Callback(name="moments", on_checkpoint=on_checkpoint)


def _trained(callback: Callback, tiny: Problem, state: TrainState | None = None) -> TrainState:
    try:
        return tiny.trainer.fit(state or tiny.state, tiny.train_loader, EPOCHS, tiny.val_loader)[0]
    except Exception as error:
        raise CallbackFault(f"callback {callback.name!r}: training with it fails: {error}") from error


def _check_traces(callback: Callback, tiny: Problem) -> None:
    """Trace every hook that runs in compiled code by itself, twice."""
    state = tiny.state.replace(host=None, stop=jnp.bool_(False), skip=None)
    batch = Logs({"batch_size": 8, "loss": jnp.float32(1.0)})
    scalars = {"train_loss": jnp.float32(1.0), "val_loss": jnp.float32(1.0)}
    for name, hook in hooks_of(callback).items():
        if name not in STEP_HOOKS and (not callback.traced or name in HOST_HOOKS):
            continue
        of_batch = name in BATCH_HOOKS or name in STEP_HOOKS
        lead = [jnp.int32(0)] if HOOKS[name].lead else []
        given: list[Any] = [state.replace(skip=jnp.bool_(False)) if name == "on_backward_end" else state]
        given += [state.params] if HOOKS[name].tree else []
        logs = batch if of_batch else Logs(scalars)
        _check_trace(callback, name, hook, tiny.trainer, lead, given, logs)


def _check_trace(
    callback: Callback, name: str, hook: Any, trainer: Trainer, lead: Any, given: list[Any], logs: Logs
) -> None:
    known = {log: value for log, value in logs.items() if isinstance(value, jax.Array)}

    def trace() -> Any:
        def traced(lead: Any, given: Any, values: Any) -> Any:  # a new function, or JAX would remember the first trace
            arguments = (*given, Logs({**logs, **values}))
            *rest, published = judged(name, arguments, hook(*lead, trainer, *arguments))
            return rest, {log: value for log, value in published.items() if not isinstance(value, int)}

        return jax.make_jaxpr(traced)(lead, given, known)

    printed = io.StringIO()
    try:
        with jax.checking_leaks(), contextlib.redirect_stdout(printed):
            first, second = trace(), trace()
    except KeyError:  # a log that only another callback, or another problem, has
        return
    except Exception as error:
        leaked = "leaked" in str(error).lower()
        fault = "it leaks a tracer; keep it in the state" if leaked else error
        raise CallbackFault(f"callback {callback.name!r}, {name}: {fault}") from error
    _refuse(bool(printed.getvalue()), callback, "it prints while it is traced: once, and not at every step", name)
    _refuse(bool(first.effects), callback, "it has a side effect in compiled code; publish a log instead", name)
    different = str(first) != str(second) or list(map(bytes_of, first.consts)) != list(map(bytes_of, second.consts))
    why = "it depends on something outside its arguments (a counter, a clock, numpy's random numbers)"
    _refuse(different, callback, f"traced twice it gives two programs: {why}; keep it in the memory", name)


def _check_compilations_of_epochs(callback: Callback, moments: _Moments) -> None:
    late = moments.counts[-1] - moments.counts[0] if moments.counts else 0
    _refuse(
        late > 0, callback, f"{late} programs are compiled after the first epoch; keep shapes and dtypes as they are"
    )


def _check_memories(callback: Callback, moments: _Moments) -> None:
    for state, kept in zip(moments.states, moments.memories, strict=True):
        for name, memory in kept.items():
            changed = as_text(memory, name) != as_text(host_memories(state)[name], name)
            _refuse(changed, callback, "it changes its memory in place; make a new one and use with_callback_state")


def _check_resume_and_fusion(
    make: Callable[[], Callback],
    callback: Callback,
    whole: TrainState,
    states: list[TrainState],
    twice: bool,
    options: Any,
) -> None:
    """Go on from the end of every epoch, with a new callback and a launch a step; the first time through a file."""

    def stepwise() -> Problem:
        return problem(make(), _Moments().callback(), **{**options, "fuse": False})

    tiny = stepwise()
    for place, state in enumerate(states):
        if state.stop or state.epoch == EPOCHS:
            continue
        if place == 0:
            state = _saved_and_restored(callback, tiny, state)
        elif not twice:
            tiny = stepwise()
        differs = difference(whole, _trained(callback, tiny, state))
        if differs:
            _check_same(
                *(callback, whole, _trained(callback, stepwise()), "a run with a launch a step"),
                "it depends on how many steps a launch has",
            )
            raise CallbackFault(
                f"callback {callback.name!r}: a run that goes on from the end of epoch {place} ends otherwise than one "
                f"that was not interrupted: {differs}. What it must remember belongs in "
                f"state.callback_states[{callback.name!r}], made by init(state), and nowhere else"
            )


def _saved_and_restored(callback: Callback, tiny: Problem, state: TrainState) -> TrainState:
    with tempfile.TemporaryDirectory() as directory:
        try:
            tiny.trainer.save(directory, state)
            restored = tiny.trainer.restore(directory)
        except Exception as error:
            raise CallbackFault(f"callback {callback.name!r}: its memory does not survive saving: {error}") from error
    differs = difference(state, restored)
    _refuse(bool(differs), callback, f"its memory does not survive saving and restoring: {differs}")
    return restored


def _check_same(callback: Callback, expected: TrainState, got: TrainState, what: str, why: str) -> None:
    differs = difference(expected, got)
    _refuse(bool(differs), callback, f"{what} ends otherwise: {differs}; {why}")


def _refuse(fault: bool, callback: Callback, message: str, hook: str = "") -> None:
    if fault:
        raise CallbackFault(f"callback {callback.name!r}{f', {hook}' if hook else ''}: {message}")


@contextlib.contextmanager
def _counted_compilations() -> Iterator[list[str]]:
    compiled: list[str] = []

    def count(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
