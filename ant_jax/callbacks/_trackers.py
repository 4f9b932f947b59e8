"""Logs for experiment trackers: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import functools
import inspect
import os
import posixpath
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from ant_jax._arguments import check_name, check_path, refuse_taken, require
from ant_jax._callback import Callback
from ant_jax.callbacks._background import is_borne
from ant_jax.callbacks._records import recording
from ant_jax.callbacks._runs import Claim


# How often, and for how many seconds, MLflow tries a request again whose failure is borne. Its own defaults, 7 and 120,
# are minutes for each, which is right where a failure ends the run.
_SHORTER = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
# The bytes that a name may have in MLflow, which takes 250 characters and, in a file store, makes files of them. It
# leaves room for a checksum.
_MLFLOW_BYTES = 240
# What W&B writes itself, or drops, in every row.
_WANDB_OWN = re.compile(r"_step|_runtime|_timestamp|_wandb.*|", re.DOTALL)


def tensorboard(directory: str | os.PathLike[str], *, every: int | None = None, name: str = "tensorboard") -> Callback:
    """Write the scalars of the logs as TensorBoard event files, with neither TensorFlow nor torch.

    On the host, in the background. The horizontal axis is the batches trained on. A run that goes on tells TensorBoard
    to forget the steps that it does again. A run that begins while another one of this process writes there writes into
    another directory beside it, ``digits-2`` for ``digits``, and says so (logger ``ant_jax``, a warning).

    Args:
        directory: of the event files; it is made.
        every: also the means over every so many batches; ``None``: epochs only.
        name: of the callback; it keeps no memory.

    Returns:
        A host callback.

    Raises:
        ImportError: the package ``tensorboard`` is not installed (the extra ``tensorboard``).
        ValueError: ``directory`` is no path, or ``every`` is below 1.

    >>> tensorboard("runs/digits", every=100).every
    100
    """
    require("tensorboard", "tensorboard", "tensorboard")
    check_path("tensorboard", "directory", directory)
    return recording("tensorboard", name, functools.partial(_Events, os.fspath(directory)), every)


def wandb(
    project: str | None = None, *, every: int | None = None, name: str = "wandb", **init_arguments: Any
) -> Callback:
    """Log the scalars of the logs to Weights & Biases.

    On the host, in the background; ``wandb.init`` runs in ``on_train_begin``. A run that goes on goes on with the same
    W&B run, and runs at the same time have one each. With the environment variable ``WANDB_MODE=offline`` nothing
    leaves the machine. Inside ``tolerate`` ``wandb.init`` waits 15 seconds for a server that is down, and not 90,
    unless the environment variable ``WANDB_INIT_TIMEOUT`` or the argument ``settings`` is given.

    A log whose name W&B keeps for itself, such as ``_step``, is written as ``log_step``.

    Args:
        project: where the run belongs.
        every: also the means over every so many batches; ``None``: epochs only.
        name: of the callback. Its memory is ``{"run_id": str}``, ``None`` before the run begins.
        **init_arguments: of ``wandb.init``: ``config``, ``tags``, ``group`` and so on. (W&B's own name of the run may
            be set by ``run.name`` or the environment variable ``WANDB_NAME``.)

    Returns:
        A host callback.

    Raises:
        ImportError: the package ``wandb`` is not installed (the extra ``wandb``).
        ValueError: ``project`` is no name, ``wandb.init`` has no such argument, or ``every`` is below 1; while
            training, if a log is named ``epoch``.

    >>> wandb("digits", every=100, tags=["baseline"]).every
    100
    """
    require("wandb", "wandb", "wandb")
    check_name("wandb", "project", project, optional=True)
    if init_arguments:
        _check_init_arguments(init_arguments)
    make_sink = functools.partial(_Wandb, {"project": project, "resume": "allow", **init_arguments})
    return recording("wandb", name, make_sink, every, memory={"run_id": None})


def mlflow(
    experiment: str = "Default",
    *,
    tracking_uri: str | None = None,
    every: int | None = None,
    name: str = "mlflow",
) -> Callback:
    """Log the scalars of the logs to MLflow.

    On the host, in the background; the MLflow run is found or made in ``on_train_begin``, as its id is remembered from
    then on. A run that goes on goes on with the same MLflow run, and runs at the same time have one each; it ends as
    ``FINISHED``, ``FAILED`` or, after Ctrl-C, ``KILLED``.

    MLflow waits for minutes for a server that is down. Inside ``tolerate`` it does not: a request is tried three times,
    for 5 seconds each, unless the environment variables ``MLFLOW_HTTP_REQUEST_MAX_RETRIES`` and
    ``MLFLOW_HTTP_REQUEST_TIMEOUT`` say otherwise; those that do not are set while the run is under way.

    In the names of logs, what MLflow does not take, such as the brackets of ``a[b]``, becomes ``_``. MLflow's file
    store keeps a metric as a file, which cannot be a folder, too; so beside a log ``norm`` the log ``norm/bias`` is
    written as ``norm.bias``. Where two logs would still have one name, the second's ends in a checksum of its own.

    Args:
        experiment: where the run belongs; it is made if there is none of that name.
        tracking_uri: of the server or the store; ``None``: MLflow's own default, or ``MLFLOW_TRACKING_URI``.
        every: also the means over every so many batches; ``None``: epochs only.
        name: of the callback. Its memory is ``{"run_id": str}``, ``None`` before the run begins.

    Returns:
        A host callback.

    Raises:
        ImportError: the package ``mlflow`` or ``mlflow-skinny`` is not installed (the extra ``mlflow``).
        ValueError: ``experiment`` is no name, ``tracking_uri`` no string, or ``every`` is below 1.

    >>> mlflow("digits", every=100).every
    100
    """
    require("mlflow", "mlflow", "mlflow")
    check_name("mlflow", "experiment", experiment)
    check_name("mlflow", "tracking_uri", tracking_uri, kind="a URI", optional=True)
    make_sink = functools.partial(_Mlflow, experiment, tracking_uri)
    return recording("mlflow", name, make_sink, every, memory={"run_id": None})


class _Events:
    """TensorBoard's event files."""

    def __init__(self, directory: str):
        self._directory = directory
        self._writer: Any = None
        self._names = _Names(_in_utf8)

    def open(self, memory: Any, epoch: int, step: int) -> Any:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        del epoch
        self._claim = Claim("tensorboard", self._directory)
        try:
            self._writer = EventFileWriter(self._claim.path)
        except BaseException:
            self._claim.release()
            raise
        if step:  # what was written of later steps, before the run was killed, is forgotten
            start = _message(event_pb2, "SessionLog")
            self._add(event_pb2, step=step + 1, session_log=start(status=start.START))
        return memory

    def write(self, record: Mapping[str, Any], epoch: int, step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2

        del epoch
        summary = _message(summary_pb2, "Summary")
        scalars = self._names.given(_scalars(record))
        values = [summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._add(event_pb2, step=step, summary=summary(value=values))
        self._writer.flush()

    def close(self, error: BaseException | None) -> None:
        del error
        try:
            self._writer.close()
        finally:
            self._claim.release()

    def _add(self, event_pb2: Any, **fields: Any) -> None:
        self._writer.add_event(_message(event_pb2, "Event")(wall_time=time.time(), **fields))


_open_ids: set[str] = set()  # of the runs of W&B and MLflow that this process has open
_opening = threading.Lock()


def _known_id(memory: Any) -> str | None:
    """The id of the run to go on with; none while another run, whose state this one was given, has it open."""
    return None if memory["run_id"] in _open_ids else memory["run_id"]


class _Wandb:
    """A run of Weights & Biases."""

    def __init__(self, init_arguments: dict[str, Any]):
        self._arguments = init_arguments
        self._run: Any = None
        self._names = _Names(_wandb_name)

    def open(self, memory: Any, epoch: int, step: int) -> Any:
        import wandb

        del epoch, step
        shorter = is_borne() and "WANDB_INIT_TIMEOUT" not in os.environ
        settings = {"settings": {"init_timeout": 15}} if shorter else {}
        with _opening:
            # By default W&B returns a run that is open when it is asked for one.
            another = {"reinit": "create_new"} if _open_ids else {}
            run_id = _known_id(memory)
            known = {} if run_id is None else {"id": run_id}
            self._run = wandb.init(**{**settings, **another, **self._arguments, **known})
            _open_ids.add(self._run.id)
        return {"run_id": self._run.id}

    def write(self, record: Mapping[str, Any], epoch: int, step: int) -> None:
        refuse_taken("wandb", record, "epoch")
        # W&B takes one row a step; the last batches of an epoch and the epoch share theirs.
        self._run.log({"epoch": epoch, **self._names.given(_scalars(record))}, step=step)

    def close(self, error: BaseException | None) -> None:
        try:
            self._run.finish(exit_code=0 if error is None else 1)
        finally:
            _open_ids.discard(self._run.id)


class _Mlflow:
    """A run of MLflow."""

    def __init__(self, experiment: str, tracking_uri: str | None):
        self._experiment, self._uri = experiment, tracking_uri
        self._client: Any = None
        self._run_id = ""
        self._names = _Names(_mlflow_name, folders=False)
        self._set: list[str] = []  # environment variables; in hooks alone, as another thread might read them meanwhile

    def open(self, memory: Any, epoch: int, step: int) -> Any:
        from mlflow.tracking import MlflowClient

        del epoch, step
        if is_borne():
            self._set = [variable for variable in _SHORTER if variable not in os.environ]
            os.environ.update({variable: _SHORTER[variable] for variable in self._set})
        try:
            client = MlflowClient(tracking_uri=self._uri)
            with _opening:
                known = _known_id(memory)
                self._run_id = self._begun(client) if known is None else known
                if known is not None:
                    client.update_run(self._run_id, status="RUNNING")
                _open_ids.add(self._run_id)
            there = () if known is None else client.get_run(known).data.metrics
            self._names = _Names(_mlflow_name, there, folders=False)
        except BaseException:
            _open_ids.discard(self._run_id)
            self._unset()
            raise
        self._client = client
        return {"run_id": self._run_id}

    def write(self, record: Mapping[str, Any], epoch: int, step: int) -> None:
        from mlflow.entities import Metric

        del epoch
        now = int(1000 * time.time())
        scalars = self._names.given(_scalars(record))
        metrics = [Metric(name, value, now, step) for name, value in scalars.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, error: BaseException | None) -> None:
        if self._client is not None:
            interrupted = isinstance(error, KeyboardInterrupt)
            status = "FINISHED" if error is None else "KILLED" if interrupted else "FAILED"
            client, self._client = self._client, None
            try:
                client.set_terminated(self._run_id, status=status)
            finally:
                _open_ids.discard(self._run_id)
                self._unset()

    def _begun(self, client: Any) -> str:
        """The id of a new run."""
        found = client.get_experiment_by_name(self._experiment)
        experiment_id = client.create_experiment(self._experiment) if found is None else found.experiment_id
        return client.create_run(experiment_id).info.run_id

    def _unset(self) -> None:
        for variable in self._set:
            os.environ.pop(variable, None)
        self._set = []


def _check_init_arguments(given: Mapping[str, Any]) -> None:
    import wandb

    known = inspect.signature(wandb.init).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for argument, value in given.items():
        if argument not in known:
            raise ValueError(
                f"wandb: wandb.init has no argument {argument!r} (given: {value!r}); it has {', '.join(known)}"
            )


class _Names:
    """What logs are called in a tracker: by names that it takes, and each by another.

    The same log has the same name in every record, also of a run that goes on.

    Args:
        taken_as: makes of the name of a log one that the tracker takes.
        there: the names in the run that goes on.
        folders: whether a name may be a folder of others, ``a`` beside ``a/b``.
    """

    def __init__(self, taken_as: Callable[[str], str], there: Iterable[str] = (), *, folders: bool = True):
        self._taken_as, self._there, self._folders = taken_as, frozenset(there), folders
        self._names: dict[str, str] = {}

    def given(self, record: Mapping[str, float]) -> dict[str, float]:
        """Return the record under the names."""
        new = record.keys() - self._names.keys()
        # Those that the tracker takes as they are come first, and a folder before what is in it.
        for log in sorted(new, key=lambda log: (self._taken_as(log) != log, log)):
            self._names[log] = self._chosen(log)
        return {self._names[log]: value for log, value in record.items()}

    def _chosen(self, log: str) -> str:
        name = self._taken_as(log)
        flat = name.replace("/", ".")
        apart = f"{flat}-{_checksum(log)}"
        if apart in self._there:  # the run that goes on has told it apart
            return apart
        used = set(self._names.values())
        return next((free for free in (name, flat) if free not in used and not self._is_nested(free, used)), apart)

    def _is_nested(self, name: str, used: set[str]) -> bool:
        """Whether a name is a folder of another, or the other of it."""
        if self._folders:
            return False
        return any(other.startswith(f"{name}/") or name.startswith(f"{other}/") for other in used | self._there)


def _checksum(log: str) -> str:
    return f"{zlib.crc32(log.encode(errors='surrogatepass')):08x}"


def _in_utf8(log: str) -> str:
    return log.encode(errors="backslashreplace").decode()


def _wandb_name(log: str) -> str:
    return _in_utf8(f"log{log}" if _WANDB_OWN.fullmatch(log) else log)


def _mlflow_name(log: str) -> str:
    """The name of a log as MLflow takes it: letters, digits and ``_-. /``, and a path that is not rewritten."""
    name = re.sub(r"[^/\w.\- ]", "_", log)
    if posixpath.normpath(name) != name or name.startswith(("..", "/")) or name == ".":
        name = "/".join("_" if part in ("", ".", "..") else part for part in name.split("/"))
        name = re.sub(r"^\.\.", "__", name)
    if len(name.encode()) <= _MLFLOW_BYTES:
        return name
    checksum = _checksum(log)
    begin = name.replace("/", ".").encode()[: _MLFLOW_BYTES - len(checksum) - 1].decode(errors="ignore")
    return f"{begin}-{checksum}"


def _message(module: Any, name: str) -> Any:
    """A class that protobuf makes when its module is imported."""
    return getattr(module, name)


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    return {log: float(value) for log, value in record.items() if np.ndim(value) == 0}
