"""Logs as files: what is in them, that they survive faults, and that a run that goes on writes the same file."""

import csv
import io
import itertools
import json
import pathlib
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import batches, host, trainer

import ant_jax as ant
from ant_jax._background import Queue
from ant_jax._hooks.callback import hooks_of
from ant_jax._logs.windows import Window
from ant_jax.callbacks import _log_to
from ant_jax.writers import CSVWriter, JSONLinesWriter, _text_file


FACTORIES = {"csv": ant.callbacks.csv_log, "json": ant.callbacks.json_log}


def rows_of(path: pathlib.Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [json.loads(line) for line in path.read_text().splitlines()]


def fit(*callbacks: ant.Callback, epochs: int = 3, state: Any = None, **options: Any) -> ant.TrainState:
    a_trainer = trainer(*callbacks, **options)
    return a_trainer.fit(state or a_trainer.init(batches()[0]), batches(5), epochs, batches(1))[0]


@pytest.mark.parametrize("kind", FACTORIES)
def test_a_record_an_epoch_is_the_history(kind, tmp_path):
    path = tmp_path / "deep" / f"log.{kind}"
    state = fit(FACTORIES[kind](path))
    rows = rows_of(path)
    assert [(row.pop("epoch"), row.pop("step")) for row in rows] == [(0, 5), (1, 10), (2, 15)]
    assert rows == list(state.history)


@pytest.mark.parametrize("kind", FACTORIES)
@pytest.mark.parametrize("number", [int, np.int64, jnp.int32])
def test_hooks_called_by_hand_take_any_number(kind, number, tmp_path):
    path, a_trainer = tmp_path / f"log.{kind}", trainer()
    hooks, state = hooks_of(FACTORIES[kind](path)), a_trainer.init(batches()[0])
    hooks["on_train_begin"](a_trainer, state, {})
    hooks["on_epoch_end"](number(3), a_trainer, state, {"train_loss": 0.5})
    hooks["on_train_end"](a_trainer, state, {})
    assert rows_of(path) == [{"epoch": 3, "step": 0, "train_loss": 0.5}]


@pytest.mark.parametrize(("kind", "of_epochs"), [("csv", 0), ("json", 3)])
def test_records_of_batches_are_means_over_all_of_them(kind, of_epochs, tmp_path):
    losses: list[float] = []

    def note(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        losses.append(float(logs["loss"]))
        return state, logs

    path = tmp_path / f"log.{kind}"
    fit(FACTORIES[kind](path, every=2), host("note", on_batch_end=note))
    rows = rows_of(path)
    of_batches = [row for row in rows if "train_loss" not in row]
    assert len(rows) - len(of_batches) == of_epochs
    assert [row["step"] for row in of_batches] == [2, 4, 5, 7, 9, 10, 12, 14, 15]
    wanted = [np.mean(losses[e + a : e + b]) for e in (0, 5, 10) for a, b in ((0, 2), (2, 4), (4, 5))]
    np.testing.assert_allclose([row["loss"] for row in of_batches], wanted, rtol=1e-6)


@pytest.mark.parametrize("kind", FACTORIES)
def test_means_are_over_the_examples(kind, tmp_path):
    path = tmp_path / f"log.{kind}"
    a_trainer = trainer(FACTORIES[kind](path, every=100))
    loader = [*batches(2), *batches(1, batch=3)]
    state, _ = a_trainer.fit(a_trainer.init(loader[0]), loader, 1)
    assert rows_of(path)[0]["loss"] == pytest.approx(state.history[0]["train_loss"], rel=1e-6)


@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("kind", FACTORIES)
def test_a_run_that_goes_on_writes_the_file_of_the_uninterrupted_one(kind, every, tmp_path):
    whole, cut = tmp_path / f"whole.{kind}", tmp_path / f"cut.{kind}"
    fit(FACTORIES[kind](whole, every=every))
    one_epoch = fit(FACTORIES[kind](cut, every=every), epochs=1)
    fit(FACTORIES[kind](cut, every=every), state=one_epoch, epochs=2)  # goes further than what is kept of it
    fit(FACTORIES[kind](cut, every=every), state=one_epoch)
    assert whole.read_text() == cut.read_text()
    fit(FACTORIES[kind](cut, every=every))  # a new run begins the file anew
    assert whole.read_text() == cut.read_text()


@pytest.mark.parametrize("kind", FACTORIES)
def test_any_name_is_a_column(kind, tmp_path):
    names = ["a,b", 'c"d', "e\nf", "g\rh", "\r\n", "", " ", "\u2028", "'", ";", "=1+1", "\udc80"]

    def publishing() -> ant.Callback:
        values = {name: float(i) for i, name in enumerate(names)}
        return host("publishing", on_epoch_end=lambda epoch, trainer, state, logs: (state, {**logs, **values}))

    path = tmp_path / f"log.{kind}"
    state = fit(publishing(), FACTORIES[kind](path), epochs=1)
    fit(publishing(), FACTORIES[kind](path), state=state, epochs=2)
    text = path.read_bytes().decode(errors="surrogatepass")
    rows = [*csv.DictReader(io.StringIO(text, newline=""))] if kind == "csv" else map(json.loads, text.splitlines())
    for row in rows:
        assert [float(row[name]) for name in names] == [*range(len(names))]


def failing_once(hook: str, at: int) -> ant.Callback:
    calls = itertools.count()

    def fail(*arguments: Any) -> Any:
        if next(calls) == at:
            raise RuntimeError("on purpose")
        return arguments[-2:]

    hooks: dict[str, Any] = {hook: fail}
    return host("fail", **hooks)


@pytest.mark.parametrize(
    ("hook", "at"), [("on_batch_end", 6), ("on_batch_end", 9), ("on_epoch_end", 1), ("on_checkpoint", 1)]
)
@pytest.mark.parametrize("every", [None, 1])
@pytest.mark.parametrize("kind", FACTORIES)
def test_going_on_after_an_exception_writes_nothing_twice(kind, every, hook, at, tmp_path):
    whole, cut = tmp_path / f"whole.{kind}", tmp_path / f"cut.{kind}"
    fit(FACTORIES[kind](whole, every=every))
    with pytest.raises(RuntimeError, match="on purpose") as caught:
        fit(FACTORIES[kind](cut, every=every), failing_once(hook, at))
    fit(FACTORIES[kind](cut, every=every), state=getattr(caught.value, "train_state"))  # noqa: B009
    assert whole.read_text() == cut.read_text()


@pytest.mark.parametrize("kind", FACTORIES)
def test_a_row_that_was_torn_when_the_process_was_killed_is_written_again(kind, tmp_path):
    path = tmp_path / f"log.{kind}"
    two_epochs = fit(FACTORIES[kind](path), epochs=2)
    fit(FACTORIES[kind](path), state=two_epochs)
    whole = path.read_text()
    last = whole.splitlines()[-1]
    for torn in (last[:1], last[:-1], last):
        path.write_text(whole.removesuffix(f"{last}\n") + torn)
        fit(FACTORIES[kind](path), state=two_epochs)
        assert path.read_text() == whole


@pytest.mark.parametrize("kind", FACTORIES)
def test_epochs_that_are_left_out_count_in_the_steps(kind, tmp_path):
    path = tmp_path / f"log.{kind}"
    fit(ant.callbacks.every(FACTORIES[kind](path), epochs=2), epochs=5)
    assert [(row["epoch"], row["step"]) for row in rows_of(path)] == [(1, 10), (3, 20)]


@pytest.mark.parametrize("kind", FACTORIES)
@pytest.mark.parametrize(("every", "steps"), [(None, [10, 15]), (5, [10, 15]), (3, [8, 10, 13, 15])])
def test_a_file_is_opened_when_its_condition_first_holds(kind, every, steps, tmp_path):
    path = tmp_path / f"log.{kind}"
    log = ant.callbacks.when(lambda state, logs: state.epoch >= 1, FACTORIES[kind](path, every=every))
    for _ in range(2):  # the second run does again what the first did
        fit(log)
        assert [row["step"] for row in rows_of(path) if every is None or "train_loss" not in row] == steps


def test_a_run_is_told_from_one_before_it_that_had_no_end(tmp_path):
    log = ant.callbacks.json_log(tmp_path / "log")
    for _ in range(2):
        fit(ant.callbacks.when(lambda state, logs: state.epoch == 1, log))
    hooks_of(log)["on_train_end"](None, None, {})
    assert [row["epoch"] for row in rows_of(tmp_path / "log")] == [1]


def test_a_column_that_comes_later_and_numbers_that_are_not_finite(tmp_path):
    def publish(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        more: dict[str, Any] = {"late": 1.0} if epoch else {"vector": np.array([1, np.nan], np.float32)}
        return state, {**logs, "bad": [np.nan, np.inf, 1.0][epoch], **more}

    table, lines = tmp_path / "log.csv", tmp_path / "log.json"
    fit(host("publish", on_epoch_end=publish), ant.callbacks.csv_log(table), ant.callbacks.json_log(lines))
    header, *rows = table.read_text().splitlines()
    assert header == "epoch,step,train_loss,val_loss,bad,late"
    assert [row.split(",")[4:] for row in rows] == [["nan", ""], ["inf", "1.0"], ["1.0", "1.0"]]
    assert [row["bad"] for row in rows_of(lines)] == [None, None, 1.0]
    assert rows_of(lines)[0]["vector"] == [1.0, None]


def test_complex_logs_are_written_and_saved(tmp_path):
    table, lines = tmp_path / "log.csv", tmp_path / "log.json"
    metrics = {"phase": lambda outputs, targets: jax.lax.complex(outputs, -outputs).sum(-1)}
    callbacks = ant.callbacks.csv_log(table), ant.callbacks.json_log(lines)
    a_trainer = trainer(*callbacks, metrics=metrics)
    state, history = a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 1)
    value = history[0]["train_phase"]
    assert value.imag == -value.real != 0
    with table.open(newline="") as file:
        assert [complex(row["train_phase"]) for row in csv.DictReader(file)] == [value]
    assert [complex(row["train_phase"]) for row in rows_of(lines)] == [value]
    a_trainer.save(tmp_path / "saved", state)
    assert a_trainer.restore(tmp_path / "saved").history[0]["train_phase"] == value


def test_what_is_read_is_read_in_the_background(tmp_path, monkeypatch):
    threads: set[str] = set()
    to_python, means = _log_to.to_python, Window.means
    monkeypatch.setattr(_log_to, "to_python", lambda v: (threads.add(threading.current_thread().name), to_python(v))[1])
    monkeypatch.setattr(Window, "means", lambda w: (threads.add(threading.current_thread().name), means(w))[1])
    fit(ant.callbacks.json_log(tmp_path / "log", every=2))
    assert threads == {"ant_jax-writer_0"}


def test_the_file_is_whole_after_an_exception(tmp_path):
    def fail(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        if epoch == 1:
            raise RuntimeError("on purpose")
        return state, logs

    log = ant.callbacks.json_log(tmp_path / "log", every=1)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(log, host("fail", on_epoch_end=fail))
    assert [row["step"] for row in rows_of(tmp_path / "log")] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]
    fit(log, epochs=1)  # and it may be used again
    assert len(rows_of(tmp_path / "log")) == 6


def test_a_failure_to_write_comes_out_of_the_hook_of_the_callback_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(JSONLinesWriter, "flush", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        fit(ant.callbacks.csv_log(tmp_path / "a"), ant.callbacks.json_log(tmp_path / "b"), epochs=5)
    assert any("of callback 'json_log'" in note for note in caught.value.__notes__)
    assert len(rows_of((tmp_path / "a").rename(tmp_path / "a.csv"))) >= 1


def test_a_failure_may_be_tolerated(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(JSONLinesWriter, "flush", lambda *arguments: 1 / 0)
    state = fit(ant.callbacks.tolerate(ant.callbacks.json_log(tmp_path / "b"), failures=2), epochs=5)
    assert state.epoch == 5
    assert "callback 'json_log' failed in" in caplog.text


@pytest.mark.parametrize("kind", FACTORIES)
def test_a_failure_that_is_tolerated_costs_no_other_row(kind, tmp_path, monkeypatch):
    failures = iter([None, OSError("on purpose")])
    for writer in (CSVWriter, JSONLinesWriter):
        write = writer._write

        def write_or_fail(*arguments: Any, write: Any = write) -> None:
            failure = next(failures, None)
            if failure is not None:
                raise failure
            write(*arguments)

        monkeypatch.setattr(writer, "_write", write_or_fail)
    path = tmp_path / f"log.{kind}"
    fit(ant.callbacks.tolerate(FACTORIES[kind](path)), epochs=4)
    assert [row["epoch"] for row in rows_of(path)] == [0, 2, 3]


def test_a_column_that_cannot_be_added_costs_no_other_row(tmp_path, monkeypatch):
    def fail_once(path: pathlib.Path) -> Any:
        monkeypatch.undo()
        raise OSError("on purpose")

    def publish(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        if epoch == 1:
            assert written.wait(timeout=60)  # the row of epoch 0 may be being written
            monkeypatch.setattr(_text_file, "replacing", fail_once)
        return state, {**logs, "late": 1.0} if epoch else logs

    written, write = threading.Event(), CSVWriter._write

    def write_and_tell(*arguments: Any) -> None:
        write(*arguments)
        written.set()

    path = tmp_path / "log.csv"
    monkeypatch.setattr(CSVWriter, "_write", write_and_tell)
    fit(host("publish", on_epoch_end=publish), ant.callbacks.tolerate(ant.callbacks.csv_log(path)), epochs=4)
    assert [(row["epoch"], "late" in row) for row in rows_of(path)] == [(0, False), (2, True), (3, True)]


def test_every_row_that_fails_is_a_failure_and_after_too_many_the_rest_is_left_out(tmp_path, monkeypatch, caplog):
    trained, given_up, tried, give_up = threading.Event(), threading.Event(), [], Queue._give_up

    def write(*arguments: Any) -> None:
        trained.wait(timeout=60)
        tried.append(arguments)
        if len(tried) > 2:  # it may have begun before the failures of the others are told
            given_up.wait(timeout=60)
        raise OSError("the disk is full")

    def train_end(trainer: Any, state: Any, logs: Any) -> Any:
        trained.set()
        return state, logs

    monkeypatch.setattr(JSONLinesWriter, "_write", write)
    monkeypatch.setattr(Queue, "_give_up", lambda writer: (give_up(writer), given_up.set()))
    log = ant.callbacks.tolerate(ant.callbacks.json_log(tmp_path / "log", every=1), failures=2)
    fit(host("end", on_train_end=train_end), log, epochs=10)  # 60 rows, none of which is written while it trains
    said = [record.getMessage().split(": ")[0] for record in caplog.records if record.name == "ant_jax"]
    assert said[:2] == [
        "callback 'json_log' failed in on_train_end (failure 1 of 2; the run goes on)",
        "callback 'json_log' failed in on_train_end (failure 2 of 2; it is not called any more)",
    ]
    assert len(said) == len(tried) <= 3


def test_a_callback_that_cannot_write_holds_up_no_other(tmp_path, monkeypatch):
    """Rows of the table are written while the first line is not: the line waits for all of them."""
    in_time: list[bool] = []
    monkeypatch.setattr(JSONLinesWriter, "_write", lambda *arguments: in_time.append(written.wait(timeout=20)))
    written, write = threading.Event(), CSVWriter._write

    def write_and_tell(*arguments: Any) -> None:
        write(*arguments)
        if len(rows_of(tmp_path / "log.csv")) == 3:
            written.set()

    monkeypatch.setattr(CSVWriter, "_write", write_and_tell)
    fit(ant.callbacks.json_log(tmp_path / "log"), ant.callbacks.csv_log(tmp_path / "log.csv"))
    assert in_time == 3 * [True]


def test_runs_leave_no_threads(tmp_path):
    counts: set[int] = set()
    a_trainer = trainer(ant.callbacks.csv_log(tmp_path / "a.csv"), ant.callbacks.json_log(tmp_path / "b.json"))
    start = a_trainer.init(batches()[0])
    for _ in range(20):
        a_trainer.fit(start, batches(5), 1)
        counts.add(sum(thread.name.startswith("ant_jax-writer") for thread in threading.enumerate()))
    assert counts == {0}


def test_a_directory_that_cannot_be_written_is_an_error_at_the_beginning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        fit(ant.callbacks.csv_log(tmp_path / "file" / "log.csv"))


@pytest.mark.parametrize("kind", FACTORIES)
@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_refuses(kind, every):
    with pytest.raises(ValueError, match=f"{kind}_log: every must be a whole number of batches.*got {every}"):
        FACTORIES[kind]("log", every=every)


@pytest.mark.parametrize(("kind", "writer"), [("csv", "CSVWriter"), ("json", "JSONLinesWriter")])
@pytest.mark.parametrize("column", ["epoch", "step"])
def test_a_log_with_the_name_of_a_column_is_refused(kind, writer, column, tmp_path):
    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        return state, {**logs, column: 7}

    publishing = ant.Callback(name="publishing", on_epoch_end=on_epoch_end)
    with pytest.raises(ValueError, match=f"{writer}: a callback published a log named '{column}'"):
        fit(publishing, FACTORIES[kind](tmp_path / "log"))
