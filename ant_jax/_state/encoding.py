"""What the host knows about a run, as JSON that gives back the same values, to the bit."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax._state.memories import Memories
from ant_jax._trees import describe


# Beyond this, readers of JSON other than Python's round, and Python's own refuses very long numbers.
_INT_LIMIT = 2**63


def encode(value: Any, where: str) -> Any:
    """Encode plain Python values, containers of them, and arrays.

    Args:
        value: what to encode.
        where: what to call it in an error.

    Raises:
        TypeError: it holds something else; the message says where.

    >>> decode(encode({"best": float("inf"), 3: (1, np.float32(0.5))}, "a memory"))
    {'best': inf, 3: (1, np.float32(0.5))}
    """
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        return value if abs(value) < _INT_LIMIT else {"int": hex(value)}
    if type(value) is float:  # JSON has no infinities and no NaN, which has bits of its own
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if type(value) is complex:
        return {"complex": [encode(value.real, where), encode(value.imag, where)]}
    if type(value) is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if type(value) is list:
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]}
    if type(value) in (dict, Memories):
        kind = "dict" if type(value) is dict else "memories"
        items = value.items()
        return {kind: [[encode(key, f"a key of {where}"), encode(item, f"{where}[{key!r}]")] for key, item in items]}
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return {"key": encode(np.asarray(jax.random.key_data(value)), where), "impl": str(jax.random.key_impl(value))}
    if isinstance(value, jax.Array | np.generic) or type(value) is np.ndarray:  # a subclass may hold more than numbers
        array = np.asarray(value)
        dtype = _name_of(array.dtype)
        if dtype is not None:
            data = base64.b64encode(array.tobytes()).decode()
            kind = "device" if isinstance(value, jax.Array) else "array" if type(value) is np.ndarray else "scalar"
            return {kind: data, "dtype": dtype, "shape": list(array.shape)}
    raise TypeError(
        f"{where} is {describe(value)}, which cannot be saved; what a host callback remembers must be None, bool, int, "
        f"float, complex, str, bytes, a list, tuple or dict of such, or an array"
    )


def decode(value: Any) -> Any:
    """Turn what ``encode`` returned back into the value."""
    if type(value) is list:
        return [decode(item) for item in value]
    if type(value) is not dict:
        return value
    match value:
        case {"int": digits}:
            return int(digits, 16)
        case {"bytes": data}:
            return base64.b64decode(data)
        case {"float": bits}:
            return struct.unpack(">d", bytes.fromhex(bits))[0]
        case {"complex": parts}:
            return complex(*map(decode, parts))
        case {"tuple": items}:
            return tuple(decode(item) for item in items)
        case {"dict": items}:
            return {decode(key): decode(item) for key, item in items}
        case {"memories": items}:
            return Memories({decode(key): decode(item) for key, item in items})
        case {"key": data, "impl": impl}:
            return jax.random.wrap_key_data(jnp.asarray(decode(data)), impl=impl)
    ((kind, data),) = [(kind, value[kind]) for kind in ("device", "array", "scalar") if kind in value]
    array = np.frombuffer(base64.b64decode(data), jnp.dtype(value["dtype"])).reshape(value["shape"])
    return jnp.asarray(array) if kind == "device" else array.copy() if kind == "array" else array[()]


def _name_of(dtype: np.dtype) -> str | None:
    """A name that gives back this very dtype; ``None`` when its bytes alone do not hold the values."""
    for name in () if dtype.hasobject else (dtype.name, dtype.str):
        try:
            if jnp.dtype(name) == dtype:  # not so for the name of big-endian numbers, which numpy gives no other
                return name
        except TypeError:  # the name of strings, for one, is none that numpy reads
            continue
    return None


def structure_of(tree: Any) -> Any:
    """Describe the containers of a tree, when they are Python's own; ``None`` when there are others.

    >>> rebuild(structure_of({"a": (1, [2])}), {("a", "0"): "x", ("a", "1", "0"): "y"})
    {'a': ('x', ['y'])}
    """
    if tree is None:
        return {"none": True}
    if type(tree) is dict:
        items = [[key, structure_of(tree[key])] for key in tree]
        described = all(type(key) in (str, int) and inner is not None for key, inner in items)
        return {"dict": items} if described else None
    if type(tree) in (list, tuple):
        items = [structure_of(item) for item in tree]
        return None if None in items else {type(tree).__name__: items}
    return "leaf" if jax.tree_util.treedef_is_leaf(jax.tree.structure(tree)) else None


def rebuild(structure: Any, leaves: Mapping[tuple[str, ...], Any], at: tuple[str, ...] = ()) -> Any:
    """Put leaves, by their paths, into the containers that were described."""
    match structure:
        case "leaf":
            return leaves[at]
        case {"dict": items}:
            return {key: rebuild(inner, leaves, (*at, str(key))) for key, inner in items}
        case {"list": items}:
            return [rebuild(inner, leaves, (*at, str(i))) for i, inner in enumerate(items)]
        case {"tuple": items}:
            return tuple(rebuild(inner, leaves, (*at, str(i))) for i, inner in enumerate(items))
        case _:
            return None
