"""Schedules and plateaus take the decisions of torch's, in hundreds of random sequences."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from problems import batches, standard_promotion, trainer

import ant_jax as ant


SCHEDULERS = torch.optim.lr_scheduler
LEARNING_RATE = 0.5
SEQUENCES = 200


INJECTED_SGD = standard_promotion(optax.inject_hyperparams(optax.sgd)(learning_rate=LEARNING_RATE))


def initial_state(*callbacks: ant.Callback) -> ant.TrainState:
    return trainer(*callbacks, optimizer=INJECTED_SGD).init(batches()[0])


START = initial_state()


def with_memory(callback: ant.Callback) -> ant.TrainState:
    """The state of a run that begins, as a traced hook is given it: to call the hook by hand, with nothing compiled."""
    memory = callback.init(START)
    return START.replace(host=None, callback_states={} if memory is None else {callback.name: memory})


def torch_rates(make: Callable[[Any], Any], count: int, learning_rate: float = LEARNING_RATE) -> list[float]:
    """The learning rates of the first updates with a scheduler of torch."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    scheduler, rates = make(optimizer), []
    for _ in range(count):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


# --- plateaus


def random_plateau(rng: random.Random) -> tuple[dict[str, Any], list[float]]:
    """Arguments that the two share, and what they monitor; the values are float32 numbers."""
    options = {
        "mode": rng.choice(["min", "max"]),
        "factor": rng.choice([0.1, 0.5, 0.9, rng.uniform(0.05, 0.95)]),
        "patience": rng.choice([0, 0, 1, 2, 4]),
        "threshold": rng.choice([0.0, 1e-4, 0.05, rng.uniform(0, 0.5)]),
        "threshold_mode": rng.choice(["rel", "abs"]),
        "cooldown": rng.choice([0, 0, 1, 3]),
        "eps": rng.choice([0.0, 1e-8, 0.03]),
    }
    levels = [rng.uniform(-1, 3) for _ in range(5)]  # so that values come again
    fall = rng.choice([0.0, 0.1, -0.1])
    values = [rng.choice([rng.choice(levels), rng.gauss(1 - fall * epoch, 0.3)]) for epoch in range(16)]
    for epoch in range(len(values)):
        if rng.random() < 0.04:
            values[epoch] = rng.choice([float("nan"), float("inf"), -float("inf")])
    return options, [float(np.float32(value)) for value in values]


def test_plateaus_are_torchs():
    rng, reductions, floors = random.Random(0), 0, 0
    for sequence in range(SEQUENCES):
        options, values = random_plateau(rng)
        floor = rng.choice([0.0, 0.0, 0.02, 0.2])
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LEARNING_RATE)
        scheduler = SCHEDULERS.ReduceLROnPlateau(optimizer, min_lr=floor, **options)
        expected = []
        for value in values:
            scheduler.step(value)
            expected.append(optimizer.param_groups[0]["lr"])
        callback: Any = ant.callbacks.reduce_on_plateau("value", min_value=floor, **options)
        state, actual = with_memory(callback), []
        for epoch, value in enumerate(values):
            state, logs = callback.on_epoch_end(epoch, None, state, {"value": np.float32(value)})
            assert logs["learning_rate"] is state.hyperparams["learning_rate"]
            actual.append(float(logs["learning_rate"]))
        np.testing.assert_allclose(actual, expected, rtol=1e-5, err_msg=f"{sequence}: {options}, {floor}, {values}")
        memory = state.callback_states[callback.name]
        assert float(memory["best"]) == scheduler.best
        assert [int(memory["wait"]), int(memory["cooldown"])] == [scheduler.num_bad_epochs, scheduler.cooldown_counter]
        reductions += len(set(expected)) - 1
        floors += expected[-1] == floor
    assert reductions > SEQUENCES and floors > SEQUENCES / 10  # the sequences are not idle


# --- schedules


def constant(rng: random.Random) -> Any:
    factor = rng.uniform(0.1, 1)
    return (
        lambda optimizer: SCHEDULERS.ConstantLR(optimizer, factor=factor, total_iters=7),
        optax.piecewise_constant_schedule(factor * LEARNING_RATE, {7: 1 / factor}),
    )


