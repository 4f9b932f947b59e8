"""Lines of progress, with a clock that the test turns."""

from typing import Any

import pytest
from problems import batches, host, trainer

import ant_jax as ant
from ant_jax.callbacks import _log_progress


def test_a_line_every_so_many_batches_and_one_every_epoch():
    printed: list[str] = []
    time = [0.0]

    def tick(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        time[0] += 0.5  # every batch takes half a second
        return state, logs

    callback = ant.callbacks.log_progress(2, printer=printed.append, clock=lambda: time[0])
    a_trainer = trainer(ant.Callback(name="tick", on_batch_end=tick), callback)
    a_trainer.fit(a_trainer.init(batches()[0]), batches(5) + batches(1, batch=3), 2, batches(1))
    first, second = printed[:5], printed[5:]
    assert first[0] == "epoch 1/2" and second[0] == "epoch 2/2"
    assert [line.split(":")[0] for line in first[1:4]] == ["  batch 2/6", "  batch 4/6", "  batch 6/6"]
    assert first[1].endswith("(16 examples/s)") and first[2].endswith("(16 examples/s)")
    assert first[3].endswith("(11 examples/s)")  # the last batch has 3 examples
    assert first[4].startswith("epoch 1/2 took 3.00 s: train_loss") and "val_loss" in first[4]


def test_the_rate_of_an_epochs_last_line_leaves_out_what_follows_its_batches(monkeypatch):
    # So lines wait, those of an epoch as short as this one until it has ended.
    monkeypatch.setattr(_log_progress, "_are_ready", lambda logs: False)
    printed: list[str] = []
    time = [0.0]

    def after(seconds: float) -> Any:
        def hook(*arguments: Any) -> Any:
            time[0] += seconds
            return arguments[-2:]

        return hook

    lines = ant.callbacks.log_progress(6, printer=printed.append, clock=lambda: time[0])
    slow = host("slow", every=1, on_batch_end=after(2**-6), on_evaluate_end=after(100.0))
    a_trainer = trainer(slow, lines)
    a_trainer.fit(a_trainer.init(batches()[0]), batches(6), 1, batches(1))
    (line,) = [line for line in printed if "batch" in line]
    assert line.startswith("  batch 6/6") and line.endswith("(512 examples/s)")


@pytest.mark.parametrize("every", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("fuse", [True, False])
def test_lines_do_not_depend_on_how_batches_are_launched(every, fuse):
    printed: list[str] = []
    a_trainer = trainer(ant.callbacks.log_progress(every, printer=printed.append), fuse=fuse)
    a_trainer.fit(a_trainer.init(batches()[0]), batches(7), 1)
    places = [int(line.split("/")[0].split()[-1]) for line in printed if "batch" in line]
    assert places == [*range(every, 8, every), *([7] if 7 % every else [])]


def test_lines_of_a_run_that_goes_on_inside_an_epoch_count_its_batches_from_there():
    def fail(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        if batch_idx == 3:
            raise InterruptedError
        return state, logs

    printed: list[str] = []
    failing = trainer(ant.Callback(name="fails", on_batch_begin=fail))
    with pytest.raises(InterruptedError) as caught:
        failing.fit(failing.init(batches()[0]), batches(7), 1)
    state = caught.value.train_state  # pyright: ignore[reportAttributeAccessIssue]
    a_trainer = trainer(ant.callbacks.log_progress(2, printer=printed.append))
    a_trainer.fit(state, batches(7), 1)
    assert [line.split(":")[0] for line in printed if "batch" in line] == [f"  batch {done}/7" for done in (4, 6, 7)]


def test_batch_lines_hold_the_mean_since_the_last_one():
    import numpy as np

    losses: list[float] = []
    printed: list[str] = []
    each = ant.Callback(
        name="each", on_batch_end=lambda b, t, state, logs: (losses.append(float(logs["loss"])), (state, logs))[1]
    )
    a_trainer = trainer(each, ant.callbacks.log_progress(3, printer=printed.append))
    a_trainer.fit(a_trainer.init(batches()[0]), batches(5), 1)
    assert f"batch 3/5: loss {np.mean(losses[:3]):.4g} " in printed[1]
    assert f"batch 5/5: loss {np.mean(losses[3:]):.4g} " in printed[2]


def test_it_says_that_the_run_was_stopped():
    printed: list[str] = []
    stop = ant.Callback(name="stop", on_epoch_end=lambda e, t, state, logs: (state.request_stop(), logs))
    a_trainer = trainer(stop, ant.callbacks.log_progress(printer=printed.append))
    a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 5)
    assert printed[-1] == "stopped after epoch 1 of 5, as a callback asked"


def test_evaluation_after_a_run_that_failed_prints_nothing_of_it():
    printed: list[str] = []

    def boom(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        if batch_idx == 2:
            raise RuntimeError("boom")
        return state, logs

    a_trainer = trainer(
        ant.callbacks.log_progress(2, printer=printed.append), ant.Callback(name="b", on_batch_end=boom)
    )
    state = a_trainer.init(batches()[0])
    with pytest.raises(RuntimeError, match="boom"):
        a_trainer.fit(state, batches(), 1)
    before = list(printed)
    a_trainer.evaluate(state, batches(1))
    assert printed == before and printed[0] == "epoch 1/1" and "batch" in printed[-1]


def test_refuses():
    with pytest.raises(ValueError, match="log_progress: every must be a whole number of batches, at least 1, got 0"):
        ant.callbacks.log_progress(0)


def test_by_default_it_prints_beside_a_progress_bar(capsys):
    a_trainer = trainer(ant.callbacks.log_progress(1))
    a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 1)
    assert capsys.readouterr().out.startswith("epoch 1/1\n  batch 1/1: loss")
