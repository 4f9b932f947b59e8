"""What an update is to lower, for the optax transformations that ask for more than the gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from flax import struct

from ant_jax._trees import PyTree


@struct.dataclass
class Objective:
    """The loss that an update is to lower.

    Attributes:
        value: its value, a scalar: of the batch, or the mean over an accumulation window, as the gradient's.
        grad: its gradient as ``on_backward_end`` left it, of the parameters' dtypes; no later hook has changed it.
        value_fn: ``value_fn(params) -> loss`` of this batch at other parameters, with this batch's random key.
        grad_fn: ``grad_fn(params) -> gradients`` of it, unscaled; no hook runs.
    """

    value: jax.Array
    grad: PyTree
    value_fn: Callable[..., Any] = struct.field(pytree_node=False)
    grad_fn: Callable[..., Any] = struct.field(pytree_node=False)

    def extra_args(self) -> dict[str, Any]:
        """The keyword arguments that optax' ``update`` functions ask for, by optax' names."""

        # optax' line searches hand `value_fn` what else they were given, and refuse what it does not take.
        def value_fn(params: PyTree, *, grad_fn: Any = None, obj_fn: Any = None) -> Any:
            del grad_fn, obj_fn
            return self.value_fn(params)

        def grad_fn(params: PyTree, step: Any = None) -> Any:
            del step  # optax.contrib.sam counts its calls
            return self.grad_fn(params)

        given = {"value": self.value, "grad": self.grad, "value_fn": value_fn, "grad_fn": grad_fn}
        return given | {"obj_fn": self.value_fn}  # optax.contrib.hutchinson_estimator_diag_hessian's name for it


def update_with(
    transformation: optax.GradientTransformation,
    updates: PyTree,
    state: Any,
    params: PyTree,
    extra_args: Mapping[str, Any],
) -> tuple[PyTree, Any]:
    """Call ``transformation.update`` with those extra arguments that it takes.

    Args:
        transformation: any of optax.
        updates: the gradients.
        state: the transformation's.
        params: the parameters.
        extra_args: what there is, by name.

    Returns:
        The transformed updates and the new state.
    """

    def update(*arguments: Any, **extra_args: Any) -> tuple[PyTree, Any]:
        # optax is not written for jax_numpy_dtype_promotion="strict", which a user may have set.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return transformation.update(*arguments, **extra_args)

    known, extra_args = tuple(extra_args), _accepted(transformation.update, extra_args)
    while True:
        try:
            return update(updates, state, params, **extra_args)
        except TypeError as error:
            # A chain takes everything and hands it on to members of which one may not take it: the error names it.
            refused = [name for name in extra_args if f"unexpected keyword argument {name!r}" in str(error)]
            if not refused:
                error.add_note(f"an optax transformation is given those of {', '.join(known)} that it takes")
                raise
            extra_args = {name: value for name, value in extra_args.items() if name not in refused}


def _accepted(update: Callable[..., Any], extra_args: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of the arguments that a function's signature has room for."""
    try:
        parameters = inspect.signature(update).parameters
    except ValueError:  # a function that does not tell
        return extra_args
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return extra_args
    return {name: value for name, value in extra_args.items() if name in parameters}
