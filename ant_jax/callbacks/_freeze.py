"""Keep a part of the parameters as it is."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from ant_jax._callback import Callback
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
        ValueError: in ``Trainer.init``, when it matches no parameter; the message lists the paths.

    >>> freeze("encoder/*")
    Callback(name='freeze', hooks=on_backward_end, on_before_apply)
    """
    is_frozen = _predicate(filter)

    def init(state: Any) -> None:
        paths = list(named_leaves(state.params))
        if not any(map(is_frozen, paths)):
            raise ValueError(f"freeze: {filter!r} matches none of the parameters {', '.join(paths)}")

    def zeroed(tree: Any) -> Any:
        leaves, treedef = jax.tree.flatten(tree)
        paths = named_leaves(tree)
        return jax.tree.unflatten(
            treedef,
            [jnp.zeros_like(leaf) if is_frozen(path) else leaf for path, leaf in zip(paths, leaves, strict=True)],
        )

    def on_backward_end(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        del batch_idx, trainer
        return state, zeroed(grads), logs

    def on_before_apply(batch_idx: Any, trainer: Any, state: Any, updates: Any, logs: Any) -> Any:
        del batch_idx, trainer
        return state, zeroed(updates), logs

    return Callback(name=name, init=init, on_backward_end=on_backward_end, on_before_apply=on_before_apply)


def _predicate(filter: Any) -> Callable[[str], bool]:
    if callable(filter):
        return lambda path: bool(filter(path))
    patterns = [filter] if isinstance(filter, str) else list(filter) if isinstance(filter, Iterable) else []
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"freeze: filter must be a pattern, patterns, or a function of a path, got {filter!r}")
    return lambda path: any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
