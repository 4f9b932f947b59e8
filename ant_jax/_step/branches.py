"""Run a part of compiled code, or leave it out, as a traced condition says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ant_jax._logs.logs import Logs
from ant_jax._logs.packing import entries_of
from ant_jax._trees import PyTree


def run_if(
    due: jax.Array, function: Callable[[], tuple[PyTree, Mapping[str, Any]]], otherwise: PyTree, logs: Logs
) -> tuple[Any, Logs]:
    """Run ``function`` where ``due``; a log that it would publish is NaN (0, for an integer) where it is not.

    In the logs that come out it is present where it runs: on one condition, the very same object, for all that have no
    other of their own. A leaf of the tree that ``function`` does not touch comes out as the very same object.

    Args:
        due: boolean scalar.
        function: returns a tree like ``otherwise``, and logs with those of ``logs`` among them.
        otherwise: the tree where it does not run.
        logs: the logs before it.
    """
    before, structure = jax.tree.flatten(otherwise)

    def run() -> tuple[dict[str, Any], dict[str, Any], dict[tuple[str, ...], Any], dict[str, Any]]:
        tree, returned = function()
        after = structure.flatten_up_to(tree)
        changed = {str(i): new for i, (old, new) in enumerate(zip(before, after, strict=True)) if new is not old}
        new_logs = logs.changed_to(returned)
        published = {name: jnp.asarray(log) for name, log in new_logs.items() if log is not logs.get(name)}
        present = {name: new_logs.present[name] for name in published if name in new_logs.present}
        vectors = {names: vector for names, vector in new_logs.vectors.items() if logs.keys().isdisjoint(names)}
        for names in vectors:
            for name in names:
                del published[name]
        return changed, published, vectors, present

    changes, published, vectors, conditional = jax.eval_shape(run)
    kept = {
        name: jnp.asarray(logs[name], like.dtype) if name in logs else _absent(like) for name, like in published.items()
    }
    was_there = {name: jnp.asarray(logs.present.get(name, name in logs)) for name in conditional}
    unchanged = {i: before[int(i)] for i in changes}
    no_vectors = {names: _absent(like) for names, like in vectors.items()}
    changes, values, vectors, present = jax.lax.cond(due, run, lambda: (unchanged, kept, no_vectors, was_there))
    values |= entries_of(vectors)
    for name in values.keys() - present.keys():
        if name not in logs:
            present[name] = due
        elif name in logs.present:
            present[name] = jnp.logical_or(due, logs.present[name])
    leaves = [changes.get(str(i), leaf) for i, leaf in enumerate(before)]
    return jax.tree.unflatten(structure, leaves), logs.changed_to(Logs({**logs, **values}, None, present, vectors))


def _absent(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.full(like.shape, jnp.nan if jnp.issubdtype(like.dtype, jnp.inexact) else 0, like.dtype)
