"""Check the arguments of the factories: a bad one is refused where it is written."""

from __future__ import annotations

import importlib.util
import math
import numbers
from typing import Any

from ant_jax._hyperparams import Hyperparam


def number(value: Any) -> Any:
    """The value of a number that may be given as a ``Hyperparam``, where the checks below allow none."""
    return value.value if isinstance(value, Hyperparam) else value


def refuse(owner: str, argument: str, allowed: str, value: Any) -> None:
    """Raise ValueError, naming the factory, its argument, what is allowed and what was given.

    >>> refuse("ema", "decay", "a number between 0 and 1", 2)
    Traceback (most recent call last):
    ...
    ValueError: ema: decay must be a number between 0 and 1, got 2
    """
    raise ValueError(f"{owner}: {argument} must be {allowed}, got {value!r}")


def check_positive(owner: str, argument: str, value: Any) -> None:
    """Refuse what is not a finite number above 0."""
    if not _is_finite(value) or not value > 0:
        refuse(owner, argument, "a finite number above 0", value)


def check_not_negative(owner: str, argument: str, value: Any) -> None:
    """Refuse what is not a finite number from 0 on."""
    if not _is_finite(value) or not value >= 0:
        refuse(owner, argument, "a finite number from 0 on", value)


def check_finite(owner: str, argument: str, value: Any) -> None:
    """Refuse what is not a finite number."""
    if not _is_finite(value):
        refuse(owner, argument, "a finite number", value)


def check_fraction(owner: str, argument: str, value: Any) -> None:
    """Refuse what is not a number strictly between 0 and 1."""
    if not _is_finite(value) or not 0 < value < 1:
        refuse(owner, argument, "a number between 0 and 1", value)


def check_count(
    owner: str, argument: str, value: Any, *, least: int = 1, unit: str = "", optional: bool = False
) -> None:
    """Refuse what is not a whole number of at least ``least``, or ``None`` when it is ``optional``."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        allowed = f"a whole number{f' of {unit}' if unit else ''}, at least {least}{', or None' if optional else ''}"
        refuse(owner, argument, allowed, value)


def check_choice(owner: str, argument: str, value: Any, *allowed: str) -> None:
    """Refuse what is not one of ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        refuse(owner, argument, " or ".join(map(repr, allowed)), value)


def check_name(owner: str, argument: str, value: Any) -> None:
    """Refuse what is not a string that names something."""
    if not isinstance(value, str) or not value:
        refuse(owner, argument, "a name", value)


def require(owner: str, package: str, extra: str) -> None:
    """Raise ImportError, naming the factory and the extra, unless the package is installed."""
    if importlib.util.find_spec(package) is None:
        raise ImportError(f'{owner}: the package {package} is not installed; pip install "ant_jax[{extra}]"')


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
