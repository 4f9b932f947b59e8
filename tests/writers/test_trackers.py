"""Trackers, against the real packages: what was logged is read back."""

import io
import json
import os
import pathlib
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from problems import batches, host, trainer

import ant_jax as ant
from ant_jax.writers._mlflow import accepted
from ant_jax.writers._names import UniqueNames


def nested(log: ant.Callback) -> tuple[list[str], ant.TrainState]:
    """Train two epochs, and at the end of each another run from there; returns the ids of those, and the last state."""
    ids: list[str] = []

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        if trainer.num_epochs == 2:
            inner, _ = trainer.fit(state.replace(stop=False), batches(4), epoch + 3)
            ids.append(inner.callback_states[log.name]["run_id"])
        return state, logs

    outer = trainer(log, host("nests", on_epoch_end=on_epoch_end))
    state, _ = outer.fit(outer.init(batches()[0]), batches(4), 2, batches(1))
    return ids, state


def fit(*callbacks: ant.Callback, epochs: int = 2, state: Any = None) -> ant.TrainState:
    a_trainer = trainer(*callbacks)
    return a_trainer.fit(state or a_trainer.init(batches()[0]), batches(4), epochs, batches(1))[0]


def failing() -> ant.Callback:
    return host("fail", on_epoch_end=lambda e, trainer, state, logs: 1 / 0)


def test_tensorboard_reads_what_was_logged_and_forgets_what_is_done_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = fit(ant.callbacks.tensorboard(tmp_path, every=2), epochs=1)
    fit(ant.callbacks.tensorboard(tmp_path, every=2), state=one, epochs=2)
    whole = fit(ant.callbacks.tensorboard(tmp_path, every=2), state=one, epochs=3)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss", "train_loss", "val_loss"]
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8, 10, 12]
    assert [event.step for event in events.Scalars("val_loss")] == [4, 8, 12]
    read = [event.value for event in events.Scalars("train_loss")]
    np.testing.assert_allclose(read, whole.history.to_dict()["train_loss"], rtol=1e-6)


