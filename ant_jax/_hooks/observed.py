"""What a hook of an observer is given, and what it may return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Never

from ant_jax._hooks.callback import HOOKS, Callback, HookFn, place_of
from ant_jax._hooks.returns import CallbackReturnError
from ant_jax._logs.logs import Logs
from ant_jax._logs.windows import Window
from ant_jax._state.history import History
from ant_jax._state.train_state import CYCLE, TrainState
from ant_jax._trees import describe


class ObserverError(AttributeError):
    """An observer read something of the state that only other callbacks can; the message names the remedy."""


class Facts(NamedTuple):
    """What the host knows about a run at one place, as plain Python.

    Attributes:
        epoch: and the others, as attributes of ``TrainState``.
        each: examples in the batch before this place, and in those of its launch.
    """

    epoch: int
    batch_idx: int
    examples: int
    batch_size: int | None
    history: History
    total_steps: int
    stop: bool
    each: int = 0


class ObservedState:
    """What an observer sees of the state: plain Python that the host knows without the device.

    It holds no array, because the batch hooks of an observer run when later batches may have overwritten the arrays.

    Args:
        facts: at this place of the run, or some batches later in the same launch.
        ago: how many batches later that is.

    >>> state = ObservedState(Facts(0, 5, 160, None, History(), 5, False, each=32), ago=2)
    >>> state.batch_idx, state.examples, state.step
    (3, 96, 3)
    >>> state.params
    Traceback (most recent call last):
    ...
    ant_jax._hooks.observed.ObserverError: an observer cannot read state.params, because later batches may have \
