"""What the host knows about a run, as JSON that gives back the same values, to the bit."""

from __future__ import annotations

import base64
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax._trees import describe


_PLAIN = (type(None), bool, int, float, str)


def encoded(value: Any, where: str) -> Any:
    """Encode plain Python values, containers of them, and arrays.

    Args:
        value: what to encode.
        where: what to call it in an error.

    Raises:
        TypeError: it holds something else; the message says where.

    >>> decoded(encoded({"best": float("inf"), 3: (1, np.float32(0.5))}, "a memory"))
    {'best': inf, 3: (1, array(0.5, dtype=float32))}
    """
    if type(value) in _PLAIN:
        return value
    if type(value) is list:
        return [encoded(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": [encoded(item, f"{where}[{i}]") for i, item in enumerate(value)]}
    if type(value) is dict:
        return {"dict": [[encoded(key, where), encoded(item, f"{where}[{key!r}]")] for key, item in value.items()]}
    if isinstance(value, jax.Array | np.ndarray | np.generic) and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        array = np.asarray(value)
        data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
        kind = "device" if isinstance(value, jax.Array) else "array"
        return {kind: data, "dtype": array.dtype.name, "shape": list(array.shape)}
    raise TypeError(
        f"{where} is {describe(value)}, which cannot be saved; what a host callback remembers must be None, bool, int, "
        f"float, str, a list, tuple or dict of such, or an array"
    )


def decoded(value: Any) -> Any:
    """Turn what ``encoded`` returned back into the value."""
    if type(value) is list:
        return [decoded(item) for item in value]
    if type(value) is not dict:
        return value
    if "tuple" in value:
        return tuple(decoded(item) for item in value["tuple"])
    if "dict" in value:
        return {decoded(key): decoded(item) for key, item in value["dict"]}
    data = value["device"] if "device" in value else value["array"]
    array = np.frombuffer(base64.b64decode(data), jnp.dtype(value["dtype"])).reshape(value["shape"])
    return jnp.asarray(array) if "device" in value else array.copy()


def structure_of(tree: Any) -> Any:
    """Describe the containers of a tree, when they are Python's own; ``None`` when there are others.

    >>> rebuilt(structure_of({"a": (1, [2])}), iter("xy"))
    {'a': ('x', ['y'])}
    """
    if type(tree) is dict:
        parts = {key: structure_of(tree[key]) for key in sorted(tree)} if all(type(k) is str for k in tree) else None
        return None if parts is None or None in parts.values() else {"dict": parts}
    if type(tree) in (list, tuple):
        items = [structure_of(item) for item in tree]
        return None if None in items else {type(tree).__name__: items}
    if tree is None:
        return {"none": True}
    return "leaf" if jax.tree_util.treedef_is_leaf(jax.tree.structure(tree)) else None


def rebuilt(structure: Any, leaves: Any) -> Any:
    """Put leaves, an iterator in the order of ``jax.tree.leaves``, into the containers that were described."""
    if structure == "leaf":
        return next(leaves)
    ((kind, parts),) = structure.items()
    if kind == "dict":
        return {key: rebuilt(parts[key], leaves) for key in sorted(parts)}
    return None if kind == "none" else {"list": list, "tuple": tuple}[kind](rebuilt(part, leaves) for part in parts)
