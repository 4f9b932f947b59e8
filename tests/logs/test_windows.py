"""What rows of a window stand for: every reader has the mean that the history has."""

import csv
import io
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import BATCH, batches, data, host, trainer

import ant_jax as ant
from ant_jax._logs.windows import Window, join_windows, with_nan


library = ant.callbacks


def spoilt(count: int, *bad: int, last: int = BATCH) -> list[Any]:
    """Batches of which some give a loss that is NaN, and the last has so many examples."""
    loader: list[Any] = batches(count)
    for i in bad:
        loader[i][0][0, 0] = np.nan
    inputs, targets = loader[-1]
    loader[-1] = inputs[:last], targets[:last]
    return loader


def rows_of_readers(tmp_path: Any, loader: list[Any], *callbacks: ant.Callback, **options: Any) -> list[dict[str, Any]]:
    """The means of an epoch as each reader tells them: the history first."""
    lines: list[str] = []
    bar, windows = io.StringIO(), []
    every = len(loader)

    def look(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        windows.append({name: logs.window.mean(name) for name, of in logs.window.items() if of.ndim == 1})
        return state, logs

    readers = [
        library.csv_log(tmp_path / "log.csv", every=every),
        library.json_log(tmp_path / "log.json", every=every),
        library.log_progress(every, printer=lines.append),
        host("look", every=every, on_batch_end=look),
        library.progress_bar(file=bar),
    ]
    a_trainer = trainer(*callbacks, *readers, **options)
    history = a_trainer.fit(a_trainer.init(loader[0]), loader, 1)[1]
    expected = {name.removeprefix("train_"): mean for name, mean in history[0].items() if name.startswith("train_")}
    (row,) = csv.DictReader((tmp_path / "log.csv").read_text().splitlines())
    line = json.loads((tmp_path / "log.json").read_text().splitlines()[0])
    told = dict(part.split() for part in lines[1].split(": ")[1].split(" (")[0].split(", "))
    read = [row, line, told, windows[-1]]
    return [expected, *[{name: _number(values[name]) for name in expected} for values in read]]


def _number(value: Any) -> float:
    return np.nan if value is None else float(value)


CASES: dict[str, tuple[list[Any], list[ant.Callback], dict[str, Any]]] = {
    "a last batch of one example": (spoilt(5, last=1), [], {}),
    "a batch that is skipped": (spoilt(5, 1, last=3), [library.skip_nonfinite()], {}),
    "a loss that is NaN": (spoilt(5, 1), [], {"optimizer": optax.apply_if_finite(optax.sgd(0.1), 9)}),
    "a log that not every batch has": (spoilt(5, last=1), [library.every(library.gradient_norm(), batches=2)], {}),
    "a log that a condition leaves out": (
        spoilt(5, last=3), [library.when(lambda state, logs: state.step % 2 == 1, library.gradient_norm())], {},
    ),
    "a log that no batch has": (spoilt(3), [library.every(library.gradient_norm(), batches=9)], {}),
    "a log of updates": (
        spoilt(5, last=1), [library.gradient_statistics(per_layer=False)], {"gradient_accumulation_steps": 2},
    ),
    "a log of updates, where batches are skipped": (
        spoilt(7, 0, 1, 2, last=1), [library.skip_nonfinite(), library.gradient_statistics(per_layer=False)],
        {"gradient_accumulation_steps": 2},
    ),
    "overflow of float16": (
        [((1e4 if i == 1 else 1e-3) * batch[0], batch[1]) for i, batch in enumerate(spoilt(5, last=3))],
        [library.gradient_norm()], {"precision": "float16"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_reader_has_the_mean_of_the_history(name, tmp_path):
    loader, callbacks, options = CASES[name]
    fuse = "skipped" not in name  # so both kinds of launches have their turn
    expected, row, line, told, window = rows_of_readers(tmp_path, loader, *callbacks, fuse=fuse, **options)
    assert len(expected) >= 1
    for mean in (row, line, window):
        np.testing.assert_allclose([mean[log] for log in expected], [*expected.values()], rtol=2e-7)
    np.testing.assert_allclose([told[log] for log in expected], [*expected.values()], rtol=1e-3)
    lacks = name in ("a loss that is NaN", "a log that no batch has")
    assert np.isnan([*expected.values()]).any() == lacks


@pytest.mark.parametrize("fuse", [True, False])
def test_rows_have_weights_and_what_is_absent_is_nan(fuse):
    seen: list[Any] = []

    def look(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        seen.append((logs, logs.window))
        return state, logs

    rare = library.every(library.gradient_norm(), batches=2)
    a_trainer = trainer(rare, library.skip_nonfinite(), host("look", every=5, on_batch_end=look), fuse=fuse)
    loader = spoilt(5, 2, last=3)
    a_trainer.fit(a_trainer.init(loader[0]), loader, 1)
    ((logs, window),) = seen
    assert window.weights["loss"].tolist() == [8, 8, 0, 8, 3]
    assert window.weights["grad_norm"].tolist() == [0, 8, 0, 8, 0]
    assert window.weights["step_skipped"].tolist() == [8, 8, 8, 8, 3]
    assert np.isnan(window["grad_norm"]).tolist() == [True, False, True, False, True]
    assert np.isnan(window["loss"]).tolist() == [False, False, True, False, False]  # what the batch has computed
    assert np.isnan(logs["grad_norm"]) and np.isfinite(logs["loss"])  # of the last batch
    assert logs["batch_size"] == 3 and set(logs) == {"batch_size", "loss", "grad_norm", "step_skipped"}


def test_an_open_window_is_saved_with_its_weights(tmp_path):
    means: list[Any] = []

    def look(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        means.append((logs.window.means(), {name: of.tolist() for name, of in logs.window.weights.items()}))
        return state, logs

    def callbacks(*others: ant.Callback) -> list[ant.Callback]:
        rare = library.every(library.gradient_norm(), batches=2)
        return [rare, library.skip_nonfinite(), host("look", every=6, on_batch_end=look), *others]

    def save(trainer: Any, state: Any, logs: Any) -> Any:
        if state.batch_idx == 4:
            trainer.save(tmp_path, state)
        return state, logs

    def nothing(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        return state, logs

    loader = spoilt(6, 1, last=3)
    a_trainer = trainer(*callbacks(host("save", every=4, on_batch_end=nothing, on_checkpoint=save)))
    whole, history = a_trainer.fit(a_trainer.init(loader[0]), loader, 1)
    again = trainer(*callbacks(host("save", every=4, on_batch_end=nothing)))
    _, same = again.fit(again.restore(tmp_path), loader, 1)
    assert means[0] == means[1] and history == same


def test_windows_join_and_part():
    rows = {"batch_size": np.array([2, 1, 1]), "loss": np.array([1.0, 2.0, 4.0]), "rare": np.array([1.0, np.nan, 3.0])}
    window = Window(rows, {"rare": np.array([2, 0, 1])})
    parts = [window.between(0, 1), Window({}, {}), window.between(1, 3)]
    assert join_windows(parts).means() == window.means() == {"loss": 2.0, "rare": 5 / 3}
    assert np.isnan(window.between(1, 2).mean("rare")) and join_windows([]) == {}
    with pytest.raises(KeyError):
        window.mean("other")


def test_a_mean_of_arrays_and_of_integers():
    values = np.array([[1, 2], [3, 4]])
    window = Window({"batch_size": np.array([1, 3]), "v": values}, {"v": np.array([0, 3])})
    np.testing.assert_array_equal(window.mean("v"), [3.0, 4.0])
    assert with_nan(values, np.array([0, 1])) is values
    low = with_nan(np.ones((2, 2), jnp.bfloat16), np.array([0, 1]))
    assert low.dtype == jnp.bfloat16 and np.isnan(low.astype(np.float32)).tolist() == [[True, True], [False, False]]


def test_a_host_look_reads_no_more_logs_than_it_is_asked_for():
    def many(batch_idx: Any, trainer: Any, state: Any, logs: Any) -> Any:
        return state, {**logs, **{f"log{i:02}": logs["loss"] * i for i in range(70)}}

    seen: list[Any] = []

    def look(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        seen.append((float(logs["log69"]), 69 * logs.window["loss"][-1]))
        return state, {**logs, "mine": logs["log03"]}

    a_trainer = trainer(ant.Callback(name="many", traced=True, on_batch_end=many), host("look", on_batch_end=look))
    state, history = a_trainer.fit(a_trainer.init(batches()[0]), ant.ArrayLoader(data(20), BATCH), 2)
    assert len(history[0]) == 72 and history[0]["train_mine"] == history[0]["train_log03"]
    np.testing.assert_allclose(history[1]["train_log69"], 69 * history[1]["train_loss"], rtol=1e-6)
    np.testing.assert_allclose(*zip(*seen, strict=True), rtol=1e-6)
    _, logs = a_trainer.train_step(state, batches()[0])
    np.testing.assert_allclose(logs["log69"], 69 * logs["loss"], rtol=1e-6)


def test_by_hand_a_log_that_the_step_lacks_is_nan():
    a_trainer = trainer(library.gradient_statistics(per_layer=False), gradient_accumulation_steps=2)
    state, first = a_trainer.train_step(a_trainer.init(batches()[0]), batches()[0])
    _, second = a_trainer.train_step(state, batches()[0])
    assert isinstance(first, dict) and isinstance(first["loss"], jax.Array)
    assert np.isnan(first["grad_norm"]) and np.isfinite(second["grad_norm"])
