"""A state as what a checkpoint holds, and back: arrays by their paths, and what only the host knows."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax._logs.packing import PackedLogs
from ant_jax._logs.sums import LogSums
from ant_jax._logs.windows import Window
from ant_jax._state.encoding import decode, encode, rebuild, structure_of
from ant_jax._state.history import History
from ant_jax._state.host_fields import PLAIN_FIELDS, HostFields, OpenHookWindow, StateMismatch
from ant_jax._state.leaves import strong
from ant_jax._state.train_state import DATA_FIELDS, TrainState
from ant_jax._trees import PyTree, describe, in_lines


_logger = logging.getLogger("ant_jax")

FORMAT = 2
_PACKAGES = ("ant_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")

Path = tuple[str, ...]


class Snapshot(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        arrays: every array by its path: the field, and the keys inside it.
        host: what only the host knows, by name.
    """

    arrays: dict[Path, Any]
    host: dict[str, Any]


def take_snapshot(state: TrainState, device_names: frozenset[str]) -> Snapshot:
    """Take a snapshot; its ``host`` is JSON, and its arrays are the state's own, or views of them.

    Args:
        state: to save.
        device_names: the callbacks whose memory is arrays.

    Raises:
        TypeError: a callback's memory cannot be saved.
        ValueError: two arrays would be saved under one name.
    """
    tree = _saved_tree(state, device_names)
    leaves = _by_path(tree)
    host = _host_part(state, leaves)
    memories = {name: memory for name, memory in state.callback_states.items() if name not in tree["callback_states"]}
    host["memories"] = {
        "dict": [[name, encode(memory, f"the memory of callback {name!r}")] for name, memory in memories.items()]
    }
    return Snapshot({keys: _plain(leaf) for keys, leaf in leaves.items()}, host)


def decode_snapshot(arrays: Mapping[Path, Any], host: Mapping[str, Any]) -> Snapshot:
    """Turn what was read from a checkpoint into a snapshot with decoded ``host``.

    Raises:
        StateMismatch: a later version wrote it, in another format.
    """
    if host["format"] != FORMAT:
        raise StateMismatch(
            f"the checkpoint is of format {host['format']}, written by ant_jax {decode(host['versions'])['ant_jax']}; "
            f"this version reads format {FORMAT}"
        )
    return Snapshot(dict(arrays), {name: decode(value) for name, value in host.items()})


def parameters_of(saved: Snapshot, field: str) -> PyTree:
    """Return the saved ``params`` or ``model_state`` in their own containers.

    Raises:
        StateMismatch: the containers are not Python's own.
    """
    structure = saved.host["structures"][field]
    if structure is None:
        raise StateMismatch(
            f"the saved {field} are in containers other than dict, list and tuple; restore them with "
            f"trainer.restore(directory, like=trainer.init(example_batch))"
        )
    return rebuild(structure, {keys[1:]: leaf for keys, leaf in with_keys(saved).items() if keys[0] == field})


def with_keys(saved: Snapshot) -> dict[Path, Any]:
    """Return the arrays that were saved, those that were random keys as such."""
    impls = saved.host["keys"]
    return {
        keys: jax.random.wrap_key_data(leaf, impl=impls[name]) if (name := "/".join(keys)) in impls else leaf
        for keys, leaf in saved.arrays.items()
    }


