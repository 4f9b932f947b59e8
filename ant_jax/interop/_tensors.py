"""Tensors of torch as arrays of numpy, and back, without importing torch: where a tensor is, torch is imported."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


_CATEGORIES = {"floating": jnp.floating, "complex": jnp.complexfloating, "integer": jnp.integer, "boolean": jnp.bool_}


def is_array(value: Any) -> bool:
    """Whether a value is a tensor of torch, or an array of numpy or JAX."""
    return _is_tensor(value) or isinstance(value, np.ndarray | np.generic | jax.Array)


def as_numpy(value: Any) -> np.ndarray:
    """Copy a tensor or an array; floats that numpy has not come as float32, which holds each of them exactly.

    A copy, since both libraries would otherwise look at the same memory, which torch writes to in place.

    >>> as_numpy(jnp.ones(2, jnp.bfloat16))
    array([1., 1.], dtype=float32)
    """
    if _is_tensor(value):
        tensor = value.detach().cpu()
        return np.array((tensor.float() if _only_elsewhere(tensor.dtype) else tensor).numpy())
    array = np.array(value)
    return array.astype(np.float32) if _only_elsewhere(array.dtype) else array


def as_like(array: np.ndarray, like: Any) -> Any:
    """Give ``array`` the dtype and device of ``like``, and its type: a tensor, or else an array of numpy."""
    if _is_tensor(like):
        return sys.modules["torch"].from_numpy(array).to(dtype=like.dtype, device=like.device)
    return array.astype(like.dtype)


def category(value: Any) -> str:
    """Name the kind of numbers in a tensor or an array, whatever their width.

    >>> category(np.ones(2, np.int8)), category(jnp.ones(2, jnp.bfloat16))
    ('integer', 'floating')
    """
    dtype = as_numpy(value.new_empty(0)).dtype if _is_tensor(value) else value.dtype
    return next((name for name, kind in _CATEGORIES.items() if jnp.issubdtype(dtype, kind)), str(dtype))


def memory(value: Any) -> tuple[Any, ...] | None:
    """Name the memory that a tensor lies in, so that tied weights are known; ``None`` where that cannot be told."""
    if _is_tensor(value) and value.numel():
        return value.device, value.data_ptr(), tuple(value.shape), value.stride()
    return None


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _only_elsewhere(dtype: Any) -> bool:
    """Whether a dtype of torch or ml_dtypes is a float that numpy has not: bfloat16 or one of eight bits."""
    name = str(dtype).removeprefix("torch.")
    return name.startswith(("float", "bfloat")) and name not in ("float16", "float32", "float64")
