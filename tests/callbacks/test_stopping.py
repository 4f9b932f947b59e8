"""Early stopping."""

from typing import Any

import numpy as np
import pytest
from problems import batches, host, trainer

import ant_jax as ant


def run(values: list[float], **options: Any) -> tuple[ant.TrainState, ant.History]:
    """Train one epoch for each value, which is what the callback monitors."""
    publish = host(
        "publish",
        on_epoch_end=lambda epoch, trainer, state, logs: (state, {**logs, "value": np.float32(values[epoch])}),
    )
    a_trainer = trainer(publish, ant.callbacks.early_stopping("value", **options))
    return a_trainer.fit(a_trainer.init(batches()[0]), batches(1), len(values))


@pytest.mark.parametrize(
    ("values", "options", "epochs", "stopped"),
    [
        ([3, 2, 1, 0], {"patience": 1}, 4, False),
        ([3, 2, 2, 2, 2], {"patience": 2}, 4, True),
        ([3, 2, 2, 1, 1, 1], {"patience": 2}, 6, True),
        ([1, 2, 2, 2], {"patience": 2, "mode": "max"}, 4, True),
        ([3, 2.95, 2.9, 2.85], {"patience": 2, "min_delta": 0.2}, 3, True),
        ([3, float("nan"), float("nan"), 1], {"patience": 2}, 3, True),
        ([float("nan"), 3, 3, 3], {"patience": 3}, 4, False),
    ],
)
def test_it_stops_after_so_many_epochs_without_improvement(values, options, epochs, stopped):
    state, history = run(values, **options)
    assert len(history) == epochs
    assert state.stop == stopped


def test_its_memory_is_the_best_value_and_the_wait():
    state, _ = run([3, 2, 2.5], patience=5)
    assert {name: float(value) for name, value in state.callback_states["early_stopping"].items()} == {
        "best": 2,
        "wait": 1,
    }


def test_patience_survives_in_the_state():
    """Two epochs, and then two more: as if it had been four."""
    publish = host(
        "publish", on_epoch_end=lambda epoch, trainer, state, logs: (state, {**logs, "value": np.float32(1)})
    )
    a_trainer = trainer(publish, ant.callbacks.early_stopping("value", patience=3))
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 2)
    state, history = a_trainer.fit(state, batches(1), 10)
    assert len(history) == 4


def test_an_unknown_monitor_raises_at_the_first_epoch_end():
    a_trainer = trainer(ant.callbacks.early_stopping("val_los"))
    with pytest.raises(
        KeyError, match="there is no log named 'val_los'; the logs here are: train_loss, val_loss"
    ) as caught:
        a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 3, batches(1))
    assert "in on_epoch_end of callback 'early_stopping' (epoch 0)" in caught.value.__notes__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"min_delta": -1.0}, "min_delta must not be negative, got -1.0"),
        ({"mode": "best"}, "mode must be 'min' or 'max', got 'best'"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ant.callbacks.early_stopping(**options)
