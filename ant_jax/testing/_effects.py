"""See what a function does beside returning: what it refers to before and after, files and connections."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import random
import sys
import threading
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ant_jax._hooks.callback import Callback


DEPTH = 6  # how far references are followed

# Where objects are not looked into: what they remember about tracing is their own affair.
_LIBRARIES = ("ant_jax", "jax", "jaxlib", "numpy", "optax", "flax", "equinox", "chex")


def reach(function: Any) -> dict[str, Any]:
    """What a function refers to and could change, by where it is, as values that can be compared.

    Its closure, what it is bound to, the globals that it names, and what these hold: numbers and strings, containers,
    arrays of numpy, counters, random numbers, open files, objects. What is out of reach is left out.
    """
    found: dict[str, Any] = {}
    _look_at("", function, found, {}, DEPTH)
    return found


def changed_reach(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Name the first thing that has changed; empty when nothing has."""
    for place in (*before, *after):
        if place not in before or place not in after or before[place] != after[place]:
            return place
    return ""


@contextlib.contextmanager
def files_and_connections() -> Iterator[list[str]]:
    """Collect what this thread does meanwhile: ``opens 'log.txt' for writing``, ``connects to ('localhost', 80)``."""
    _add_audit_hook()
    seen: list[str] = []
    _watching[threading.get_ident()] = seen
    try:
        yield seen
    finally:
        del _watching[threading.get_ident()]


_watching: dict[int, list[str]] = {}  # by thread


@functools.cache
def _add_audit_hook() -> None:
    """Once: such a hook stays as long as the process. It does nothing while nobody watches."""
    sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or event not in ("open", "socket.connect"):
        return
    seen = _watching.get(threading.get_ident())
    if seen is None:
        return
    if event == "socket.connect":
        seen.append(f"connects to {arguments[1]!r}")
        return
    path, mode, flags = arguments
    writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)
    if writes and isinstance(path, str | bytes) and not _is_of_python_or_jax(os.fsdecode(path)):
        seen.append(f"opens {os.fsdecode(path)!r} for writing")


def _is_of_python_or_jax(path: str) -> bool:
    """Whether a file is written by importing a module or by compiling, not by the one that is watched."""
    cache = jax.config.values.get("jax_compilation_cache_dir")
    return path == os.devnull or "__pycache__" in path or bool(cache and path.startswith(str(cache)))


def _look_at(place: str, value: Any, found: dict[str, Any], visited: dict[int, Any], depth: int) -> None:
    plain = _as_plain(value)
    if plain is not None:
        found.setdefault(place, []).append(plain)  # two functions may have a variable of one name
        return
    if id(value) in visited or not depth:
        return
    visited[id(value)] = value  # kept, so that nothing else gets its id
    for name, part in _parts_of(value):
        _look_at(name.format(place) if place else name.format("").lstrip("."), part, found, visited, depth - 1)


def _as_plain(value: Any) -> Any:
    """A value that tells whether ``value`` has changed, where one is enough."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return type(value).__name__, repr(value)
    if isinstance(value, bytearray | itertools.count):
        return type(value).__name__, repr(value)
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        return str(array.dtype), array.shape, repr(value) if array.dtype.hasobject else array.tobytes()
    if isinstance(value, random.Random):
        return "Random", hash(value.getstate())
    if isinstance(value, np.random.Generator):
        return "Generator", repr(value.bit_generator.state)
    if isinstance(value, io.IOBase):
        try:
            return "file", value.tell()
        except (OSError, ValueError):  # closed, or no place to tell
            return "file", None
    return None


def _parts_of(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value is made of; ``{}`` in a name stands for its own."""
    if isinstance(value, types.MethodType):
        yield "{}", value.__func__
        yield "self", value.__self__
    elif isinstance(value, functools.partial):
        yield "{}", value.func
        yield from ((f"{{}} argument {number}", part) for number, part in enumerate(value.args))
        yield from value.keywords.items()
    elif isinstance(value, types.FunctionType):
        yield from _references_of(value)
    elif isinstance(value, list | tuple | deque):
        yield "{}", len(value)
        yield from ((f"{{}}[{number}]", part) for number, part in enumerate(value))
    elif isinstance(value, set | frozenset):
        yield "{}", repr(sorted(map(repr, value)))
    elif isinstance(value, Mapping):
        yield "{}", len(value)
        yield from ((f"{{}}[{_escaped(repr(key))}]", part) for key, part in value.items())
    elif isinstance(value, Callback) or _is_of_the_user(value):
        kept = getattr(value, "__dict__", {})
        lazy = {name for name in kept if isinstance(getattr(type(value), name, None), functools.cached_property)}
        yield from ((f"{{}}.{name}", part) for name, part in kept.items() if name not in lazy)


def _references_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a cell that is still empty
            yield name, cell.cell_contents
    for name in function.__code__.co_names:
        if name in function.__globals__ and _is_of_the_user(function):
            yield name, function.__globals__[name]
    yield from ((f"a default of {function.__name__}", part) for part in function.__defaults__ or ())


def _is_of_the_user(value: Any) -> bool:
    if isinstance(value, types.ModuleType | type | jax.Array):
        return False
    module = value.__module__ if isinstance(value, types.FunctionType) else type(value).__module__
    return str(module).partition(".")[0] not in (*_LIBRARIES, *sys.stdlib_module_names)


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
