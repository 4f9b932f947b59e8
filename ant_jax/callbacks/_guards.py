"""Callbacks that guard a run against numbers that are not finite."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax._callback import Callback
from ant_jax._finite import NonFiniteError
from ant_jax._trees import named_leaves
from ant_jax.callbacks._arguments import check_count


_REMEDIES = "A lower learning rate, clip_by_global_norm or skip_nonfinite may help"


def terminate_on_nan(*, name: str = "terminate_on_nan") -> Callback:
    """End the run at the first batch with a number that is not finite, and say which.

    Inside the step, in ``on_backward_end``, it looks at the parameters, the loss and the gradients, as the callbacks
    before it left these. The first bad batch makes no update and is the last one, however many steps a launch has (an
    accumulation window that is open closes first, without it); then the error is raised on the host. Its attribute
    ``train_state`` is the state then, whose parameters that batch has not touched. At the end of an epoch it looks at
    the parameters once more, which the last update may have spoilt. (Where the precision is float16, a batch whose
    gradients overflow is the loss scale's business, and not looked at.)

    Args:
        name: of the callback. Its memory is ``{"batch_idx", "step", "leaf"}``, int32 scalars: where the first bad
            number was, -1 as long as there is none.

    Returns:
        A callback that raises ``NonFiniteError`` in ``on_batch_end`` or ``on_epoch_end``.

    >>> terminate_on_nan()
    Callback(name='terminate_on_nan', hooks=on_train_begin, on_backward_end, on_batch_end, on_epoch_end)
    """

    def init(state: Any) -> Any:
        del state
        return {field: jnp.int32(-1) for field in ("batch_idx", "step", "leaf")}

    def on_train_begin(trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        return state.with_callback_state(name, init(state)), logs  # a run that goes on after a mishap begins anew

    def on_backward_end(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        del trainer
        memory = state.callback_states[name]
        bad = _bad(list(_watched(state.params, logs["loss"], grads).values()))
        found = jnp.any(bad)
        here = {"batch_idx": batch_idx, "step": state.step, "leaf": jnp.argmax(bad).astype(jnp.int32)}
        first = found & (memory["step"] < 0)
        memory = {field: jnp.where(first, value, memory[field]) for field, value in here.items()}
        state = state.with_callback_state(name, memory)
        return state.skip_batch(when=found).request_stop(when=found), grads, logs

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        del batch_idx, trainer
        if _has_stopped(state):
            memory = {field: int(value) for field, value in state.callback_states[name].items()}
            if memory["step"] >= 0:
                what = list(_watched(state.params, None, state.params))[memory["leaf"]]
                raise NonFiniteError(
                    f"{what} is not finite at batch {memory['batch_idx']} of epoch {state.epoch} (step "
                    f"{memory['step']}); the parameters of this exception's train_state are untouched by that batch. "
                    f"{_REMEDIES}"
                )
        return state, logs

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        params = named_leaves(state.params)
        for path, bad in zip(params, np.asarray(_bad(list(params.values()))), strict=True):
            if bad:
                raise NonFiniteError(
                    f"the parameter {path!r} is not finite after the last update of epoch {epoch} (step "
                    f"{int(state.step) - 1}). {_REMEDIES}"
                )
        return state, logs

    return Callback(
        name=name,
        init=init,
        every=None,
        on_train_begin=on_train_begin,
        on_backward_end=on_backward_end,
        on_batch_end=on_batch_end,
        on_epoch_end=on_epoch_end,
    )


def skip_nonfinite(*, max_consecutive: int = 10, name: str = "skip_nonfinite") -> Callback:
    """Leave out batches whose loss or gradients are not finite.

    Inside the step, in ``on_backward_end``, it looks at the loss and at the gradients as the callbacks before it left
    them. A bad batch makes no update, joins no accumulation window and no mean, and leaves the model state as it was.
    (``optax.apply_if_finite`` does the first of these, for an optimizer.)

    Args:
        max_consecutive: a run that must leave out so many batches in a row ends with an error; at least 1.
        name: of the callback. Its memory is ``{"skipped", "consecutive"}``, int32 scalars: the batches left out so far,
            and how many of them were the last in a row.

    Returns:
        A callback that publishes ``step_skipped`` at every batch, 1 where it was left out, whose mean in the history is
        the share of an epoch, and ``skipped_steps`` at the end of an epoch, the number in the run so far.

    Raises:
        ValueError: ``max_consecutive`` is below 1.
        NonFiniteError: while training, after so many.

    >>> skip_nonfinite()
    Callback(name='skip_nonfinite', hooks=on_train_begin, on_backward_end, on_batch_end, on_epoch_end)
    """
    check_count("skip_nonfinite", "max_consecutive", max_consecutive, unit="batches")

    def init(state: Any) -> Any:
        del state
        return {"skipped": jnp.int32(0), "consecutive": jnp.int32(0)}

    def on_train_begin(trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        memory = state.callback_states[name]
        if memory["consecutive"] >= max_consecutive:  # a run that goes on after the error begins to count anew
            state = state.with_callback_state(name, {**memory, "consecutive": jnp.int32(0)})
        return state, logs

    def on_backward_end(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        del batch_idx, trainer
        memory = state.callback_states[name]
        bad = jnp.any(_bad([logs["loss"], *named_leaves(grads).values()]))
        skipped = memory["skipped"] + bad.astype(jnp.int32)
        # Once there are too many they stay so: the rest of an accumulation window, which may be good, follows.
        too_many = memory["consecutive"] >= max_consecutive
        consecutive = jnp.where(bad, memory["consecutive"] + 1, jnp.where(too_many, memory["consecutive"], 0))
        state = state.with_callback_state(name, {"skipped": skipped, "consecutive": consecutive})
        return state.skip_batch(when=bad).request_stop(when=consecutive >= max_consecutive), grads, logs

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        if _has_stopped(state):
            consecutive = int(state.callback_states[name]["consecutive"])
            if consecutive >= max_consecutive:
                raise NonFiniteError(
                    f"skip_nonfinite: {consecutive} batches in a row, by batch {batch_idx} of epoch {state.epoch}, had "
                    f"a loss or gradients that are not finite; max_consecutive={max_consecutive}. Use terminate_on_nan "
                    f"to see where the first such number is"
                )
        return state, logs

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        del epoch, trainer
        return state, {**logs, "skipped_steps": state.callback_states[name]["skipped"]}

    return Callback(
        name=name,
        init=init,
        every=None,
        on_train_begin=on_train_begin,
        on_backward_end=on_backward_end,
        on_batch_end=on_batch_end,
        on_epoch_end=on_epoch_end,
    )


def _has_stopped(state: Any) -> bool:
    """Whether the step has asked to end the run, and no accumulation window is open; costs nothing as long as not."""
    return state.stop and not state.window_open


def _watched(params: Any, loss: Any, grads: Any) -> dict[str, Any]:
    """Name what is looked at, in the order in which one spoils the next."""
    return (
        {f"the parameter {path!r}": leaf for path, leaf in named_leaves(params).items()}
        | {"the loss": loss}
        | {f"the gradient of {path!r}": leaf for path, leaf in named_leaves(grads).items()}
    )


@jax.jit
def _bad(leaves: list[Any]) -> Any:
    """Which leaves have a number that is not finite, bool[leaves]."""
    return jnp.stack([~jnp.all(jnp.isfinite(leaf)) for leaf in leaves])
