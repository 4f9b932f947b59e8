"""Checkpoints: the one file that knows Orbax.

A checkpoint has two items. ``arrays`` is a nested dict of all arrays of the state by their paths, the parameters under
``params``, so that Orbax alone can read it. ``host`` is JSON: what the host knows, and what it takes to put the arrays
back into their containers.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import logging
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax._encoding import decoded, encoded, rebuilt, structure_of
from ant_jax._history import History
from ant_jax._state import HostFields, StateMismatch, TrainState
from ant_jax._sums import LogSums, PackedLogs
from ant_jax._trees import PyTree, describe, in_lines


_logger = logging.getLogger("ant_jax")

FORMAT = 1
# Steps are directories "step_120": a stray directory of another name is no checkpoint.
PREFIX = "step"
# The fields of a state that are arrays; those of callbacks are added one by one.
FIELDS = ("step", "params", "model_state", "opt_state", "key", "accumulator", "loss_scale", "log_sums")


class Saved(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        arrays: every array as numpy, by its path: the field, and the keys inside it.
        host: the decoded JSON.
    """

    arrays: dict[tuple[str, ...], np.ndarray]
    host: dict[str, Any]


class Checkpointer:
    """Saves the states of a run into a directory, in the background; made by ``Trainer.checkpointer``.

    Use it as a context manager, or ``close`` it: leaving the process with a save under way loses that checkpoint.

    Args:
        directory: where to; it is made.
        device_names: the callbacks whose memory is arrays.
        keep: how many checkpoints to keep, the newest, or the best when ``save`` is given metrics; ``None``: all.
        mode: whether a smaller (``"min"``) or a larger (``"max"``) metric is better, ``None`` when there is no metric.
        save_last: whether to keep the newest beside the best.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        device_names: frozenset[str],
        *,
        keep: int | None = None,
        mode: Literal["min", "max"] | None = None,
        save_last: bool = True,
    ):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        def score(metrics: Any) -> float:
            value = metrics["metric"] if mode == "max" else -metrics["metric"]
            return value if math.isfinite(value) else -math.inf  # a metric that is not finite is never the best

        newest = policies.LatestN(keep if mode is None else 1 if save_last else 0)
        best = policies.BestN(get_metric_fn=score, n=keep, keep_checkpoints_without_metrics=False)
        self.directory, self._device_names = pathlib.Path(directory).absolute(), device_names
        self._args = ocp.args
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                step_prefix=PREFIX,
                cleanup_tmp_directories=True,
                preservation_policy=policies.AnyPreservationPolicy([newest] if mode is None else [newest, best]),
                best_fn=None if mode is None else score,
                best_mode="max",
            ),
        )
        self._measured = mode is not None

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, metric: float | None = None) -> None:
        """Save a state under its step; returns when the state has been copied, and before it is written.

        Args:
            state: to save.
            metric: how good it is; without one, a checkpoint is never among the best.

        Raises:
            TypeError: a callback's memory cannot be saved.
            FileExistsError: the directory has a checkpoint of that step, or of a later one.
        """
        step = int(state.step)
        if self.steps and step <= self.steps[-1]:
            raise FileExistsError(
                f"{self.directory} has checkpoints of steps {', '.join(map(str, self.steps))}, and the state to save "
                f"is at step {step}; save another run into another directory"
            )
        tree = _saved_tree(state, self._device_names)
        host, arrays = _host_part(state, tree), _array_part(tree)
        metrics = {"metric": -math.inf if metric is None else float(metric)} if self._measured else None
        items = self._args.Composite(arrays=self._args.StandardSave(arrays), host=self._args.JsonSave(host))
        self._manager.save(step, args=items, metrics=metrics)

    def wait(self) -> None:
        """Wait until what was saved is on disk; raises what went wrong there."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and give everything back."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(directory: str | os.PathLike[str], step: int | None = None) -> Saved:
    """Read a checkpoint.

    Args:
        directory: that was saved into.
        step: which one; ``None``: the newest.

    Raises:
        FileNotFoundError: there is none; the message says which steps there are.
    """
    import orbax.checkpoint as ocp

    directory = pathlib.Path(directory).absolute()
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory} to restore from")
    options = ocp.CheckpointManagerOptions(step_prefix=PREFIX, create=False, enable_async_checkpointing=False)
    handlers: Any = {"arrays": ocp.PyTreeCheckpointHandler(), "host": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(directory, options=options, item_handlers=handlers) as manager:
        steps = sorted(manager.all_steps())
        if not steps or step not in (None, *steps):
            wanted, there = "" if step is None else f" of step {step}", ", ".join(map(str, steps)) or "none"
            raise FileNotFoundError(f"{directory} has no checkpoint{wanted}; the steps there are: {there}")
        step = steps[-1] if step is None else step
        forms = manager.item_metadata(step)["arrays"]
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), forms.tree)
        items = ocp.args.Composite(arrays=ocp.args.PyTreeRestore(restore_args=as_numpy), host=ocp.args.JsonRestore())
        restored = manager.restore(step, args=items)
    arrays = {_keys(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(restored["arrays"])[0]}
    return Saved(arrays, {name: decoded(value) for name, value in restored["host"].items()})


def parameters_of(saved: Saved, field: str) -> PyTree:
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
    return rebuilt(structure, iter([leaf for keys, leaf in saved.arrays.items() if keys[0] == field]))


def filled(saved: Saved, fresh: TrainState, device_names: frozenset[str]) -> TrainState:
    """Put what was saved into a fresh state of the trainer that restores it.

    A callback that the checkpoint does not know starts afresh, and the memory of one that the trainer has not is left
    out; both are named in a warning (logger ``ant_jax``).

    Raises:
        StateMismatch: parameters, optimizer or memories have another form; the message names every leaf that differs.
    """
    host, fresh_memories = saved.host, dict(fresh.callback_states)
    saved_names = {keys[1] for keys in saved.arrays if keys[0] == "callback_states"} | host["memories"].keys()
    _name_strangers(saved_names, fresh_memories, device_names)
    kept = {name: fresh_memories[name] for name in fresh_memories.keys() & saved_names & device_names}
    expected = {field: getattr(fresh, field) for field in FIELDS if field != "log_sums"} | {"callback_states": kept}
    arrays = {
        keys: leaf
        for keys, leaf in saved.arrays.items()
        if keys[0] != "log_sums" and (keys[0] != "callback_states" or keys[1] in kept)
    }
    found = _matched(arrays, host["keys"], expected)
    found["log_sums"] = None if host["log_sums"] is None else _sums_of(saved.arrays, host["log_sums"])
    memories = fresh_memories | {name: value for name, value in host["memories"].items() if name in fresh_memories}
    found["callback_states"] = memories | found["callback_states"]
    fields = HostFields(**host["fields"], history=History(host["history"]), published=host["published"])
    return fresh.replace(**found, stop=host["stop"], host=fields)


def _name_strangers(saved: set[str], memories: Mapping[str, Any], device_names: frozenset[str]) -> None:
    for name, memory in memories.items():
        empty = name in device_names and not jax.tree.leaves(memory)  # nothing is saved of it
        if name not in saved and not empty:
            _logger.warning("restore: the checkpoint has no memory of callback %r, which starts afresh", name)
    for name in saved - memories.keys():
        _logger.warning("restore: the checkpoint has a memory of callback %r, which this trainer does not have", name)


def _matched(arrays: Mapping[tuple[str, ...], np.ndarray], key_impls: Mapping[str, str], expected: PyTree) -> Any:
    """Put arrays into the containers of ``expected``, after comparing every leaf."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(expected)
    likes = {_keys(path): like for path, like in leaves}
    lines = [f"{'/'.join(keys)}: unexpected, {describe(arrays[keys])}" for keys in arrays.keys() - likes.keys()]
    values = []
    for keys, like in likes.items():
        where, form = "/".join(keys), _key_data(like) if _is_key(like) else like
        if keys not in arrays:
            lines.append(f"{where}: missing, expected {describe(like)}")
        elif (arrays[keys].shape, arrays[keys].dtype) != (form.shape, form.dtype):
            lines.append(f"{where}: expected {describe(form)}, got {describe(arrays[keys])}")
        elif _is_key(like) and key_impls[where] != _impl_of(like):
            lines.append(f"{where}: expected a random key of kind {_impl_of(like)}, got {key_impls[where]}")
        elif _is_key(like):
            values.append(jax.random.wrap_key_data(jax.device_put(arrays[keys]), impl=_impl_of(like)))
        else:
            values.append(jax.device_put(arrays[keys]))
    if lines:
        raise StateMismatch(
            f"the checkpoint is not of the form that this trainer needs; nothing was restored:{in_lines(sorted(lines))}"
        )
    return jax.tree.unflatten(treedef, values)


def _saved_tree(state: TrainState, device_names: frozenset[str]) -> dict[str, Any]:
    memories = {name: memory for name, memory in state.callback_states.items() if name in device_names}
    return {field: getattr(state, field) for field in FIELDS} | {"callback_states": memories}


def _array_part(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Bring all arrays of a tree into nested dicts, in copies that nothing overwrites while they are being written."""
    nested: dict[str, Any] = {}
    taken: set[str] = set()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = _keys(path)
        if ".".join(keys) in taken:  # Orbax joins keys by dots
            raise ValueError(f"two leaves of the state would be saved under one name, {'.'.join(keys)!r}; rename one")
        taken.add(".".join(keys))
        *outer, last = keys
        inner = nested
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = _copied(_key_data(leaf) if _is_key(leaf) else leaf)
    return nested


def _copied(leaf: jax.Array) -> Any:
    # Orbax copies from an accelerator before it returns; on a CPU it would read the very buffer that the next step
    # overwrites.
    return np.array(leaf) if {device.platform for device in leaf.devices()} == {"cpu"} else leaf


def _host_part(state: TrainState, tree: Mapping[str, Any]) -> dict[str, Any]:
    host = state.on_host()
    fields = {"epoch": host.epoch, "batch_idx": host.batch_idx}
    keys = {
        "/".join(_keys(path)): _impl_of(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if _is_key(leaf)
    }
    sums = state.log_sums
    parts: dict[str, Any] = {
        "format": FORMAT,
        "versions": {"ant_jax": importlib.metadata.version("ant_jax"), "jax": jax.__version__},
        "saved_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "fields": fields,
        "history": list(host.history),
        "published": dict(host.published),
        "stop": bool(state.stop),
        "structures": {field: structure_of(getattr(state, field)) for field in ("params", "model_state")},
        "keys": keys,
        "log_sums": None if sums is None else {"names": list(sums.totals.names), "others": sorted(sums.totals.others)},
    }
    encoded_parts = {name: encoded(value, name) for name, value in parts.items()}
    memories = {name: memory for name, memory in state.callback_states.items() if name not in tree["callback_states"]}
    named = [[name, encoded(memory, f"the memory of callback {name!r}")] for name, memory in memories.items()]
    return encoded_parts | {"memories": {"dict": named}}


def _sums_of(arrays: Mapping[tuple[str, ...], np.ndarray], names: Mapping[str, Any]) -> LogSums:
    """Put the sums of logs of these names back together; ``fit`` compares them with those of its program."""

    def packed(part: str) -> PackedLogs:
        values = {keys[2:]: jax.device_put(leaf) for keys, leaf in arrays.items() if keys[:2] == ("log_sums", part)}
        others = {log: values["others", log] for log in names["others"]}
        return PackedLogs(tuple(names["names"]), values[("scalars",)], others)

    return LogSums(packed("totals"), packed("counts"))


def _keys(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(key: jax.Array) -> jax.Array:
    return jax.random.key_data(key)


def _impl_of(key: jax.Array) -> str:
    return str(jax.random.key_impl(key))
