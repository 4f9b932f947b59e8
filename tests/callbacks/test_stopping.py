"""When a run ends: after so many epochs without an improvement, at a value, after some time."""

import datetime
import random
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import apply, assert_bit_equal, batches, host, init, trainer

import ant_jax as ant


library = ant.callbacks


def publishing(values: list[Any]) -> ant.Callback:
    """Publishes one value at the end of each epoch."""

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        return state, {**logs, "value": np.float32(values[epoch])}

    return host("publish", on_epoch_end=on_epoch_end)


# A state whose only parameter says after which epoch it is.
START = trainer().init(batches()[0]).replace(params={"epoch": jnp.int32(-1)})


def stopped_at(
    values: list[Any], whole: Any = jnp.int32, real: Any = np.float32, **options: Any
) -> tuple[int | None, dict[str, Any]]:
    """Call the hook once for each value: the epoch at which it asks to stop, and its memory then.

    Epochs and values are numbers of the kinds `whole` and `real`.
    """
    callback: Any = library.early_stopping("value", **options)
    state = START.replace(callback_states={callback.name: callback.init(START)})
    for epoch, value in enumerate(values):
        state = state.replace(params={"epoch": jnp.int32(epoch)})
        state, _ = callback.on_epoch_end(whole(epoch), None, state, {"value": real(value)})
        if state.stop:
            return epoch, state.callback_states[callback.name]
    return None, state.callback_states[callback.name]


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "options", "stopped"),
    [
        ([3, 2, 1, 0], {"patience": 1}, None),
        ([3, 2, 2, 2, 2], {"patience": 2}, 3),
        ([3, 2, 2, 1, 1, 1], {"patience": 2}, 5),
        ([1, 2, 2, 2], {"patience": 2, "mode": "max"}, 3),
        ([3, 2.95, 2.9, 2.85], {"patience": 2, "min_delta": 0.2}, 2),
        ([3, 2.9, 2.8, 2.7], {"patience": 2, "min_delta": 0.25}, 2),
        ([3, NAN, NAN, 1], {"patience": 2}, 2),
        ([NAN, 3, 3, 3], {"patience": 3}, None),
        ([NAN, 1], {"patience": 1}, 0),
        # Warm-up: neither waited for nor remembered.
        ([1, 5, 5, 4, 5, 5], {"patience": 2, "start_epoch": 2}, 5),
        ([NAN, NAN, 1, 1], {"patience": 1, "start_epoch": 2}, 3),
        # With a baseline the wait goes on until it is beaten, but not at an epoch that is the best so far.
        ([9, 8, 7, 6], {"patience": 2, "baseline": 5}, None),
        ([9, 8, 8, 6], {"patience": 2, "baseline": 5}, 2),
        ([9, 4, 4, 4], {"patience": 2, "baseline": 5}, 3),
        ([9, 8, 4, 4, 4], {"patience": 2, "baseline": 5}, 4),
        ([9, 5, 5], {"patience": 1, "baseline": 5}, 2),
        ([0, 1, 1], {"patience": 2, "mode": "max", "baseline": 2}, 2),
    ],
)
def test_it_stops_after_so_many_epochs_without_improvement(values, options, stopped):
    assert stopped_at(values, **options)[0] == stopped


def by_keras(
    values: list[float], patience: int, min_delta: float, mode: str, baseline: float | None, start_epoch: int
) -> tuple[int | None, float, int, int]:
    """What keras.callbacks.EarlyStopping does, written down again: the epoch of the stop, best, wait, best epoch."""
    sign = 1 if mode == "min" else -1
    worst = float(np.finfo(np.float32).max)
    best, wait, best_epoch = sign * worst, 0, 0
    for epoch, value in enumerate(values):
        if epoch < start_epoch:
            best_epoch = epoch
            continue
        wait += 1
        if sign * value + min_delta < sign * best:
            best, best_epoch = value, epoch
            if baseline is None or sign * value + min_delta < sign * baseline:
                wait = 0
        else:
            best_epoch = epoch if sign * best == worst else best_epoch
            if wait >= patience:
                return epoch, best, wait, best_epoch
    return None, best, wait, best_epoch


