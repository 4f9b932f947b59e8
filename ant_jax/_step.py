"""The pure step: gradient, hooks, optax. What is compiled, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from ant_jax._branches import run_if
from ant_jax._broadcasts import stretches
from ant_jax._events import Events
from ant_jax._host_fields import CYCLE
from ant_jax._judging import is_number
from ant_jax._logs import Logs
from ant_jax._model_state import WRITTEN_PARAMS, with_form_of, without_written
from ant_jax._models import PureModel, applied
from ant_jax._objective import Objective, transformed
from ant_jax._packing import PackedLogs, pack
from ant_jax._precision import Precision, at_least
from ant_jax._state import Accumulator, TrainState
from ant_jax._trees import PyTree, describe, describe_tree
from ant_jax.data import batch_size_of


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
    events: Events
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
            return self.loss_fn(_joined(params), {**rest, **replacing} if replacing else rest, batch, key)

        variables = _parted(state.params), replacing
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
        grads = jax.tree.map(_at_least_float32, _joined(grads))
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
        updates, opt_state = transformed(self.optimizer, grads, state.opt_state, state.params, extra_args)
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


def criterion_loss(
    model: PureModel,
    criterion: Callable[[Any, Any], Any],
    metrics: Mapping[str, Callable[[Any, Any], Any]],
    precision: Precision,
) -> LossFn:
    """Make the general loss function of ``criterion(outputs, targets)``, on batches ``(inputs, targets)``."""

    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> tuple[Any, tuple[Any, dict[str, Any]]]:
        inputs, targets = batch
        low_params, low_inputs = precision.cast_to_compute(params), precision.cast_to_compute(inputs)
        outputs, new_state = applied(model, low_params, model_state, low_inputs, key)
        outputs = precision.cast_to_output(outputs)
        if precision.output_dtype is None:
            outputs = at_least(outputs, jnp.float32)
        size = batch_size_of(batch)
        loss = _reduced("criterion", criterion, outputs, targets, size, is_loss=True)
        logs = {name: _reduced(f"metric {name!r}", metric, outputs, targets, size) for name, metric in metrics.items()}
        if key is not None:
            new_state = _kept("the model", model_state, new_state, params, low_params)
        return loss, (new_state, logs)

    return loss_fn


def general_loss(loss_fn: LossFn, precision: Precision) -> LossFn:
    """Wrap a user's general loss function: its precision, and checks of what it returns.

    Its parameters are cast, and its batch is not, because targets must keep their digits, and in a batch of any form
    nothing tells targets from inputs.
    """
    dtype = precision.compute_dtype

    def checked_loss(params: Any, model_state: Any, batch: Any, key: Any) -> tuple[Any, tuple[Any, dict[str, Any]]]:
        low_params = precision.cast_to_compute(params)
        result = loss_fn(low_params, model_state, batch, key)
        match result:
            case (loss, (new_state, Mapping() as logs)):
                pass
            case _:
                raise TypeError(f"loss_fn must return (loss, (model_state, logs)), logs a mapping, got {_form(result)}")
        if not is_number(loss) or jnp.shape(loss) != ():
            raise ValueError(f"loss_fn must return a scalar loss, the mean over the batch, got {describe(loss)}")
        _refuse_without_gradient("loss_fn", loss)
        if dtype is not None and jnp.finfo(dtype).bits < 32 and jnp.result_type(loss) == dtype:
            raise TypeError(
                f"loss_fn computed its loss in {dtype.name}, in which a mean has no more than three digits; turn what "
                f"the model returns into float32 before the loss, outputs.astype(jnp.float32)"
            )
        for name, value in logs.items():
            if name in STEP_LOGS:
                raise ValueError(f"loss_fn returned a log named {name!r}, which the trainer writes itself; rename it")
            if not isinstance(name, str) or not is_number(value):
                raise TypeError(
                    f"loss_fn returned the log {name!r} as {describe(value)}; a log is a number or an array under a "
                    f"string. Give each value of a nested log a name of its own, such as 'outer/inner'"
                )
        floats = {name: _at_least_float32(jnp.asarray(value)) for name, value in logs.items()}
        if key is not None:
            new_state = _kept("loss_fn", model_state, new_state, params, low_params)
        return _at_least_float32(jnp.asarray(loss)), (new_state, floats)

    return checked_loss


def _at_least_float32(leaf: jax.Array) -> jax.Array:
    return at_least(leaf, jnp.float32)


def _like(old: PyTree, new: PyTree) -> PyTree:
    """Give the new tree the old one's dtypes, which a low precision must not change."""
    if jax.tree.structure(old) != jax.tree.structure(new):
        return new
    return jax.tree.map(lambda before, after: after.astype(before.dtype), old, new)


