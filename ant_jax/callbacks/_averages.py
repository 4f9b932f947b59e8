"""What a memory with an average looks like, for those that keep one and those that must know."""

from __future__ import annotations

from typing import Any

import jax


def evaluated(memory: Any) -> bool:
    """Whether a memory has an average that takes the place of the parameters in evaluations.

    >>> evaluated({"average": {}, "swapped": False}), evaluated({"average": {}})
    (True, False)
    """
    return isinstance(memory, dict) and memory.keys() >= {"average", "swapped"}


def evaluated_in(memory: Any) -> list[Any]:
    """The memories inside a memory, that of a chain for one, or itself, whose average is evaluated."""
    return [inner for inner in jax.tree.leaves(memory, is_leaf=evaluated) if evaluated(inner)]


def with_averages(memory: Any, averages: list[Any]) -> Any:
    """The memory in which the averages of ``evaluated_in`` are others, in its order."""
    others = iter(averages)
    return jax.tree.map(
        lambda inner: {**inner, "average": next(others)} if evaluated(inner) else inner, memory, is_leaf=evaluated
    )
