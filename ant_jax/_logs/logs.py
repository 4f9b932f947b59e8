"""The read-only mapping of logs that every hook is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ant_jax._logs.packing import Unpacked
from ant_jax._logs.windows import Window


class UnknownLog(KeyError):
    """A log was asked for that is not there; the message lists what there is."""

    def __str__(self) -> str:  # KeyError shows the repr of its message, quotes and all
        return self.args[0]


class Logs(Mapping[str, Any]):
    """A read-only mapping from names to logged values.

    To publish a value, a hook returns a new mapping: ``return state, {**logs, "lr": lr}``. Values computed by the
    compiled step stay device arrays until they are read.

    Attributes:
        window: every batch's values since this callback last looked, as arrays whose first axis is the batch
            (``logs.window["loss"][-1]`` is this batch's loss), how many examples each value stands for
            (``logs.window.weights["loss"]``), and their mean as in the history (``logs.window.mean("loss")``); see
            :class:`ant_jax._logs.windows.Window`. Empty in hooks that are not batch hooks. Reading it waits for the
            device.
        present: inside the step, for logs that not every batch has, whether this one has it: boolean scalars. What is
            not present counts in no mean.
        vectors: inside the step, those whose entries are logs, by the names of all entries in their order. So the many
            logs of one computation stay one array for the compiler, whatever it costs to compile them one by one.

    >>> logs = Logs({"loss": 0.5})
    >>> logs["loss"], dict(logs)
    (0.5, {'loss': 0.5})
    >>> logs["los"]
    Traceback (most recent call last):
    ...
    ant_jax._logs.logs.UnknownLog: there is no log named 'los'; the logs here are: loss
    >>> logs["lr"] = 0.1
    Traceback (most recent call last):
    ...
    TypeError: logs are read-only; to publish 'lr', return {**logs, 'lr': value}
    """

    __slots__ = ("_values", "_window", "present", "vectors")

    def __init__(
        self,
        values: Mapping[str, Any],
        window: Callable[[], Window] | None = None,
        present: Mapping[str, Any] | None = None,
        vectors: Mapping[tuple[str, ...], Any] | None = None,
    ):
        # What the trainer gives is read when a log is asked for; a hook's own mapping may change after it has returned.
        self._values = values if isinstance(values, Unpacked | Logs) else dict(values)
        self._window = window
        self.present = present or {}
        self.vectors = vectors or {}

    def changed_to(self, values: Mapping[str, Any]) -> Logs:
        """Return these logs with other values: what a hook returned, and what the logs know beside the values."""
        # What a hook publishes is present, also where another hook has left a log of that name out.
        present = {name: there for name, there in self.present.items() if values.get(name) is self._values[name]}
        vectors = {
            names: vector
            for names, vector in self.vectors.items()
            if all(values.get(name) is self._values[name] for name in names)
        }
        if isinstance(values, Logs):
            present |= values.present
            vectors |= values.vectors
        return Logs(values, self._window, present, vectors)

    @property
    def window(self) -> Window:
        """Every batch's values since this callback last looked; see the class."""
        return Window({}, {}) if self._window is None else self._window()

    def __getitem__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            there = ", ".join(map(str, self._values)) or "none"
            raise UnknownLog(f"there is no log named {name!r}; the logs here are: {there}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError(f"logs are read-only; to publish {name!r}, return {{**logs, {name!r}: value}}")

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"logs are read-only; {name!r} cannot be removed")

    def __repr__(self) -> str:
        return f"Logs({self._values!r})"


def join_logs(*parts: Mapping[str, Any]) -> Unpacked:
    """Join logs without reading them; of values of one name the last is taken.

    >>> dict(join_logs({"loss": 0.5, "lr": 1}, Logs({"loss": 0.25})))
    {'loss': 0.25, 'lr': 1}
    """
    values: dict[str, Any] = {}
    for part in parts:
        while isinstance(part, Logs):
            part = part._values
        values |= part.unread() if isinstance(part, Unpacked) else part
    return Unpacked(values)
