"""Keep a part of the parameters as it is."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from ant_jax._arguments import check_function, refuse
from ant_jax._hooks.callback import Callback
from ant_jax._trees import named_leaves


def freeze(filter: str | Iterable[str] | Callable[[str], bool], *, name: str = "freeze") -> Callback:
    """Keep some parameters as they are, bit for bit.

    It sets their gradients to zero in ``on_backward_end``, so that they count in no norm that is computed after it
    (list it first), and what the optimizer would add to them in ``on_before_apply``, so that weight decay does not move
    them either. XLA then leaves out the part of the backward pass that nobody needs.

    Args:
        filter: which to freeze, by their paths, such as ``"encoder/layers_0/kernel"``: a pattern
            (``"encoder/*"``, where ``*`` stands for anything, ``/`` included), several of them, or a function
            ``filter(path) -> bool``.
        name: of the callback; it keeps no memory.

    Returns:
        A callback that changes gradients and updates.

    Raises:
        TypeError: ``filter`` is something else.
        ValueError: a pattern is empty; or, in ``Trainer.init``, when the function, or one of the patterns, matches no
            parameter; the message lists the paths.

    >>> freeze("encoder/*")
    Callback(name='freeze', hooks=on_backward_end, on_before_apply)
    """
    matchers = _matchers(filter)

    def init(state: Any) -> None:
        paths = list(named_leaves(state.params))
        for given, matches in matchers.items():
            if not any(map(matches, paths)):
                raise ValueError(f"freeze: {given!r} matches none of the parameters {', '.join(paths)}")

    def with_frozen(value: float, tree: Any) -> Any:
        leaves, treedef = jax.tree.flatten(tree)
        frozen = [any(matches(path) for matches in matchers.values()) for path in named_leaves(tree)]
        return jax.tree.unflatten(
            treedef, [jnp.full_like(leaf, value) if f else leaf for f, leaf in zip(frozen, leaves, strict=True)]
        )

    def on_backward_end(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        del batch_idx, trainer
        return state, with_frozen(0.0, grads), logs

    def on_before_apply(batch_idx: Any, trainer: Any, state: Any, updates: Any, logs: Any) -> Any:
        del batch_idx, trainer
        return state, with_frozen(-0.0, updates), logs  # adding 0.0 would make 0.0 of a parameter that is -0.0

    return Callback(name=name, init=init, on_backward_end=on_backward_end, on_before_apply=on_before_apply)


def _matchers(filter: Any) -> dict[Any, Callable[[str], bool]]:
    """What was given, the function or each pattern, with what it says of a path."""
    if callable(filter):
        check_function("freeze", "filter", filter, "path")
        return {filter: lambda path: bool(filter(path))}
    patterns = [filter] if isinstance(filter, str) else list(filter) if isinstance(filter, Iterable) else []
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"freeze: filter must be a pattern, patterns, or a function of a path, got {filter!r}")
    if not all(patterns):
        refuse("freeze", "filter", "a pattern that is not empty, or several", filter)
    return {pattern: functools.partial(fnmatch.fnmatchcase, pat=pattern) for pattern in patterns}