def _kept(owner: str, model_state: PyTree, new: PyTree, params: PyTree, low_params: PyTree) -> PyTree:
    """Bring what a training step returned as model state into the form of the old one, written parameters included."""
    rest, written = without_written(new)
    rest = with_form_of(model_state, rest, owner)
    if written is None:
        return rest
    if low_params is not params:
        # By their changes, so that what has not changed keeps the digits that the low precision does not have.
        written = jax.tree.map(
            lambda param, low, new: param + (new - low).astype(param.dtype), params, low_params, written
        )
    return {**rest, WRITTEN_PARAMS: with_form_of(params, written, owner)}


class _Complex(NamedTuple):
    """A complex parameter as two real ones."""

    real: Any
    imag: Any


def _parted(params: PyTree) -> PyTree:
    """Split complex parameters into real ones.

    The gradient of a real function in these is, put together again, the direction in which it rises, as optimizers
    expect it; that in the complex number itself is by JAX's convention the conjugate.
    """
    return jax.tree.map(lambda leaf: _Complex(leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else leaf, params)


def _joined(parts: PyTree) -> PyTree:
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


def _reduced(
    what: str, function: Callable[[Any, Any], Any], outputs: Any, targets: Any, size: int, *, is_loss: bool = False
) -> jax.Array:
    """Call a criterion or a metric and take the mean of what it returns; explain what does not fit."""
    given = f"outputs {describe_tree(outputs)} and targets {describe_tree(targets)}"
    try:
        values = function(outputs, targets)
    except Exception as error:
        error.add_note(f"in {what}, called with {given}")
        raise
    if not hasattr(values, "dtype") and not isinstance(values, bool | int | float):
        raise TypeError(f"{what} must return an array, got {type(values).__name__} for {given}")
    if is_loss:
        _refuse_without_gradient(what, values)
    if _could_stretch(outputs, targets) and stretches(function, outputs, targets):
        raise ValueError(
            f"{what} was called with {given}: as many values in another shape, and it broadcasts them against each "
            f"other; give the targets the shape of the outputs"
        )
    if not _is_one_each(jnp.shape(values), outputs, targets, size):
        raise ValueError(
            f"{what} must return one value an example, or their mean as a scalar; it returned {describe(values)} for "
            f"{given}"
        )
    return jnp.mean(_at_least_float32(jnp.asarray(values)))


def _could_stretch(outputs: Any, targets: Any) -> bool:
    """Whether two arrays hold as many values in different shapes, such as a column and a row."""
    arrays = hasattr(outputs, "shape") and hasattr(targets, "shape")
    return arrays and outputs.shape != targets.shape and outputs.size == targets.size > 1


def _is_one_each(shape: tuple[int, ...], outputs: Any, targets: Any, size: int) -> bool:
    """Whether a result of this shape can be one value for each example (or token), or their mean."""
    if shape == () or shape == getattr(targets, "shape", None):
        return True
    return shape == outputs.shape[: len(shape)] if hasattr(outputs, "shape") else shape[0] == size


def _refuse_without_gradient(what: str, loss: Any) -> None:
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise ValueError(f"{what} must return a real floating loss, which has a gradient, got {describe(loss)}")


def _form(result: Any) -> str:
    return f"({', '.join(map(_form, result))})" if isinstance(result, tuple) else describe(result)


def _where(condition: Any, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(condition, a, b), new, old)
