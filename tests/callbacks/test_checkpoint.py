"""A run is saved while it goes on: when, what is kept, and that it is what the state was then."""

import contextlib
import itertools
from typing import Any

import numpy as np
import pytest
from problems import BATCH, Clock, assert_bit_equal, batches, data, host, trainer

import ant_jax as ant


def steps_in(path: Any) -> list[int]:
    return sorted(int(step.name.removeprefix("step_")) for step in path.glob("step_*"))


def publish(values: list[float]) -> ant.Callback:
    return host("publish", on_epoch_end=lambda e, trainer, state, logs: (state, {**logs, "v": np.float32(values[e])}))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep": 2}, [10, 12]),
        ({"keep": 10}, [2, 4, 6, 8, 10, 12]),
        ({"keep": 1, "monitor": "v"}, [6, 12]),
        ({"keep": 1, "monitor": "v", "keep_best": 2}, [6, 10, 12]),
        ({"keep": 1, "monitor": "v", "mode": "max"}, [4, 12]),
        ({"keep": 10, "every_epochs": 4}, [8, 12]),
        ({"keep": 10, "every_epochs": 4, "save_last": False}, [8]),
        ({"keep": 10, "every_epochs": None}, [12]),
        ({"keep": 3, "every": 1}, [10, 11, 12]),
    ],
)
def test_what_is_kept(options, kept, tmp_path):
    values = [3.0, 5.0, 1.0, float("nan"), 2.0, float("inf")]
    a_trainer = trainer(publish(values), ant.callbacks.checkpoint(tmp_path, **options))
    a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 6)
    assert steps_in(tmp_path) == kept


def stop_after(epoch: int) -> ant.Callback:
    return host("stop", on_epoch_end=lambda e, t, state, logs: (state.request_stop(when=e == epoch), logs))


def fail_in(epoch: int) -> ant.Callback:
    def on_epoch_begin(e: int, trainer: Any, state: Any, logs: Any) -> Any:
        if e == epoch:
            raise KeyboardInterrupt
        return state, logs

    return host("fail", on_epoch_begin=on_epoch_begin)


@pytest.mark.parametrize("ending", [lambda: host("full"), lambda: stop_after(2), lambda: fail_in(3)])
@pytest.mark.parametrize("options", [{"every_epochs": 2}, {"every_epochs": None}, {"every_seconds": 1e9}, {"every": 2}])
def test_the_last_save_has_its_metric(options, ending, tmp_path):
    callback = ant.callbacks.checkpoint(tmp_path, monitor="v", keep=10, **options)
    a_trainer = trainer(publish([3.0, 2.0, 1.0]), callback, ending())
    with contextlib.suppress(KeyboardInterrupt):
        ends = "full" in [other.name for other in a_trainer.callbacks]
        a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 3 if ends else 9)
    with a_trainer.checkpointer(tmp_path, mode="min") as saved:
        assert saved.best_step == saved.latest_step == 6


def test_the_last_save_of_a_rarer_one_has_its_metric(tmp_path):
    callback = ant.callbacks.every(ant.callbacks.checkpoint(tmp_path, monitor="v"), epochs=2)
    a_trainer = trainer(publish([3.0, 2.0, 1.0]), callback)
    a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 3)
    with a_trainer.checkpointer(tmp_path, mode="min") as saved:
        assert saved.steps == [4, 6] and saved.best_step == 6


def test_the_last_save_is_of_the_end_of_its_epoch(tmp_path):
    """So that the run, with more epochs, goes on from there as if it had not ended."""
    one = lambda: [ant.callbacks.early_stopping("train_loss", restore_best=True), publish([0.0] * 4)]  # noqa: E731
    a_trainer = trainer(*one(), ant.callbacks.checkpoint(tmp_path, every_epochs=2))
    start = a_trainer.init(batches()[0])
    a_trainer.fit(start, batches(2), 3)
    resumed, _ = a_trainer.fit(start, batches(2), 4, resume=tmp_path)
    whole = trainer(*one())
    assert_bit_equal(whole.fit(whole.init(batches()[0]), batches(2), 4)[0], resumed)


