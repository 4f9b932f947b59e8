"""Compare two states to the bit."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax._state.encoding import encode
from ant_jax._state.host_fields import PLAIN_FIELDS
from ant_jax._state.train_state import DATA_FIELDS, TrainState
from ant_jax._trees import named_leaves


class CallbackFault(AssertionError):
    """A callback breaks a promise; the message names the callback, the hook where it can, the fault and the remedy."""


def host_memories(state: TrainState) -> dict[str, Any]:
    """The memories that are not arrays alone."""

    def on_host(memory: Any) -> bool:
        return not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(memory))

    return {name: memory for name, memory in state.callback_states.items() if on_host(memory)}


def difference(expected: TrainState, got: TrainState) -> str:
    """Name the first thing in which two states differ; empty when they do not."""
    one, other = describe_state(expected), describe_state(got)
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            return f"{name} differs"
    return "" if expected.history == got.history else f"the history differs:\n{expected.history}\nand\n{got.history}"


def describe_state(state: TrainState) -> dict[str, Any]:
    """Everything in a state but its history, by name, as values that can be compared."""
    host = state.on_host()
    tree = {field: getattr(state, field) for field in DATA_FIELDS} | {"host": {"log_sums": host.log_sums}}
    device = {name: m for name, m in state.callback_states.items() if name not in host_memories(state)}
    arrays = {f"state.{path}": bytes_of(leaf) for path, leaf in named_leaves(tree).items()}
    arrays |= {f"state.callback_states/{path}": bytes_of(leaf) for path, leaf in named_leaves(device).items()}
    arrays |= {f"state.callback_states/{n}": as_text(m, n) for n, m in host_memories(state).items()}
    # How many steps a launch had is a fact of the process; the hyper-parameters that the run began with are its code's.
    names = {*PLAIN_FIELDS, "published"} - {"fused", "hyperparams"}
    plain = {name: repr(getattr(host, name)) for name in names}
    return arrays | {f"state.host/{name}": text for name, text in plain.items()} | {"state.stop": bool(state.stop)}


def bytes_of(leaf: Any) -> Any:
    """An array's dtype, shape and bits."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return array.dtype.name, array.shape, array.tobytes()


def as_text(memory: Any, name: str) -> str:
    """The host memory of the callback ``name`` as it would be saved."""
    try:
        return json.dumps(encode(memory, f"the memory of callback {name!r}"))
    except TypeError as error:
        raise CallbackFault(f"callback {name!r}: its memory does not survive saving: {error}") from error
