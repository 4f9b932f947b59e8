"""A trainer in use: copied, pickled, shared by threads, and by a run in a hook of another."""

import copy
import csv
import dataclasses
import gc
import io
import pathlib
import pickle
import threading
import types
from collections.abc import Callable
from typing import Any

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import BATCH, CLASSES, FEATURES, LINEAR, Clock, adam, assert_bit_equal, batches, host, squares, trainer

import ant_jax as ant
from ant_jax._engine.programs import TrainProgram
from ant_jax._hooks.callback import hooks_of


library = ant.callbacks
SECONDS = 120  # until a thread counts as hung


def in_threads(count: int, function: Callable[[int], Any]) -> list[Any]:
    """Call ``function(number)`` in threads that begin together; return what it returns, or raise what it raises."""
    start = threading.Barrier(count)
    results: list[Any] = [None] * count

    def call(number: int) -> None:
        start.wait(SECONDS)
        try:
            results[number] = function(number)
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def callbacks_that_open_something(path: pathlib.Path) -> list[ant.Callback]:
    """One of each that has something open while a run goes on, each writing to a place of its own."""
    table = library.csv_log(path / "when.csv", name="table")
    return [
        library.csv_log(path / "log.csv"),
        library.json_log(path / "log.jsonl", every=1),
        library.when(lambda state, logs: True, library.every(table, epochs=1)),
        library.tolerate(library.json_log(path / "tolerate.jsonl", name="lines")),
        library.tensorboard(path / "events", every=2),
        library.plot_history(path / "history.png"),
        library.progress_bar(file=io.StringIO()),
        library.log_progress(2, printer=str),
        library.profile_steps(every=2, printer=str),
        library.profile(path / "trace", start=1, steps=1),
        library.throughput(),
        library.time_limit(3600.0),
        library.ema(0.9),
        library.early_stopping("train_loss", patience=9),
        library.gradient_norm(),
    ]


def epochs_in(path: pathlib.Path) -> list[int]:
    with path.open(newline="") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


def fit(a_trainer: ant.Trainer, epochs: int = 3, **options: Any) -> tuple[ant.TrainState, ant.History]:
    return a_trainer.fit(a_trainer.init(batches()[0]), batches(), epochs, batches(1), **options)


def assert_same(got: tuple[ant.TrainState, ant.History], expected: tuple[ant.TrainState, ant.History]) -> None:
    assert_bit_equal(got[0], expected[0], "step", "params", "opt_state", "model_state")
    assert [row["train_loss"] for row in got[1]] == [row["train_loss"] for row in expected[1]]
    assert [row["val_loss"] for row in got[1]] == [row["val_loss"] for row in expected[1]]


