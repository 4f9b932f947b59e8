"""The dtypes of a training step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.training.dynamic_scale import DynamicScale

from ant_jax._trees import PyTree


@dataclasses.dataclass(frozen=True)
class Precision:
    """The dtypes of parameters, of the model's arithmetic, of its outputs, and of the loss scale.

    Every argument is a floating dtype or its name; ``None`` leaves things as they are. Losses, metrics and gradients
    are in float32 at least. A subclass may cast otherwise, for example leave some parameters out.

    Args:
        param_dtype: of the parameters as ``Trainer.init`` makes them; ``None``: as the model makes them.
        compute_dtype: of the parameters and the inputs that the model is given, and so of its arithmetic.
        output_dtype: of the model's outputs, at least: for the criterion, the metrics and ``Trainer.predict``.
            ``None``: float32 at least for the criterion and the metrics, and as they are for ``predict``.
        loss_scale_dtype: of the dynamic loss scale, without which small gradients are lost in float16; ``None``: the
            loss is not scaled.

    Raises:
        ValueError: a dtype is not a floating one, or that of the loss scale is lower than float32.

    >>> Precision(compute_dtype="bfloat16", output_dtype="float32")
    Precision(param_dtype=None, compute_dtype='bfloat16', output_dtype='float32', loss_scale_dtype=None)
    """

    param_dtype: Any = None
    compute_dtype: Any = None
    output_dtype: Any = None
    loss_scale_dtype: Any = None

    def __post_init__(self) -> None:
        for name, value in _dtypes_of(self).items():
            if value is not None:
                object.__setattr__(self, name, _floating(name, value))
        if self.loss_scale_dtype is not None and jnp.finfo(self.loss_scale_dtype).bits < 32:
            raise ValueError(
                f"Precision: loss_scale_dtype must be float32 at least, because a scale of 65536 does not fit into "
                f"{self.loss_scale_dtype.name}"
            )

    def __repr__(self) -> str:
        names = ((name, value and value.name) for name, value in _dtypes_of(self).items())
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in names)})"

    def cast_to_param(self, params: PyTree) -> PyTree:
        """Return the parameters that a run begins with."""
        return _cast(params, self.param_dtype)

    def cast_to_compute(self, tree: PyTree) -> PyTree:
        """Return the parameters, or the inputs, that the model computes with; ``tree`` itself if nothing changes."""
        return _cast(tree, self.compute_dtype)

    def cast_to_output(self, outputs: PyTree) -> PyTree:
        """Return the model's outputs, those of a lower precision than ``output_dtype`` in that."""
        return outputs if self.output_dtype is None else at_least(outputs, self.output_dtype)

    def initial_loss_scale(self) -> DynamicScale | None:
        """Return the loss scale that a run begins with."""
        if self.loss_scale_dtype is None:
            return None
        scale: Any = jnp.asarray(2.0**16, dtype=self.loss_scale_dtype)
        # Below 1 a scale no longer helps; without a floor it would fall to nothing when gradients are never finite.
        return DynamicScale(fin_steps=jnp.int32(0), scale=scale, minimum_scale=1.0)


def precision_of(value: str | Precision) -> Precision:
    """Return the precision that a string names, or the one that is given.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, Precision):
        return value
    if not isinstance(value, str) or value not in PRECISIONS:
        names = ", ".join(map(repr, PRECISIONS))
        raise ValueError(f"precision must be one of {names}, or an ant_jax.Precision, got {value!r}")
    return PRECISIONS[value]


def at_least(tree: PyTree, dtype: Any) -> PyTree:
    """Return the tree, its floating leaves of a lower precision than ``dtype`` in that."""
    bits = jnp.finfo(dtype).bits

    def lift(leaf: jax.Array) -> jax.Array:
        low = jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < bits
        return leaf.astype(dtype) if low else leaf

    return jax.tree.map(lift, tree)


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    if dtype is None:
        return tree
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def _dtypes_of(precision: Precision) -> dict[str, Any]:
    return {field.name: getattr(precision, field.name) for field in dataclasses.fields(Precision)}


def _floating(name: str, value: Any) -> Any:
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"Precision: {name} must be a floating dtype or None, got {value!r}")
    return dtype


# What the strings name.
PRECISIONS: Mapping[str, Precision] = {
    "float32": Precision(),
    "bfloat16": Precision(compute_dtype=jnp.bfloat16, output_dtype=jnp.float32),
    "float16": Precision(compute_dtype=jnp.float16, output_dtype=jnp.float32, loss_scale_dtype=jnp.float32),
}
