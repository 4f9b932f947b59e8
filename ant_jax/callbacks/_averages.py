"""What a memory with an average looks like, for those that keep one and those that must know."""

from __future__ import annotations

from typing import Any

from ant_jax._state.memories import members_of, with_members


def evaluated(memory: Any) -> bool:
    """Whether a memory has an average that takes the place of the parameters in evaluations.

    >>> evaluated({"average": {}, "swapped": False}), evaluated({"average": {}})
    (True, False)
    """
    return isinstance(memory, dict) and memory.keys() >= {"average", "swapped"}


def averages(memory: Any) -> bool:
    """Whether a memory has an average of parameters, as those of ``ema`` and ``swa`` have.

    >>> averages({"average": {}, "count": 0}), averages({"average": {}})
    (True, False)
    """
    return isinstance(memory, dict) and "average" in memory and ("updated" in memory or "count" in memory)


def evaluated_in(memory: Any) -> list[Any]:
    """The memories inside a memory, that of a chain for one, or itself, whose average is evaluated."""
    return [inner for inner in members_of(memory) if evaluated(inner)]


def with_averages(memory: Any, averages: list[Any]) -> Any:
    """The memory in which the averages of ``evaluated_in`` are others, in its order."""
    others = iter(averages)
    members = members_of(memory)
    return with_members(
        memory, [{**inner, "average": next(others)} if evaluated(inner) else inner for inner in members]
    )
