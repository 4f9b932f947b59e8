"""What only the host knows of a run, and how it travels with a state through functions of JAX.

A pytree's static part decides its structure, so a static epoch or history would make ``jax.jit`` trace a function of
the state anew at every look. A :class:`Carried` is static and equal to every other, so it decides nothing. The price:
what ``jax.jit`` returns carries the host fields of the call that was traced. Therefore a state also has a leaf that
names its host fields, :attr:`Carried.leaf`. :func:`find_carried` compares the two, and where they differ looks the name
up among those that were given lately, or that a living state has.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ant_jax._logs.sums import LogSums
from ant_jax._logs.windows import Window
from ant_jax._state.encoding import encode
from ant_jax._state.history import History


# Where `TrainState.step` begins anew: it stays an int32, and JAX has no wider integers by default.
CYCLE = 2**31
# How many host fields are kept for the states that `jax.jit` returns without them.
RECENT = 32


class StateMismatch(ValueError):
    """A state does not belong to the trainer that it was given to; the message says how it differs."""


@dataclasses.dataclass(frozen=True)
class OpenHookWindow:
    """A look of a host callback that has begun and not ended.

    Attributes:
        published: by its ``on_batch_begin``.
        read: returns the logs of the batches that have passed in it; waits for the device.
    """

    published: Mapping[str, Any]
    read: Callable[[], Window]


_NOTHING: Mapping[str, Any] = {}  # shared, because it is never changed


class HostFields(NamedTuple):
    """What the host knows about a run. Plain Python: it never enters the compiled step.

    A named tuple, because every launch makes one, and a dataclass takes longer to make.

    Attributes:
        epoch: the epoch under way, or the next one; counted from 0.
        batch_idx: batches of this epoch that are done.
        examples: examples in them: the position in the epoch's data.
        batch_size: examples in a batch, as a callback has asked; ``None``: as the loader has it.
        batch_sizes: those asked for that are still to come, each with the batch of the epoch from which it holds.
        history: the logs of the epochs that are done.
        log_sums: the sums of the logs of the epoch under way, until it has ended; ``None`` between epochs.
        published: sum, as :func:`ant_jax._logs.sums.plus` makes it, and weight of every value that host hooks have
            published in this epoch.
        opened: what ``on_epoch_begin`` of this epoch has published.
        data: what the training loader of this epoch says of its data; see :func:`ant_jax._data.loaders.description_of`.
        fused: the backend, and whether many steps ran in one launch there; ``None`` before the first.
        hyperparams: those that can be changed while training, as the code had them when the run began.
        windows: the looks of host callbacks that are open here, by the callback's name; ``None`` where none was asked.
        loader: where a loader with ``get_state`` was, and how many batches have been read since.
        device_names: the callbacks whose memory is on the device; the others' travels with the host fields.
    """

    epoch: int = 0
    batch_idx: int = 0
    examples: int = 0
    batch_size: int | None = None
    batch_sizes: tuple[tuple[int, int], ...] = ()
    history: History = History()
    log_sums: LogSums | None = None
    published: Mapping[str, tuple[Any, int]] = _NOTHING
    opened: Mapping[str, Any] = _NOTHING
    data: Mapping[str, Any] | None = None
    fused: tuple[str, bool] | None = None
    hyperparams: Mapping[str, Any] = _NOTHING
    windows: Mapping[str, OpenHookWindow] | None = None
    loader: tuple[Any, int] | None = None
    device_names: frozenset[str] = frozenset()

    def asking(self, batch_sizes: tuple[tuple[int, int], ...]) -> HostFields:
        """The same but for the batch sizes that are to come, which are all that a hook may change."""
        return self._replace(batch_sizes=batch_sizes)

    def differs_only_in_requests(self, other: HostFields) -> bool:
        """Whether other host fields are these but for the batch sizes that are asked for."""
        return all(
            mine is theirs or (name in PLAIN_FIELDS and mine == theirs)
            for name, mine, theirs in zip(self._fields, self, other, strict=True)
            if name != "batch_sizes"
        )


# The fields that are plain Python, and are saved as they are.
PLAIN_FIELDS = ("epoch", "batch_idx", "examples", "batch_size", "batch_sizes", "opened", "data", "fused", "hyperparams")


class Carried:
    """The static part of a state as a pytree: host fields and the memories of host callbacks.

    Equal to every other, so that it does not decide the structure of the pytree.

    Args:
        host: the host fields.
        memories: of host callbacks, by name.
    """

    def __init__(self, host: HostFields | None, memories: Mapping[str, Any] = _NOTHING):
        self.host, self.memories = host, memories

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Carried)

    def __hash__(self) -> int:
        return 0

    @functools.cached_property
    def leaf(self) -> np.ndarray | None:
        """Name the host fields in an array, int32 [4]: epoch, batch index and 64 bits; ``None`` without host fields.

        Between epochs equal states have equal bits, a digest of the history and of host callbacks' memories, which
        waits for the device. Inside an epoch the sums of its logs are still being computed, so the bits are random
        ones; so they are where a memory cannot be encoded.
        """
        if self.host is None:
            return None
        bits = np.frombuffer(self._digest() or os.urandom(8), np.int32)
        leaf = np.array([self.host.epoch, self.host.batch_idx % CYCLE, *bits], np.int32)
        leaf.flags.writeable = False
        return leaf

    def remember(self) -> None:
        """Remember the host fields by their name, because the result of a function of JAX may need them."""
        if self.leaf is None:
            return
        name = self.leaf.tobytes()
        with _lock:
            _alive[name] = _recent[name] = self
            _recent.move_to_end(name)
            if len(_recent) > RECENT:
                _recent.popitem(last=False)

    def _digest(self) -> bytes | None:
        host = self.host
        if host is None or host.log_sums is not None or host.published or host.windows:
            return None
        values = {name: getattr(host, name) for name in PLAIN_FIELDS}
        values |= {"history": host.history.digest(), "loader": host.loader, "memories": dict(self.memories)}
        values["device_names"] = sorted(host.device_names)
        plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
        try:
            text = json.dumps(encode(plain, "the host fields"))
        except TypeError:  # a memory that cannot be saved
            return None
        return hashlib.blake2b(text.encode(), digest_size=8).digest()


_recent: collections.OrderedDict[bytes, Carried] = collections.OrderedDict()
_alive: weakref.WeakValueDictionary[bytes, Carried] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def find_carried(leaf: Any, carried: Carried) -> Carried:
    """Return what the host knows of the state that has this leaf; waits for the device where it has computed the leaf.

    Args:
        leaf: a concrete array.
        carried: what came with it, which may be stale.

    Raises:
        StateMismatch: the leaf names no host fields that are known.
    """
    numbers = np.asarray(leaf)
    if numbers.shape == (4,) and numbers.dtype == np.int32:
        name = numbers.tobytes()
        with _lock:
            known = _recent.get(name) or _alive.get(name)
        if known is not None:
            return known
        if carried.leaf is not None and carried.leaf.tobytes() == name:
            return carried
    if numbers.ndim > 1:
        raise StateMismatch(
            f"the state is a stack of {numbers.shape[0]} states, which have no epoch and no history in common; take "
            f"one out of it, jax.tree.map(lambda leaf: leaf[0], states)"
        )
    raise StateMismatch(
        f"the state has lost its epoch, position and history: its leaf 'host' is {numbers.tolist()}, which names none "
        f"that are known here. A function has computed with that leaf, or it was read from a file without "
        f"trainer.restore, or jax.jit has returned the state, the one that went in is gone, and more than {RECENT} "
        f"others have been given to functions of JAX since. Put what you changed into the state from before: "
        f"before.replace(params=changed.params)"
    )
