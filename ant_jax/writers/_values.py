"""What trackers make of values: real numbers and bins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


# `gradient_statistics` counts the elements whose magnitude is in [2**e, 2**(e + 1)), for these e. The first bin has all
# smaller ones, zeros included; the last has all larger ones, and those that are not finite.
HISTOGRAM_EXPONENTS = range(-24, 8)
_COUNTED = "grad_histogram/"  # in the names of its logs
_BINS = 30


def real_scalars(scalars: Mapping[str, Any]) -> dict[str, float]:
    """Return numbers as floats, without the complex ones, which no tracker has.

    >>> real_scalars({"loss": 1, "phase": 1j})
    {'loss': 1.0}
    """
    return {name: float(value) for name, value in scalars.items() if not np.iscomplexobj(value)}


def binned(name: str, array: Any) -> tuple[np.ndarray, np.ndarray]:
    """Bin an array.

    The ``grad_histogram/...`` of :func:`ant_jax.callbacks.gradient_statistics` are counts already, and get their edges.

    Args:
        name: of the log.
        array: of real numbers, of any shape; what is not finite is left out.

    Returns:
        How many numbers are in each bin, and the edges: one more than bins.

    >>> binned("weights", np.array([0.0, 1.0, 1.0, np.nan]))[0].sum().item()
    3.0
    """
    array = np.asarray(array)
    if _COUNTED in name and array.shape == (len(HISTOGRAM_EXPONENTS),):
        return array.astype(np.float64), 2.0 ** np.arange(HISTOGRAM_EXPONENTS.start, HISTOGRAM_EXPONENTS.stop + 1)
    values = np.ravel(array)
    counts, edges = np.histogram(values[np.isfinite(values)].astype(np.float64), bins=_BINS)
    return counts.astype(np.float64), edges
