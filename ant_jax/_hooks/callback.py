"""The callback type and the table of hooks."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Never, Unpack, overload

import numpy as np

from ant_jax._hooks.signatures import Hooks, ObserverHooks


@dataclasses.dataclass(frozen=True)
class Hook:
    """How one hook is called.

    Attributes:
        lead: what stands before ``trainer``: ``"epoch"``, ``"batch_idx"``, ``"exception"``, or nothing.
        tree: what goes in and comes out between state and logs: ``"grads"``, ``"updates"``, or nothing. A hook that has
            one always runs inside the step.
    """

    lead: str | None = None
    tree: str | None = None

    @property
    def values(self) -> tuple[str, ...]:
        """What goes in after ``trainer`` and comes out, in order."""
        return ("state", self.tree, "logs") if self.tree else ("state", "logs")


# One rule: what comes after `trainer` goes in and comes out, in the same order.
HOOKS: Mapping[str, Hook] = {
    "on_train_begin": Hook(),
    "on_epoch_begin": Hook("epoch"),
    "on_batch_begin": Hook("batch_idx"),
    "on_backward_end": Hook("batch_idx", "grads"),
    "on_before_update": Hook("batch_idx", "grads"),
    "on_before_apply": Hook("batch_idx", "updates"),
    "on_batch_end": Hook("batch_idx"),
    "on_evaluate_begin": Hook(),
    "on_evaluate_end": Hook(),
    "on_epoch_end": Hook("epoch"),
    "on_checkpoint": Hook(),
    "on_train_end": Hook(),
    "on_exception": Hook("exception"),
}
STEP_HOOKS = tuple(name for name, hook in HOOKS.items() if hook.tree)  # always traced
BATCH_HOOKS = ("on_batch_begin", "on_batch_end")  # in the step when the callback is traced
HOST_HOOKS = ("on_checkpoint", "on_exception")  # on the host, even of a traced callback

HookFn = Callable[..., tuple[Any, ...] | None]  # ``None``: only of observers


class Callback:
    """A set of pure functions that the trainer calls at fixed points; see :data:`HOOKS` for their arguments.

    Every hook takes ``state`` and ``logs`` (and ``grads``) and returns them, changed or not, in the same order. Write
    one as functions, ``Callback(name="double", on_backward_end=...)``, or as methods of a frozen dataclass::

        @dataclasses.dataclass(frozen=True)
        class Double(ant_jax.Callback):
            factor: float = 2.0

            def on_backward_end(self, batch_idx, trainer, state, grads, logs):
                return state, jax.tree.map(lambda g: g * self.factor, grads), logs

    A callback is configuration and never changes; what it must remember is ``state.callback_states[name]``, made by
    ``init(state)`` when the run begins and replaced with ``state.with_callback_state(name, value)``.

    ``on_backward_end``, ``on_before_update`` and ``on_before_apply`` are always traced into the compiled step. The
    other hooks run on the host unless the callback is ``traced``: then its batch hooks run inside the step too, and its
    other hooks are pure JAX as well. ``on_checkpoint`` and ``on_exception`` always run on the host.

    An ``observer`` only looks, so its hooks may return nothing. It costs no launch, however often it looks: its batch
    hooks are called after a launch, batch by batch, in the order of the loop::

        def on_batch_end(batch_idx, trainer, state, logs):
            print(f"epoch {state.epoch}, batch {batch_idx}: {logs['loss']:.4f}")

        log = ant_jax.Callback(name="log", observer=True, on_batch_end=on_batch_end)

    By then later batches may have been trained on, so it sees of the state only what the host knows (``step``,
    ``total_steps``, ``epoch``, ``batch_idx``, ``examples``, ``batch_size``, ``history``, ``stop``), and can change
    neither the state nor the logs. The logs of a batch are numbers of numpy. What waits to be told is told before a
    hook of any other callback runs, and before an exception is. ``on_checkpoint`` comes at the ends of epochs alone.

    Args:
        name: unique among the callbacks of a trainer; by default, a subclass's name in snake_case.
        init: ``init(state) -> memory``, any pytree.
        traced: whether all hooks are pure JAX.
        every: how often a host callback's batch hooks look: every that many batches and at the last batch of an
            epoch; ``range(a, b)``, once an epoch, at those batches; ``None``, whenever the host next has control. One
            look is one ``on_batch_begin`` and the ``on_batch_end`` that belongs to it; ``logs.window`` holds the
            batches between them.
        observer: whether the callback only looks; a host callback, without a memory. ``None``: as the class says, which
            may have ``observer = True`` in its body.
        on_train_begin: and the other hooks, one function each; one that is not given is never called.

    Raises:
        TypeError: a hook that does not exist, or one that cannot be called.
        ValueError: a bad ``every``; an observer that is traced, has a hook inside the step, or an ``init``.

    >>> double = Callback(
    ...     name="double",
    ...     on_backward_end=lambda batch_idx, trainer, state, grads, logs: (
    ...         state, jax.tree.map(lambda g: 2 * g, grads), logs
    ...     ),
    ... )
    >>> Callback(name="typo", on_epoch_edn=print)
    Traceback (most recent call last):
    ...
    TypeError: Callback 'typo' has no hook or argument named 'on_epoch_edn'; did you mean 'on_epoch_end'?
    """

    name: str = ""
    traced: bool = False
    every: int | range | None = 1
    observer: bool = False

    @overload
    def __init__(
        self,
        *,
        observer: Literal[True],
        name: str = ...,
        every: int | range | None = ...,
        **hooks: Unpack[ObserverHooks],
    ) -> None: ...
    @overload
    def __init__(
        self,
        *,
        observer: Literal[False] | None = ...,
        name: str = ...,
        init: Callable[[Any], Any] | None = ...,
        traced: bool = ...,
        every: int | range | None = ...,
        **hooks: Unpack[Hooks],
    ) -> None: ...
    def __init__(
        self,
        *,
        name: str = "",
        init: Callable[[Any], Any] | None = None,
        traced: bool = False,
        every: int | range | None = 1,
        observer: bool | None = None,
        on_train_begin: HookFn | None = None,
        on_epoch_begin: HookFn | None = None,
        on_batch_begin: HookFn | None = None,
        on_backward_end: HookFn | None = None,
        on_before_update: HookFn | None = None,
        on_before_apply: HookFn | None = None,
        on_batch_end: HookFn | None = None,
        on_evaluate_begin: HookFn | None = None,
        on_evaluate_end: HookFn | None = None,
        on_epoch_end: HookFn | None = None,
        on_checkpoint: HookFn | None = None,
        on_train_end: HookFn | None = None,
        on_exception: HookFn | None = None,
        **misspelt: Never,
    ):
        arguments = locals()
        if misspelt:
            known = "name", "init", "traced", "every", "observer", *HOOKS
            raise _misspelt(f"Callback {name!r}", next(iter(misspelt)), known)
        given = {"name": name or self.name, "init": init, **{hook: arguments[hook] for hook in HOOKS}}
        for attribute, value in {"traced": traced, "every": every, "observer": observer, **given}.items():
            if value is not None or attribute == "every":
                object.__setattr__(self, attribute, value)
        _check(self)

    def init(self, state: Any) -> Any:
        """Make the callback's memory for a run that begins at ``state``: any pytree, or ``None`` to keep none."""
        del state

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for attribute in vars(cls):
            if re.match("on[_A-Z]", attribute) and attribute not in HOOKS:
                raise _misspelt(f"class {cls.__name__}", attribute, tuple(HOOKS))
        if "name" not in vars(cls):
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    def __setattr__(self, attribute: str, value: Any) -> None:
        raise TypeError(
            f"callback {self.name!r} cannot change (self.{attribute} = ...): configuration belongs in fields of a "
            f"@dataclasses.dataclass(frozen=True), memory in state.callback_states[{self.name!r}], made by init(state)"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, hooks={', '.join(hooks_of(self)) or 'none'})"


