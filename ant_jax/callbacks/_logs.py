"""Logs as files and in trackers: each factory is ``log_to`` with a writer."""

from __future__ import annotations

import os
from typing import Any

from ant_jax._hooks.callback import Callback
from ant_jax.callbacks._log_to import log_to
from ant_jax.writers import CSVWriter, JSONLinesWriter, MLflowWriter, TensorBoardWriter, WandbWriter


def csv_log(path: str | os.PathLike[str], *, every: int | None = None, name: str = "csv_log") -> Callback:
    """Write the numbers of the logs as a table, a row an epoch or a row every so many batches.

    Args:
        path: as in :class:`ant_jax.writers.CSVWriter`, which says what is in the file.
        every: a row of the means over every so many batches; ``None``: a row of ``on_epoch_end``'s logs an epoch.
        name: of the callback; it keeps no memory.

    Returns:
        :func:`log_to` with that writer.

    Raises:
        ValueError: ``path`` is not the path of a file, or ``every`` is below 1; while training, a log is named
            ``epoch`` or ``step``.

    >>> csv_log("runs/digits.csv")
    Callback(name='csv_log', hooks=on_train_begin, on_epoch_end, on_train_end, on_exception)
    """
    return log_to(CSVWriter(path), every=every, epochs=every is None, name=name)


def json_log(path: str | os.PathLike[str], *, every: int | None = None, name: str = "json_log") -> Callback:
    """Write the logs as JSON lines, one object an epoch, and one every so many batches.

    Args:
        path: as in :class:`ant_jax.writers.JSONLinesWriter`, which says what is in the file.
        every: also a line of the means over every so many batches; ``None``: epochs only.
        name: of the callback; it keeps no memory.

    Returns:
        :func:`log_to` with that writer.

    Raises:
        ValueError: ``path`` is not the path of a file, or ``every`` is below 1; while training, a log is named
            ``epoch`` or ``step``.

    >>> json_log("runs/digits.jsonl", every=100)
    Callback(name='json_log', hooks=on_train_begin, on_batch_end, on_epoch_end, on_train_end, on_exception)
    """
    return log_to(JSONLinesWriter(path), every=every, name=name)


def tensorboard(directory: str | os.PathLike[str], *, every: int | None = None, name: str = "tensorboard") -> Callback:
    """Write the logs as TensorBoard event files, with neither TensorFlow nor torch.

    Args:
        directory: as in :class:`ant_jax.writers.TensorBoardWriter`, which says what is in the files.
        every: also the means over every so many batches; ``None``: epochs only.
        name: of the callback; it keeps no memory.

    Returns:
        :func:`log_to` with that writer.

    Raises:
        ImportError: the package ``tensorboard`` is not installed (the extra ``tensorboard``).
        ValueError: ``directory`` is not a path, or ``every`` is below 1.

    >>> tensorboard("runs/digits", every=100).every
    100
    """
    return log_to(TensorBoardWriter(directory), every=every, name=name)


def wandb(
    project: str | None = None, *, every: int | None = None, name: str = "wandb", **init_arguments: Any
) -> Callback:
    """Log to Weights & Biases.

    Args:
        project: as in :class:`ant_jax.writers.WandbWriter`, which says what is logged.
        every: also the means over every so many batches; ``None``: epochs only.
        name: of the callback. Its memory is ``{"run_id": str}``, ``None`` before the run begins.
        **init_arguments: of ``wandb.init``: ``config``, ``tags``, ``group`` and so on. (W&B's own name of the run may
            be set by the environment variable ``WANDB_NAME``, or with ``log_to(WandbWriter("digits", name=...))``.)

    Returns:
        :func:`log_to` with that writer.

    Raises:
        ImportError: the package ``wandb`` is not installed (the extra ``wandb``).
        ValueError: ``project`` is not a name, ``wandb.init`` has no such argument, or ``every`` is below 1; while
            training, a log is named ``epoch``.

    >>> wandb("digits", every=100, tags=["baseline"]).every
    100
    """
    return log_to(WandbWriter(project, **init_arguments), every=every, name=name)


def mlflow(
    experiment: str = "Default",
    *,
    tracking_uri: str | None = None,
    every: int | None = None,
    name: str = "mlflow",
) -> Callback:
    """Log to MLflow.

    Args:
        experiment: as in :class:`ant_jax.writers.MLflowWriter`, which says what is logged.
        tracking_uri: of the server or the store; ``None``: MLflow's own default, or ``MLFLOW_TRACKING_URI``.
        every: also the means over every so many batches; ``None``: epochs only.
        name: of the callback. Its memory is ``{"run_id": str}``, ``None`` before the run begins.

    Returns:
        :func:`log_to` with that writer.

    Raises:
        ImportError: the package ``mlflow`` or ``mlflow-skinny`` is not installed (the extra ``mlflow``).
        ValueError: ``experiment`` is not a name, ``tracking_uri`` not a string, or ``every`` is below 1.

    >>> mlflow("digits", every=100).every
    100
    """
    return log_to(MLflowWriter(experiment, tracking_uri=tracking_uri), every=every, name=name)
