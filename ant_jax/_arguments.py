"""Check the arguments of the factories: a bad one is refused where it is written."""

from __future__ import annotations

import importlib.util
import inspect
import math
import numbers
import os
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from ant_jax._state.hyperparams import Hyperparam


def number(value: Any) -> Any:
    """The value of a number that may be given as a ``Hyperparam``, where the checks below allow none."""
    return value.value if isinstance(value, Hyperparam) else value


def refuse(owner: str, argument: str, allowed: str, value: Any) -> NoReturn:
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
) -> Any:
    """Refuse what is not a whole number of at least ``least``, or ``None`` when it is ``optional``.

    Returns:
        The number as a Python int: one of numpy's has a dtype, which would take part in what is computed with it.
    """
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        allowed = f"a whole number{f' of {unit}' if unit else ''}, at least {least}"
        refuse(owner, argument, allowed + _or_none(optional), value)
    return int(value)


def check_choice(owner: str, argument: str, value: Any, *allowed: str) -> None:
    """Refuse what is not one of ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        refuse(owner, argument, " or ".join(map(repr, allowed)), value)


def check_name(owner: str, argument: str, value: Any, *, kind: str = "a name", optional: bool = False) -> None:
    """Refuse what is not a string that names something, or ``None`` when it is ``optional``."""
    if value is None and optional:
        return
    if not isinstance(value, str) or not value:
        refuse(owner, argument, kind + _or_none(optional), value)


def check_flag(owner: str, argument: str, value: Any) -> None:
    """Refuse what is not a bool: ``"no"`` would count as true."""
    if not isinstance(value, bool | np.bool_):
        refuse(owner, argument, "True or False", value)


def check_path(owner: str, argument: str, value: Any, *, file: bool = False) -> None:
    """Refuse what is not a path, and where a ``file`` is meant, a directory that is there."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str) or not os.fspath(value):
        refuse(owner, argument, "the path of a file" if file else "a path", value)
    if file and os.path.isdir(value):
        refuse(owner, argument, "the path of a file, and this is a directory", value)


def check_function(owner: str, argument: str, value: Any, *parameters: str, optional: bool = False) -> None:
    """Refuse what cannot be called with so many arguments, or is not ``None`` when it is ``optional``.

    Raises:
        TypeError: naming the factory, its argument, what it is called with and what was given.

    >>> check_function("memory", "reader", lambda: {}, "device")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    TypeError: memory: reader must be a function of (device), got <function <lambda> at ...>, which takes ()
    """
    if value is None and optional:
        return
    allowed = f"a function of ({', '.join(parameters)}){_or_none(optional)}"
    if not callable(value):
        raise TypeError(f"{owner}: {argument} must be {allowed}, got {value!r}")
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # a function that does not tell
        return
    try:
        signature.bind(*parameters)
    except TypeError:
        raise TypeError(f"{owner}: {argument} must be {allowed}, got {value!r}, which takes {signature}") from None


def refuse_taken(owner: str, record: Mapping[str, Any], *taken: str) -> None:
    """Raise ValueError if a log has the name of something that the factory's callback writes beside the logs."""
    for name in taken:
        if name in record:
            raise ValueError(
                f"{owner}: a callback published a log named {name!r}, which is what {owner} itself writes in every "
                f"row; publish it under another name"
            )


def require(owner: str, package: str, extra: str) -> None:
    """Raise ImportError, naming the factory and the extra, unless the package is installed."""
    if importlib.util.find_spec(package) is None:
        raise ImportError(f'{owner}: the package {package} is not installed; pip install "ant_jax[{extra}]"')


def _or_none(optional: bool) -> str:
    return ", or None" if optional else ""


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
