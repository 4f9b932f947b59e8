"""How one parameter lies in torch and in JAX, and the way between the two."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeAlias

import numpy as np


Shape: TypeAlias = tuple[int, ...]

# What torch calls the parameter of a JAX leaf; any other leaf is looked for under its own name.
TORCH_NAMES = {
    "kernel": "weight",
    "w": "weight",
    "embedding": "weight",
    "scale": "weight",
    "negative_slope": "weight",
    "b": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_INPUTS_FIRST = ("kernel", "w")
_ANY_SHAPE = ("bias", "b", "negative_slope")  # one torch axis, whose order is that of the features in JAX


class Misfit(ValueError):
    """A parameter of torch does not fit a leaf of JAX; the message says why."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The way between two arrays: split the axes of torch's, permute them, reverse some, merge them to JAX's.

    Attributes:
        torch: the shape in torch.
        split: the shape in which the axes can be permuted.
        axes: the permutation.
        reversed: how many of the first axes, as permuted, are reversed.
        jax: the shape in JAX.
    """

    torch: Shape
    split: Shape
    axes: Shape
    reversed: int
    jax: Shape

    def to_jax(self, array: np.ndarray) -> np.ndarray:
        """Lay torch's array out as JAX has it.

        >>> Layout((3, 2), (3, 2), (1, 0), 0, (2, 3)).to_jax(np.arange(6).reshape(3, 2))
        array([[0, 2, 4],
               [1, 3, 5]])
        """
        return array.reshape(self.split).transpose(self.axes)[self._directions].reshape(self.jax)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Undo ``to_jax``."""
        permuted = array.reshape([self.split[axis] for axis in self.axes])
        return permuted[self._directions].transpose(np.argsort(self.axes)).reshape(self.torch)

    @property
    def _directions(self) -> tuple[slice, ...]:
        return (slice(None, None, -1),) * self.reversed


def is_linear(name: str, shape: Shape) -> bool:
    """Whether a parameter that goes to the JAX leaf ``name`` is a matrix whose inputs JAX has first."""
    return name in _INPUTS_FIRST and len(shape) == 2


def is_convolution(name: str, shape: Shape) -> bool:
    """Whether a parameter that goes to the JAX leaf ``name`` is the kernel of a convolution, transposed or not."""
    return name in _INPUTS_FIRST and len(shape) > 2


def layout(
    shape: Shape, name: str, jax: Shape, *, flattened: Any = None, transpose_kernel: bool | None = None
) -> Layout:
    """Find the way from a parameter of torch to a JAX leaf.

    Args:
        shape: torch's.
        name: the JAX leaf's own, which decides the layout.
        jax: the JAX leaf's shape.
        flattened: the ``(C, *spatial)`` that torch flattens to make the inputs of a Linear.
        transpose_kernel: of flax's ConvTranspose; ``None``: it is not one.

    Returns:
        The way there and back.

    Raises:
        Misfit: there is none.

    >>> layout((8, 3, 5, 5), "kernel", (5, 5, 3, 8)).axes
    (2, 3, 1, 0)
    """
    if transpose_kernel is not None and not is_convolution(name, shape):
        raise Misfit(f"transpose_kernel is for kernels of convolutions, and this is {name!r} of shape {shape}")
    if flattened is not None:
        return _of_flattened(shape, name, jax, flattened)
    if is_linear(name, shape):
        return _of_linear(shape, jax)
    if is_convolution(name, shape):
        return _of_convolution(shape, jax, transpose_kernel)
    if shape != jax and not (name in _ANY_SHAPE and len(shape) == 1 and math.prod(shape) == math.prod(jax)):
        raise Misfit(f"torch has {shape}, JAX {jax}; {name!r} is taken over as it is")
    return Layout(shape, shape, tuple(range(len(shape))), 0, jax)


def _of_linear(shape: Shape, jax: Shape) -> Layout:
    outputs, inputs = shape
    # Attention splits the outputs of query, key and value into (heads, head_dim), and the inputs of what follows them.
    is_split = len(jax) == 3 and (
        (jax[0] == inputs and math.prod(jax[1:]) == outputs) or (math.prod(jax[:2]) == inputs and jax[2] == outputs)
    )
    if jax != (inputs, outputs) and not is_split:
        raise Misfit(f"torch's (out, in) = {shape} is (in, out) = {(inputs, outputs)} in JAX, where the leaf has {jax}")
    return Layout(shape, shape, (1, 0), 0, jax)


def _of_convolution(shape: Shape, jax: Shape, transpose_kernel: bool | None) -> Layout:
    spatial = tuple(range(2, len(shape)))
    swapped, kept = (*spatial, 1, 0), (*spatial, 0, 1)
    # Torch's transposed convolution is the gradient of a convolution, whose kernel it reverses in space. With
    # transpose_kernel=True flax does the same and so has that convolution's kernel; with False it reverses nothing.
    axes = kept if transpose_kernel is False else swapped
    expected = _permuted(shape, axes)
    if expected == jax:
        return Layout(shape, shape, axes, len(spatial) if transpose_kernel is False else 0, jax)
    torch_words, jax_words = {
        None: ("(out, in/groups, *spatial)", "(*spatial, in/groups, out)"),
        True: ("(in, out, *spatial)", "(*spatial, out, in)"),
        False: ("(in, out, *spatial)", "(*spatial, in, out)"),
    }[transpose_kernel]
    hint = ""
    if _permuted(shape, kept if axes == swapped else swapped) == jax:
        hint = f"; it would fit a ConvTranspose with transpose_kernel={transpose_kernel is False}"
    raise Misfit(f"torch's {torch_words} = {shape} is {jax_words} = {expected} in JAX, where the leaf has {jax}{hint}")


def _of_flattened(shape: Shape, name: str, jax: Shape, flattened: Shape) -> Layout:
    if len(shape) != 2 or not (name == "weight" or is_linear(name, shape)):
        raise Misfit(f"flattened is for the weight of a Linear, and this is {name!r} of shape {shape}")
    outputs, inputs = shape
    if math.prod(flattened) != inputs:
        raise Misfit(f"flattened={flattened} makes {math.prod(flattened)} inputs, and torch's (out, in) = {shape}")
    columns = (*range(2, len(flattened) + 1), 1)
    axes = (0, *columns) if name == "weight" else (*columns, 0)
    plain = layout(shape, name, jax)
    return Layout(shape, (outputs, *flattened), axes, 0, plain.jax)


def _permuted(shape: Shape, axes: Shape) -> Shape:
    return tuple(shape[axis] for axis in axes)