def test_on_random_sequences_it_decides_as_keras_does():
    rng, stops = random.Random(0), 0
    for sequence in range(100):
        options: dict[str, Any] = {
            "patience": rng.randint(1, 4),
            "min_delta": rng.choice([0.0, 0.0, 0.25]),
            "mode": rng.choice(["min", "max"]),
            "baseline": rng.choice([None, None, -0.5, 0.5]),
            "start_epoch": rng.choice([0, 0, 2, 5]),
        }
        sign = 1 if options["mode"] == "min" else -1
        values = [sign * (rng.randint(-16, 16) / 8 - epoch / 16) for epoch in range(10)]  # exact in float32
        values = [NAN if rng.random() < 0.05 else value for value in values]
        epoch, best, wait, best_epoch = by_keras(values, **options)
        kinds = [(jnp.int32, np.float32), (int, float), (np.int64, jnp.float32)][sequence % 3]
        actual, memory = stopped_at(values, *kinds, restore_best=True, **options)
        what = f"{sequence}: {options} {values}"
        assert (actual, float(memory["best"]), int(memory["wait"])) == (epoch, best, wait), what
        assert int(memory["params"]["epoch"]) == best_epoch, what
        stops += epoch is not None
    assert 30 < stops < 90


def counting(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
    outputs, _ = apply(params, {}, inputs, key)
    return outputs, {"batches": model_state["batches"] + (0 if key is None else 1)}


def initial(key: Any, inputs: Any) -> Any:
    return init(key, inputs)[0], {"batches": jnp.int32(0)}


@pytest.fixture(scope="module")
def restoring() -> ant.Trainer:
    stopping = library.early_stopping("value", patience=3, restore_best=True)
    return trainer(publishing([3, 2, 1, 2, 2, 2, 9]), stopping, model=(initial, counting))


@pytest.mark.parametrize("whole", [int, np.int64, jnp.int32])
def test_by_hand_a_run_ends_where_the_trainers_does(whole):
    values = [3.0, 1.0, 2.0, NAN, 0.5, 2.0, 2.0, 2.0, 2.0]
    cases: list[dict[str, Any]] = [{"patience": 2}, {"patience": 3}, {"patience": 2, "start_epoch": 4}]
    for options in cases:
        a_trainer = trainer(publishing(values), library.early_stopping("value", **options))
        state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(1), len(values))
        assert stopped_at(values, whole, float, **options)[0] == state.epoch - 1


def test_the_best_epochs_parameters_and_model_state_are_restored_to_the_bit(restoring):
    start = restoring.init(batches()[0])
    best, _ = restoring.fit(start, batches(3), 3)
    assert int(best.model_state["batches"]) == 9
    state, history = restoring.fit(start, batches(3), 10)
    assert len(history) == 6 and state.stop and state.epoch == 6
    assert_bit_equal(state, best, "params", "model_state")
    assert int(state.step) == 18  # the run is not turned back, its weights are


def test_the_wait_and_the_best_weights_survive_in_the_state(restoring, compilations):
    start = restoring.init(batches()[0])
    whole, _ = restoring.fit(start, batches(3), 10)
    compilations.reset()
    state = start
    for epochs in (1, 2, 3, 10):  # every epoch is the best until the third
        state, history = restoring.fit(state, batches(3), epochs)
    assert compilations.count == 0
    assert len(history) == 6
    assert_bit_equal(state, whole)


def test_when_no_epoch_was_any_good_the_latest_weights_stay():
    ends: list[ant.TrainState] = []

    def keep(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        ends.append(state)
        return state, logs

    stopping = library.early_stopping("value", patience=2, restore_best=True)
    a_trainer = trainer(publishing([NAN, NAN]), host(on_epoch_end=keep), stopping, fuse=False)
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 5)
    assert state.stop and len(ends) == 2
    assert_bit_equal(state, ends[-1], "params")


def test_an_unknown_monitor_raises_at_the_first_epoch_end():
    a_trainer = trainer(library.early_stopping("val_los"), fuse=False)
    with pytest.raises(
        KeyError, match="there is no log named 'val_los'; the logs here are: train_loss, val_loss"
    ) as caught:
        a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 3, batches(1))
    assert "in on_epoch_end of callback 'early_stopping' (epoch 0)" in caught.value.__notes__


# --- stop_at


