"""Check that a callback keeps every promise."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax._hooks.callback import BATCH_HOOKS, HOOKS, HOST_HOOKS, STEP_HOOKS, Callback, hooks_of
from ant_jax._hooks.returns import check_return
from ant_jax._logs.logs import Logs, UnknownLog
from ant_jax._state.train_state import TrainState
from ant_jax._trainer.trainer import Trainer
from ant_jax.testing._compare import CallbackFault, as_text, bytes_of, describe_state, difference, host_memories
from ant_jax.testing._effects import changed_reach, files_and_connections, reach
from ant_jax.testing._problem import Problem, problem


EPOCHS = 3


def check_callback(make: Callable[[], Callback], *, twice: bool = True, **options: Any) -> None:
    """Check that a callback keeps the promises that the library's own keep, by training a tiny problem with it.

    Its traced hooks give the same program whenever they are traced, without leaked tracers and side effects: output,
    files opened for writing, connections, and changes of what a hook refers to (its closure, ``self``, the globals that
    it names). Every hook, ``on_exception`` included, returns what went in, in the same form, and changes nothing in
    place; its memory survives saving and restoring; a run that goes on from the end of any epoch, or from within one,
    ends like the one that was not interrupted, a second run with the same trainer like the first, and one with a launch
    a step like a fused one, all to the bit; and nothing is compiled after the first epoch. Its traced hooks called by
    hand, without compiling, make the same of Python's numbers, NumPy's and JAX's.

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
    _check_by_hand(callback, fused)
    before = describe_state(fused.state)
    with _counted_compilations() as compiled:
        moments.compiled = compiled
        whole = _trained(callback, fused)
        _refuse(before != describe_state(fused.state), callback, "it changed the state that fit was given, in place")
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
    _check_exception(make, callback, options)
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
            self.states.append(_copied(state, on_host))
            self.memories.append(copy.deepcopy(on_host))
            self.counts.append(len(self.compiled))
            return state, logs

        return Callback(name="moments", on_checkpoint=on_checkpoint)


def _copied(state: TrainState, on_host: dict[str, Any]) -> TrainState:
    """A copy: an array that somebody refers to would be copied by the trainer, which compiles the copying."""
    copied = jax.tree.map(lambda leaf: jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf, state)
    return copied.replace(callback_states={**copied.callback_states, **on_host})


