"""Runs of more than 2**31 batches, where the step on the device begins anew."""

import csv
import pathlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import LINEAR, apply, assert_bit_equal, batches, host, trainer

import ant_jax as ant
from ant_jax._data.epoch_batches import Chunk
from ant_jax._engine.launch import MAX_ROWS, Cursor


CYCLE = 2**31
library = ant.callbacks


def noisy(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
    outputs, _ = apply(params, {}, inputs, None)
    return (outputs if key is None else outputs + jax.random.normal(key, outputs.shape)), model_state


def drawing(*callbacks: ant.Callback, **options: Any) -> ant.Trainer:
    """A trainer in which the model and a traced callback draw from the random key of the step."""

    def on_backward_end(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        return state, grads, {**logs, "drawn": jax.random.uniform(state.random_key("noise"))}

    draw = ant.Callback(name="draw", on_backward_end=on_backward_end)
    return trainer(draw, *callbacks, model=(LINEAR[0], noisy), **options)


def begun(a_trainer: ant.Trainer, total: int) -> ant.TrainState:
    cycle, step = divmod(total, CYCLE)
    return a_trainer.init(batches()[0]).replace(step=jnp.int32(step), cycle=jnp.int32(cycle))


def collecting(seen: list[Any]) -> ant.Callback:
    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        seen.append((state.total_steps, float(logs["loss"]), float(logs["drawn"])))
        return state, logs

    return host("collect", every=1, on_batch_end=on_batch_end)


@pytest.mark.parametrize("total", [CYCLE - 3, 4 * CYCLE - 1])
def test_randomness_does_not_repeat_and_no_chunking_changes_it(total):
    fused = drawing(fuse=True)
    start = begun(fused, total)
    end, history = fused.fit(start, batches(6), 1)
    assert end.total_steps == total + 6
    assert int(end.step) == (total + 6) % CYCLE and int(end.cycle or 0) == (total + 6) // CYCLE
    seen: list[Any] = []
    stepwise = drawing(collecting(seen), fuse=False)
    same, _ = stepwise.fit(start, batches(6), 1)
    assert_bit_equal(same, end, "params", "step", "cycle", "key")
    assert [step for step, *_ in seen] == list(range(total + 1, total + 7))
    drawn = [values for _, _, values in seen]
    first: list[Any] = []
    drawing(collecting(first), fuse=False).fit(begun(fused, 0), batches(6), 1)
    assert len({*drawn, *(values for _, _, values in first)}) == 12

    state = start  # by hand
    for (_, loss, value), batch in zip(seen, batches(6), strict=True):
        assert float(jax.random.uniform(state.random_key("noise"))) == value
        np.testing.assert_allclose(fused.grad_step(state, batch)[1]["loss"], loss, rtol=1e-6)
        state, logs = fused.train_step(state, batch)
        assert float(logs["drawn"]) == value
    assert_bit_equal(state, end, "params", "step", "cycle", "key")


def test_the_first_cycle_draws_from_the_key_itself():
    a_trainer = drawing()
    state = begun(a_trainer, CYCLE - 1)
    expected = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(state.key, CYCLE - 1), zlib.crc32(b"noise")))
    assert a_trainer.train_step(state, batches()[0])[1]["drawn"] == expected


@pytest.mark.parametrize(("total", "epochs"), [(CYCLE - 3, 1), (CYCLE - 4, 1), (4 * CYCLE - 3, 2)])
def test_a_run_is_saved_in_order_and_resumed_to_the_bit(total, epochs, tmp_path):
    def made(directory: pathlib.Path, **options: Any) -> ant.Trainer:
        saving = library.checkpoint(directory, monitor="val_loss", every=3, keep=2, keep_best=1)
        return drawing(saving, library.csv_log(directory / "log.csv", every=2), **options)

    loader, val = batches(4), batches(1)
    whole = made(tmp_path / "whole")
    start = begun(whole, total)
    end, history = whole.fit(start, loader, 4, val)
    losses = [row["val_loss"] for row in history]
    best = total + 4 * (1 + losses.index(min(losses)))
    with whole.checkpointer(tmp_path / "whole", mode="min") as saved:
        assert saved.best_step == best and saved.latest_step == total + 16
        assert saved.steps == sorted({best, total + 15, total + 16})
    rows = list(csv.DictReader((tmp_path / "whole" / "log.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows if row["step"]] == sorted(int(row["step"]) for row in rows if row["step"])
    assert {total + 2, total + 16} <= {int(row["step"]) for row in rows if row["step"]}

    first = made(tmp_path / "parts")
    first.fit(start, loader, epochs, val)
    second = made(tmp_path / "parts")
    resumed, _ = second.fit(second.init(loader[0]), loader, 4, val, resume=tmp_path / "parts")
    assert_bit_equal(resumed, end)
    assert resumed.total_steps == total + 16


def test_it_goes_on_from_the_middle_of_an_epoch_and_waits_for_no_device(tmp_path, monkeypatch):
    def look(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        states.append(state)
        return state, logs

    states: list[ant.TrainState] = []
    a_trainer = drawing(host("look", every=3, on_batch_end=look))
    start = begun(a_trainer, CYCLE - 4)
    with jax.transfer_guard_device_to_host("disallow"):
        end, _ = a_trainer.fit(start, batches(8), 1)
    assert [state.total_steps for state in states] == [CYCLE - 1, CYCLE + 2, CYCLE + 4]
    assert end.total_steps == CYCLE + 4


def test_an_epoch_may_have_more_batches_than_an_int32_holds():
    chunk = Chunk(batches=(), filled=1, examples=1, last=False)
    for window in (1, 3, 100):
        for first in (0, 5, CYCLE - 1, CYCLE + 7, 10**10 + 1):
            cursor = Cursor(chunk, first, window)
            assert cursor.batch_idx == first
            assert 0 <= int(cursor.offset) < CYCLE - MAX_ROWS
            assert int(cursor.offset) % window == first % window
    assert int(Cursor(chunk, 10**9, 3).offset) == 10**9