def hooks_of(callback: Callback) -> dict[str, HookFn]:
    """The hooks that ``callback`` defines, by name, in the order of :data:`HOOKS`."""
    return {name: getattr(callback, name) for name in HOOKS if getattr(callback, name, None) is not None}


def in_step(callback: Callback) -> bool:
    """Whether any hook of ``callback`` runs inside compiled code, so that its memory lives on the device."""
    return callback.traced or any(name in STEP_HOOKS for name in hooks_of(callback))


def place_of(callback: Callback, name: str, lead: Any, epoch: int) -> str:
    """Say where in a run a hook of ``callback`` was called, with ``lead`` before the trainer."""
    where = f"epoch {lead if HOOKS[name].lead == 'epoch' else epoch}"
    if HOOKS[name].lead == "batch_idx":
        where += f", batch {lead}"
    return f"in {name} of callback {callback.name!r} ({where})"


class LateInit:
    """An ``init`` that sees the memories of all other callbacks, wherever in the list its own one stands."""

    def __init__(self, init: Callable[[Any], Any]):
        self._init = init

    def __call__(self, state: Any) -> Any:
        return self._init(state)


def in_order_of_init(callbacks: Iterable[Callback]) -> list[Callback]:
    """The callbacks in the order in which their memories are made: those with a ``LateInit`` last."""
    return sorted(callbacks, key=lambda callback: isinstance(callback.init, LateInit))