def _midway(states: list[TrainState]) -> Callback:
    """A callback that keeps the states in the middle of epochs."""

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        del batch_idx, trainer
        return state, logs

    def on_checkpoint(trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        if state.batch_idx:
            states.append(_copied(state, copy.deepcopy(host_memories(state))))
        return state, logs

    return Callback(name="midway", every=3, on_batch_end=on_batch_end, on_checkpoint=on_checkpoint)


class _Planned(Exception):
    """Ends a run, to see what callbacks make of that."""


def _check_exception(make: Callable[[], Callback], callback: Callback, options: Any) -> None:
    """End a run with an exception, before anything is compiled: its failure at that hides no other, and is a note."""
    if "on_exception" not in hooks_of(callback):
        return

    def on_epoch_begin(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        raise _Planned

    fails = Callback(name="fails", on_epoch_begin=on_epoch_begin)
    tiny = problem(make(), fails, **{**options, "fuse": True})
    try:
        tiny.trainer.fit(tiny.state, tiny.train_loader, EPOCHS, tiny.val_loader)
    except _Planned as error:
        for note in error.__notes__:
            _refuse(
                note.startswith(f"on_exception of callback {callback.name!r}"),
                callback,
                f"a run that fails ends with another failure: {note}",
                "on_exception",
            )
    except Exception as error:
        raise CallbackFault(f"callback {callback.name!r}: training with it fails: {error}") from error


def _trained(callback: Callback, tiny: Problem, state: TrainState | None = None) -> TrainState:
    try:
        return tiny.trainer.fit(state or tiny.state, tiny.train_loader, EPOCHS, tiny.val_loader)[0]
    except Exception as error:
        raise CallbackFault(f"callback {callback.name!r}: training with it fails: {error}") from error


class _Moment(NamedTuple):
    """A hook that runs in compiled code, and what it may be given there."""

    name: str
    hook: Any
    has_lead: bool
    state: TrainState
    trees: list[Any]
    logs: Logs


def _compiled_hooks(callback: Callback, tiny: Problem) -> Iterator[_Moment]:
    state = tiny.state.replace(host=None, stop=jnp.bool_(False), skip=None)
    batch = Logs({"batch_size": 8, "loss": jnp.float32(1.0)})
    scalars = Logs({"train_loss": jnp.float32(1.0), "val_loss": jnp.float32(1.0)})
    for name, hook in hooks_of(callback).items():
        if name not in STEP_HOOKS and (not callback.traced or name in HOST_HOOKS):
            continue
        skip = jnp.bool_(False) if name == "on_backward_end" else None
        trees = [state.params] if HOOKS[name].tree else []
        logs = batch if name in BATCH_HOOKS or name in STEP_HOOKS else scalars
        yield _Moment(name, hook, HOOKS[name].lead is not None, state.replace(skip=skip), trees, logs)


def _check_traces(callback: Callback, tiny: Problem) -> None:
    """Trace every hook that runs in compiled code by itself, twice."""
    for moment in _compiled_hooks(callback, tiny):
        lead = [jnp.int32(0)] if moment.has_lead else []
        given = [moment.state, *moment.trees]
        _check_trace(callback, moment.name, moment.hook, tiny.trainer, lead, given, moment.logs)


def _check_by_hand(callback: Callback, tiny: Problem) -> None:
    """Call every such hook with numbers of every kind, several times in a row."""
    kinds = {"JAX": (jnp.int32, jnp.float32), "Python": (int, float), "NumPy": (np.int64, np.float32)}
    for moment in _compiled_hooks(callback, tiny):
        name, host = moment.name, tiny.state.host
        results: dict[str, list[Any]] = {}
        for kind, (whole, real) in kinds.items():
            given: Any = (moment.state.replace(host=host, stop=False), *moment.trees)
            results[kind] = []
            for lead in range(3):
                logs = {log: value if isinstance(value, int) else real(value) for log, value in moment.logs.items()}
                arguments = (*given, Logs(logs))
                try:
                    result = moment.hook(*([whole(lead)] if moment.has_lead else []), tiny.trainer, *arguments)
                    *given, published = check_return(name, arguments, result)
                except UnknownLog:
                    break
                except Exception as error:
                    fault = f"called by hand with {kind}'s numbers, it fails: {error}"
                    raise CallbackFault(f"callback {callback.name!r}, {name}: {fault}") from error
                numbers = {log: np.asarray(value, np.float64) for log, value in published.items()}
                results[kind].append((describe_state(given[0]), bool(given[0].stop), given[1:], numbers))
        for kind, result in results.items():
            same = all(jax.tree.leaves(jax.tree.map(np.array_equal, results["JAX"], result)))
            _refuse(
                not same, callback, f"called by hand, it makes another thing of {kind}'s numbers than of JAX's", name
            )


def _check_trace(
    callback: Callback, name: str, hook: Any, trainer: Trainer, lead: Any, given: list[Any], logs: Logs
) -> None:
    known = {log: value for log, value in logs.items() if isinstance(value, jax.Array)}

    def trace() -> Any:
        def traced(lead: Any, given: Any, values: Any) -> Any:  # a new function, or JAX would remember the first trace
            arguments = (*given, Logs({**logs, **values}))
            *rest, published = check_return(name, arguments, hook(*lead, trainer, *arguments))
            return rest, {log: value for log, value in published.items() if not isinstance(value, int)}

        return jax.make_jaxpr(traced)(lead, given, known)

    printed, before = io.StringIO(), reach(hook)
    try:
        with jax.checking_leaks(), contextlib.redirect_stdout(printed), files_and_connections() as opened:
            first, second = trace(), trace()
    except UnknownLog:  # a log that only another callback, or another problem, has
        return
    except Exception as error:
        leaked = "leaked" in str(error).lower()
        shown = repr(error) if isinstance(error, KeyError) else error  # whose text is a name alone
        fault = "it leaks a tracer; keep it in the state" if leaked else shown
        raise CallbackFault(f"callback {callback.name!r}, {name}: {fault}") from error
    _refuse(bool(printed.getvalue()), callback, "it prints while it is traced: once, and not at every step", name)
    _refuse(bool(first.effects), callback, "it has a side effect in compiled code; publish a log instead", name)
    different = str(first) != str(second) or list(map(bytes_of, first.consts)) != list(map(bytes_of, second.consts))
    why = "it depends on something outside its arguments (a counter, a clock, numpy's random numbers)"
    _refuse(different, callback, f"traced twice it gives two programs: {why}; keep it in the memory", name)
    once = "while it is traced: once, and not at every step"
    _refuse(bool(opened), callback, f"it {', '.join(dict.fromkeys(opened))} {once}; publish a log instead", name)
    changed = changed_reach(before, reach(hook))
    _refuse(bool(changed), callback, f"it changes {changed} {once}; keep it in the memory", name)


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
    """Go on from the end of every epoch and from within one, with a new callback and a launch a step.

    The first time through a file. A run that has ended in its first epoch is done again instead.
    """
    midway: list[TrainState] = []

    def stepwise(*others: Callback) -> Problem:
        return problem(make(), _Moments().callback(), *others, **{**options, "fuse": False})

    def going_on(place: str, differs: str) -> CallbackFault:
        return CallbackFault(
            f"callback {callback.name!r}: a run that goes on from {place} ends otherwise than one that was not "
            f"interrupted: {differs}. What it must remember belongs in state.callback_states[{callback.name!r}], made "
            f"by init(state), and nowhere else"
        )

    tiny, end = stepwise(_midway(midway)), whole
    ends = [state for state in states if not state.stop and state.epoch < EPOCHS]
    for place, state in enumerate(ends):
        if place == 0:
            state = _saved_and_restored(callback, tiny, state)
        elif not twice:
            tiny = stepwise()
        end = _trained(callback, tiny, state)
        differs = difference(whole, end)
        if differs:
            _check_same(callback, whole, _trained(callback, stepwise()), *_UNFUSED)
            raise going_on(f"the end of epoch {state.epoch - 1}", differs)
    if not ends:
        end = _trained(callback, tiny)
        if twice:
            _check_same(callback, whole, end, *_UNFUSED)
    if midway:
        state = midway[0]
        differs = difference(end, _trained(callback, stepwise(_midway([])), state))
        if differs:
            raise going_on(f"batch {state.batch_idx} of epoch {state.epoch}", differs)


_UNFUSED = ("a run with a launch a step", "it depends on how many steps a launch has")


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
