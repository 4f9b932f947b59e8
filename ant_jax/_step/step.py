"""The pure step: gradient, hooks, optax. What is compiled, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from ant_jax._data.batches import batch_size_of
from ant_jax._hooks.callback_list import CallbackList
from ant_jax._logs.logs import Logs
from ant_jax._logs.packing import PackedLogs, pack
from ant_jax._models.model_state import without_written
from ant_jax._state.host_fields import CYCLE
from ant_jax._state.objective import Objective, update_with
from ant_jax._state.train_state import Accumulator, TrainState
from ant_jax._step.branches import run_if
from ant_jax._step.precision import Precision, at_least
from ant_jax._trees import PyTree, describe_tree


# (params, model_state, batch, key) -> (loss, (model_state, logs)). A criterion(outputs, targets) is brought into this
# form, which is the only one that the step knows.
LossFn = Callable[[Any, Any, Any, Any], tuple[Any, tuple[Any, Mapping[str, Any]]]]

# Logs that the step itself writes; a metric cannot have one of these names.
STEP_LOGS = ("batch_size", "loss", "step_skipped", "loss_scale")


class StepResult(NamedTuple):
    """What one step returns.

    Attributes:
        state: after the step; its ``stop`` is ``None``.
        stop: boolean scalar, whether a traced hook asked to stop; ``None`` when no traced hook can.
        logs: every log of this batch, and how many examples each stands for.
    """

    state: TrainState
    stop: jax.Array | None
    logs: PackedLogs


@dataclasses.dataclass(frozen=True)
class Step:
    """The arithmetic of one trainer, as pure functions of state and batch.

    Attributes:
        loss_fn: ``(params, model_state, batch, key) -> (loss, (model_state, logs))``; no ``key`` in evaluation.
        optimizer: takes the gradients that ``on_before_update`` leaves.
        events: whose traced hooks run inside the step.
        accumulation_steps: micro-batches in a window.
        accumulation_mean: ``"examples"`` or ``"steps"``; see ``Trainer``.
        max_grad_norm: global norm to clip to before the update, or ``None``.
        needs_pairs: whether batches must be ``(inputs, targets)``.
        precision: that ``loss_fn`` computes in.
    """

    loss_fn: LossFn
    optimizer: optax.GradientTransformation
    events: CallbackList
    accumulation_steps: int
    accumulation_mean: str
    max_grad_norm: float | None
    needs_pairs: bool
    precision: Precision

    def check_batch(self, batch: PyTree) -> None:
        """Raise TypeError if the loss cannot read this batch."""
        if self.needs_pairs and not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise TypeError(
                f"criterion needs batches of the form (inputs, targets), got {describe_tree(batch)}; for any other "
                f"batch give the Trainer a loss_fn(params, model_state, batch, key) instead, for arrays in memory an "
                f"ArrayLoader((X, Y), batch_size=32) in the place of the loader"
            )

    def gradients(self, state: TrainState, batch: PyTree) -> tuple[TrainState, PyTree, dict[str, Any], Any]:
        """Differentiate the loss of one micro-batch.

        Returns:
            The state with the new model state and loss scale, and with the parameters that the model has written; the
            gradients, unscaled and in float32, those of complex parameters conjugated, as optax descends; the logs; and
            whether all gradients are finite, ``None`` when nobody scales the loss.
        """
        _refuse_nothing_to_train(state.params, state.model_state)
        key = jax.random.fold_in(state.key, state.step)
        replacing, rest = _split_replaced(state.model_state)

        def loss_of(variables: tuple[PyTree, PyTree]) -> tuple[Any, tuple[Any, Mapping[str, Any]]]:
            params, replacing = variables
            return self.loss_fn(_join(params), {**rest, **replacing} if replacing else rest, batch, key)

        variables = _part(state.params), replacing
        scale = state.loss_scale
        if scale is None:
            differentiated = jax.value_and_grad(loss_of, has_aux=True)(variables)
            (loss, (model_state, logs)), (grads, replacements) = differentiated
            loss_scale, finite, skipped = None, None, {}
        else:
            scaled = scale.value_and_grad(loss_of, has_aux=True)(variables)
            loss_scale, finite, (loss, (model_state, logs)), (grads, replacements) = scaled
            # These are no gradients, and have not been scaled.
            replacements = jax.tree.map(lambda leaf: leaf * scale.scale, replacements)
            skipped = {"step_skipped": 1.0 - finite.astype(jnp.float32), "loss_scale": scale.scale}
        grads = jax.tree.map(_at_least_float32, _join(grads))
        model_state, written = without_written(model_state)
        params = state.params if written is None else written
        if replacing:
            model_state = {**model_state, **replacements}
        if finite is not None:
            model_state = _where(finite, model_state, state.model_state)
            params = _where(finite, params, state.params)
        state = state.replace(params=params, model_state=model_state, loss_scale=loss_scale)
        return state, grads, {"loss": loss, **logs, **skipped}, finite

    def train_step(self, state: TrainState, batch: PyTree, batch_idx: Any, last: Any) -> StepResult:
        """Train on one micro-batch; a pure function, made to be compiled.

        Args:
            state: without host fields and ``stop``.
            batch: any pytree of arrays.
            batch_idx: int32 scalar, the position in the epoch.
            last: boolean scalar, whether the epoch ends with this batch, so that an open window closes.
        """
        run_hook = self.events.step_hook
        stop: Any = jnp.bool_(False)
        skip: Any = jnp.bool_(False)
        examples = batch_size_of(batch)
        state = state.replace(stop=stop)
        state, logs = run_hook("on_batch_begin", batch_idx, state, Logs({"batch_size": examples}))

        before = state
        functions = self._functions_of(state, batch)
        state, grads, step_logs, finite = self.gradients(state, batch)
        before_hooks, logs = state.replace(skip=skip), logs.changed_to({**logs, **step_logs})
        state, grads, after_hooks = run_hook("on_backward_end", batch_idx, before_hooks, grads, logs)
        if finite is not None:  # what hooks made of gradients that overflowed must not stay
            state = _where(finite, state, before_hooks)
            after_hooks = _published_if(finite, logs, after_hooks)
        logs = after_hooks
        if state.skip is not skip:
            skipped: Any = state.skip
            kept = ~skipped
            finite = kept if finite is None else finite & kept
            if state.model_state is before_hooks.model_state:  # or a hook has said what it is to be
                state = state.replace(model_state=_where(finite, state.model_state, before.model_state))
            if state.params is before_hooks.params:
                state = state.replace(params=_where(finite, state.params, before.params))
            logs = logs.changed_to({**logs, "step_skipped": 1.0 - finite.astype(jnp.float32)})
        state = state.replace(skip=None)

        counted = examples if finite is None else jnp.where(finite, examples, 0)
        state, grads, loss, due, in_update = self._accumulate(state, grads, logs["loss"], counted, finite, last)
        seen = set(logs)
        objective = Objective(loss, grads, *functions)
        state, logs = self._update_if(due, batch_idx, state, objective, logs)
        weights = {name: counted if name in seen else in_update for name in logs}

        state = state.replace(step=(state.step + 1) & (CYCLE - 1))
        state, logs = run_hook("on_batch_end", batch_idx, state, logs)
        weights |= {name: examples for name in logs if name not in weights or name in ("step_skipped", "loss_scale")}
        values = {name: jnp.asarray(value) for name, value in logs.items() if name != "batch_size"}
        packed = pack(values, _own_weights(weights, logs.present), tuple(logs.present), logs.vectors)
        asked: Any = None if state.stop is stop else state.stop
        return StepResult(state.replace(stop=None), asked, packed)

    def _functions_of(self, state: TrainState, batch: PyTree) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The loss of a batch, and its gradient, as functions of the parameters; ``state`` is that before the batch."""

        def refuse(*_: Any) -> Any:
            raise ValueError(
                f"the optimizer, or a transformation given to from_optax, evaluates the loss at other parameters "
                f"(value_fn, grad_fn or obj_fn), and gradient_accumulation_steps is {self.accumulation_steps}: the "
                f"batches of a window are not kept. Use larger batches and gradient_accumulation_steps=1"
            )

        def value_fn(params: PyTree) -> Any:
            key = jax.random.fold_in(state.key, state.step)
            return self.loss_fn(params, state.model_state, batch, key)[0]

        def grad_fn(params: PyTree) -> PyTree:
            _, grads, _, _ = self.gradients(state.replace(params=params), batch)
            return _like(params, grads)

        return (value_fn, grad_fn) if self.accumulation_steps == 1 else (refuse, refuse)

    def _accumulate(
        self, state: TrainState, grads: PyTree, loss: Any, counted: Any, finite: Any, last: Any
    ) -> tuple[TrainState, PyTree, Any, Any, Any]:
        """Add the gradients and the loss to the window.

        Returns:
            The state, the gradients to update with, the loss that they are of, whether to update now (``None`` when
            always) and how many examples they stand for.
        """
        window = state.accumulator
        if window is None:
            return state, grads, loss, finite, counted
        if finite is not None:
            grads, loss = _where(finite, (grads, loss), jax.tree.map(jnp.zeros_like, (grads, loss)))
        by_examples = self.accumulation_mean == "examples"
        weight = jnp.asarray(counted, jnp.float32) if by_examples else 1.0 / self.accumulation_steps
        sums = jax.tree.map(lambda total, grad: total + weight * grad, window.grads, grads)
        losses = window.loss + (weight * loss).astype(window.loss.dtype)
        examples = window.examples + counted
        micro_batches = window.micro_batches + 1
        closes = (micro_batches == self.accumulation_steps) | last
        # A window in which every micro-batch overflowed closes without an update.
        due = closes & (examples > 0)
        kept = Accumulator(sums, examples, micro_batches, losses)
        state = state.replace(accumulator=_where(closes, jax.tree.map(jnp.zeros_like, kept), kept))
        divisor = jnp.maximum(examples, 1).astype(jnp.float32) if by_examples else None
        mean, loss = (sums, losses) if divisor is None else jax.tree.map(lambda sum: sum / divisor, (sums, losses))
        return state, mean, loss, due, jnp.where(due, examples, 0)

    def _update_if(
        self, due: Any, batch_idx: Any, state: TrainState, objective: Objective, logs: Logs
    ) -> tuple[TrainState, Logs]:
        """Run ``_update`` where ``due``; a log that it would publish is NaN (0, for an integer) where it is not."""
        if due is None:
            return self._update(batch_idx, state, objective, logs)
        return run_if(due, lambda: self._update(batch_idx, state, objective, logs), state, logs)

    def _update(self, batch_idx: Any, state: TrainState, objective: Objective, logs: Logs) -> tuple[TrainState, Logs]:
        grads = objective.grad
        objective = dataclasses.replace(objective, grad=_like(state.params, grads))
        state = state.replace(objective=objective)
        state, grads, logs = self.events.step_hook("on_before_update", batch_idx, state, grads, logs)
        if self.max_grad_norm is not None:
            grads, _ = optax.clip_by_global_norm(self.max_grad_norm).update(grads, optax.EmptyState())
        grads = _like(state.params, grads)
        extra_args = objective.extra_args()
        updates, opt_state = update_with(self.optimizer, grads, state.opt_state, state.params, extra_args)
        state = state.replace(opt_state=opt_state)
        state, updates, logs = self.events.step_hook("on_before_apply", batch_idx, state, updates, logs)
        return state.replace(params=optax.apply_updates(state.params, updates), objective=None), logs

    def evaluation_step(self, params: PyTree, model_state: PyTree, batch: PyTree) -> PackedLogs:
        """Return the loss and the metrics of one batch in evaluation mode."""
        loss, (_, logs) = self.loss_fn(params, model_state, batch, None)
        return pack({name: jnp.asarray(value) for name, value in {"loss": loss, **logs}.items()})


