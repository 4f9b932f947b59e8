"""The picture is there after every epoch, whole."""

import pathlib
import threading
from typing import Any

import pytest
from problems import batches, host, trainer

import ant_jax as ant
from ant_jax.callbacks import _plot


def test_it_is_drawn_after_every_epoch(tmp_path: pathlib.Path):
    from matplotlib import image

    path, seen = tmp_path / "deep" / "history.png", []
    watch = host("watch", on_epoch_begin=lambda e, trainer, state, logs: (seen.append(path.exists()), (state, logs))[1])
    a_trainer = trainer(ant.callbacks.plot_history(path, "train_loss"), watch)
    a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 2)
    assert image.imread(path).ndim == 3
    assert list(path.parent.iterdir()) == [path]


def test_an_unknown_name_is_told(tmp_path):
    a_trainer = trainer(ant.callbacks.plot_history(tmp_path / "a.png", "train_los"))
    with pytest.raises(KeyError, match="no scalar named 'train_los'; there are train_loss"):
        a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 1)


def test_what_is_drawn_slowly_does_not_queue_up(tmp_path, monkeypatch):
    gate, drawn = threading.Event(), []
    monkeypatch.setattr(_plot, "_draw", lambda history, *rest: (drawn.append(len(history)), gate.wait()))
    go = host("go", on_train_end=lambda trainer, state, logs: (gate.set(), (state, logs))[1])
    a_trainer = trainer(go, ant.callbacks.plot_history(tmp_path / "a.png"))
    a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 6)
    assert drawn[-1] == 6
    assert len(drawn) <= 2


@pytest.mark.parametrize("name", ["history.unknown", "history"])
def test_refuses_what_cannot_be_drawn(name):
    with pytest.raises(
        ValueError, match=rf"suffix of path must be one of .*\.png.*, got '{pathlib.Path(name).suffix}'"
    ):
        ant.callbacks.plot_history(name)


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(
        ImportError, match=r'plot_history: .* matplotlib is not installed; pip install "ant_jax\[plot\]"'
    ):
        ant.callbacks.plot_history("history.png")


def test_a_run_inside_another_ones_first_epoch_draws_a_picture_of_its_own(tmp_path):
    def on_epoch_begin(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        if trainer.num_epochs == 2 and epoch == 0:  # before the outer run has drawn anything
            trainer.fit(state, batches(2), 1)
        return state, logs

    inner = host("inner", on_epoch_begin=on_epoch_begin)
    a_trainer = trainer(ant.callbacks.plot_history(tmp_path / "history.png"), inner)
    a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 2)
    assert {path.name for path in tmp_path.iterdir()} == {"history.png", "history-2.png"}