overwritten the arrays when its hooks run; set observer=False, or publish what it needs as a log, from a traced hook
    """

    __slots__ = ("_ago", "_facts")

    def __init__(self, facts: Facts, ago: int = 0):
        self._facts, self._ago = facts, ago

    @property
    def step(self) -> int:
        """Batches trained on since ``init``; after 2**31 batches it begins anew at 0."""
        return self.total_steps % CYCLE

    @property
    def total_steps(self) -> int:
        """Batches trained on since ``init``, however many."""
        return self._facts.total_steps - self._ago

    @property
    def epoch(self) -> int:
        """The epoch under way, or the next one; counted from 0."""
        return self._facts.epoch

    @property
    def batch_idx(self) -> int:
        """Batches of this epoch that are done."""
        return self._facts.batch_idx - self._ago

    @property
    def examples(self) -> int:
        """Examples in the batches of this epoch that are done."""
        return self._facts.examples - self._ago * self._facts.each

    @property
    def batch_size(self) -> int | None:
        """Examples in a batch, where a callback has asked for a size; ``None``: as the loader has it."""
        return self._facts.batch_size

    @property
    def history(self) -> History:
        """The logs of the epochs that are done."""
        return self._facts.history

    @property
    def stop(self) -> bool:
        """Whether a callback has asked the run to end; batch hooks may see it some batches early."""
        return self._facts.stop

    def __getattr__(self, name: str) -> Never:
        if name.startswith("_") or not (hasattr(TrainState, name) or name in TrainState.__dataclass_fields__):
            raise AttributeError(f"the state has no attribute {name!r}")
        field = getattr(TrainState, name, None)
        if callable(field):
            raise ObserverError(
                f"an observer cannot call state.{name}, because it only looks; set observer=False if the callback is "
                f"to change the run or to read its arrays"
            )
        raise ObserverError(
            f"an observer cannot read state.{name}, because later batches may have overwritten the arrays when its "
            f"hooks run; set observer=False, or publish what it needs as a log, from a traced hook"
        )

    def __repr__(self) -> str:
        return f"ObservedState(epoch={self.epoch}, batch_idx={self.batch_idx}, total_steps={self.total_steps})"


def observed(state: TrainState) -> ObservedState:
    """Return what an observer sees of a state; waits for the device, to read the step."""
    return ObservedState(facts_of(state, state.total_steps))


def facts_of(state: TrainState, total_steps: int) -> Facts:
    """Return what the host knows about a state that has trained on so many batches."""
    place = state.epoch, state.batch_idx, state.examples, state.batch_size
    return Facts(*place, state.history, total_steps, bool(state.stop))


def call_observer(
    callback: Callback, name: str, function: HookFn, lead: Any, trainer: Any, state: ObservedState, logs: Logs
) -> None:
    """Call one hook of an observer, refuse what it must not return, and add the blame to what it raises."""
    try:
        if HOOKS[name].lead is None:
            result = function(trainer, state, logs)
        else:
            result = function(lead, trainer, state, logs)
        if result is not None:
            refuse_changes(callback, name, (state, logs), result)
    except Exception as error:
        error.add_note(place_of(callback, name, lead, state.epoch))
        raise


def refuse_changes(callback: Callback, name: str, given: tuple[Any, ...], result: Any) -> None:
    """Raise CallbackReturnError unless a hook of an observer returned nothing, or what it was given.

    Args:
        callback: the observer.
        name: the hook.
        given: the state and the logs.
        result: what the hook returned.
    """
    if result is None:
        return
    if not isinstance(result, tuple) or len(result) != len(given):
        got = describe(result)
    elif result[0] is not given[0]:
        got = "another state"
    elif result[1] is not given[1]:
        got = "other logs"
    else:
        return
    raise CallbackReturnError(
        f"{name} of observer {callback.name!r} returned {got}; an observer only looks, so its hooks return nothing. If "
        f"the callback is to change the run or to publish logs, set observer=False"
    )


class ObservedLogs(Logs):
    """The logs of one batch on the host, as numbers and arrays of numpy.

    Those of all batches of a launch are read together, when the first of them is asked for.

    Args:
        rows: of the launch.
        row: which of its batches.
        window: returns the window that ends with the batch; ``None``: it is the batch alone.
        published: by other callbacks at this batch.
    """

    __slots__ = ("_published", "_row", "_rows")

    # Only a step has these; they hide the slots of the base, which every batch would have to fill.
    present: Any = {}
    vectors: Any = {}

    def __init__(
        self,
        rows: Rows,
        row: int,
        window: Callable[[], Window] | None = None,
        published: dict[str, Any] | None = None,
    ):
        self._rows, self._row, self._window, self._published = rows, row, window, published

    @property
    def is_ready(self) -> bool:
        """Whether reading the logs does not wait for the device."""
        return self._rows.is_ready

    @property
    def window(self) -> Window:
        """Every batch's values since this observer last looked."""
        return self._rows.between(self._row, self._row + 1) if self._window is None else self._window()

    @property
    def _values(self) -> Any:
        values = {name: column[self._row] for name, column in self._rows.columns.items()}
        return values if self._published is None else values | self._published

    def __getitem__(self, name: str) -> Any:
        column = None if self._published else self._rows.columns.get(name)
        return super().__getitem__(name) if column is None else column[self._row]


class Rows:
    """The logs of all batches of a launch, read from the device in one go when the first is asked for.

    Args:
        launch: an :class:`ant_jax._engine.launch.Launch`.
    """

    __slots__ = ("_columns", "_launch", "_window")

    def __init__(self, launch: Any):
        self._launch = launch  # None when it has been read, so that the device can free its logs
        self._window = Window({}, {})
        self._columns: dict[str, Any] = {}

    @property
    def is_ready(self) -> bool:
        """Whether reading does not wait for the device."""
        launch = self._launch
        return launch is None or launch.rows.scalars.is_ready()

    @property
    def columns(self) -> dict[str, Any]:
        """Every log by its name, as a sequence of its values."""
        if self._launch is not None:
            self._read()
        return self._columns

    def between(self, start: int, stop: int) -> Window:
        """Return the batches from ``start`` to ``stop`` as a window."""
        if self._launch is not None:
            self._read()
        return self._window.between(start, stop)

    def _read(self) -> None:
        launch = self._launch  # only once, because a callback may read in a thread
        if launch is not None:
            self._window = window = launch.read()
            self._columns = {**window, "batch_size": [launch.examples] * launch.steps}
            self._launch = None
