"""Weights & Biases."""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from ant_jax._arguments import check_name, require
from ant_jax.writers._names import UniqueNames, in_utf8
from ant_jax.writers._open_runs import OPEN_IDS, OPENING, known_id
from ant_jax.writers._values import binned, real_scalars
from ant_jax.writers._writer import Start, Writer


# What W&B writes itself, or drops, in every row.
_OWN = re.compile(r"_step|_runtime|_timestamp|_wandb.*|", re.DOTALL)


class WandbWriter(Writer):
    """Log to Weights & Biases: scalars, histograms, images, texts.

    A run that goes on goes on with the same W&B run, and runs at the same time have one each. With the environment
    variable ``WANDB_MODE=offline`` nothing leaves the machine. Inside ``tolerate`` ``wandb.init`` waits 15 seconds for
    a server that is down, instead of 90, unless the environment variable ``WANDB_INIT_TIMEOUT`` or the argument
    ``settings`` is given. A log whose name W&B keeps for itself, such as ``_step``, is written as ``log_step``.

    Args:
        project: where the run belongs.
        **init_arguments: of ``wandb.init``: ``config``, ``tags``, ``group``, ``name`` and so on.

    Raises:
        ImportError: the package ``wandb`` is not installed (the extra ``wandb``).
        ValueError: ``project`` is not a name, or ``wandb.init`` has no such argument; while training, a log is named
            ``epoch``.

    >>> WandbWriter("digits", tags=["baseline"])
    WandbWriter('digits')
    """

    has_runs = True

    def __init__(self, project: str | None = None, **init_arguments: Any):
        require("wandb", "wandb", "wandb")
        check_name("WandbWriter", "project", project, optional=True)
        if init_arguments:
            _check_init_arguments(init_arguments)
        self._project = project
        self._arguments = {"project": project, "resume": "allow", **init_arguments}
        self._run: Any = None
        self._names = UniqueNames(_accepted)

    def __repr__(self) -> str:
        return f"WandbWriter({self._project!r})"

    def open(self, start: Start) -> Self:
        """Begin a W&B run, or go on with one."""
        import wandb

        opened = copy.copy(self)
        opened._names = UniqueNames(_accepted)
        shorter = start.tolerated and "WANDB_INIT_TIMEOUT" not in os.environ
        settings = {"settings": {"init_timeout": 15}} if shorter else {}
        with OPENING:
            # By default W&B returns a run that is open when it is asked for one.
            another = {"reinit": "create_new"} if OPEN_IDS else {}
            run_id = known_id(start)
            known = {} if run_id is None else {"id": run_id}
            opened._run = wandb.init(**{**settings, **another, **self._arguments, **known})
            opened.run_id = opened._run.id
            OPEN_IDS.add(opened._run.id)
        return opened

    def write_scalars(self, step: int, scalars: Mapping[str, Any], *, epoch: int) -> None:
        """Write numbers; complex ones are left out."""
        self._log(step, real_scalars(scalars), epoch)

    def write_histograms(self, step: int, arrays: Mapping[str, Any], *, epoch: int) -> None:
        """Write the distributions of real arrays."""
        import wandb

        real = {name: binned(name, array) for name, array in arrays.items() if not np.iscomplexobj(array)}
        self._log(step, {name: wandb.Histogram(np_histogram=bins) for name, bins in real.items()}, epoch)

    def write_images(self, step: int, images: Mapping[str, Any], *, epoch: int) -> None:
        """Write images."""
        import wandb

        self._log(step, {name: wandb.Image(np.asarray(image)) for name, image in images.items()}, epoch)

    def write_texts(self, step: int, texts: Mapping[str, str], *, epoch: int) -> None:
        """Write texts."""
        self._log(step, texts, epoch)

    def close(self, error: BaseException | None) -> None:
        """Finish the W&B run."""
        try:
            self._run.finish(exit_code=0 if error is None else 1)
        finally:
            OPEN_IDS.discard(self._run.id)

    def _log(self, step: int, values: Mapping[str, Any], epoch: int) -> None:
        if "epoch" in values:
            raise ValueError(
                "WandbWriter: a callback published a log named 'epoch', which is what WandbWriter itself writes in "
                "every row; publish it under another name"
            )
        # W&B has one row a step; the last batches of an epoch and the epoch share theirs.
        self._run.log({"epoch": epoch, **self._names.rename(values)}, step=step)


def _accepted(log: str) -> str:
    return in_utf8(f"log{log}" if _OWN.fullmatch(log) else log)


def _check_init_arguments(given: Mapping[str, Any]) -> None:
    import wandb

    known = inspect.signature(wandb.init).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for argument, value in given.items():
        if argument not in known:
            raise ValueError(
                f"WandbWriter: wandb.init has no argument {argument!r} (given: {value!r}); it has {', '.join(known)}"
            )
