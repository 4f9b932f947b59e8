"""Run a part of the compiled step, or leave it out, as a traced condition says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from ant_jax._logs import Logs
from ant_jax._trees import PyTree


def run_if(
    due: chex.Array, function: Callable[[], tuple[PyTree, Mapping[str, Any]]], otherwise: PyTree, logs: Logs
) -> tuple[Any, Logs]:
    """Run ``function`` where ``due``; a log that it would publish is NaN (0, for an integer) where it is not.

    Args:
        due: boolean scalar.
        function: returns a tree like ``otherwise`` and logs with those of ``logs`` among them.
        otherwise: the tree where it does not run.
        logs: the logs before it.
    """

    def run() -> tuple[PyTree, dict[str, chex.Array]]:
        tree, new_logs = function()
        return tree, {name: jnp.asarray(value) for name, value in new_logs.items() if name != "batch_size"}

    _, published = jax.eval_shape(run)
    kept = {name: jnp.asarray(logs[name]) if name in logs else _absent(like) for name, like in published.items()}
    tree, values = jax.lax.cond(due, run, lambda: (otherwise, kept))
    # A number that Python knows stays one.
    return tree, Logs({name: logs[name] for name in logs if name not in values} | values)


def _absent(like: jax.ShapeDtypeStruct) -> chex.Array:
    return jnp.full(like.shape, jnp.nan if jnp.issubdtype(like.dtype, jnp.inexact) else 0, like.dtype)
