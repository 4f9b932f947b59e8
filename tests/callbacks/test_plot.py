"""The picture is there after every epoch, whole."""

import pathlib

import pytest
from problems import batches, host, trainer

import ant_jax as ant


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