def check_callbacks(callbacks: Iterable[Callback]) -> tuple[Callback, ...]:
    """Return the callbacks as a tuple after checking each, and that their names are unique.

    Raises:
        TypeError: something that is not a ``Callback``, or a broken one.
        ValueError: a name used twice, or a bad ``every``.
    """
    if isinstance(callbacks, Callback):
        raise TypeError(f"callbacks must be a sequence; write callbacks=[...] around {callbacks!r}")
    if not isinstance(callbacks, Iterable):
        hint = "; call the factory" if callable(callbacks) else ""
        raise TypeError(f"callbacks must be a sequence of callbacks, got {callbacks!r}{hint}")
    callbacks = tuple(callbacks)
    names: set[str] = set()
    for position, callback in enumerate(callbacks):
        if not isinstance(callback, Callback):
            hint = "; call the factory" if callable(callback) else ""
            raise TypeError(f"callbacks[{position}] is not an ant_jax.Callback but {callback!r}{hint}")
        _check(callback)
        if callback.name in names:
            raise ValueError(
                f"two callbacks are named {callback.name!r}; a name keys the callback's memory in the checkpoint, so "
                f"give one of them another: name=..."
            )
        names.add(callback.name)
    return callbacks


def _check(callback: Callback) -> None:
    if not isinstance(callback.name, str) or not callback.name:
        raise TypeError(f"a callback's name must be a non-empty string, got {callback.name!r}")
    for hook, function in hooks_of(callback).items():
        if not callable(function):
            raise TypeError(f"callback {callback.name!r}: {hook} must be a function, got {function!r}")
        _check_parameters(callback, hook, function)
    every = callback.every
    if every is not None and not _is_interval(every):
        raise ValueError(
            f"callback {callback.name!r}: every must be a whole number of batches, a range of them (of step 1) or "
            f"None, got {every!r}"
        )
    if callback.traced and every != 1:
        raise ValueError(
            f"callback {callback.name!r} is traced, so it runs in every step; every={every!r} is for host ones"
        )
    if callback.observer:
        _check_observer(callback)


def _check_observer(callback: Callback) -> None:
    if callback.traced:
        raise ValueError(
            f"callback {callback.name!r} is an observer and traced; an observer looks on the host, after the steps, so "
            f"leave out traced=True, or observer=True if it is to change the run"
        )
    for hook in STEP_HOOKS:
        if hook in hooks_of(callback):
            raise ValueError(
                f"callback {callback.name!r} is an observer, and {hook} runs inside the step; publish what it computes "
                f"as a log, in a callback of its own, or set observer=False"
            )
    if getattr(callback.init, "__func__", None) is not Callback.init:
        raise ValueError(
            f"callback {callback.name!r} is an observer, and its hooks could not replace the memory that init makes; "
            f"let on_train_begin open what it needs for a run, or set observer=False"
        )


def _is_interval(every: Any) -> bool:
    if isinstance(every, range):
        return every.step == 1 and 0 <= every.start < every.stop
    return isinstance(every, int | np.integer) and not isinstance(every, bool) and bool(every >= 1)


def _check_parameters(callback: Callback, hook: str, function: HookFn) -> None:
    lead = HOOKS[hook].lead
    arguments = (*([lead] if lead else []), "trainer", *HOOKS[hook].values)
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function that does not tell
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        raise TypeError(
            f"callback {callback.name!r}: {hook} is called with ({', '.join(arguments)}), and cannot be: it takes "
            f"{signature}"
        ) from None


def _misspelt(owner: str, name: str, known: tuple[str, ...]) -> TypeError:
    snake_case = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    near = difflib.get_close_matches(snake_case, known, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"the hooks are {', '.join(HOOKS)}"
    return TypeError(f"{owner} has no hook or argument named {name!r}; {remedy}")