def fill_state(
    saved: Snapshot,
    form: TrainState,
    device_names: frozenset[str],
    initial_memories: Callable[[TrainState], Mapping[str, Any]],
) -> TrainState:
    """Put what was saved into a state of the form that a trainer needs.

    A callback that the checkpoint does not know starts afresh, and the memory of one that the trainer has not is left
    out; both are named in a warning (logger ``ant_jax``).

    Args:
        saved: the snapshot.
        form: containers, shapes and dtypes, and places for arrays that are committed to one; its values, and the
            memories in it, do not count.
        device_names: the callbacks of the trainer whose memory is arrays.
        initial_memories: makes the memories of the trainer's callbacks for a run that begins at a state.

    Raises:
        StateMismatch: parameters, optimizer or memories have another form; the message names every leaf that differs.
    """
    host = saved.host
    of_memories = {keys: leaf for keys, leaf in saved.arrays.items() if keys[0] == "callback_states"}
    arrays = {k: leaf for k, leaf in saved.arrays.items() if k[0] != "log_sums" and k not in of_memories}
    found = _match(arrays, host["keys"], {field: getattr(form, field) for field in DATA_FIELDS})
    fields = HostFields(
        **host["fields"],
        history=History(host["history"]),
        log_sums=None if host["log_sums"] is None else _sums_of(saved.arrays, host["log_sums"]),
        published=host["published"],
        loader=host["loader"],
        windows=_windows_of(host["windows"]),
        device_names=device_names,
    )
    state = form.replace(**found, callback_states={}, stop=np.bool_(host["stop"]), host=fields)
    fresh = initial_memories(state)
    saved_names = {keys[1] for keys in of_memories} | host["memories"].keys()
    _name_strangers(saved_names, fresh, device_names)
    on_host = {name: value for name, value in host["memories"].items() if name in fresh.keys() - device_names}
    expected = {name: memory for name, memory in fresh.items() if name in saved_names & device_names}
    # Arrays of a callback that has its memory on the host by now find no place, and so are refused as unexpected.
    known = {keys: leaf for keys, leaf in of_memories.items() if keys[1] in fresh}
    on_device = _match(known, host["keys"], {"callback_states": expected})["callback_states"]
    return state.replace(callback_states={**fresh, **on_host, **on_device})


def _name_strangers(saved: set[str], fresh: Mapping[str, Any], device_names: frozenset[str]) -> None:
    for name, memory in fresh.items():
        empty = name in device_names and not jax.tree.leaves(memory)  # nothing is saved of it
        if name not in saved and not empty:
            _logger.warning("restore: the checkpoint has no memory of callback %r, which starts afresh", name)
    for name in sorted(saved - fresh.keys()):
        _logger.warning("restore: the checkpoint has a memory of callback %r, which this trainer does not have", name)