@pytest.fixture(scope="module")
def alone() -> tuple[ant.TrainState, ant.History]:
    """What a run ends with that shares nothing."""
    return fit(trainer(optimizer=adam()))


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda a: cloudpickle.loads(cloudpickle.dumps(a)), dataclasses.replace]
)
def test_a_trainer_that_has_been_used_can_be_copied_and_the_copy_trains_alike(copied, tmp_path, alone):
    def copy_too(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        copies.append(copied(trainer))  # in use
        return state, logs

    copies: list[ant.Trainer] = []
    used = trainer(
        *[c for c in callbacks_that_open_something(tmp_path) if c.name in ("csv_log", "progress_bar", "time_limit")],
        host("copying", on_epoch_end=copy_too),
        optimizer=adam(),
    )
    assert_same(fit(used), alone)
    with pytest.raises(RuntimeError, match="num_epochs"):
        copied(used).num_epochs  # noqa: B018
    for twin in (copied(used), copies[0]):
        assert_same(fit(twin), alone)
        state = used.init(batches()[0])
        assert twin.evaluate(state, batches(1)) == used.evaluate(state, batches(1))
    assert epochs_in(tmp_path / "log.csv") == [0, 1, 2]


@pytest.mark.parametrize("dumped", [copy.deepcopy, cloudpickle.dumps])
def test_every_callback_that_has_been_used_can_be_copied(dumped, tmp_path):
    used = trainer(*callbacks_that_open_something(tmp_path), library.checkpoint(tmp_path / "saved"), check_batches=True)
    fit(used, epochs=1)
    dumped(used)


@dataclasses.dataclass(frozen=True)
class Halving(ant.Callback):
    def on_backward_end(self, batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        return state, {name: 0.5 * grad for name, grad in grads.items()}, logs


def initial(key: Any, inputs: Any) -> Any:
    return {"kernel": jnp.ones((FEATURES, CLASSES))}, {}


def outputs(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
    return inputs @ params["kernel"], model_state


def identity(updates: Any, state: Any, params: Any = None) -> Any:
    return {name: -0.1 * update for name, update in updates.items()}, state


def no_state(params: Any) -> Any:
    return optax.EmptyState()


def test_what_pickle_can_name_it_pickles():
    used = ant.Trainer(
        (initial, outputs),
        optax.GradientTransformation(no_state, identity),
        squares,
        callbacks=[Halving()],
        progress_bar=False,
    )
    expected = fit(used, 1)
    assert_same(fit(pickle.loads(pickle.dumps(used)), 1), expected)


def test_threads_that_share_a_trainer_train_as_each_would_alone(tmp_path, alone, monkeypatch):
    made: list[Any] = []
    begin = TrainProgram.__init__
    monkeypatch.setattr(
        TrainProgram, "__init__", lambda self, *arguments: (made.append(self), begin(self, *arguments))[1]
    )
    threads = set(threading.enumerate())
    shared = trainer(*callbacks_that_open_something(tmp_path), optimizer=adam())
    for got in in_threads(4, lambda number: fit(shared)):
        assert_same(got, alone)
    assert len(made) == 1
    for number in ("", "-2", "-3", "-4"):
        for name in ("log", "when"):
            assert epochs_in(tmp_path / f"{name}{number}.csv") == [0, 1, 2]
        assert len((tmp_path / f"log{number}.jsonl").read_text().splitlines()) == 3 * 6
        assert list((tmp_path / f"events{number}").iterdir())
        assert (tmp_path / f"history{number}.png").exists()
    left = {thread.name for thread in set(threading.enumerate()) - threads}
    assert not any(name.startswith("ant_jax") for name in left)


def test_threads_may_do_everything_at_the_same_time(alone):
    shared = trainer(optimizer=adam())
    state, inputs = alone[0], batches()[0][0]

    def steps() -> Any:
        stepped = shared.init(batches()[0])
        for batch in batches():
            stepped, _ = shared.train_step(stepped, batch)
        return stepped.params

    what: list[Callable[[], Any]] = [
        steps,
        lambda: fit(shared)[0].params,
        lambda: shared.evaluate(state, batches(2)),
        lambda: shared.predict(state, inputs),
        lambda: shared.grad_step(state, batches()[0])[0],
    ]
    expected = [function() for function in what]
    shared = trainer(optimizer=adam())
    for number, got in enumerate(in_threads(10, lambda number: what[number % 5]())):
        jax.tree.map(np.testing.assert_array_equal, got, expected[number % 5])


def test_states_of_threads_with_keys_of_their_own_draw_from_them():
    def noisy(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
        made, _ = LINEAR[1](params, model_state, inputs, key)
        return made if key is None else made + jax.random.normal(key, made.shape), model_state

    shared = trainer(model=(LINEAR[0], noisy))

    def run(seed: int) -> Any:
        state = shared.init(batches()[0], seed=seed)
        for batch in batches() * 4:
            state, _ = shared.train_step(state, batch)
        return state

    expected = [run(seed) for seed in range(4)]
    for got, alone in zip(in_threads(4, run), expected, strict=True):
        assert_bit_equal(got, alone)


@pytest.mark.parametrize("view", [False, True], ids=["the user's trainer", "the hook's trainer"])
def test_a_run_in_a_hook_of_another_leaves_it_as_it_is(view, tmp_path, alone):
    inner: list[Any] = []

    def probe(trainer: Any, state: Any) -> None:
        if inner and inner[-1] is None:  # this is the inner run
            assert trainer.num_epochs == 2 and trainer.steps_per_epoch == 2
            return
        assert trainer.num_epochs == 3 and trainer.steps_per_epoch == 5
        own = trainer if view else outer
        inner.append(None)
        inner[-1] = own.fit(own.init(batches()[0]), batches(2), 2, batches(1)), own.evaluate(state, batches(1))
        own.predict(state, batches()[0][0])
        own.train_step(state, batches()[0])
        assert trainer.num_epochs == 3 and trainer.steps_per_epoch == 5

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        probe(trainer, state)
        return state, logs

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        if batch_idx == 1 and state.epoch == 1:
            probe(trainer, state)
        return state, logs

    probing = host("probe", on_epoch_end=on_epoch_end, on_batch_end=on_batch_end)
    outer = trainer(*callbacks_that_open_something(tmp_path), probing, optimizer=adam())
    assert_same(fit(outer), alone)
    assert len(inner) == 4
    for name in ("log", "when"):
        assert epochs_in(tmp_path / f"{name}.csv") == [0, 1, 2]
        assert epochs_in(tmp_path / f"{name}-2.csv") == [0, 1]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3 * 6
    assert not (tmp_path / "log-3.csv").exists()


def test_a_nested_run_counts_in_the_costs_of_the_hook_that_it_is_in(monkeypatch):
    seen: list[dict[str, float]] = []

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        if trainer.num_epochs == 2:
            outer.fit(outer.init(batches()[0]), batches(1), 1)
            seen.append(trainer.costs.hook_seconds)
        return state, logs

    clock = Clock()
    monkeypatch.setattr("ant_jax._hooks.callback_list.time", types.SimpleNamespace(perf_counter=clock))
    outer = trainer(host("nests", on_epoch_end=on_epoch_end), clock.passing(on_train_begin=1.0))
    outer.fit(outer.init(batches()[0]), batches(1), 2)
    assert seen == [{"nests": 0.0, "passing": 1.0}, {"nests": 1.0, "passing": 1.0}]


def test_an_evaluation_in_a_hook_is_none_of_the_run():
    time = [0.0]
    rates: list[float] = []

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        time[0] += 1.0 if batch_idx < 2 else 3.0
        if batch_idx == 1:
            trainer.evaluate(state, batches(1))
        return state, logs

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        rates.append(logs["examples_per_second"])
        return state, logs

    evaluating = host("evaluating", on_batch_end=on_batch_end, on_epoch_end=on_epoch_end)
    a_trainer = trainer(library.throughput(clock=lambda: time[0]), evaluating)
    a_trainer.fit(a_trainer.init(batches()[0]), batches(), 2)
    assert rates[-1] == 5 * BATCH / 11  # and not that of the batches before the evaluation; the first epoch compiles


class Screen(io.StringIO):
    """Shows what a bar says before its numbers, whenever that changes."""

    def __init__(self, show: Callable[[str], None]):
        super().__init__()
        self._show, self._said = show, ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        said = text.strip("\r\n ").partition(":")[0]
        if said not in ("", self._said):
            self._said = said
            self._show(said)
        return len(text)


SHOWING: dict[str, Callable[[Callable[[str], None], Clock, pathlib.Path], ant.Callback]] = {
    "progress_bar": lambda show, clock, path: library.progress_bar(file=Screen(show), clock=clock),
    "log_progress": lambda show, clock, path: library.log_progress(4, printer=show, clock=clock),
    "profile_steps": lambda show, clock, path: library.profile_steps(every=4, printer=show, clock=clock),
    "throughput": lambda show, clock, path: library.chain(library.throughput(clock=clock), name="throughput"),
    "csv_log": lambda show, clock, path: library.csv_log(path / "log.csv"),
    "json_log": lambda show, clock, path: library.json_log(path / "log.jsonl", every=2),
    "tolerate": lambda show, clock, path: library.tolerate(library.log_progress(4, printer=show, clock=clock)),
}


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize("name", SHOWING)
def test_an_evaluation_in_a_hook_changes_nothing_of_what_is_shown(name, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "ant_jax._loop.hook_windows.LAUNCH_SECONDS", -1.0
    )  # so that a look of every=None ends after every launch

    def shown(evaluates: bool) -> list[str]:
        clock, lines, path = Clock(), list[str](), tmp_path / str(evaluates)

        def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
            clock.now += 1.0 + batch_idx
            if evaluates and batch_idx == 1:
                trainer.evaluate(state, batches(1))
            return state, logs

        showing = SHOWING[name](lines.append, clock, path)
        _, history = fit(trainer(host("evaluates", on_batch_end=on_batch_end), showing), 2)
        written = [file.read_text() for file in path.iterdir()] if path.exists() else []
        # The table at the end has seconds of hooks, by a clock that goes.
        return [line for line in lines if "callbacks" not in line] + written + [str(history.to_dict())]

    assert shown(evaluates=True) == shown(evaluates=False)


@pytest.mark.parametrize("hook", ["on_evaluate_begin", "on_evaluate_end"])
def test_failures_in_an_evaluation_in_a_hook_are_none_of_the_run(hook, caplog):
    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        trainer.evaluate(state, batches(1))
        return state, logs

    def fail(trainer: Any, state: Any, logs: Any) -> Any:
        raise OSError("down")

    hooks: Any = {hook: fail}
    fit(trainer(library.tolerate(host("fails", **hooks), failures=2), host("evaluates", on_batch_end=on_batch_end)), 1)
    said = [record.getMessage() for record in caplog.records if "failed in" in record.getMessage()]
    assert len(said) == 6 and all("failure 1 of 2" in line for line in said)


def test_a_run_in_a_hook_cannot_save_where_the_outer_one_does(tmp_path):
    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        if trainer.num_epochs == 2:
            with pytest.raises(ant.CheckpointError, match=str(tmp_path)):
                outer.fit(outer.init(batches()[0]), batches(1), 1)
        return state, logs

    outer = trainer(library.checkpoint(tmp_path), host("nests", on_epoch_end=on_epoch_end))
    outer.fit(outer.init(batches()[0]), batches(1), 2)
    with outer.checkpointer(tmp_path) as saved:
        assert saved.steps == [1, 2]


def test_failures_are_borne_for_each_run_by_itself(caplog):
    def fail(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        if trainer.num_epochs == 3:
            outer.fit(outer.init(batches()[0]), batches(1), 1)
        raise OSError("down")

    outer = trainer(library.tolerate(host("fails", on_epoch_end=fail), failures=2))
    outer.fit(outer.init(batches()[0]), batches(1), 3)
    said = [
        record.getMessage().partition("(")[2][:14] for record in caplog.records if "failed in" in record.getMessage()
    ]
    assert said == ["failure 1 of 2"] * 2 + ["failure 1 of 2", "failure 2 of 2"]


def test_what_a_run_has_left_open_is_closed_when_the_run_is_gone(tmp_path, caplog):
    def without_end(callback: ant.Callback) -> ant.Callback:
        hooks = hooks_of(callback)
        return host("open", on_train_begin=hooks["on_train_begin"], on_epoch_end=hooks["on_epoch_end"])

    a_trainer = trainer(without_end(library.csv_log(tmp_path / "log.csv")))
    for _ in range(2):
        fit(a_trainer)
        gc.collect()
        assert epochs_in(tmp_path / "log.csv") == [0, 1, 2]
    assert "another run" not in caplog.text


def test_the_file_of_another_trainer_is_left_alone_too(tmp_path, caplog):
    path = tmp_path / "log.csv"
    inner = trainer(library.csv_log(path))

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        fit(inner, 1)
        return state, logs

    fit(trainer(library.csv_log(path), host("nests", on_epoch_end=on_epoch_end)))
    assert epochs_in(path) == [0, 1, 2]
    assert f"CSVWriter: another run of this process is writing to {path}" in caplog.text
    fit(inner, 1)
    assert epochs_in(path) == [0]


def test_a_path_is_the_same_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def nesting(inner: ant.Trainer) -> Any:
        return lambda epoch, trainer, state, logs: (fit(inner, 1), (state, logs))[1]

    for outer_path, inner_path in (("log.csv", tmp_path / "log.csv"), (tmp_path / "log.csv", "log.csv")):
        inner = trainer(library.csv_log(inner_path))
        fit(trainer(library.csv_log(outer_path), host("nests", on_epoch_end=nesting(inner))))
        assert epochs_in(tmp_path / "log.csv") == [0, 1, 2]
