"""The bar on a screen and in a file."""

import io
import itertools
import sys
from collections.abc import Callable
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


def test_a_run_that_goes_on_inside_an_epoch_counts_its_steps_once():
    def boom(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        if state.epoch == 1 and batch_idx == 1:
            raise InterruptedError
        return state, logs

    failing = trainer(host("boom", on_batch_begin=boom))
    with pytest.raises(InterruptedError) as caught:
        failing.fit(failing.init(batches()[0]), batches(3), 2)
    state, file = caught.value.train_state, Screen()  # pyright: ignore[reportAttributeAccessIssue]
    a_trainer = trainer(ant.callbacks.progress_bar(file=file))
    a_trainer.fit(state, batches(3), 3)
    drawings = [drawing for drawing in file.getvalue().split("\r") if "step" in drawing]
    assert "4/9" in drawings[0] and "9/9" in drawings[-1]
    assert not any("/10" in drawing or "/12" in drawing for drawing in drawings)


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


class Bare:
    """A stream that can do no more than it must."""

    def write(self, text: str) -> int:
        return len(text)


class Broken(Screen):
    """A pipe whose reader is gone after so many writes."""

    def __init__(self, writes: int):
        super().__init__()
        self._left = writes

    def write(self, text: str) -> int:
        self._left -= 1
        if self._left < 0:
            raise BrokenPipeError("nobody reads")
        return super().write(text)


class Narrow(Screen):
    """Has a console's code page."""

    encoding = "cp1252"

    def write(self, text: str) -> int:
        text.encode("cp1252")
        return super().write(text)


def closed() -> io.StringIO:
    stream = Screen()
    stream.close()
    return stream


STREAMS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "bare": Bare,
    "closed": closed,
    "cp1252": lambda: io.TextIOWrapper(io.BytesIO(), "cp1252"),
    "cp1252 screen": Narrow,
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), "ascii"),
    "broken": lambda: Broken(0),
    "breaks": lambda: Broken(5),
    "object": object,
}


@pytest.mark.parametrize("stream", STREAMS)
def test_no_stream_ends_a_run(stream, monkeypatch, tmp_path):
    def replace(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        if epoch == 1 and hasattr(sys.stderr, "close"):
            sys.stderr.close()
        return state, {**logs, "\u4e2d": 1.0}

    for name in ("stderr", "stdout"):
        monkeypatch.setattr(sys, name, STREAMS[stream]())
    monkeypatch.setattr("ant_jax.callbacks._progress_bar.SCREEN_SECONDS", 0.0)
    prints = [ant.callbacks.log_progress(1), host("replace", on_epoch_end=replace)]
    a_trainer = trainer(*prints, ant.callbacks.checkpoint(tmp_path), progress_bar=True)
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 3, batches(1), resume=tmp_path)
    assert state.epoch == 3


def test_a_stream_of_few_characters_gets_those(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stderr", stream)
    bad_name = host("publish", on_epoch_end=lambda e, trainer, state, logs: (state, {**logs, "\u4e2d": 1.0}))
    a_trainer = trainer(bad_name, progress_bar=True)
    a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 1)
    stream.seek(0)
    assert "100%|##########| 2/2" in (text := stream.read()) and "?=1" in text


def test_a_line_beside_a_bar_takes_its_place_and_the_bar_comes_again(monkeypatch):
    screen = Screen()
    for name in ("stderr", "stdout"):
        monkeypatch.setattr(sys, name, screen)
    a_trainer = trainer(ant.callbacks.log_progress(1), progress_bar=True)
    a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 1)
    before, _, after = screen.getvalue().partition("epoch 1/1\n")
    assert before.endswith("\r") and "compiling" in after
