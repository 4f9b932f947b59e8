"""A callback that writes down what is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from ant_jax._hooks.callback import HOOKS, Callback


class _Recorder(Callback):
    """See ``record_hooks``."""

    calls: list[tuple[Any, ...]]

    def __init__(self, name: str):
        calls: list[tuple[Any, ...]] = []

        def recorded(hook: str) -> Callable[..., Any]:
            def on_host(*arguments: Any) -> Any:
                jax.effects_barrier()  # what runs inside the step has been recorded before
                lead = arguments[:1] if HOOKS[hook].lead else ()
                calls.append((hook, *lead))
                return arguments[-2:]

            def in_step(batch_idx: Any, trainer: Any, state: Any, tree: Any, logs: Any) -> Any:
                jax.debug.callback(lambda i: calls.append((hook, int(i))), batch_idx, ordered=True)
                return state, tree, logs

            return in_step if HOOKS[hook].tree else on_host

        hooks: dict[str, Any] = {hook: recorded(hook) for hook in HOOKS}
        super().__init__(name=name, **hooks)
        object.__setattr__(self, "calls", calls)


def record_hooks(*, name: str = "record_hooks") -> _Recorder:
    """Make a callback that writes down every call of a hook, those inside the step when they run.

    Args:
        name: of the callback.

    Returns:
        A callback with the attribute ``calls``: tuples of the hook's name and what stands before ``trainer``.

    >>> from ant_jax import testing
    >>> recorder = testing.record_hooks()
    >>> tiny = testing.problem(recorder)
    >>> _ = tiny.trainer.fit(tiny.state, tiny.train_loader, num_epochs=1)
    >>> recorder.calls[:4]
    [('on_train_begin',), ('on_epoch_begin', 0), ('on_batch_begin', 0), ('on_backward_end', 0)]
    """
    return _Recorder(name)
