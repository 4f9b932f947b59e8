"""The general loss function, of a criterion or of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ant_jax._data.batches import batch_size_of
from ant_jax._hooks.returns import is_number
from ant_jax._models.model_state import WRITTEN_PARAMS, with_form_of, without_written
from ant_jax._models.pure_model import PureModel, apply_model
from ant_jax._step.broadcasts import stretches
from ant_jax._step.precision import Precision, at_least
from ant_jax._step.step import STEP_LOGS, LossFn, _at_least_float32
from ant_jax._trees import PyTree, describe, describe_tree


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
        outputs, new_state = apply_model(model, low_params, model_state, low_inputs, key)
        outputs = precision.cast_to_output(outputs)
        if precision.output_dtype is None:
            outputs = at_least(outputs, jnp.float32)
        size = batch_size_of(batch)
        loss = _reduce("criterion", criterion, outputs, targets, size, is_loss=True)
        logs = {name: _reduce(f"metric {name!r}", metric, outputs, targets, size) for name, metric in metrics.items()}
        if key is not None:
            new_state = _keep_dtypes("the model", model_state, new_state, params, low_params)
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
            new_state = _keep_dtypes("loss_fn", model_state, new_state, params, low_params)
        return _at_least_float32(jnp.asarray(loss)), (new_state, floats)

    return checked_loss


def _keep_dtypes(owner: str, model_state: PyTree, new: PyTree, params: PyTree, low_params: PyTree) -> PyTree:
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


def _reduce(
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
