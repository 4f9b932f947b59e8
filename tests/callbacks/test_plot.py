"""The picture is there after every epoch, whole."""

import pathlib
import threading

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
