"""Find out whether a function broadcasts its two arguments against each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax


class _Origin(NamedTuple):
    """Where a value comes from.

    Attributes:
        arguments: positions of the arguments that it depends on.
        size: elements that it had before it was broadcast.
    """

    arguments: frozenset[int]
    size: int


def stretches(function: Callable[[Any, Any], Any], first: Any, second: Any) -> bool:
    """Whether somewhere in ``function`` both arguments are broadcast along different axes, to meet element by element.

    A column and a row of n numbers become n x n in this way. It traces the function.

    >>> import jax.numpy as jnp
    >>> column, row = jnp.zeros((3, 1)), jnp.zeros(3)
    >>> stretches(lambda a, b: ((a - b[None]) ** 2).mean(), column, row)
    True
    >>> stretches(lambda a, b: ((a[:, 0] - b) ** 2).mean(), column, row)
    False
    """
    closed = jax.make_jaxpr(function)(first, second)
    origins = [_Origin(frozenset({i}), _size(var)) for i, var in enumerate(closed.jaxpr.invars)]
    return _any_meets(closed.jaxpr, origins)[0]


def _any_meets(jaxpr: Any, given: list[_Origin]) -> tuple[bool, list[_Origin]]:
    """Whether an equation of a jaxpr stretches both arguments, and the origins of its results."""
    origins: dict[Any, _Origin] = dict(zip(jaxpr.invars, given, strict=True))

    def origin(atom: Any) -> _Origin:
        known = None if hasattr(atom, "val") else origins.get(atom)
        return known or _Origin(frozenset(), _size(atom))

    for equation in jaxpr.eqns:
        operands = [origin(atom) for atom in equation.invars]
        together = frozenset().union(*(operand.arguments for operand in operands))
        results = [_Origin(together, _size(var)) for var in equation.outvars]
        for inner in _inner(equation):
            # Where operands and inner variables do not correspond, as in a branch, all may come from everywhere.
            passed = operands[len(operands) - len(inner.invars) :]
            met, returned = _any_meets(inner, passed)
            if met:
                return True, []
            if len(returned) == len(results):
                results = [_Origin(a.arguments, _size(var)) for a, var in zip(returned, equation.outvars, strict=True)]
        if equation.primitive.name == "broadcast_in_dim":
            results = [_Origin(together, operands[0].size)]
        elif _is_elementwise(equation) and _meet(operands, _size(equation.outvars[0])):
            return True, []
        origins |= dict(zip(equation.outvars, results, strict=True))
    return False, [origin(atom) for atom in jaxpr.outvars]


def _meet(operands: list[_Origin], size: int) -> bool:
    stretched = {operand.arguments for operand in operands if 1 < operand.size < size}
    return {frozenset({0}), frozenset({1})} <= stretched


def _is_elementwise(equation: Any) -> bool:
    if equation.primitive.name in ("concatenate", "dot_general") or len(equation.outvars) != 1:
        return False
    shape = equation.outvars[0].aval.shape
    return all(
        len(atom.aval.shape) == len(shape) and all(a in (1, b) for a, b in zip(atom.aval.shape, shape, strict=True))
        for atom in equation.invars
        if atom.aval.shape != ()
    )


def _inner(equation: Any) -> Iterator[Any]:
    """The jaxprs that an equation holds, of those with as many variables as it has operands, or fewer."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns") and len(jaxpr.invars) <= len(equation.invars):
                yield jaxpr


def _size(atom: Any) -> int:
    return math.prod(atom.aval.shape)