def test_so_is_the_last_save_of_a_run_that_is_stopped(tmp_path):
    """With the parameters of its last epoch, not with the best ones, which are put back when the run ends."""
    stopping = ant.callbacks.early_stopping("v", patience=2, restore_best=True)
    saving = ant.callbacks.checkpoint(tmp_path, every_epochs=None, monitor="v")
    a_trainer = trainer(publish([1.0, 2.0, 3.0, 4.0]), stopping, saving)
    start = a_trainer.init(batches()[0])
    state, history = a_trainer.fit(start, batches(2), 4)
    assert len(history) == 3 and steps_in(tmp_path) == [6]
    plain = trainer()
    assert_bit_equal(plain.fit(start.replace(callback_states={}), batches(2), 1)[0], state, "params")
    expected, _ = plain.fit(start.replace(callback_states={}), batches(2), 3)
    assert_bit_equal(expected, a_trainer.restore(tmp_path), "params")


def test_an_unknown_monitor_raises_at_the_end_of_the_first_epoch_also_where_none_is_due(tmp_path):
    a_trainer = trainer(ant.callbacks.checkpoint(tmp_path, monitor="v", every_epochs=3))
    with pytest.raises(KeyError, match="there is no log named 'v'"):
        a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 9)
    assert steps_in(tmp_path) == [2]


def test_every_batch_of_a_fused_run_is_saved_as_it_was(tmp_path):
    """The state is written while the next steps overwrite it."""
    states: dict[int, ant.TrainState] = {}

    def on_checkpoint(trainer: Any, state: Any, logs: Any) -> Any:
        states[int(state.step)] = state
        return state, logs

    identity = lambda i, trainer, state, logs: (state, logs)  # noqa: E731
    watch = host("watch", every=2, on_batch_end=identity, on_checkpoint=on_checkpoint)
    saving = ant.callbacks.checkpoint(tmp_path, every=2, keep=100)
    a_trainer = trainer(ant.callbacks.ema(0.9), saving, watch, fuse=True)
    a_trainer.fit(a_trainer.init(batches()[0]), ant.ArrayLoader(data(8 * BATCH), BATCH), 2)
    assert steps_in(tmp_path) == sorted(states)
    for step, state in states.items():
        assert_bit_equal(a_trainer.restore(tmp_path, step), state)


def test_it_sees_what_all_callbacks_made_of_the_moment(tmp_path):
    """It is listed first, and yet saves what the others remember afterwards."""
    count = host(
        "count",
        init=lambda state: 0,
        on_epoch_end=lambda e, trainer, state, logs: (
            state.with_callback_state("count", state.callback_states["count"] + 1),
            {**logs, "extra": 1.0},
        ),
    )
    a_trainer = trainer(ant.callbacks.checkpoint(tmp_path), count)
    a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 2)
    restored = a_trainer.restore(tmp_path)
    assert restored.callback_states["count"] == restored.epoch == 2
    assert restored.history[-1]["extra"] == 1.0


