"""What a caller says of two models that their parameters do not say."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ant_jax.interop._layouts import Shape
from ant_jax.interop._sides import Entry, Leaf, Path, canonical


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of a conversion, checked.

    Attributes:
        names: the path in JAX of what is under a path in torch; ``None``: it has no counterpart.
        flattened: what torch flattens to make the inputs of a Linear, by the Linear's path; ``None``: nothing, here and
            in all that is below.
        transpose_kernel: of flax's ConvTranspose, by the path of torch's.
    """

    names: Mapping[Path, Path | None]
    flattened: Mapping[Path, Shape | None]
    transpose_kernel: Mapping[Path, bool]

    def counterpart(self, entry: Entry) -> tuple[Path, bool] | None:
        """Return the path in JAX of a parameter, and whether a name was given for itself; ``None``: it has none."""
        given = _longest_prefix(entry.path, self.names)
        if given is None:
            return entry.default, False
        path = self.names[given]
        return None if path is None else ((*path, *entry.default[len(given) :]), given == entry.path)

    def says_inputs_of(self, entry: Entry) -> bool:
        """Whether the caller has said what the inputs of the module of ``entry`` are."""
        return _longest_prefix(entry.path[:-1], self.flattened) is not None

    def refuse_unknown(self, entries: Iterable[Entry], leaves: Iterable[Leaf]) -> None:
        """Raise ValueError if a path that the caller gave leads nowhere."""
        in_torch = {entry.path[:end] for entry in entries for end in range(len(entry.path) + 1)}
        modules = {entry.path[:-1] for entry in entries}
        shapes = {path for path, shape in self.flattened.items() if shape is not None}
        _refuse("names", self.names, in_torch, modules)
        _refuse("flattened", shapes, modules, modules)
        _refuse("flattened", self.flattened, in_torch, modules)
        _refuse("transpose_kernel", self.transpose_kernel, modules, modules)
        places = {
            place[:end] for place in map(canonical, (leaf.keys for leaf in leaves)) for end in range(len(place) + 1)
        }
        for given, path in self.names.items():
            if path is not None and canonical(path) not in places:
                there = _listed({leaf.module for leaf in leaves})
                raise ValueError(
                    f"names[{'.'.join(given)!r}] = {'/'.join(path)!r} is not in the JAX model; its modules: {there}"
                )


def request(names: Any, flattened: Any, transpose_kernel: Any) -> Request:
    """Check the arguments; raise TypeError if one is of another type than it should be."""
    return Request(
        {_split(path): _path(path, value) for path, value in _mapping("names", names).items()},
        {_split(path): _shape(path, value) for path, value in _mapping("flattened", flattened).items()},
        {_split(path): _flag(path, value) for path, value in _mapping("transpose_kernel", transpose_kernel).items()},
    )


def _mapping(argument: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{argument} must be a mapping from paths of torch modules, got {value!r}")
    return value


def _path(given: str, value: Any) -> Path | None:
    if value is None or isinstance(value, str):
        return None if value is None else tuple(part for part in value.split("/") if part)
    if isinstance(value, tuple) and all(isinstance(key, str | int) for key in value):
        return tuple(map(str, value))
    raise TypeError(f"names[{given!r}] must be a path such as 'Block_0/fc1', a tuple of keys or None, got {value!r}")


def _shape(given: str, value: Any) -> Shape | None:
    if value is None:
        return None
    if isinstance(value, tuple | list) and len(value) > 1 and all(type(size) is int and size > 0 for size in value):
        return tuple(value)
    raise TypeError(
        f"flattened[{given!r}] must be what torch flattens, (channels, *spatial) without the batch, or None where "
        f"nothing is flattened; got {value!r}"
    )


def _flag(given: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise TypeError(f"transpose_kernel[{given!r}] must be what flax's ConvTranspose has there, a bool; got {value!r}")


def _split(path: str) -> Path:
    return tuple(path.split(".")) if path else ()


def _longest_prefix(path: Path, given: Mapping[Path, Any]) -> Path | None:
    return next((path[:end] for end in range(len(path), -1, -1) if path[:end] in given), None)


def _refuse(argument: str, given: Iterable[Path], known: set[Path], modules: set[Path]) -> None:
    for path in given:
        if path not in known:
            there = _listed({".".join(module) for module in modules})
            raise ValueError(f"{argument}: {'.'.join(path)!r} is not in the torch model; its modules: {there}")


def _listed(modules: set[str]) -> str:
    more = f", and {len(modules) - 20} more" if len(modules) > 20 else ""
    return ", ".join(map(repr, sorted(modules)[:20])) + more