def of_a_function(rng: random.Random) -> Any:
    decay = rng.uniform(0, 1)
    return (
        lambda optimizer: SCHEDULERS.LambdaLR(optimizer, lambda count: 1 / (1 + decay * count)),
        lambda count: LEARNING_RATE / (1 + decay * count),
    )


def steps(rng: random.Random) -> Any:
    size, gamma = rng.randint(1, 9), rng.uniform(0.1, 0.99)
    return (
        lambda optimizer: SCHEDULERS.StepLR(optimizer, size, gamma),
        optax.exponential_decay(LEARNING_RATE, size, gamma, staircase=True),
    )


def milestones(rng: random.Random) -> Any:
    places, gamma = sorted(rng.sample(range(1, 20), 3)), rng.uniform(0.1, 0.99)
    return (
        lambda optimizer: SCHEDULERS.MultiStepLR(optimizer, places, gamma),
        optax.piecewise_constant_schedule(LEARNING_RATE, dict.fromkeys(places, gamma)),
    )


def exponential(rng: random.Random) -> Any:
    gamma = rng.uniform(0.5, 0.99)
    return (
        lambda optimizer: SCHEDULERS.ExponentialLR(optimizer, gamma),
        optax.exponential_decay(LEARNING_RATE, 1, gamma),
    )


def cosine(rng: random.Random) -> Any:
    floor = rng.uniform(0, 0.1)
    return (
        lambda optimizer: SCHEDULERS.CosineAnnealingLR(optimizer, COUNT, floor),
        optax.cosine_decay_schedule(LEARNING_RATE, COUNT, floor / LEARNING_RATE),
    )


def linear(rng: random.Random) -> Any:
    first, last, length = rng.uniform(0.1, 1), rng.uniform(0, 1), rng.randint(1, 25)
    return (
        lambda optimizer: SCHEDULERS.LinearLR(optimizer, first, last, length),
        optax.linear_schedule(first * LEARNING_RATE, last * LEARNING_RATE, length),
    )


def polynomial(rng: random.Random) -> Any:
    power, length = rng.uniform(0.5, 3), rng.randint(1, 25)
    return (
        lambda optimizer: SCHEDULERS.PolynomialLR(optimizer, length, power),
        optax.polynomial_schedule(LEARNING_RATE, 0.0, power, length),
    )


def one_cycle(rng: random.Random) -> Any:
    """torch counts the updates of the cycle and optax the steps between them; the peak must be at one of them."""
    peak = rng.randint(2, COUNT - 3)
    start, end = rng.uniform(5, 30), rng.uniform(10, 1e4)
    return (
        lambda optimizer: SCHEDULERS.OneCycleLR(
            optimizer, LEARNING_RATE, COUNT, pct_start=(peak + 1) / COUNT, div_factor=start, final_div_factor=end
        ),
        optax.cosine_onecycle_schedule(COUNT - 1, LEARNING_RATE, (peak + 0.5) / (COUNT - 1), start, end),
    )


COUNT = 20
KINDS = [constant, of_a_function, steps, milestones, exponential, cosine, linear, polynomial, one_cycle]


@pytest.mark.parametrize("per", ["step", "epoch"])
def test_schedules_are_torchs(per):
    rng = random.Random(1)
    for sequence, kind in zip(range(SEQUENCES // 2), itertools.cycle(KINDS), strict=False):
        make, schedule = kind(rng)
        expected = torch_rates(make, COUNT)
        callback: Any = ant.callbacks.learning_rate_schedule(schedule, per=per)
        state = with_memory(callback)

        def rate_at(count: Any, callback: Any = callback, state: Any = state) -> Any:
            if per == "epoch":
                after, _ = callback.on_epoch_begin(count, None, state, {})
            else:
                counted = state.with_callback_state(callback.name, {"count": count})
                after, _, _ = callback.on_before_update(0, None, counted, None, {})
            return after.hyperparams["learning_rate"]

        counts = range(COUNT)
        actual = list(map(rate_at, counts)) if per == "epoch" else jax.vmap(rate_at)(jnp.arange(COUNT))
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7, err_msg=f"{sequence}: {kind.__name__}")