def _own_weights(weights: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of the logs that do not, or not always, stand for all examples of the batch.

    Logs that stand for the same examples get the very same weight, which is then summed once.
    """
    made: dict[Any, Any] = {}
    own: dict[str, Any] = {}
    for name, weight in weights.items():
        there = present.get(name)
        if there is not None:
            own[name] = made.setdefault((id(weight), id(there)), jnp.where(there, weight, 0))
        elif not isinstance(weight, int):
            own[name] = made.setdefault(id(weight), jnp.asarray(weight))
    return own


def _published_if(condition: Any, before: Logs, after: Logs) -> Logs:
    """Let what hooks have published between two logs be absent where a condition does not hold."""
    published = [name for name, log in after.items() if log is not before.get(name)]
    present = {name: condition & after.present[name] if name in after.present else condition for name in published}
    return after.changed_to(Logs(after, present=present))


def _at_least_float32(leaf: jax.Array) -> jax.Array:
    return at_least(leaf, jnp.float32)


def _like(old: PyTree, new: PyTree) -> PyTree:
    """Give the new tree the old one's dtypes, which a low precision must not change."""
    if jax.tree.structure(old) != jax.tree.structure(new):
        return new
    return jax.tree.map(lambda before, after: after.astype(before.dtype), old, new)


class _Complex(NamedTuple):
    """A complex parameter as two real ones."""

    real: Any
    imag: Any


def _part(params: PyTree) -> PyTree:
    """Split complex parameters into real ones.

    The gradient of a real function in these is, put together again, the direction in which it rises, as optimizers
    expect it; that in the complex number itself is by JAX's convention the conjugate.
    """
    return jax.tree.map(lambda leaf: _Complex(leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else leaf, params)


def _join(parts: PyTree) -> PyTree:
    return jax.tree.map(
        lambda part: jax.lax.complex(*part) if isinstance(part, _Complex) else part,
        parts,
        is_leaf=lambda part: isinstance(part, _Complex),
    )


def _split_replaced(model_state: PyTree) -> tuple[PyTree, PyTree]:
    """Split off the part of a model state whose next value is its gradient: the scales of linen's fp8 layers."""
    if not isinstance(model_state, Mapping) or OVERWRITE_WITH_GRADIENT not in model_state:
        return {}, model_state
    replaced = {OVERWRITE_WITH_GRADIENT: model_state[OVERWRITE_WITH_GRADIENT]}
    return replaced, {name: entry for name, entry in model_state.items() if name not in replaced}


def _refuse_nothing_to_train(params: PyTree, model_state: PyTree) -> None:
    if not jax.tree.leaves(params):
        raise ValueError(
            f"the model has no parameters to train; its model state has: {describe_tree(model_state) or 'nothing'}. "
            f"What is trained of a flax.nnx.Module is nnx.Param: put arrays into one, self.w = nnx.Param(array), and "
            f"let a Variable type of your own subclass it, class Adapter(nnx.Param); of a flax.linen.Module it is what "
            f"self.param makes, and of a pair of functions the first that init returns"
        )


def _where(condition: Any, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(condition, a, b), new, old)
