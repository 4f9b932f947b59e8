"""What a run has logged: one mapping an epoch."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import jax
import numpy as np

from ant_jax._logs.logs import join_logs
from ant_jax._logs.packing import Unpacked
from ant_jax._state.encoding import encode


def to_python(value: Any) -> Any:
    """Turn a logged value into a Python number, or into a numpy array when it is not a scalar.

    Reading a device array waits for it.

    >>> to_python(np.float32(0.5))
    0.5
    """
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        array = np.asarray(value)
        return array.item() if array.ndim == 0 else array
    return value


class _Row:
    """The logs of one epoch, turned into Python numbers when they are first read."""

    def __init__(self, values: Mapping[str, Any]):
        joined = join_logs(values)
        # Arrays of numpy are copied, because a hook may use one again for the next epoch.
        own = {name: np.array(value) for name, value in joined.unread().items() if isinstance(value, np.ndarray)}
        self._values: Mapping[str, Any] = join_logs(joined, own) if own else joined

    def values(self) -> dict[str, Any]:
        if isinstance(self._values, Unpacked):
            self._values = {name: to_python(value) for name, value in self._values.on_host().items()}
        return dict(self._values)

    @functools.cached_property
    def digest(self) -> bytes:
        """A digest of names and values, to the bit; waits for the device."""
        text = json.dumps(encode(self.values(), "the history"))
        return hashlib.blake2b(text.encode(), digest_size=16).digest()


class History(Sequence[dict[str, Any]]):
    """The logs of every epoch, in order: ``history[3]["val_loss"]``.

    Immutable: a longer history is a new value. Numbers stay on the device until they are read, so keeping a history
    never makes the training loop wait.

    >>> history = History().appended({"train_loss": 0.5}).appended({"train_loss": 0.25, "val_loss": 0.75})
    >>> history[-1]
    {'train_loss': 0.25, 'val_loss': 0.75}
    >>> history.to_dict()
    {'train_loss': [0.5, 0.25], 'val_loss': [nan, 0.75]}
    >>> history
    epoch  train_loss  val_loss
        0         0.5         -
        1        0.25      0.75
    """

    __slots__ = ("_rows",)

    def __init__(self, epochs: Sequence[Mapping[str, Any]] = ()):
        self._rows = tuple(_Row(values) for values in epochs)

    def appended(self, logs: Mapping[str, Any]) -> History:
        """Return this history with the logs of one more epoch."""
        longer = History()
        longer._rows = (*self._rows, _Row(logs))
        return longer

    def digest(self) -> bytes:
        """Return a digest of all epochs, equal for equal histories; waits for the device.

        >>> History([{"loss": 0.5}]).digest() == History().appended({"loss": 0.5}).digest()
        True
        """
        return hashlib.blake2b(b"".join(row.digest for row in self._rows), digest_size=16).digest()

    def to_dict(self) -> dict[str, list[Any]]:
        """Return ``{name: [value of epoch 0, value of epoch 1, ...]}``, NaN where an epoch lacks the name."""
        epochs = list(self)
        return {name: [logs.get(name, float("nan")) for logs in epochs] for name in self._names()}

    def plot(self, *names: str, ax: Any = None) -> Any:
        """Draw scalar logs over the epochs, with matplotlib (the extra ``plot``).

        Args:
            names: what to draw; without any, every scalar in the history.
            ax: a matplotlib ``Axes`` to draw on; without one, a new figure's.

        Returns:
            The ``Axes``.

        Raises:
            KeyError: a name is not in the history.
        """
        columns = {name: values for name, values in self.to_dict().items() if all(np.ndim(v) == 0 for v in values)}
        unknown = [name for name in names if name not in columns]
        if unknown:
            raise KeyError(
                f"history.plot: no scalar named {unknown[0]!r}; there are {', '.join(columns) or 'none yet'}"
            )
        if ax is None:
            from matplotlib import pyplot

            _, ax = pyplot.subplots()
        for name in names or columns:
            label = name.replace("$", r"\$")  # or matplotlib would read a formula
            ax.plot(range(len(self)), columns[name], marker="." if len(self) < 30 else None, label=label)
        ax.set_xlabel("epoch")
        if columns:
            ax.legend()
        return ax

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for logs in self for name in logs))

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> History: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | History:
        if isinstance(index, slice):
            part = History()
            part._rows = self._rows[index]
            return part
        return self._rows[index].values()

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row.values() for row in self._rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, History):
            return NotImplemented
        if self._rows == other._rows:  # the very same rows: equal without reading them
            return True
        mine, theirs = list(self), list(other)
        return [list(m) for m in mine] == [list(t) for t in theirs] and all(
            np.array_equal(m[name], t[name], equal_nan=True) for m, t in zip(mine, theirs, strict=True) for name in m
        )

    def __hash__(self) -> int:
        return hash(len(self))

    def __repr__(self) -> str:
        names = self._names()
        rows = [["epoch", *names]]
        for epoch, logs in enumerate(self):
            rows.append([str(epoch), *(_cell(logs[name]) if name in logs else "-" for name in names)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _cell(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
