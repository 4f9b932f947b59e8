"""The memories of several callbacks as one."""

from __future__ import annotations

from typing import Any

import jax


@jax.tree_util.register_pytree_with_keys_class
class Memories(dict[str, Any]):
    """The memories of a chain's callbacks, by their names.

    A type of its own, since what a key of a memory means to the library it means nowhere else: parameters, for one, may
    have any names.
    """

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
        names = tuple(sorted(self))
        return [(jax.tree_util.DictKey(name), self[name]) for name in names], names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], memories: Any) -> Memories:
        return cls(zip(names, memories, strict=True))


def members_of(memory: Any) -> list[Any]:
    """The memories in a memory: those of a chain's callbacks, also of chains in it, or itself.

    >>> members_of(Memories(a=1, b=Memories(c={"d": 2}))), members_of({"a": 1})
    ([1, {'d': 2}], [{'a': 1}])
    """
    if not isinstance(memory, Memories):
        return [memory]
    return [member for _, inner in sorted(memory.items()) for member in members_of(inner)]


def with_members(memory: Any, members: list[Any]) -> Any:
    """The memory in which those of ``members_of`` are others, in its order."""
    others = iter(members)

    def replaced(memory: Any) -> Any:
        if not isinstance(memory, Memories):
            return next(others)
        return Memories({name: replaced(inner) for name, inner in sorted(memory.items())})

    return replaced(memory)
