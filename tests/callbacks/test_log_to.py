"""A writer from outside of the package, and what is open for a run."""

import time
from typing import Any

import numpy as np
import pytest
from problems import batches, host, trainer

import ant_jax as ant
from ant_jax import writers
from ant_jax.callbacks import log_to


class Remembering(writers.Writer):
    """Ten lines are a writer."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, dict[str, Any]]] = []

    def write_scalars(self, step: int, scalars: Any, *, epoch: int) -> None:
        self.rows.append((epoch, step, dict(scalars)))


def fit(*callbacks: ant.Callback, epochs: int = 2, **options: Any) -> ant.TrainState:
    a_trainer = trainer(*callbacks, **options)
    return a_trainer.fit(a_trainer.init(batches()[0]), batches(4), epochs)[0]


def test_a_writer_from_outside_gets_every_row():
    writer = Remembering()
    state = fit(log_to(writer, every=3))
    assert [(epoch, step) for epoch, step, row in writer.rows if "loss" in row] == [(0, 3), (0, 4), (1, 7), (1, 8)]
    assert [row for _, _, row in writer.rows if "train_loss" in row] == list(state.history)


def test_rows_of_epochs_may_be_left_out():
    writer = Remembering()
    fit(log_to(writer, every=4, epochs=False))
    assert [step for _, step, _ in writer.rows] == [4, 8]


def test_an_array_that_a_hook_uses_again_is_written_as_it_was():
    frame, pictures = np.zeros((2, 2, 3), np.uint8), []

    class Slow(Remembering):
        def write_images(self, step: int, images: Any, *, epoch: int) -> None:
            time.sleep(0.01)
            pictures.append(int(images["frame"].max()))

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        frame[:] = batch_idx + 1
        writers.write(trainer, state, images={"frame": frame})
        return state, logs

    fit(log_to(Slow()), host("note", on_batch_end=on_batch_end), epochs=1)
    assert pictures == [1, 2, 3, 4]


def test_what_is_no_writer_or_no_number_is_named():
    class Forgetful(Remembering):
        def open(self, start: Any) -> Any: ...

    with pytest.raises(TypeError, match="Forgetful.open must return the writer of the run, got None"):
        fit(log_to(Forgetful()))

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        writers.write(trainer, state, **given)
        return state, logs

    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"scalars": {"said": "seven"}}, "scalar 'said' must be one number, got 'seven'"),
        ({"scalars": {"many": np.ones(3)}}, "scalar 'many' must be one number"),
        ({"images": {"f": [[1]]}}, "image 'f' must be uint8.*got list"),
    )
    given: dict[str, Any] = {}
    for arguments, message in refused:
        given.clear()
        given.update(arguments)
        with pytest.raises(ValueError, match=message):
            fit(log_to(Remembering()), host("note", on_epoch_end=on_epoch_end))


@pytest.mark.parametrize("every", [None, 1])
def test_it_changes_neither_state_nor_logs(every):
    def noting(name: str) -> ant.Callback:
        def note(lead: Any, trainer: Any, state: Any, logs: Any) -> Any:
            seen.setdefault(name, []).append((id(state), dict(logs)))
            return state, logs

        return host(name, on_epoch_end=note)

    seen: dict[str, list[Any]] = {}
    state = fit(noting("before"), log_to(Remembering(), every=every), noting("after"))
    assert seen["before"] == seen["after"]
    assert state.callback_states == {}


class Tracker(Remembering):
    """Has a run of its own for every `fit`, and writes all kinds."""

    has_runs = True

    def __init__(self, opened: list[Any], start: writers.Start | None = None):
        super().__init__()
        self.opened, self.start, self.error = opened, start, "open"

    def open(self, start: writers.Start) -> Any:
        run = Tracker(self.opened, start)
        run.run_id = start.run_id or f"run {len(self.opened)}"
        self.opened.append(run)
        return run

    def write_histograms(self, step: int, arrays: Any, *, epoch: int) -> None:
        self.rows.append((epoch, step, {name: array.shape for name, array in arrays.items()}))

    def write_images(self, step: int, images: Any, *, epoch: int) -> None:
        self.write_histograms(step, images, epoch=epoch)

    def write_texts(self, step: int, texts: Any, *, epoch: int) -> None:
        self.write_scalars(step, texts, epoch=epoch)

    def close(self, error: BaseException | None) -> None:
        self.error = error


def test_a_run_that_goes_on_is_told_where_and_goes_on_with_its_run():
    opened: list[Tracker] = []
    a_trainer = trainer(log_to(Tracker(opened), name="tracker"))
    start = a_trainer.init(batches()[0])
    assert start.callback_states == {"tracker": {"run_id": None}}
    one, _ = a_trainer.fit(start, batches(4), 1)
    whole, _ = a_trainer.fit(one, batches(4), 2)
    again, _ = a_trainer.fit(start, batches(4), 1)
    assert [run.start for run in opened] == [(0, 0, None, False), (1, 4, "run 0", False), (0, 0, None, False)]
    ids = [state.callback_states["tracker"]["run_id"] for state in (one, whole, again)]
    assert ids == ["run 0", "run 0", "run 2"]
    assert [[step for _, step, _ in run.rows] for run in opened] == [[4], [8], [4]]
    assert [run.error for run in opened] == [None] * 3


def test_a_writer_is_told_what_ended_the_run_and_whether_failures_are_tolerated():
    opened: list[Tracker] = []
    with pytest.raises(ZeroDivisionError) as caught:
        fit(
            ant.callbacks.tolerate(log_to(Tracker(opened))),
            host("fails", on_epoch_end=lambda epoch, trainer, state, logs: 1 / 0),
        )
    assert opened[0].error is caught.value
    assert opened[0].start is not None and opened[0].start.tolerated


def test_a_run_whose_last_hooks_are_left_out_is_closed_when_fit_ends():
    opened: list[Tracker] = []
    fit(ant.callbacks.when(lambda state, logs: state.epoch == 1, log_to(Tracker(opened))))
    assert [run.error for run in opened] == [None]


@pytest.mark.parametrize("tolerated", [False, True])
def test_a_failure_when_fit_closes_what_is_open_is_raised_or_tolerated(tolerated, caplog):
    class Failing(Remembering):
        def close(self, error: BaseException | None) -> None:
            raise OSError("on purpose")

    log = ant.callbacks.when(lambda state, logs: state.epoch == 1, log_to(Failing()))
    if tolerated:
        fit(ant.callbacks.tolerate(log))
        assert "on purpose" in caplog.text
    else:
        with pytest.raises(OSError, match="on purpose"):
            fit(log)


def test_what_is_no_log_is_written_too():
    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        writers.write(
            trainer,
            state,
            scalars={"best": np.float32(0.5)},
            histograms={"kernel": state.params["kernel"]},
            images={"digit": np.zeros((2, 3, 1), np.uint8)},
            texts={"said": "seven"},
        )
        return state, logs

    opened: list[Tracker] = []
    remembering = Remembering()
    plain = log_to(remembering)
    state = fit(plain, log_to(Tracker(opened)), host("writes", on_epoch_end=on_epoch_end), epochs=1)
    wanted = [(0, 4, state.history[0]), (0, 4, {"best": 0.5}), (0, 4, {"kernel": (4, 3)})]
    assert opened[0].rows == [*wanted, (0, 4, {"digit": (2, 3, 1)}), (0, 4, {"said": "seven"})]
    assert remembering.rows == wanted[:2]  # it has no other kinds


@pytest.mark.parametrize("image", [np.zeros((2, 2), np.uint8), np.zeros((2, 2, 1)), np.zeros((2, 2, 5), np.uint8)])
def test_what_is_no_image_is_refused(image):
    with pytest.raises(ValueError, match=r"image 'digit' must be uint8\[height, width, channels\].*got"):
        writers.write(None, None, images={"digit": image})


def test_each_run_has_resources_of_its_own_and_closes_them():
    said: list[str] = []

    def on_train_begin(trainer: Any, state: Any, logs: Any) -> Any:
        name = f"of {trainer.num_epochs}"
        assert trainer.resources.get("mine") is None
        trainer.resources.open("mine", name, said.append)
        if trainer.num_epochs == 2:
            outer.fit(outer.init(batches()[0]), batches(1), 1)
        assert trainer.resources.get("mine") == name
        return state, logs

    outer = trainer(host("opens", on_train_begin=on_train_begin))
    outer.fit(outer.init(batches()[0]), batches(1), 2)
    assert said == ["of 1", "of 2"]
    assert outer.resources.get("mine") is None
