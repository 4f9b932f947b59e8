"""Callbacks that guard a run against numbers that are not finite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax._arguments import check_count
from ant_jax._finite import NonFiniteError
from ant_jax._hooks.callback import Callback, LateInit
from ant_jax._state.hyperparams import carried, carried_in_memory
from ant_jax._state.memories import members_of, with_members
from ant_jax._trees import named_leaves
from ant_jax.callbacks._averages import averages


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
                step = state.total_steps - (int(state.step) - memory["step"])
                what = list(_watched(state.params, None, state.params))[memory["leaf"]]
                raise NonFiniteError(
                    f"{what} is not finite at batch {memory['batch_idx']} of epoch {state.epoch} (step "
                    f"{step}); the parameters of this exception's train_state are untouched by that batch. "
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
                    f"{state.total_steps - 1}). {_REMEDIES}"
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
    max_consecutive = check_count("skip_nonfinite", "max_consecutive", max_consecutive, unit="batches")

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


def roll_back(*, every: int = 100, times: int = 3, name: str = "roll_back") -> Callback:
    """Go back to the last good parameters where a number is not finite, and go on with the data that follows.

    Inside the step, in ``on_backward_end``, it looks at the parameters, the model state, the loss and the gradients, as
    the callbacks before it left these. Every so many batches, where all are finite, it keeps parameters, model state,
    optimizer state and what other callbacks remember of floating numbers. At a bad batch these take the place of the
    present ones; the batch counts for nothing, as with :func:`skip_nonfinite`, and an accumulation window that is open
    is emptied. Of the other callbacks' memories, those with an average of the parameters (:func:`ema`, :func:`swa`) go
    back, and those in which a number that was finite when it was kept is not any more. Data, ``state.step``,
    hyper-parameters and all other memories do not: the same batches from the same parameters would lead to the same
    number. (A ``checkpoint`` that comes between an update that spoils parameters and the batch after it refuses them,
    and ends the run: let it save rarely, or inside ``tolerate``.)

    Args:
        every: batches between one keeping and the next. It costs memory for a second set of parameters, optimizer state
            and averages, and so much of each checkpoint.
        times: how many times a run may go back; one that must once more ends with an error.
        name: of the callback. Its memory is ``{"kept": {"params", "model_state", "opt_state", "memories"}, "times":
            int32 scalar}``, the optimizer state and each callback's memory as their leaves, the latter how many times
            it has gone back so far.

    Returns:
        A callback that publishes ``step_skipped`` at every batch, 1 where it went back, and ``roll_backs`` at the end
        of an epoch, the number in the run so far.

    Raises:
        ValueError: ``every`` or ``times`` is below 1.
        NonFiniteError: while training, at the first bad batch after so many.

    References:
        Chowdhery et al., PaLM: Scaling language modeling with pathways, 2022, section 5.1, goes back from spikes of the
        loss in this way, https://arxiv.org/abs/2204.02311

    >>> roll_back(every=50)
    Callback(name='roll_back', hooks=on_train_begin, on_backward_end, on_batch_end, on_epoch_end)
    """
    every = check_count("roll_back", "every", every, unit="batches")
    times = check_count("roll_back", "times", times)

    def init(state: Any) -> Any:
        others = [other for other, memory in state.callback_states.items() if _may_be_spoilt(memory)]
        return {"kept": worth_keeping(state, others), "times": jnp.int32(0)}

    def worth_keeping(state: Any, others: Iterable[str]) -> Any:
        # The leaves alone: hyper-parameters are to be found in the optimizer's own state, and nowhere else.
        return {
            "params": state.params,
            "model_state": state.model_state,
            "opt_state": jax.tree.leaves(state.opt_state),
            "memories": {other: jax.tree.leaves(state.callback_states[other]) for other in others},
        }

    def on_train_begin(trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        memory = state.callback_states[name]
        if memory["times"] > times:  # a run that goes on after the error begins to count anew
            state = state.with_callback_state(name, {**memory, "times": jnp.int32(0)})
        return state, logs

    def on_backward_end(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        del batch_idx, trainer
        memory = state.callback_states[name]
        leaves = jax.tree.leaves((logs["loss"], state.params, state.model_state, grads))
        bad = jnp.any(_bad([leaf for leaf in leaves if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]))
        kept = memory["kept"]
        now = worth_keeping(state, kept["memories"])
        structures = {other: jax.tree.structure(state.callback_states[other]) for other in kept["memories"]}

        def back() -> Any:
            memories = {
                other: _gone_back(structures[other].unflatten(leaves), state.callback_states[other])
                for other, leaves in kept["memories"].items()
            }
            return {**kept, "memories": {other: jax.tree.leaves(memory) for other, memory in memories.items()}}

        due = ~bad & (state.step % every == 0)
        gone_back = jax.lax.cond(bad, back, lambda: now)
        memory = {
            "kept": jax.lax.cond(due, lambda: now, lambda: kept),
            "times": memory["times"] + bad.astype(jnp.int32),
        }
        if state.accumulator is not None:
            emptied = state.accumulator.replace(
                grads=jax.tree.map(lambda grad: jnp.where(bad, 0, grad), state.accumulator.grads),
                examples=jnp.where(bad, 0, state.accumulator.examples),
                loss=jnp.where(bad, 0, state.accumulator.loss),
            )
            state = state.replace(accumulator=emptied)
        opt_state = jax.tree.unflatten(jax.tree.structure(state.opt_state), gone_back["opt_state"])
        memories = {other: structures[other].unflatten(leaves) for other, leaves in gone_back.pop("memories").items()}
        state = state.replace(**{**gone_back, "opt_state": carried(opt_state, state.opt_state)})
        state = state.replace(callback_states={**state.callback_states, **memories})
        state = state.with_callback_state(name, memory)
        return state.skip_batch(when=bad).request_stop(when=memory["times"] > times), grads, logs

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        if _has_stopped(state) and int(state.callback_states[name]["times"]) > times:
            raise NonFiniteError(
                f"roll_back: by batch {batch_idx} of epoch {state.epoch}, numbers were not finite once more after the "
                f"run had gone back {times} times. Use terminate_on_nan to see where the first such number is. "
                f"{_REMEDIES}"
            )
        return state, logs

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        del epoch, trainer
        return state, {**logs, "roll_backs": state.callback_states[name]["times"]}

    return Callback(
        name=name,
        init=LateInit(init),
        every=None,
        on_train_begin=on_train_begin,
        on_backward_end=on_backward_end,
        on_batch_end=on_batch_end,
        on_epoch_end=on_epoch_end,
    )


def _may_be_spoilt(memory: Any) -> bool:
    """Whether a memory is on the device and has numbers that may become infinite or NaN."""
    leaves = jax.tree.leaves(memory)
    on_device = all(isinstance(leaf, jax.Array) for leaf in leaves)
    return on_device and any(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves)


def _gone_back(kept: Any, now: Any) -> Any:
    """A memory as it was kept, where it has an average or has been spoilt since, but with its hyper-parameters."""

    def of_member(kept: Any, now: Any) -> Any:
        if averages(now):
            return carried_in_memory(kept, now)
        pairs = zip(jax.tree.leaves(kept), jax.tree.leaves(now), strict=True)
        floats = [(old, new) for old, new in pairs if jnp.issubdtype(new.dtype, jnp.inexact)]
        spoilt = jnp.any(jnp.array([jnp.any(jnp.isfinite(old) & ~jnp.isfinite(new)) for old, new in floats], bool))
        chosen = jax.tree.map(lambda old, new: jnp.where(spoilt, old, new), kept, now)
        return carried_in_memory(chosen, now)

    members = zip(members_of(kept), members_of(now), strict=True)
    return with_members(now, [of_member(*pair) for pair in members])


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
