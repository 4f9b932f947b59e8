"""The trainer's own copy of the state, which the compiled step overwrites in place."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import jax
import numpy as np

from ant_jax._logs.sums import LogSums
from ant_jax._state.host_fields import CYCLE, HostFields
from ant_jax._state.leaves import key_of_cycle, strong
from ant_jax._state.train_state import TrainState


def _reference_counts(objects: list[Any]) -> list[int]:
    return [sys.getrefcount(item) for item in objects]


# Whether a reference count tells whether an object is referred to elsewhere: without a global lock it does not.
_COUNTS_TELL = getattr(sys, "_is_gil_enabled", lambda: True)()
# What `_reference_counts` says of an object that nothing but the list refers to.
_SOLE_OWNER = _reference_counts([object()])[0]


def _copied(leaf: jax.Array) -> jax.Array:
    return jax.device_put(leaf, may_alias=False)  # as jnp.copy does, but compiles nothing


class DeviceState(NamedTuple):
    """The part of a state that launches overwrite: fields of ``TrainState``."""

    step: Any
    params: Any
    model_state: Any
    opt_state: Any
    accumulator: Any
    loss_scale: Any
    log_sums: Any
    callback_states: Any

    def state(
        self, key: Any, stop: Any = None, host: HostFields | None = None, memories: Any = None, cycle: Any = None
    ) -> TrainState:
        """Complete it to a state; ``memories`` are those of host callbacks."""
        return TrainState(
            step=self.step,
            params=self.params,
            model_state=self.model_state,
            opt_state=self.opt_state,
            key=key,
            accumulator=self.accumulator,
            loss_scale=self.loss_scale,
            callback_states={**self.callback_states, **memories} if memories else self.callback_states,
            stop=stop,
            host=host,
            cycle=cycle,
        )

    def fields(self) -> dict[str, Any]:
        """Return what it holds of a state, by the names of fields."""
        return {field: getattr(self, field) for field in _PART_OF_STATE}


_PART_OF_STATE = tuple(field for field in DeviceState._fields if field != "log_sums")


def device_state(
    state: TrainState, device_names: frozenset[str] | None = None, log_sums: LogSums | None = None
) -> DeviceState:
    """Take the device part out of a state, with the memories of those callbacks, or with all that are in it."""
    part = DeviceState(**{field: getattr(state, field) for field in _PART_OF_STATE}, log_sums=log_sums)
    if device_names is None:
        return part
    memories = {name: memory for name, memory in state.callback_states.items() if name in device_names}
    return part._replace(callback_states=memories)


class Buffers:
    """The state of a run that is under way: its device part, which launches overwrite, and the rest.

    The host sees it as a ``TrainState`` and may keep that, or any part of it, for as long as it likes: an array that
    somebody else still refers to when a launch is about to overwrite it is copied first. Reference counts tell, as they
    tell numpy whether an array may be resized in place. So nobody meets a deleted array, whether it is the caller of
    ``fit`` or a callback that keeps the best parameters, and a run whose callbacks keep nothing copies nothing. (An
    alias that JAX makes without saying so, by ``jax.device_put`` to the same device or ``addressable_data``, is not
    seen: reading one later raises. Keep the array itself, or ``jnp.copy`` it.) What is still being written to a
    checkpoint is kept in this way, too.

    Args:
        state: to begin with; the caller's own, which stays readable.
        device_names: the callbacks whose memory is on the device.

    Attributes:
        host: the host fields.
        stop: whether a callback has asked the run to end.
        key: the random key.
        key_data: that of the cycle of steps as plain numbers. Compiled code leaves the key as it is, so it need not
            return it; and JAX hands plain arrays to compiled code faster than arrays of keys.
        total_steps: batches trained on since the state was made.
        lost: whether a launch is overwriting the state, so that there is none that anybody could read.
    """

    def __init__(self, state: TrainState, device_names: frozenset[str]):
        self._device_names = device_names
        self.lost = False
        self._leaves: list[Any] = []
        self.put(state)

    def put(self, state: TrainState) -> None:
        """Make ``state`` the one that goes on."""
        memories = state.callback_states
        # New containers, so that nothing that a hook does to them reaches the caller's state.
        self._host_memories = {
            name: jax.tree.map(lambda leaf: leaf, memory)
            for name, memory in memories.items()
            if name not in self._device_names
        }
        host = state.on_host()
        # The sums are among the arrays that launches overwrite: another reference to them would make a copy.
        self.host: HostFields = host._replace(log_sums=None, device_names=self._device_names)
        self.stop = bool(state.stop)
        # Reading the step waits for the device, so that is done only where a hook has replaced it.
        if not self._leaves or state.step is not self.part().step or state.cycle is not self.cycle:
            self.total_steps = state.total_steps
        self.key = state.key
        self._begin_cycle(state.cycle)
        part = device_state(state, self._device_names, host.log_sums)
        del host
        leaves, self._structure = jax.tree.flatten(part)
        self._leaves = [strong(leaf) for leaf in leaves]

    def get(self) -> TrainState:
        """Return the whole state."""
        part = self.part()
        host = self.host._replace(log_sums=part.log_sums)
        return part.state(self.key, np.bool_(self.stop), host, self._host_memories, self.cycle)

    def part(self) -> DeviceState:
        """Return the device part."""
        return jax.tree.unflatten(self._structure, self._leaves)

    def update(self, **fields: Any) -> None:
        """Replace fields of the device part."""
        self._leaves, self._structure = jax.tree.flatten(self.part()._replace(**fields))

    def move(self, **fields: Any) -> None:
        """Replace host fields."""
        self.host = self.host._replace(**fields)

    def advance(self, batches: int, examples: int) -> None:
        """Count batches that are done, with so many examples in each."""
        host = self.host
        self.move(batch_idx=host.batch_idx + batches, examples=host.examples + batches * examples)
        self.total_steps += batches
        if self.total_steps % CYCLE == 0:
            self._begin_cycle(jax.device_put(np.int32(self.total_steps // CYCLE)))

    @property
    def steps_left(self) -> int:
        """Batches until the step begins anew, which no launch goes beyond."""
        return CYCLE - self.total_steps % CYCLE

    def _begin_cycle(self, cycle: Any) -> None:
        self.cycle = cycle
        later = self.total_steps >= CYCLE
        self.key_data = jax.random.key_data(key_of_cycle(self.key, cycle) if later else self.key)

    def take(self) -> list[Any]:
        """Hand over the leaves of the device part to be overwritten; ``give`` must follow."""
        leaves = self._leaves
        self.lost = True
        for position, count in enumerate(_reference_counts(leaves)):
            if count != _SOLE_OWNER or not _COUNTS_TELL:
                leaves[position] = _copied(leaves[position])
        return leaves

    def give(self, leaves: list[Any]) -> None:
        """Take the leaves that a launch made of those that it was handed."""
        self._leaves = leaves
        self.lost = False
