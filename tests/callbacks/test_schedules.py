"""Hyper-parameters that change while training; `test_torch_schedules.py` has the arithmetic of the schedules."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import batches, host, standard_promotion, trainer

import ant_jax as ant


LEARNING_RATE = 0.5


def injected_sgd(learning_rate: float = LEARNING_RATE) -> optax.GradientTransformation:
    return standard_promotion(optax.inject_hyperparams(optax.sgd)(learning_rate=learning_rate))


# --- plateaus


def test_a_plateau_in_a_run_goes_on_where_it_was_and_compiles_nothing_again(compilations):
    values = [3.0, 2.0, 2.5, 2.5, 2.5, float("nan"), 2.5, 1.0]

    def publish(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        return state, {**logs, "value": np.float32(values[epoch])}

    a_trainer = trainer(
        host("publish", on_epoch_end=publish),
        ant.callbacks.reduce_on_plateau("value", factor=0.5, patience=1),
        optimizer=injected_sgd(),
    )
    start = a_trainer.init(batches()[0])
    whole, history = a_trainer.fit(start, batches(2), len(values))
    rates = [logs["learning_rate"] for logs in history]
    assert rates == [0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.125]
    compilations.reset()
    state = start
    for epochs in (3, 5, len(values)):
        state, history = a_trainer.fit(state, batches(2), epochs)
    assert compilations.count == 0
    assert [logs["learning_rate"] for logs in history] == rates
    assert float(state.callback_states["reduce_on_plateau"]["best"]) == 1
    np.testing.assert_array_equal(state.params["kernel"], whole.params["kernel"])


def test_a_plateau_of_an_unknown_log_names_those_there_are():
    a_trainer = trainer(ant.callbacks.reduce_on_plateau("val_los"), optimizer=injected_sgd())
    with pytest.raises(KeyError, match="there is no log named 'val_los'; the logs here are: train_loss"):
        a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 1)


# --- schedules


@pytest.mark.parametrize("accumulate", [1, 2])
def test_per_step_updates_use_the_scheduled_rate_and_it_is_logged(accumulate, compilations):
    seen: list[Any] = []

    def look(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        seen.extend(logs.window["learning_rate"].tolist())
        return state, logs

    def schedule(count: Any) -> Any:
        return 0.1 * (1 + jnp.asarray(count, jnp.float32))

    a_trainer = trainer(
        ant.callbacks.learning_rate_schedule(schedule),
        host(every=100, on_batch_end=look),
        optimizer=injected_sgd(),
        gradient_accumulation_steps=accumulate,
    )
    start = a_trainer.init(batches()[0])
    state, history = a_trainer.fit(start, batches(4), 2)
    of_updates = [0.1 * (1 + update) for update in range(8 // accumulate)]
    logged = np.repeat(of_updates, 2)[:-1] if accumulate == 2 else of_updates
    if accumulate == 2:  # what an update used is logged until the next one; before the first, what that will use
        logged = [of_updates[0], *logged]
    np.testing.assert_allclose(seen, logged, rtol=1e-6)
    np.testing.assert_allclose(history[1]["train_learning_rate"], np.mean(logged[4:]), rtol=1e-6)
    assert int(state.callback_states["learning_rate_schedule"]["count"]) == 8 // accumulate

    compilations.reset()
    cut, _ = a_trainer.fit(start, batches(4), 1)
    cut, _ = a_trainer.fit(cut, batches(4), 2)
    assert compilations.count == 0
    np.testing.assert_array_equal(cut.params["kernel"], state.params["kernel"])

    by_hand = trainer(optimizer=standard_promotion(optax.sgd(schedule)), gradient_accumulation_steps=accumulate)
    expected, _ = by_hand.fit(by_hand.init(batches()[0]), batches(4), 2)
    np.testing.assert_array_equal(state.params["kernel"], expected.params["kernel"])


@pytest.mark.parametrize("kind", ["callback", "callback first", "optax"])
def test_before_the_first_update_the_rate_is_that_of_the_schedule(kind):
    def schedule(count: Any) -> Any:
        return 0.25 * (1 + jnp.asarray(count, jnp.float32))

    skipping = ant.callbacks.skip_nonfinite()
    callbacks = [skipping, ant.callbacks.log_hyperparams(), ant.callbacks.learning_rate_schedule(schedule)]
    optimizer = injected_sgd(123.0)
    if kind == "callback first":
        callbacks = [ant.callbacks.learning_rate_schedule(schedule), ant.callbacks.log_hyperparams(), skipping]
    if kind == "optax":
        callbacks = callbacks[:2]
        optimizer = standard_promotion(optax.inject_hyperparams(optax.sgd)(learning_rate=schedule))
    loader = batches(8)
    loader[:3] = [(np.full_like(inputs, np.nan), targets) for inputs, targets in loader[:3]]
    for window, logged in ((1, [1, 1, 1, 1, 2, 3, 4, 5]), (2, [1, 1, 1, 1, 1, 2, 2, 3])):
        a_trainer = trainer(*callbacks, optimizer=optimizer, gradient_accumulation_steps=window)
        state = start = a_trainer.init(loader[0])
        history = a_trainer.fit(start, loader, 1)[1]
        np.testing.assert_allclose(history[0]["train_learning_rate"], 0.25 * np.mean(logged), rtol=1e-6)
        for batch, expected in zip(loader, logged, strict=True):
            state, logs = a_trainer.train_step(state, batch)
            assert float(logs["learning_rate"]) == 0.25 * expected


def test_the_count_of_updates_does_not_overflow():
    callback = ant.callbacks.learning_rate_schedule(lambda count: jnp.asarray(count > 0, jnp.float32))
    a_trainer = trainer(callback, optimizer=injected_sgd())
    state = a_trainer.init(batches()[0]).with_callback_state(callback.name, {"count": jnp.int32(2**31 - 1)})
    for _ in range(2):
        state, logs = a_trainer.train_step(state, batches()[0])
        assert logs["learning_rate"] == 1


def test_per_epoch_any_python_function_will_do_and_nothing_is_compiled_again(compilations):
    rates = {0: 0.5, 1: 0.25, 2: 0.125, 3: 0.0}
    callbacks = [
        ant.callbacks.learning_rate_schedule(rates.__getitem__, per="epoch"),
        ant.callbacks.log_hyperparams(),
    ]
    a_trainer = trainer(*callbacks, optimizer=injected_sgd(0.9))
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 1)
    compilations.reset()
    before = []
    for epoch in (1, 2, 3):
        before.append(np.asarray(state.params["kernel"]))
        state, history = a_trainer.fit(state, batches(2), epoch + 1)
    assert compilations.count == 0
    assert history.to_dict()["learning_rate"] == history.to_dict()["train_learning_rate"] == list(rates.values())
    assert np.any(before[2] != before[1])
    np.testing.assert_array_equal(state.params["kernel"], before[2])  # with a rate of 0


def test_another_hyperparameter_may_be_scheduled_also_a_callbacks():
    a_trainer = trainer(
        ant.callbacks.clip_by_global_norm(ant.Hyperparam(1.0)),
        ant.callbacks.learning_rate_schedule(
            lambda epoch: 2.0**-epoch, per="epoch", hyperparam="max_norm", name="clip"
        ),
        ant.callbacks.learning_rate_schedule(lambda update: 0.25, hyperparam="learning_rate"),
        ant.callbacks.log_hyperparams("max_norm", "learning_rate", name="some"),
        optimizer=injected_sgd(),
    )
    _, history = a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 3)
    assert history.to_dict()["max_norm"] == history.to_dict()["train_max_norm"] == [1.0, 0.5, 0.25]
    assert history.to_dict()["train_learning_rate"] == [0.25] * 3


@pytest.mark.parametrize(
    "callback",
    [
        ant.callbacks.learning_rate_schedule(lambda count: 0.1),
        ant.callbacks.learning_rate_schedule(lambda count: 0.1, per="epoch"),
        ant.callbacks.reduce_on_plateau("train_loss"),
    ],
    ids=["per step", "per epoch", "plateau"],
)
def test_an_optimizer_that_was_not_made_for_it_is_refused_at_once(callback):
    line = r"has no hyper-parameter 'learning_rate' .*optax.inject_hyperparams\(optax.adam\)\(learning_rate=0.001\)"
    with pytest.raises(ant.HyperparamError, match=line) as caught:
        trainer(callback).init(batches()[0])
    assert f"in init of callback {callback.name!r}" in caught.value.__notes__
    scheduled = optax.inject_hyperparams(optax.sgd)(learning_rate=optax.constant_schedule(0.1))
    with pytest.raises(ant.HyperparamError, match="'learning_rate' follows a schedule"):
        trainer(callback, optimizer=scheduled).init(batches()[0])
    whole = optax.inject_hyperparams(optax.sgd)(learning_rate=1)
    with pytest.raises(ant.HyperparamError, match="'learning_rate' is a whole number, .* write it with a point"):
        trainer(callback, optimizer=whole).init(batches()[0])


def test_logging_an_unknown_hyperparameter_raises_at_the_first_batch():
    a_trainer = trainer(ant.callbacks.log_hyperparams("momentum"), optimizer=injected_sgd())
    with pytest.raises(ant.HyperparamError, match=r"no hyper-parameter 'momentum' \(there are: learning_rate\)"):
        a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 1)


def test_logging_all_hyperparameters_where_there_are_none_says_what_to_write():
    a_trainer = trainer(ant.callbacks.log_hyperparams())
    with pytest.raises(
        ant.HyperparamError, match=r"log_hyperparams: the state has no hyper-parameter to log. .*inject_hyperparams"
    ):
        a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 1)


@pytest.mark.parametrize("bad", [float("nan"), np.float32(np.inf), jnp.float32(jnp.nan), "0.1", None, True])
def test_what_a_schedule_per_epoch_returns_is_refused_at_that_epoch(bad):
    schedule = ant.callbacks.learning_rate_schedule(lambda epoch: 0.1 if epoch < 1 else bad, per="epoch")
    a_trainer = trainer(schedule, optimizer=injected_sgd())
    with pytest.raises(ValueError, match="learning_rate_schedule: what schedule.1. returns must be") as caught:
        a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 3)
    assert str(caught.value).endswith(f"a finite number, got {bad!r}")


NUMBERS = [float("nan"), float("inf"), True, "1", None, [0.1], ant.Hyperparam(0.1)]


@pytest.mark.parametrize(
    ("argument", "values", "allowed"),
    [
        ("factor", [0, 1, 1.5, -0.1, *NUMBERS], "a number between 0 and 1"),
        ("patience", [-1, 1.0, True, "1", None, float("nan")], "a whole number of epochs, at least 0"),
        ("cooldown", [-1, 0.5, True, "1", None], "a whole number of epochs, at least 0"),
        ("mode", ["auto", None, 1, True], "'min' or 'max'"),
        ("threshold", [-1e-4, *NUMBERS], "a finite number from 0 on"),
        ("threshold_mode", ["relative", None], "'rel' or 'abs'"),
        ("min_value", [-1.0, *NUMBERS], "a finite number from 0 on"),
        ("eps", [-1.0, *NUMBERS], "a finite number from 0 on"),
        ("monitor", [3, None, ""], "a name"),
        ("hyperparam", [3, None, ""], "a name"),
    ],
)
def test_plateaus_refuse(argument, values, allowed):
    for value in values:
        with pytest.raises(ValueError) as caught:
            ant.callbacks.reduce_on_plateau(**{argument: value})
        assert str(caught.value) == f"reduce_on_plateau: {argument} must be {allowed}, got {value!r}"


def test_schedules_refuse():
    factory: Any = ant.callbacks.learning_rate_schedule
    for bad in (0.1, None, "cosine"):
        with pytest.raises(TypeError, match=f"schedule must be a function of \\(count\\), got {bad!r}"):
            factory(bad)
    with pytest.raises(ValueError, match="per must be 'step' or 'epoch', got 'batch'"):
        factory(lambda count: 0.1, per="batch")
    with pytest.raises(ValueError, match="hyperparam must be a name, got 1"):
        factory(lambda count: 0.1, hyperparam=1)
