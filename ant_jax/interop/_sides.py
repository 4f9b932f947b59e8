"""The two sides of a conversion: the parameters of a state_dict, and the leaves of a JAX model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import jax

from ant_jax._trees import PyTree
from ant_jax.interop._layouts import Shape


Path: TypeAlias = tuple[str, ...]

_ATTENTION = ("query", "key", "value")
_OWN_MATRICES = {f"{part[0]}_proj_weight": part for part in _ATTENTION}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter of torch, or the third of one that holds query, key and value.

    Attributes:
        key: its name in the state_dict.
        path: as ``names`` refers to it: the path of its module, and its own name.
        default: the path under which it is looked for in JAX.
        rows: its part of the value.
        value: the state_dict's.
    """

    key: str
    path: Path
    default: Path
    rows: Any
    value: Any

    @property
    def label(self) -> str:
        """The path as a user reads it."""
        return ".".join(self.path)

    @property
    def module(self) -> str:
        """The path of its module, as a user writes it."""
        return ".".join(self.path[:-1])

    @property
    def shape(self) -> Shape:
        """The shape of its part."""
        shape = tuple(self.value.shape)
        return shape if self.rows is ... else (self.rows.stop - self.rows.start, *shape[1:])


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of ``(params, model_state)``.

    Attributes:
        position: among the leaves of both.
        keys: where it is, without the collection of linen's batch statistics.
        label: where it is, as a user reads it.
        value: the array, or whatever has its shape and dtype.
    """

    position: int
    keys: Path
    label: str
    value: Any

    @property
    def name(self) -> str:
        """Its own name."""
        return self.keys[-1]

    @property
    def module(self) -> str:
        """The path of its module, as a user writes it."""
        return "/".join(self.keys[:-1])

    @property
    def shape(self) -> Shape:
        """The shape of the array."""
        return tuple(self.value.shape)

    @property
    def place(self) -> tuple[Path, str]:
        """Its module and name, in the form in which both sides are compared."""
        return canonical(self.keys[:-1]), self.name


def canonical(path: Path) -> Path:
    """Write a path in one way: ``layers_0`` and ``layers/0`` are ``layers`` and ``0``, as in ``layers.0``.

    >>> canonical(("layers_0", "fc1"))
    ('layers', '0', 'fc1')
    """
    parts = (part for key in path for part in key.split("/") if part)
    return tuple(part for key in parts for part in re.sub(r"(?<=.)_(\d+)$", r"/\1", key).split("/"))


def entries_of(state_dict: Mapping[str, Any]) -> list[Entry]:
    """List the parameters and buffers, in order; those of ``MultiheadAttention`` under the names that flax gives them.

    The count of batches that torch's batch norm keeps has no counterpart and is left out.
    """
    return [entry for key, value in state_dict.items() for entry in _entries(key, value, state_dict)]


def _entries(key: str, value: Any, state_dict: Mapping[str, Any]) -> Iterator[Entry]:
    *module, name = key.split(".")
    if name == "num_batches_tracked":
        return
    if name.startswith("in_proj_") and _is_attention(module, state_dict):
        size = value.shape[0] // 3
        for number, part in enumerate(_ATTENTION):
            path = (*module, part, name.removeprefix("in_proj_"))
            yield Entry(key, path, path, slice(number * size, (number + 1) * size), value)
    elif name in _OWN_MATRICES and _is_attention(module, state_dict):
        path = (*module, _OWN_MATRICES[name], "weight")
        yield Entry(key, path, path, ..., value)
    else:
        path = (*module, name)
        is_output = module[-1:] == ["out_proj"] and _is_attention(module[:-1], state_dict)
        yield Entry(key, path, (*module[:-1], "out", name) if is_output else path, ..., value)


def _is_attention(module: list[str], state_dict: Mapping[str, Any]) -> bool:
    own = {".".join([*module, name]) for name in ("in_proj_weight", "q_proj_weight")}
    return ".".join([*module, "out_proj", "weight"]) in state_dict and not own.isdisjoint(state_dict)


def leaves_of(params: PyTree, model_state: PyTree) -> list[Leaf]:
    """List the leaves of both trees.

    Raises:
        TypeError: one is no array.
        ValueError: two are in the same place, once paths are written in one way.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path((params, model_state))
    leaves = [_leaf(position, path, value) for position, (path, value) in enumerate(paths)]
    seen: dict[tuple[Path, str], Leaf] = {}
    for leaf in leaves:
        other = seen.setdefault(leaf.place, leaf)
        if other is not leaf:
            raise ValueError(f"{other.label} and {leaf.label} cannot be told apart by a path; rename one of them")
    return leaves


def _leaf(position: int, path: tuple[Any, ...], value: Any) -> Leaf:
    argument = ("params", "model_state")[path[0].idx]
    keys = tuple(jax.tree_util.keystr((key,), simple=True) for key in path[1:])
    label = "/".join(keys)
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise TypeError(f"{argument} must be a pytree of arrays, and {label or 'it'} is {type(value).__name__}")
    if not keys:
        raise TypeError(f"{argument} must be a pytree with names, dicts or lists, and is an array")
    in_collection = argument == "model_state" and keys[0] == "batch_stats" and len(keys) > 1
    return Leaf(position, keys[1:] if in_collection else keys, label, value)
