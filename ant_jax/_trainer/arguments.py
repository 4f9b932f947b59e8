"""Check the arguments of a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, SupportsFloat

import numpy as np
import optax

from ant_jax._data.array_loader import ArrayLoader
from ant_jax._step.precision import precision_of
from ant_jax._step.step import STEP_LOGS


def check_arguments(trainer: Any) -> None:
    if (trainer.criterion is None) == (trainer.loss_fn is None):
        raise TypeError("give the Trainer either criterion(outputs, targets) or loss_fn, and not both")
    for name in ("criterion", "loss_fn"):
        function = getattr(trainer, name)
        if function is not None:
            _check_function(name, "a function", function)
    if not isinstance(trainer.optimizer, optax.GradientTransformation):
        hint = "; call it, as in optax.adam(1e-3)" if callable(trainer.optimizer) else ""
        raise TypeError(f"optimizer must be an optax.GradientTransformation, got {trainer.optimizer!r}{hint}")
    if trainer.metrics and trainer.loss_fn is not None:
        raise TypeError("metrics need a criterion; with a loss_fn, return them in its logs")
    if not isinstance(trainer.metrics, Mapping | None):
        raise TypeError(f"metrics must be a mapping {{name: metric(outputs, targets)}}, got {trainer.metrics!r}")
    for name, metric in (trainer.metrics or {}).items():
        if not isinstance(name, str):
            raise TypeError(f"a metric's name must be a string, got {name!r}")
        if name in STEP_LOGS:
            raise ValueError(f"a metric cannot be named {name!r}: the trainer logs its own value of that name")
        _check_function(f"metric {name!r}", "a function metric(outputs, targets)", metric)
    check_count("gradient_accumulation_steps", trainer.gradient_accumulation_steps)
    precision_of(trainer.precision)
    if trainer.max_grad_norm is not None and not _is_positive(trainer.max_grad_norm):
        raise ValueError(f"max_grad_norm must be positive or None, got {trainer.max_grad_norm!r}")
    for name, allowed in (
        ("accumulation_mean", ("examples", "steps")),
        ("fuse", ("auto", True, False)),
        ("check_batches", (True, False)),
        ("progress_bar", (True, False)),
    ):
        if getattr(trainer, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {getattr(trainer, name)!r}")


def _check_function(name: str, what: str, function: Any) -> None:
    if not callable(function):
        raise TypeError(f"{name} must be {what}, got {function!r}")
    if isinstance(function, type):
        raise TypeError(f"{name} must be {what}, got {function!r}; make an instance of it")


def _is_positive(value: Any) -> bool:
    return not isinstance(value, bool) and np.ndim(value) == 0 and isinstance(value, SupportsFloat) and float(value) > 0


def check_count(name: str, count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
        raise ValueError(f"{name} must be a positive whole number, got {count!r:.200}")


def check_prefetch(prefetch: Any, train_loader: Any, steps_per_epoch: int | None, accumulation_steps: int) -> None:
    """Raise ValueError unless ``prefetch`` is a number of batches, or ``None``."""
    if prefetch is None:
        return
    if isinstance(prefetch, bool) or not isinstance(prefetch, int | np.integer) or prefetch < 0:
        raise ValueError(f"prefetch must be a whole number from 0 on, or None, got {prefetch!r}")
    known = steps_per_epoch is not None or isinstance(train_loader, ArrayLoader)
    if prefetch == 0 and accumulation_steps > 1 and not known:
        raise ValueError(
            "prefetch=0 with gradient_accumulation_steps needs steps_per_epoch: the last batch of an epoch closes "
            "the accumulation window, and no batch is read to see whether one follows"
        )