def _match(arrays: Mapping[Path, Any], key_impls: Mapping[str, str], expected: PyTree) -> Any:
    """Put arrays into the containers of ``expected``, after comparing every leaf."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(expected)
    likes = {_keys(path): like for path, like in leaves}
    lines = [f"{'/'.join(keys)}: unexpected, {describe(arrays[keys])}" for keys in arrays.keys() - likes.keys()]
    values = []
    for keys, like in likes.items():
        where, form = "/".join(keys), _numbers_form(like)
        if keys not in arrays:
            lines.append(f"{where}: missing, expected {describe(like)}")
        elif _is_key(like) and key_impls.get(where) != _impl_of(like):
            got = key_impls.get(where, "no key")
            lines.append(f"{where}: expected a random key of kind {_impl_of(like)}, got {got}")
        elif (arrays[keys].shape, arrays[keys].dtype) != (form.shape, form.dtype):
            lines.append(f"{where}: expected {describe(form)}, got {describe(arrays[keys])}")
        elif where in key_impls and not _is_key(like):
            lines.append(f"{where}: expected {describe(like)}, got a random key of kind {key_impls[where]}")
        else:
            values.append(_place(arrays[keys], like))
    if lines:
        raise StateMismatch(
            f"the checkpoint is not of the form that this trainer needs; nothing was restored:{in_lines(sorted(lines))}"
        )
    return jax.tree.unflatten(treedef, values)


def _place(value: np.ndarray, like: Any) -> jax.Array:
    """Put an array on the device, as a random key if ``like`` is one, and where ``like`` is if that is committed."""
    array = jax.device_put(value)
    if _is_key(like):
        array = jax.random.wrap_key_data(array, impl=_impl_of(like))
    return jax.device_put(array, like.sharding) if getattr(like, "committed", False) else array


def _saved_tree(state: TrainState, device_names: frozenset[str]) -> dict[str, Any]:
    memories = {name: memory for name, memory in state.callback_states.items() if name in device_names}
    tree = {field: getattr(state, field) for field in DATA_FIELDS}
    tree |= {"log_sums": state.on_host().log_sums, "callback_states": memories}
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else strong(leaf), tree)


def _by_path(tree: PyTree) -> dict[Path, jax.Array]:
    leaves: dict[Path, jax.Array] = {}
    names: set[str] = set()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = _keys(path)
        name = ".".join(keys)  # as Orbax joins them
        if name in names:
            raise ValueError(f"two leaves of the state would be saved under one name, {name!r}; rename one")
        names.add(name)
        leaves[keys] = leaf
    return leaves


def _plain(leaf: jax.Array) -> Any:
    # What is on an accelerator is fetched once, for Orbax and for the checksums; then its memory there is free. A JAX
    # array on a CPU is only viewed: who saves must keep it until it is written, and the trainer's launches then copy
    # it before they overwrite it. The data of a key is an alias of it, which keeps nothing from being overwritten.
    if _is_key(leaf):
        return np.array(jax.random.key_data(leaf))
    return leaf if {device.platform for device in leaf.devices()} == {"cpu"} else np.asarray(leaf)


def _host_part(state: TrainState, leaves: Mapping[Path, jax.Array]) -> dict[str, Any]:
    host = state.on_host()
    sums = host.log_sums
    parts: dict[str, Any] = {
        "format": FORMAT,
        "versions": dict(_versions()),
        "saved_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "fields": {name: _python(getattr(host, name)) for name in PLAIN_FIELDS},
        "loader": host.loader,
        "windows": _read_windows(host.windows),
        "history": list(host.history),
        "published": dict(host.published),
        "stop": bool(state.stop),
        "structures": {field: structure_of(getattr(state, field)) for field in ("params", "model_state")},
        "keys": {"/".join(keys): _impl_of(leaf) for keys, leaf in leaves.items() if _is_key(leaf)},
        "log_sums": None if sums is None else _form_of(sums.totals),
    }
    return {name: encode(value, f"the state's {name}") for name, value in parts.items()}


def _python(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _read_windows(windows: Mapping[str, OpenHookWindow] | None) -> Any:
    if windows is None:
        return None
    return {name: (dict(window.published), *window.read().parts()) for name, window in windows.items()}


def _windows_of(saved: Mapping[str, Any] | None) -> dict[str, OpenHookWindow] | None:
    if saved is None:
        return None
    return {
        name: OpenHookWindow(published, functools.partial(Window, rows, weights))
        for name, (published, rows, weights) in saved.items()
    }


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    return tuple((package, importlib.metadata.version(package)) for package in _PACKAGES)


def _form_of(totals: PackedLogs) -> dict[str, Any]:
    """What is to be known of the sums of logs beside their arrays."""
    known = {"names": totals.names, "weighed": totals.weighed, "sometimes": totals.sometimes}
    return {**known, "others": tuple(sorted(totals.others))}


def _sums_of(arrays: Mapping[Path, Any], form: Mapping[str, Any]) -> LogSums:
    """Put the sums of logs of this form back together; ``fit`` compares them with those of its program."""
    values = {keys[2:]: jax.device_put(leaf) for keys, leaf in arrays.items() if keys[:2] == ("log_sums", "totals")}
    others = {log: values["others", log] for log in form["others"]}
    static = {name: form[name] for name in ("names", "weighed", "sometimes")}
    return LogSums(PackedLogs(**static, scalars=values[("scalars",)], others=others))


def _keys(path: Any) -> Path:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _numbers_form(leaf: Any) -> Any:
    """The form of what is saved of a leaf: a random key's data, anything else as it is."""
    return jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf


def _impl_of(key: Any) -> str:
    # What has only the form of a key does not tell.
    return str(jax.random.key_impl(key if isinstance(key, jax.Array) else jnp.empty((), key.dtype)))
