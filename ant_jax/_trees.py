"""Compare two pytrees and say in words how they differ."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import numpy as np


# Any pytree. Types of leaves are in the docstrings, because no type tells which nodes a pytree may have.
PyTree: TypeAlias = Any


def describe(leaf: Any) -> str:
    """Name a leaf by dtype and shape, as in ``float32[3,4]``; anything that is not an array by its type.

    >>> describe(np.zeros((3, 4), np.float32))
    'float32[3,4]'
    >>> describe("text")
    'str'
    """
    if isinstance(leaf, bool | int | float | complex):
        return f"Python {type(leaf).__name__}"
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return type(leaf).__name__


def describe_tree(tree: PyTree) -> str:
    """Name every leaf of ``tree`` on one line, at most eight of them.

    >>> describe_tree({"w": np.zeros(2, np.float32), "b": np.int32(0)})
    'b: int32[], w: float32[2]'
    """
    named = named_leaves(tree)
    parts = [f"{path}: {describe(leaf)}" if path else describe(leaf) for path, leaf in list(named.items())[:8]]
    return ", ".join(parts) + (f", and {len(named) - 8} more" if len(named) > 8 else "")


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Map the path of every leaf, its keys joined by ``/``, to the leaf.

    >>> list(named_leaves({"dense": {"kernel": 1.0, "bias": 2.0}}))
    ['dense/bias', 'dense/kernel']
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def differences(expected: PyTree, actual: PyTree, *, dtypes: bool = True) -> list[str]:
    """List how ``actual`` differs from ``expected`` in structure, shape and dtype; empty when it does not.

    Args:
        expected: the tree as it should be; its leaves are arrays or anything else with ``shape`` and ``dtype``.
        actual: the tree to judge.
        dtypes: whether dtypes count, or shapes alone.

    Returns:
        One line a difference, each beginning with the path of the leaf.

    >>> differences({"w": np.zeros(2)}, {"w": np.zeros(3), "b": np.zeros(1)})
    ['b: unexpected, float64[1]', 'w: expected float64[2], got float64[3]']
    """
    if expected is actual:
        return []
    expected_leaves, expected_def = jax.tree.flatten(expected)
    actual_leaves, actual_def = jax.tree.flatten(actual)
    if expected_def == actual_def and all(
        old is new or _same(old, new, dtypes) for old, new in zip(expected_leaves, actual_leaves, strict=True)
    ):
        return []
    return _differences_in_words(expected, actual, dtypes)


def refuse_unsortable(what: str, tree: PyTree) -> None:
    """Raise TypeError, naming ``what``, if a dict in a tree has keys that cannot be sorted, which a pytree needs.

    >>> refuse_unsortable("the memory", {"a": 1, 3: 2})
    Traceback (most recent call last):
    ...
    TypeError: the memory is no pytree: the keys of a dict in it cannot be sorted, as when some are str and some int
    """
    try:
        jax.tree.flatten(tree)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{what} is no pytree: the keys of a dict in it cannot be sorted, as when some are str and some int"
        ) from error


def replaced(before: PyTree, after: PyTree) -> bool:
    """Whether any leaf of a tree is another object than the one in its place before.

    >>> leaf = np.zeros(2)
    >>> replaced({"w": leaf}, {"w": leaf}), replaced({"w": leaf}, {"w": leaf + 0})
    (False, True)
    """
    old, new = jax.tree.leaves(before), jax.tree.leaves(after)
    return len(old) != len(new) or any(a is not b for a, b in zip(old, new, strict=True))


def in_lines(lines: list[str], most: int = 10) -> str:
    """Indent lines for an error message, at most ``most`` of them.

    >>> in_lines(["a", "b", "c"], most=2)
    '\\n  a\\n  b\\n  and 1 more'
    """
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  {line}" for line in lines[:most] + more)


def _same(expected: Any, actual: Any, dtypes: bool) -> bool:
    return np.shape(expected) == np.shape(actual) and (not dtypes or _dtype(expected) == _dtype(actual))


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _differences_in_words(expected: PyTree, actual: PyTree, dtypes: bool) -> list[str]:
    old, new = named_leaves(expected), named_leaves(actual)
    lines = []
    for path in sorted(old.keys() | new.keys()):
        name = path or "the value"
        if path not in new:
            lines.append(f"{name}: missing, expected {describe(old[path])}")
        elif path not in old:
            lines.append(f"{name}: unexpected, {describe(new[path])}")
        elif not _same(old[path], new[path], dtypes):
            lines.append(f"{name}: expected {describe(old[path])}, got {describe(new[path])}")
    if not lines:  # the same leaves in other containers, a list for a tuple for example
        lines.append(
            f"the containers differ: expected {jax.tree.structure(expected)}, got {jax.tree.structure(actual)}"
        )
    return lines
