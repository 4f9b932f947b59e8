"""MLflow."""

from __future__ import annotations

import copy
import os
import posixpath
import re
import time
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from ant_jax._arguments import check_name, require
from ant_jax.writers._names import UniqueNames, checksum
from ant_jax.writers._open_runs import OPEN_IDS, OPENING, known_id
from ant_jax.writers._values import real_scalars
from ant_jax.writers._writer import Start, Writer


# How often, and for how many seconds, MLflow tries a request again whose failure is tolerated. Its own defaults, 7 and
# 120, are minutes for each, which is right where a failure ends the run.
_SHORTER = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
# The bytes that a name may have: MLflow accepts 250 characters and, in a file store, makes files of them. The rest is
# for a checksum.
_BYTES = 240


class MLflowWriter(Writer):
    """Log to MLflow: scalars, images, texts.

    A run that goes on goes on with the same MLflow run, and runs at the same time have one each. It ends as
    ``FINISHED``, ``FAILED`` or, after Ctrl-C, ``KILLED``.

    MLflow waits for minutes for a server that is down. Inside ``tolerate`` a request is tried three times, for 5
    seconds each, unless the environment variables ``MLFLOW_HTTP_REQUEST_MAX_RETRIES`` and
    ``MLFLOW_HTTP_REQUEST_TIMEOUT`` say otherwise; one that is not set is set while the run is under way.

    In names of logs, what MLflow does not accept, such as the brackets of ``a[b]``, becomes ``_``. MLflow's file store
    keeps a metric as a file, which cannot be a folder too, so beside a log ``norm`` the log ``norm/bias`` is written as
    ``norm.bias``. Where two logs would still have one name, the second one's ends in a checksum.

    Args:
        experiment: where the run belongs; it is made if there is none of that name.
        tracking_uri: of the server or the store; ``None``: MLflow's own default, or ``MLFLOW_TRACKING_URI``.

    Raises:
        ImportError: the package ``mlflow`` or ``mlflow-skinny`` is not installed (the extra ``mlflow``).
        ValueError: ``experiment`` is not a name, or ``tracking_uri`` not a string.

    >>> MLflowWriter("digits")
    MLflowWriter('digits')
    """

    has_runs = True

    def __init__(self, experiment: str = "Default", *, tracking_uri: str | None = None):
        require("mlflow", "mlflow", "mlflow")
        check_name("MLflowWriter", "experiment", experiment)
        check_name("MLflowWriter", "tracking_uri", tracking_uri, kind="a URI", optional=True)
        self._experiment, self._uri = experiment, tracking_uri
        self._client: Any = None
        self._names = UniqueNames(accepted, folders=False)
        self._set: list[str] = []  # environment variables; in hooks only, because another thread might read them

    def __repr__(self) -> str:
        return f"MLflowWriter({self._experiment!r})"

    def open(self, start: Start) -> Self:
        """Begin an MLflow run, or go on with one."""
        opened = copy.copy(self)
        opened._begin(start)
        return opened

    def write_scalars(self, step: int, scalars: Mapping[str, Any], *, epoch: int) -> None:
        """Write numbers; complex ones are left out."""
        from mlflow.entities import Metric

        del epoch
        now = int(1000 * time.time())
        named = self._names.rename(real_scalars(scalars))
        metrics = [Metric(name, value, now, step) for name, value in named.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def write_images(self, step: int, images: Mapping[str, Any], *, epoch: int) -> None:
        """Write images, as artifacts."""
        del epoch
        for name, image in images.items():
            self._client.log_image(self.run_id, np.asarray(image), key=accepted(name), step=step, synchronous=True)

    def write_texts(self, step: int, texts: Mapping[str, str], *, epoch: int) -> None:
        """Write texts, as artifacts ``<name>/<step>.txt``."""
        del epoch
        for name, text in texts.items():
            self._client.log_text(self.run_id, text, f"{accepted(name)}/{step}.txt")

    def close(self, error: BaseException | None) -> None:
        """Say how the run has ended."""
        if self._client is not None:
            interrupted = isinstance(error, KeyboardInterrupt)
            status = "FINISHED" if error is None else "KILLED" if interrupted else "FAILED"
            client, self._client = self._client, None
            try:
                client.set_terminated(self.run_id, status=status)
            finally:
                OPEN_IDS.discard(str(self.run_id))
                self._unset()

    def _begin(self, start: Start) -> None:
        from mlflow.tracking import MlflowClient

        self._set = [variable for variable in _SHORTER if variable not in os.environ] if start.tolerated else []
        os.environ.update({variable: _SHORTER[variable] for variable in self._set})
        run_id = None
        try:
            client = MlflowClient(tracking_uri=self._uri)
            with OPENING:
                known = known_id(start)
                run_id = self._make_run(client) if known is None else known
                if known is not None:
                    client.update_run(run_id, status="RUNNING")
                OPEN_IDS.add(run_id)
            there = () if known is None else client.get_run(known).data.metrics
            self._names = UniqueNames(accepted, there, folders=False)
        except BaseException:
            OPEN_IDS.discard(str(run_id))
            self._unset()
            raise
        self._client, self.run_id = client, run_id

    def _make_run(self, client: Any) -> str:
        """Return the id of a new run."""
        found = client.get_experiment_by_name(self._experiment)
        experiment_id = client.create_experiment(self._experiment) if found is None else found.experiment_id
        return client.create_run(experiment_id).info.run_id

    def _unset(self) -> None:
        for variable in self._set:
            os.environ.pop(variable, None)
        self._set = []


def accepted(log: str) -> str:
    """Return a name that MLflow accepts: letters, digits and ``_-. /``, and a path that is in its normal form."""
    name = re.sub(r"[^/\w.\- ]", "_", log)
    if posixpath.normpath(name) != name or name.startswith(("..", "/")) or name == ".":
        name = "/".join("_" if part in ("", ".", "..") else part for part in name.split("/"))
        name = re.sub(r"^\.\.", "__", name)
    if len(name.encode()) <= _BYTES:
        return name
    digits = checksum(log)
    begin = name.replace("/", ".").encode()[: _BYTES - len(digits) - 1].decode(errors="ignore")
    return f"{begin}-{digits}"