@pytest.mark.parametrize("options", [{"fuse": True}, {"fuse": False}, {"gradient_accumulation_steps": 3}], ids=str)
def test_per_batch_the_run_ends_after_the_very_batch(options, compilations):
    seen: list[float] = []

    def look(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        seen.extend(logs.window["loss"].tolist())
        return state, logs

    a_trainer = trainer(
        library.stop_at(ant.Hyperparam(-1.0), "loss", per="batch"),
        host(every=100, on_batch_end=look),
        **options,
    )
    start = a_trainer.init(batches()[0])
    loader = batches(7)
    a_trainer.fit(start, loader, 1)
    losses, window = list(seen), options.get("gradient_accumulation_steps", 1)
    lows = [i for i in range(7) if losses[i] == min(losses[: i + 1])]
    assert len(lows) > 1
    for reached in lows[1:]:
        threshold = np.float32(losses[reached])
        ends = min(7, -(-(reached + 1) // window) * window)
        expected, _ = a_trainer.fit(start, loader, 1, steps_per_epoch=ends)
        seen.clear()
        compilations.reset()
        changed = start.with_hyperparams(threshold=threshold)
        state, history = a_trainer.fit(changed, loader, 5)
        assert compilations.count == 0
        assert state.stop and len(history) == 1 and int(state.step) == ends
        assert seen == losses[:ends]
        np.testing.assert_allclose(history[0]["train_loss"], np.mean(losses[:ends]), rtol=1e-6)
        assert_bit_equal(state, expected, "params")


@pytest.mark.parametrize(
    ("mode", "values", "epochs"),
    [("min", [3, 2, 1, 0], 3), ("max", [-3, NAN, 1, 5], 3), ("max", [0, 0, 0.5, 0.9], 4), ("min", [1], 1)],
)
def test_per_epoch_the_run_ends_at_the_threshold_or_beyond(mode, values, epochs):
    callback: Any = library.stop_at(1, "value", mode=mode)
    state, done = START, 0
    for value in values:
        if not state.stop:
            state, _ = callback.on_epoch_end(done, None, state, {"value": np.float32(value)})
            done += 1
    assert done == epochs and state.stop == (values != [0, 0, 0.5, 0.9])


def test_per_epoch_in_a_run():
    a_trainer = trainer(publishing([3, 2, 1, 0]), library.stop_at(2.5, "value"), fuse=False)
    state, history = a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 4)
    assert len(history) == 2 and state.stop and "stop_at" not in state.callback_states
    with pytest.raises(KeyError, match="no log named 'val_loss'; the logs here are: "):
        wrong = trainer(library.stop_at(1.0), fuse=False)
        wrong.fit(wrong.init(batches()[0]), batches(1), 1)
    with pytest.raises(KeyError, match="no log named 'accuracy'; the logs here are: batch_size, loss"):
        wrong = trainer(library.stop_at(1.0, "accuracy", per="batch"))
        wrong.fit(wrong.init(batches()[0]), batches(1), 1)


# --- time_limit


class Clock:
    """Time that the test turns."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def ticking(self, hook: str, seconds: float) -> ant.Callback:
        def tick(lead: Any, trainer: Any, state: Any, logs: Any) -> Any:
            self.now += seconds
            return state, logs

        return host(f"tick {hook}", every=None if hook == "on_epoch_begin" else 1, **{hook: tick})


@pytest.mark.parametrize("limit", [2.5, datetime.timedelta(seconds=2.5)])
def test_time_counts_on_when_a_run_goes_on(limit):
    clock = Clock()
    a_trainer = trainer(clock.ticking("on_epoch_begin", 1.0), library.time_limit(limit, clock=clock), fuse=False)
    start = a_trainer.init(batches()[0])
    whole, history = a_trainer.fit(start, batches(1), 10)
    assert len(history) == 3 and whole.stop
    assert whole.callback_states["time_limit"] == {"seconds": 3.0}
    state = start
    for epochs in (1, 2, 10):
        clock.now += 1000  # between two runs
        state, history = a_trainer.fit(state, batches(1), epochs)
    assert len(history) == 3 and state.stop
    assert state.callback_states["time_limit"] == {"seconds": 3.0}


def test_time_ends_a_run_in_the_middle_of_an_epoch():
    clock = Clock()
    limited = library.every(library.time_limit(2.5, clock=clock), batches=1)
    a_trainer = trainer(clock.ticking("on_batch_begin", 1.0), limited, fuse=False)
    state, history = a_trainer.fit(a_trainer.init(batches()[0]), batches(5), 10)
    assert int(state.step) == 3 and len(history) == 1


# --- arguments

NUMBERS: list[Any] = [NAN, float("inf"), True, "1", [1.0], ant.Hyperparam(1.0)]


@pytest.mark.parametrize(
    ("factory", "argument", "values", "allowed"),
    [
        (
            library.early_stopping,
            "patience",
            [0, -1, 1.5, True, "3", None, NAN],
            "a whole number of epochs, at least 1",
        ),
        (library.early_stopping, "start_epoch", [-1, 1.5, True, None], "a whole number, at least 0"),
        (library.early_stopping, "min_delta", [-1.0, None, *NUMBERS], "a finite number from 0 on"),
        (library.early_stopping, "baseline", NUMBERS, "a finite number"),
        (library.early_stopping, "mode", ["best", None, True], "'min' or 'max'"),
        (library.early_stopping, "monitor", [5, None, ""], "a name"),
        (library.stop_at, "threshold", [None, *NUMBERS[:-1]], "a finite number"),
        (library.stop_at, "monitor", [5, None, ""], "a name"),
        (library.stop_at, "mode", ["best", None], "'min' or 'max'"),
        (library.stop_at, "per", ["step", None], "'epoch' or 'batch'"),
        (library.time_limit, "seconds", [0, -1, None, *NUMBERS], "a finite number above 0"),
    ],
)
def test_refuses(factory, argument, values, allowed):
    required = {"threshold": 1.0} if factory is library.stop_at else {}
    for value in values:
        with pytest.raises(ValueError) as caught:
            factory(**{**required, argument: value})
        assert str(caught.value) == f"{factory.__name__}: {argument} must be {allowed}, got {value!r}"


def test_refuses_no_time():
    with pytest.raises(ValueError, match="time_limit: seconds must be a finite number above 0, got 0.0"):
        library.time_limit(datetime.timedelta(0))


@pytest.mark.parametrize(
    "chained", [lambda callback: callback, lambda callback: library.chain(library.swa(0), callback)]
)
def test_the_average_that_was_judged_best_is_restored(chained):
    stopping = library.early_stopping("val_loss", patience=2, restore_best=True)
    average = chained(library.ema(0.5, evaluate=True))
    a_trainer = trainer(average, stopping, optimizer=optax.sgd(3.0))
    state, history = a_trainer.fit(a_trainer.init(batches()[0]), batches(5), 9, batches(2))
    losses = [logs["val_loss"] for logs in history]
    assert a_trainer.evaluate(state, batches(2))["val_loss"] == min(losses) != losses[-1]
    for callbacks, message in (
        ([stopping, average], f"list 'early_stopping' after {average.name!r}"),
        ([library.chain(library.swa(1, evaluate=True)), stopping], "another average than the one that 'chain' had"),
        ([library.swa(1, evaluate=True), stopping], "another average than the one that 'swa' had"),
    ):
        refusing = trainer(*callbacks)
        with pytest.raises(ValueError, match=message):
            refusing.fit(refusing.init(batches()[0]), batches(5), 1, batches(2))


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize(
    ("values", "options", "stopped"),
    [
        # Below the baseline, but not by min_delta: the wait goes on, though each is the best so far.
        ([9, 4.875, 4.875, 4.875], {"patience": 2, "baseline": 5, "min_delta": 0.25}, 2),
        ([9, 4.75, 4.75, 4.75], {"patience": 2, "baseline": 5, "min_delta": 0.25}, 2),
        ([9, 4.5, 4.5, 4.5], {"patience": 2, "baseline": 5, "min_delta": 0.25}, 3),
    ],
)
def test_a_baseline_is_beaten_by_min_delta(values, options, stopped, mode):
    sign = 1 if mode == "min" else -1
    options = {**options, "baseline": sign * options["baseline"], "mode": mode}
    assert stopped_at([sign * value for value in values], **options)[0] == stopped


def test_inside_a_condition_the_time_between_two_runs_does_not_count():
    """The hook that begins a run is left out, so that each run counts from its first look on."""
    clock = Clock()
    limited = library.when(lambda state, logs: "train_loss" in logs, library.time_limit(3.5, clock=clock))
    a_trainer = trainer(clock.ticking("on_epoch_begin", 1.0), limited, fuse=False)
    state = a_trainer.init(batches()[0])
    for epochs, seconds in ((2, 1.0), (5, 3.0)):
        clock.now += 1000
        state, _ = a_trainer.fit(state, batches(1), epochs)
        assert state.callback_states["time_limit"] == {"seconds": seconds} and not state.stop
    clock.now += 1000
    state, history = a_trainer.fit(state, batches(1), 20)
    assert len(history) == 7 and state.callback_states["time_limit"] == {"seconds": 4.0}
