"""The bar on a screen and in a file."""

import io
import itertools
from typing import Any

import pytest
from problems import batches, host, trainer

import ant_jax as ant


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(file: io.StringIO, seconds: float, *, loader: Any = None, fail: bool = False, epochs: int = 2) -> str:
    def boom(epoch: Any, trainer: Any, state: Any, logs: Any) -> Any:
        raise RuntimeError("boom")

    time = itertools.count()
    bar = ant.callbacks.progress_bar(file=file, clock=lambda: seconds * next(time))
    a_trainer = trainer(bar, *([host("boom", on_epoch_end=boom)] if fail else []))
    loader = batches(3) if loader is None else loader
    steps = None if hasattr(loader, "__len__") else 3
    a_trainer.fit(a_trainer.init(batches()[0]), loader, epochs, batches(1), steps_per_epoch=steps)
    return file.getvalue()


def test_on_a_screen_it_shows_steps_values_rate_and_time_left():
    text = run(Screen(), seconds=1.0)
    drawings = text.split("\r")
    assert any(drawing.startswith("compiling:   0%") for drawing in drawings)
    assert any("compiling evaluation" in drawing for drawing in drawings)
    assert any("evaluating" in drawing for drawing in drawings)
    last = [drawing for drawing in drawings if "step" in drawing][-1]
    assert last.startswith("epoch 2/2: 100%")
    assert "6/6" in last and "loss=" in last and "val_loss=" in last and "step" in last


def test_in_a_file_it_writes_lines_now_and_then():
    rare = run(io.StringIO(), seconds=0.001).splitlines()
    assert len(rare) == 2
    assert rare[0].startswith("compiling:   0%")
    assert rare[1].startswith("epoch 2/2: 100%") and " loss=" in rare[1] and "val_loss=" in rare[1]
    often = run(io.StringIO(), seconds=60.0).splitlines()
    assert len(often) > 3 and not any("\r" in line for line in often)


@pytest.mark.parametrize("file", [Screen(), io.StringIO()], ids=["screen", "file"])
def test_it_is_closed_when_the_run_fails(file):
    with pytest.raises(RuntimeError, match="boom"):
        run(file, seconds=0.001, fail=True)
    assert file.getvalue().endswith("\n")


def test_a_stream_without_a_length():
    def endless() -> Any:
        while True:
            yield from batches(3)

    assert "6/6" in run(io.StringIO(), 0.001, loader=endless())
    assert "3/3" in run(io.StringIO(), 0.001, loader=iter(batches(3)), epochs=1)


def test_it_shows_the_latest_values_and_that_the_run_was_stopped():
    file = Screen()
    stop = host("stop", on_epoch_end=lambda e, t, state, logs: (state.request_stop() if e == 2 else state, logs))
    a_trainer = trainer(stop, ant.callbacks.progress_bar(file=file, clock=lambda: 0.0))  # nothing but the end is due
    _, history = a_trainer.fit(a_trainer.init(batches()[0]), batches(3), 9, batches(1))
    last = file.getvalue().split("\r")[-1]
    assert last.startswith("epoch 3/9, stopped")
    assert f" loss={history[-1]['train_loss']:.4g}" in last and f"val_loss={history[-1]['val_loss']:.4g}" in last


def test_evaluate_by_itself_shows_none():
    file = Screen()
    a_trainer = trainer(ant.callbacks.progress_bar(file=file))
    a_trainer.evaluate(a_trainer.init(batches()[0]), batches(1))
    assert file.getvalue() == ""