def test_what_is_under_way_is_finished_when_another_callback_fails(tmp_path):
    def fail(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        raise RuntimeError("on purpose")

    a_trainer = trainer(ant.callbacks.checkpoint(tmp_path, every=1), host("fail", on_epoch_end=fail))
    with pytest.raises(RuntimeError, match="on purpose"):
        a_trainer.fit(a_trainer.init(batches()[0]), batches(3), 1)
    assert steps_in(tmp_path) == [1, 2, 3]  # the last from after the epoch's batches, from where a run could go on
    a_trainer.restore(tmp_path)


def test_a_run_that_goes_on_saves_on_and_another_run_is_refused(tmp_path):
    a_trainer = trainer(ant.callbacks.checkpoint(tmp_path, keep=5))
    start = a_trainer.init(batches()[0])
    straight, _ = a_trainer.fit(start, batches(2), 2)
    resumed, _ = a_trainer.fit(a_trainer.restore(tmp_path), batches(2), 3)
    assert steps_in(tmp_path) == [2, 4, 6]
    with pytest.raises(FileExistsError, match="holds checkpoints of steps 2, 4, 6, and this run is at step 0"):
        a_trainer.fit(start, batches(2), 3)
    with pytest.raises(FileExistsError, match="holds checkpoints of steps 6, and this run is at step 4"):
        a_trainer.fit(straight, batches(2), 3)
    assert int(resumed.step) == 6


@pytest.mark.parametrize("failing", [2, 6], ids=["first epoch", "second epoch"])
def test_a_run_that_was_cut_short_ends_as_if_it_had_not_been(failing, tmp_path):
    """As users do it: the same lines again, with what is newest on disk instead of a new state."""
    loader = ant.ArrayLoader(data(4 * BATCH), BATCH)

    def new(*more: ant.Callback) -> ant.Trainer:
        saving = ant.callbacks.checkpoint(tmp_path, every=1)
        options = {"gradient_accumulation_steps": 3}
        return trainer(ant.callbacks.ema(0.9), saving, *more, **options)

    def fail(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        if int(state.step) > failing:
            raise RuntimeError("on purpose")
        return state, logs

    straight = trainer(ant.callbacks.ema(0.9), gradient_accumulation_steps=3)
    whole, history = straight.fit(straight.init(batches()[0]), loader, 3)
    first = new(host("fail", on_batch_end=fail))
    with pytest.raises(RuntimeError, match="on purpose"):
        first.fit(first.init(batches()[0]), loader, 3)
    second = new()
    restored = second.restore(tmp_path)
    assert restored.step == failing
    resumed, resumed_history = second.fit(restored, loader, 3)
    assert_bit_equal(whole, resumed)
    assert history == resumed_history
    assert steps_in(tmp_path) == [10, 11, 12]


def test_a_run_that_goes_on_after_the_last_batch_of_an_epoch(tmp_path):
    """The epoch's end is at a step that is saved already."""

    def fail(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        raise RuntimeError("on purpose")

    broken = trainer(host("fail", on_epoch_end=fail))
    with pytest.raises(RuntimeError, match="on purpose") as raised:
        broken.fit(broken.init(batches()[0]), batches(2), 1)
    broken.save(tmp_path, raised.value.train_state)  # type: ignore[attr-defined]
    mended = trainer(ant.callbacks.checkpoint(tmp_path))
    mended.fit(mended.restore(tmp_path), batches(2), 2)
    assert steps_in(tmp_path) == [2, 4]
    assert mended.restore(tmp_path).epoch == 2


def test_two_into_one_directory_are_refused(tmp_path):
    callbacks = [ant.callbacks.checkpoint(tmp_path, name=name) for name in "ab"]
    a_trainer = trainer(*callbacks)
    with pytest.raises(RuntimeError, match=r"each checkpoint callback needs one of its own"):
        a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 1)
    alone = trainer(callbacks[0])
    alone.fit(alone.init(batches()[0]), batches(1), 1)
    assert steps_in(tmp_path) == [1]


def test_an_unknown_monitor_raises_at_the_first_epoch_end(tmp_path):
    a_trainer = trainer(ant.callbacks.checkpoint(tmp_path, monitor="val_los"))
    with pytest.raises(KeyError, match="no log named 'val_los'; the logs here are: train_loss, val_loss"):
        a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 3, batches(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "checkpoint: every must be a whole number of batches, at least 1, or None, got 0"),
        ({"keep": 0}, "checkpoint: keep must be a whole number of checkpoints, at least 1, got 0"),
        ({"keep": True}, "got True"),
        ({"mode": "best"}, "checkpoint: mode must be 'min' or 'max', got 'best'"),
    ],
)
def test_refuses(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ant.callbacks.checkpoint(tmp_path, **options)


def test_two_in_one_trainer(tmp_path):
    both = [
        ant.callbacks.checkpoint(tmp_path / name, keep=keep, name=name) for name, keep in itertools.product("ab", [2])
    ]
    a_trainer = trainer(*both)
    a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 3)
    assert steps_in(tmp_path / "a") == steps_in(tmp_path / "b") == [2, 3]


@pytest.mark.parametrize(
    ("every_epochs", "kept"), [(1, [3, 4, 7, 8, 11, 12]), (None, [3, 6, 9, 12])], ids=["and epochs", "alone"]
)
def test_seconds_count_from_the_last_save_whatever_it_was_made_for(every_epochs, kept, tmp_path):
    clock = Clock()
    clock.now = 100.0  # the first save is so many seconds after the beginning of the run
    saving = ant.callbacks.checkpoint(tmp_path, every_seconds=2.5, every_epochs=every_epochs, keep=20, clock=clock)
    every_batch = ant.callbacks.every(saving, batches=1)
    a_trainer = trainer(clock.passing(on_batch_end=1.0), every_batch, fuse=False)
    a_trainer.fit(a_trainer.init(batches()[0]), batches(4), 3)
    assert steps_in(tmp_path) == kept


@pytest.mark.parametrize("mode", ["min", "max"])
def test_of_equally_good_epochs_the_oldest_is_the_best(mode, tmp_path):
    saving = ant.callbacks.checkpoint(tmp_path, keep=1, monitor="v", mode=mode, keep_best=2)
    a_trainer = trainer(publish(5 * [1.0]), saving)
    a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 5)
    assert steps_in(tmp_path) == [1, 2, 5]
    with a_trainer.checkpointer(tmp_path, keep=1, keep_best=2, mode=mode) as saved:
        assert saved.best_step == 1
