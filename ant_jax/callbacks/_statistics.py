"""Callbacks that log what gradients, parameters and updates look like."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ant_jax._arguments import check_flag
from ant_jax._hooks.callback import Callback
from ant_jax._logs.logs import Logs
from ant_jax._logs.packing import entries_of, vector_of
from ant_jax._trees import named_leaves
from ant_jax.writers._values import HISTOGRAM_EXPONENTS


# Elements of the largest parameter that is copied beside others of its size, to have their norms from one operation:
# XLA takes milliseconds to compile one. To copy more would make the step slower.
SMALL = 4096
# Parameters that one operation joins, because XLA on a CPU compiles one kernel for all, in more than linear time.
GROUP = 25


def gradient_norm(*, name: str = "grad_norm") -> Callback:
    """Log the global norm of the gradients of every batch.

    It runs in ``on_backward_end``, so it sees what the callbacks before it left of the gradients of this batch, before
    accumulation and before anything that runs in ``on_before_update``, clipping for instance.

    Args:
        name: of the callback and of the log; it keeps no memory.

    Returns:
        A callback that publishes ``logs[name]``, a float32 scalar.

    >>> gradient_norm()
    Callback(name='grad_norm', hooks=on_backward_end)
    """

    def on_backward_end(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        del batch_idx, trainer
        return state, grads, {**logs, name: optax.tree.norm(grads)}

    return Callback(name=name, on_backward_end=on_backward_end)


def gradient_statistics(
    *, per_layer: bool = True, histograms: bool = False, name: str = "gradient_statistics"
) -> Callback:
    """Log the norms of gradients, parameters and updates at every update, in all and of each parameter.

    It runs in ``on_before_update`` and ``on_before_apply``: the gradients are the mean ones of the accumulation window
    as the callbacks before it left them, the parameters those before the update, and the updates what the optimizer
    adds to them, learning rate and weight decay included. (``update_norm / param_norm`` near 1e-3 is what training
    usually looks like.)

    Args:
        per_layer: whether to log those of each parameter, too, as ``grad_norm/<path>`` and so on.
        histograms: whether to log ``grad_histogram/<path>``: how many elements of a gradient have a magnitude in
            ``[2**e, 2**(e + 1))``, for ``e`` from -24 to 7, float32[32]; what is smaller is counted in the first bin,
            what is larger, infinite or NaN in the last.
        name: of the callback; it keeps no memory. Another name than the default stands before those of the logs, as in
            ``clipped/grad_norm``; the default does so beside :func:`gradient_norm`, or another callback that has
            published a log of the same name.

    Returns:
        A callback that publishes ``grad_norm``, ``param_norm`` and ``update_norm``, scalars of float32 at least. Where
        a batch brings no update they are NaN and not part of the epoch's mean.

    Raises:
        ValueError: ``per_layer`` or ``histograms`` is no bool.
        ValueError: in the first step, if another callback has published one of these logs.

    >>> gradient_statistics()
    Callback(name='gradient_statistics', hooks=on_before_update, on_before_apply)
    """
    check_flag("gradient_statistics", "per_layer", per_layer)
    check_flag("gradient_statistics", "histograms", histograms)
    default = name == "gradient_statistics"

    def norms(kind: str, tree: Any) -> Logs:
        of_layers = _norms(named_leaves(tree))
        in_all = {f"{kind}_norm": optax.tree.norm(list(of_layers.values()))}
        vectors = {tuple(f"{kind}_norm/{path}" for path in paths): vector for paths, vector in of_layers.items()}
        return Logs(in_all | entries_of(vectors), vectors=vectors) if per_layer else Logs(in_all)

    def together(logs: Any, mine: Logs) -> Logs:
        vectors = getattr(logs, "vectors", {})
        return Logs({**logs, **mine}, vectors={**vectors, **mine.vectors})

    def prefixed(mine: Logs) -> Logs:
        vectors = {tuple(f"{name}/{log}" for log in logs): vector for logs, vector in mine.vectors.items()}
        return Logs({f"{name}/{log}": value for log, value in mine.items()}, vectors=vectors)

    def on_before_update(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        del batch_idx, trainer
        mine = together(norms("grad", grads), norms("param", state.params))
        if histograms:
            of_layers = {f"grad_histogram/{path}": _histogram(grad) for path, grad in named_leaves(grads).items()}
            mine = mine.changed_to({**mine, **of_layers})
        if not default or not logs.keys().isdisjoint(mine):
            mine = prefixed(mine)
        taken = [log for log in mine if log in logs]
        if taken:
            raise ValueError(
                f"{name}: another callback has published the log {taken[0]!r}; give that one or this one another name, "
                f"gradient_statistics(name='clipped')"
            )
        return state, grads, together(logs, mine)

    def on_before_apply(batch_idx: Any, trainer: Any, state: Any, updates: Any, logs: Any) -> Any:
        del batch_idx, trainer
        mine = norms("update", updates)
        return state, updates, together(logs, prefixed(mine) if f"{name}/grad_norm" in logs else mine)

    return Callback(name=name, on_before_update=on_before_update, on_before_apply=on_before_apply)


def _histogram(values: Any) -> Any:
    first, last = HISTOGRAM_EXPONENTS[0], HISTOGRAM_EXPONENTS[-1]
    values = jnp.abs(values) if jnp.iscomplexobj(values) else values
    _, exponents = jnp.frexp(values)  # mantissas are in [0.5, 1), so these are one too large
    exponents = jnp.where(values == 0, first, jnp.where(jnp.isfinite(values), exponents - 1, last))
    bins = jnp.clip(exponents, first, last) - first
    # Counted as integers: a float32 that counts by ones stays at 2**24.
    return jnp.bincount(bins.ravel(), length=len(HISTOGRAM_EXPONENTS)).astype(jnp.float32)


def _norms(leaves: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """The norm of each leaf: a vector of those of one dtype, by their paths, which are sorted."""
    alike: dict[Any, list[str]] = defaultdict(list)
    for path, leaf in leaves.items():
        alike[(leaf.size, leaf.dtype) if leaf.size <= SMALL else path].append(path)
    paths_of: dict[Any, list[str]] = defaultdict(list)
    parts: dict[Any, list[Any]] = defaultdict(list)
    for paths in alike.values():
        norms = _norms_of_equal([leaves[path] for path in paths])
        paths_of[norms.dtype] += paths
        parts[norms.dtype].append(norms)
    return dict(_sorted(paths, vector_of(parts[dtype])) for dtype, paths in paths_of.items())


def _norms_of_equal(leaves: list[Any]) -> Any:
    """The norms of leaves of one size and dtype, as a vector; of one leaf alone, a scalar."""
    if len(leaves) == 1:
        return _norm(leaves[0])
    size = leaves[0].size
    groups = [leaves[start : start + GROUP] for start in range(0, len(leaves), GROUP)]
    vectors = [lax.concatenate([lax.reshape(leaf, (size,)) for leaf in group], 0) for group in groups]
    rows = [lax.reshape(vector, (len(group), size)) for vector, group in zip(vectors, groups, strict=True)]
    return jax.vmap(_norm)(lax.concatenate(rows, 0))


def _sorted(paths: list[str], norms: Any) -> tuple[tuple[str, ...], Any]:
    order = np.array(sorted(range(len(paths)), key=paths.__getitem__))
    if (order[1:] > order[:-1]).all():
        return tuple(paths), norms
    return tuple(sorted(paths)), norms.at[order].get(mode="promise_in_bounds", unique_indices=True)


def _norm(leaf: Any) -> Any:
    """In float32 at least: parameters may have a lower precision, in which a sum of squares is worth little."""
    magnitudes = jnp.abs(leaf)
    return optax.tree.norm(magnitudes.astype(jnp.float64 if magnitudes.dtype == jnp.float64 else jnp.float32))
