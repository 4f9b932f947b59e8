"""Lines of progress, with a clock that the test turns."""

from typing import Any

import pytest
from problems import batches, trainer

import ant_jax as ant


def lines(every: int, seconds: float, **options: Any) -> list[str]:
    printed: list[str] = []
    time = iter(range(10**6))
    callback = ant.callbacks.log_progress(every, printer=printed.append, clock=lambda: seconds * next(time))
    a_trainer = trainer(callback, **options)
    a_trainer.fit(a_trainer.init(batches()[0]), batches(5) + batches(1, batch=3), 2, batches(1))
    return printed


@pytest.mark.parametrize("seconds", [1e-3, 1.0], ids=["late lines", "prompt lines"])
def test_a_line_every_so_many_batches_and_one_every_epoch(seconds):
    printed = lines(2, seconds)
    one_epoch = [
        "epoch 1/2",
        f"  batch 2/6: loss 1.459 ({16 / seconds:,.0f} examples/s)",
        f"  batch 4/6: loss 1.461 ({16 / seconds:,.0f} examples/s)",
    ]
    assert printed[:1] == one_epoch[:1]
    assert [line.split(":")[0] for line in printed[1:4]] == ["  batch 2/6", "  batch 4/6", "  batch 6/6"]
    assert printed[1].endswith(f"({16 / seconds:,.0f} examples/s)")
    assert printed[3].endswith(f"({11 / seconds:,.0f} examples/s)")  # the last batch has 3 examples
    assert printed[4].startswith("epoch 1/2 took") and "train_loss" in printed[4] and "val_loss" in printed[4]
    assert printed[5] == "epoch 2/2"
    assert len(printed) == 10


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
    assert printed == before and "batch 2/5" in printed[-1]


def test_refuses():
    with pytest.raises(ValueError, match="every must be a whole number of batches or None, got 0"):
        ant.callbacks.log_progress(0)


def test_by_default_it_prints_beside_a_progress_bar(capsys):
    a_trainer = trainer(ant.callbacks.log_progress(1))
    a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 1)
    assert capsys.readouterr().out.startswith("epoch 1/1\n  batch 1/1: loss")
