"""The trainer's own copy of the state, which the compiled step overwrites in place."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp

from ant_jax._state import HostFields, TrainState, strong


def _reference_counts(objects: list[Any]) -> list[int]:
    return [sys.getrefcount(item) for item in objects]


# What `_reference_counts` says of an object that nothing but the list refers to.
_SOLE_OWNER = _reference_counts([object()])[0]


@jax.jit
def _copies(leaves: list[Any]) -> list[Any]:
    return [jnp.copy(leaf) for leaf in leaves]


class Live:
    """The state of a run that is under way: its device part, which launches overwrite, and its host part.

    The host sees it as a ``TrainState`` and may keep that, or any part of it, for as long as it likes: an array that
    somebody else still refers to when a launch is about to overwrite it is copied first. Reference counts tell, as they
    tell numpy whether an array may be resized in place. So nobody ever meets a deleted array, whether it is the caller
    of ``fit`` or a callback that keeps the best parameters, and a run whose callbacks keep nothing copies nothing.

    Args:
        state: to begin with; the caller's own, which stays readable.
        device_names: the callbacks whose memory is on the device.

    Attributes:
        host: the host fields.
        stop: whether a callback has asked the run to end.
        key_data: the random key as plain numbers. Compiled code leaves the key as it is, so it need not return it; and
            JAX hands plain arrays to compiled code several microseconds faster than arrays of keys.
    """

    def __init__(self, state: TrainState, device_names: frozenset[str]):
        self._device_names = device_names
        self.put(state)

    def put(self, state: TrainState) -> None:
        """Make ``state`` the one that goes on."""
        memories = state.callback_states
        self._host_memories = {name: memory for name, memory in memories.items() if name not in self._device_names}
        on_device = {name: memory for name, memory in memories.items() if name in self._device_names}
        self.host: HostFields = state.on_host()
        self.stop = bool(state.stop)
        self._key = state.key
        self.key_data = jax.random.key_data(state.key)
        part = state.replace(callback_states=on_device, key=None, stop=None, host=None)
        leaves, self._structure = jax.tree.flatten(part)
        self._leaves = [strong(leaf) for leaf in leaves]

    def get(self) -> TrainState:
        """Return the whole state."""
        part: TrainState = jax.tree.unflatten(self._structure, self._leaves)
        return TrainState(
            step=part.step,
            params=part.params,
            model_state=part.model_state,
            opt_state=part.opt_state,
            key=self._key,
            accumulator=part.accumulator,
            loss_scale=part.loss_scale,
            log_sums=part.log_sums,
            callback_states={**part.callback_states, **self._host_memories},
            stop=self.stop,
            host=self.host,
        )

    def on_device(self) -> TrainState:
        """Return the state as the compiled step is given it."""
        return jax.tree.unflatten(self._structure, self._leaves).replace(key=self._key)

    def update(self, **fields: Any) -> None:
        """Replace fields of the device part."""
        part = self.on_device().replace(**fields)
        self._leaves, self._structure = jax.tree.flatten(part.replace(key=None))

    def move(self, **fields: Any) -> None:
        """Replace host fields."""
        self.host = dataclasses.replace(self.host, **fields)

    def advance(self, batches: int) -> None:
        """Count batches that are done."""
        host = self.host
        self.host = HostFields(host.epoch, host.batch_idx + batches, host.history, host.published)

    def take(self) -> list[Any]:
        """Hand over the leaves of the device part, without the key, to be overwritten; ``give`` must follow."""
        leaves = self._leaves
        shared = [i for i, count in enumerate(_reference_counts(leaves)) if count != _SOLE_OWNER]
        if shared:
            for i, copied in zip(shared, _copies([leaves[i] for i in shared]), strict=True):
                leaves[i] = copied
        return leaves

    def give(self, leaves: list[Any]) -> None:
        """Take the leaves that a launch made of those that it was handed."""
        self._leaves = leaves