def writing_all(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    gray = np.arange(4, dtype=np.uint8).reshape(2, 2, 1)
    values: dict[str, Any] = {"images": {"digit": image, "gray": gray}, "texts": {"said": "seven"}}
    ant.writers.write(trainer, state, histograms={"kernel": np.array([0.0, 1.0, 1.0, np.nan])}, **values)
    return state, logs


def test_tensorboard_reads_histograms_images_and_texts(tmp_path):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    counting = ant.callbacks.gradient_statistics(histograms=True)
    fit(counting, ant.callbacks.tensorboard(tmp_path), host("writes", on_epoch_end=writing_all), epochs=1)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    counts = "train_grad_histogram/bias"
    assert {"kernel", counts} <= set(tags["histograms"]) and set(tags["images"]) == {"digit", "gray"}
    assert events.Histograms("kernel")[0].histogram_value.num == 3
    counted = events.Histograms(counts)[0].histogram_value
    assert counted.min == 2.0**-24 and counted.num == pytest.approx(3)
    image = Image.open(io.BytesIO(events.Images("digit")[0].encoded_image_string))
    assert np.asarray(image).ravel().tolist() == list(range(12))
    assert tags["tensors"] == ["said"]
    assert events.Tensors("said")[0].tensor_proto.string_val[0] == b"seven"


def test_mlflow_has_images_and_texts(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = str(tmp_path / "mlruns")
    state = fit(ant.callbacks.mlflow(tracking_uri=uri), host("writes", on_epoch_end=writing_all), epochs=1)
    client, run_id = MlflowClient(uri), state.callback_states["mlflow"]["run_id"]
    assert {file.path for file in client.list_artifacts(run_id)} == {"images", "said"}
    assert client.list_artifacts(run_id, "said")[0].path == "said/4.txt"


def test_a_run_in_a_hook_has_an_mlflow_run_of_its_own(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = str(tmp_path / "mlruns")
    ids, state = nested(ant.callbacks.mlflow("digits", tracking_uri=uri))
    client, own = MlflowClient(uri), state.callback_states["mlflow"]["run_id"]
    assert len({own, *ids}) == 3
    assert [metric.step for metric in client.get_metric_history(own, "train_loss")] == [4, 8]
    assert {client.get_run(run_id).info.status for run_id in (own, *ids)} == {"FINISHED"}


def test_mlflow_reads_what_was_logged_and_a_run_goes_on(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the other stores need more than mlflow-skinny
    uri = str(tmp_path / "mlruns")
    one = fit(ant.callbacks.mlflow("digits", tracking_uri=uri, every=2), epochs=1)
    whole = fit(ant.callbacks.mlflow("digits", tracking_uri=uri, every=2), state=one, epochs=2)
    client, run_id = MlflowClient(uri), whole.callback_states["mlflow"]["run_id"]
    assert run_id == one.callback_states["mlflow"]["run_id"]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    history = {metric.step: metric.value for metric in client.get_metric_history(run_id, "val_loss")}
    assert history == dict(zip([4, 8], whole.history.to_dict()["val_loss"], strict=True))
    assert [metric.step for metric in client.get_metric_history(run_id, "loss")] == [2, 4, 6, 8]
    with pytest.raises(ZeroDivisionError) as caught:
        fit(ant.callbacks.mlflow("digits", tracking_uri=uri), failing())
    state: Any = getattr(caught.value, "train_state")  # noqa: B009  # it is no declared attribute
    assert client.get_run(state.callback_states["mlflow"]["run_id"]).info.status == "FAILED"


@pytest.mark.parametrize("given", [{}, {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}])
@pytest.mark.parametrize("tolerated", [False, True])
def test_mlflow_waits_less_for_its_server_where_its_failures_are_borne(tolerated, given, tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    def settings() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_HTTP_REQUEST")}

    def noting(name: str) -> None:
        method = getattr(MlflowClient, name)
        monkeypatch.setattr(MlflowClient, name, lambda *a, **k: (seen.append(settings()), method(*a, **k))[1])

    seen: list[dict[str, str]] = []
    for variable in settings():
        monkeypatch.delenv(variable)
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for name in ("get_experiment_by_name", "log_batch", "set_terminated"):
        noting(name)
    log = ant.callbacks.mlflow(tracking_uri=str(tmp_path))
    fit(ant.callbacks.tolerate(log) if tolerated else log)
    shorter = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    assert seen == [{**(shorter if tolerated else {}), **given}] * 4  # opened, two epochs, closed
    assert settings() == given


def test_a_server_that_cannot_be_reached_may_be_tolerated(monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # so that the test does not wait
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    log = ant.callbacks.mlflow(tracking_uri="http://127.0.0.1:9", every=1)
    state = fit(ant.callbacks.tolerate(log, failures=2), epochs=4)
    assert state.epoch == 4 and state.callback_states["mlflow"] == {"run_id": None}
    said = [record.getMessage().split(": ")[0] for record in caplog.records if record.name == "ant_jax"]
    assert said == [
        "callback 'mlflow' failed in on_train_begin (failure 1 of 2; the run goes on)",
        "callback 'mlflow' failed in on_batch_end (failure 2 of 2; it is not called any more)",
    ]
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def test_mlflow_is_given_names_that_it_takes(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = str(tmp_path / "mlruns")
    names = {"a[b]": "a_b_", "c//d": "c/_/d", "../e": "_/e", "..f": "__f", "/g": "_/g", "h/": "h/_", "i.j k": "i.j k"}

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        return state, {**logs, **dict.fromkeys(names, 7.0)}

    publishing = ant.Callback(name="publishing", on_epoch_end=on_epoch_end)
    state = fit(publishing, ant.callbacks.mlflow("digits", tracking_uri=uri), epochs=1)
    logged = MlflowClient(uri).get_run(state.callback_states["mlflow"]["run_id"]).data.metrics
    assert logged.keys() >= set(names.values())


def publishing(*names: str) -> ant.Callback:
    """Publish a value under each name: its position."""
    values = {name: float(i) for i, name in enumerate(names)}
    return host("publishing", on_epoch_end=lambda epoch, trainer, state, logs: (state, {**logs, **values}))


AWKWARD = ("a", "a/b", "a.b", "a/b/c", "c/d", "c", "e[f]", "e(f)", "", ".", "..", "/", "A", "\n", "x" * 300)
AWKWARD += (
    "\u4e2d" * 200,
    "_step",
    "log_step",
    "_timestamp",
    "_wandb",
    '",\r$',
    "\udc80",
    "y" * 300,
    "z" * 150 + "/" + "z" * 150,
)


def test_mlflow_gives_every_log_a_metric_of_its_own_also_when_the_run_goes_on(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = str(tmp_path / "mlruns")
    logs = [ant.callbacks.gradient_norm(), ant.callbacks.gradient_statistics()]
    one = fit(*logs, publishing(*AWKWARD), ant.callbacks.mlflow(tracking_uri=uri), epochs=1)
    # What comes first may be another log, in the process in which the run goes on.
    whole = fit(*logs, publishing(*AWKWARD[::-1]), ant.callbacks.mlflow(tracking_uri=uri, every=1), state=one, epochs=2)
    client, run_id = MlflowClient(uri), whole.callback_states["mlflow"]["run_id"]
    metrics = client.get_run(run_id).data.metrics
    history = {name: [metric.value for metric in client.get_metric_history(run_id, name)] for name in metrics}
    of_epochs = [values for values in history.values() if len(values) == 2]
    last = len(AWKWARD) - 1
    assert all([float(i), float(last - i)] in of_epochs for i in range(len(AWKWARD)))
    assert len(of_epochs) == len(whole.history[0])
    assert history["train_grad_norm"] == whole.history.to_dict()["train_grad_norm"]
    of_bias = whole.history.to_dict()["train_gradient_statistics/grad_norm/bias"]
    assert history["train_gradient_statistics.grad_norm.bias"] == of_bias


@pytest.mark.parametrize("order", [("a", "a/b"), ("a/b", "a"), ("a[b]", "a(b)"), ("a/b", "a.b", "a")])
def test_a_name_is_told_apart_in_the_same_way_whatever_comes_first_when_a_run_goes_on(order):
    first = UniqueNames(accepted, folders=False)
    given = {log: [*first.rename({log: 0.0})][0] for log in order}
    again = UniqueNames(accepted, given.values(), folders=False)
    assert {log: [*again.rename({log: 0.0})][0] for log in reversed(order)} == given
    assert len(set(given.values())) == len(order)


@pytest.fixture
def offline(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # its service may have been started with another directory, and this one must not outlive the test
    yield tmp_path
    wandb.teardown()


def records_in(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB, behind a header of 7 bytes."""
    at, parts, block = 7, b"", 32 * 1024
    while at + 7 <= len(data):
        if block - at % block < 7:  # no room for a header: the block is padded
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def wandb_rows(directory: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of all offline runs, in their order."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its own process may still be writing when a run has finished
    rows: list[dict[str, Any]] = []
    for file in sorted(directory.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for data in records_in(file.read_bytes()):
            record = getattr(wandb_internal_pb2, "Record").FromString(data)  # noqa: B009  # protobuf makes it at import
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_wandb_reads_what_was_logged_and_a_run_goes_on(offline):
    one = fit(ant.callbacks.wandb("digits", every=2), epochs=1)
    whole = fit(ant.callbacks.wandb("digits", every=2), state=one, epochs=2)
    assert one.callback_states["wandb"] == whole.callback_states["wandb"]
    assert isinstance(whole.callback_states["wandb"]["run_id"], str)
    rows = wandb_rows(offline)
    assert [row["_step"] for row in rows] == [2, 4, 6, 8]
    assert [row["val_loss"] for row in rows if "val_loss" in row] == whole.history.to_dict()["val_loss"]


def test_wandb_has_histograms_images_and_texts(offline):
    fit(ant.callbacks.wandb("digits"), host("writes", on_epoch_end=writing_all), epochs=1)
    (row,) = wandb_rows(offline)
    assert sum(row["kernel/values"]) == 3 and row["said"] == "seven"
    assert row["digit/_type"] == row["gray/_type"] == "image-file"


def test_wandb_gives_every_log_a_name_of_its_own(offline):
    fit(publishing(*AWKWARD), ant.callbacks.wandb("digits"), epochs=1)
    (row,) = wandb_rows(offline)
    values = [value for name, value in row.items() if name not in ("epoch", "_step", "_timestamp", "_runtime")]
    assert set(values) >= {float(i) for i in range(len(AWKWARD))}
    assert row["_step"] == 4 and row["a/b"] == 1.0


def test_tensorboard_gives_every_log_a_tag_of_its_own(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    state = fit(publishing(*AWKWARD), ant.callbacks.tensorboard(tmp_path), epochs=1)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert len(events.Tags()["scalars"]) == len(state.history[0])


def test_a_run_in_a_hook_has_a_wandb_run_of_its_own(offline):
    ids, state = nested(ant.callbacks.wandb("digits"))
    own = state.callback_states["wandb"]["run_id"]
    assert len({own, *ids}) == 3
    assert len([row for row in wandb_rows(offline) if "val_loss" in row]) == 2  # inner runs have none
    assert {path.name.rpartition("-")[2] for path in offline.glob("wandb/offline-run-*")} == {own, *ids}


def test_wandb_waits_less_for_its_server_where_its_failures_are_borne(monkeypatch):
    import wandb

    seen: list[Any] = []

    def down(**arguments: Any) -> None:
        seen.append(arguments.get("settings"))
        raise OSError("down")

    monkeypatch.setattr(wandb, "init", down)
    monkeypatch.delenv("WANDB_INIT_TIMEOUT", raising=False)
    fit(ant.callbacks.tolerate(ant.callbacks.wandb("digits")))
    fit(ant.callbacks.tolerate(ant.callbacks.wandb("digits", settings={"init_timeout": 1}), failures=1))
    with pytest.raises(OSError, match="down"):
        fit(ant.callbacks.wandb("digits"))
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "60")
    fit(ant.callbacks.tolerate(ant.callbacks.wandb("digits"), failures=1))
    assert seen == [{"init_timeout": 15}] * 3 + [{"init_timeout": 1}, None, None]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_package_that_is_missing_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(
        ImportError, match=rf'{name}: the package {name} is not installed; pip install "ant_jax\[{name}\]"'
    ):
        getattr(ant.callbacks, name)("digits")


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_refuses(name):
    with pytest.raises(
        ValueError, match=f"{name}: every must be a whole number of batches, at least 1, or None, got 0"
    ):
        getattr(ant.callbacks, name)("digits", every=0)
