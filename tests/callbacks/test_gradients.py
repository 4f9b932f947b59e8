"""Callbacks that rewrite gradients: each is optax's transformation, at the place where it belongs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import adam, assert_bit_equal, batches, standard_promotion, trainer

import ant_jax as ant
from ant_jax import Hyperparam


library = ant.callbacks

# The callback, and the transformation that is to do the same; it is given the random key that the callback begins with.
PAIRS: dict[str, tuple[ant.Callback, Callable[[Any], optax.GradientTransformation]]] = {
    "norm": (library.clip_by_global_norm(0.05), lambda key: optax.clip_by_global_norm(0.05)),
    "value": (library.clip_by_value(0.02), lambda key: optax.clip(0.02)),
    "adaptive": (library.adaptive_grad_clip(0.05, eps=0.2), lambda key: optax.adaptive_grad_clip(0.05, 0.2)),
    "noise": (library.gradient_noise(0.1, gamma=0.3), lambda key: optax.add_noise(0.1, 0.3, key)),
    "centralize": (library.centralize(), lambda key: optax.centralize()),
    "any": (library.from_optax(optax.trace(0.9), name="momentum"), lambda key: optax.trace(0.9)),
}


def chained(state: ant.TrainState, optimizer: Any, *names: str) -> optax.GradientTransformation:
    parts = [PAIRS[name][1](state.random_key(PAIRS[name][0].name)) for name in names]
    return optax.chain(*map(standard_promotion, parts), optimizer)


def stepped(a_trainer: ant.Trainer) -> ant.TrainState:
    state = a_trainer.init(batches()[0])
    for batch in batches(3):
        state, _ = a_trainer.train_step(state, batch)
    return state


@pytest.fixture(scope="module")
def plain() -> ant.TrainState:
    return stepped(trainer())


@pytest.mark.parametrize("name", PAIRS)
def test_each_is_optaxs_chain_bit_for_bit(name, plain):
    by_callback = trainer(PAIRS[name][0])
    state = stepped(by_callback)
    expected = stepped(trainer(optimizer=chained(by_callback.init(batches()[0]), optax.sgd(0.1), name)))
    assert_bit_equal(state, expected, "params")
    assert np.any(state.params["kernel"] != plain.params["kernel"])  # it does something


def test_all_in_a_row_act_on_the_mean_of_a_window():
    loader = batches(5)
    by_callback = trainer(
        *(callback for callback, _ in PAIRS.values()), optimizer=adam(), gradient_accumulation_steps=3
    )
    start = by_callback.init(loader[0])
    by_chain = trainer(optimizer=chained(start, adam(), *PAIRS), gradient_accumulation_steps=3)
    state, _ = by_callback.fit(start, loader, 2)
    expected, _ = by_chain.fit(by_chain.init(loader[0]), loader, 2)
    assert_bit_equal(state, expected, "params")
    assert int(state.callback_states["gradient_noise"].count) == 4  # updates, not batches
    # Their memories are in the state: two runs of an epoch are one of two.
    cut, _ = by_callback.fit(start, loader, 1)
    cut, _ = by_callback.fit(cut, loader, 2)
    assert_bit_equal(cut, state)


def test_a_number_in_the_state_is_the_same_number():
    numbers = trainer(library.clip_by_global_norm(0.05), library.adaptive_grad_clip(0.05, eps=0.2))
    changing = trainer(
        library.clip_by_global_norm(Hyperparam(0.05)), library.adaptive_grad_clip(Hyperparam(0.05), eps=Hyperparam(0.2))
    )
    states = [each.train_step(each.init(batches()[0]), batches()[0])[0] for each in (numbers, changing)]
    for a, b in zip(*(jax.tree.leaves(state.params) for state in states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_clipping_leaves_small_gradients_alone(plain):
    clipped = stepped(trainer(library.clip_by_global_norm(1e6), library.clip_by_value(1e6)))
    for name, leaf in clipped.params.items():
        np.testing.assert_allclose(leaf, plain.params[name], rtol=1e-5)


def test_noise_is_decided_by_seed_and_name():
    noisy = trainer(library.gradient_noise(1.0), library.gradient_noise(1.0, name="again"))

    def keys_of(seed: int) -> list[Any]:
        memories = noisy.init(batches()[0], seed=seed).callback_states
        return [tuple(jax.random.key_data(memory.rng_key).tolist()) for memory in memories.values()]

    assert keys_of(0) == keys_of(0)
    assert len({*keys_of(0), *keys_of(1)}) == 4
    # sgd(0.1): what the noise adds is a tenth of the sum of two normal variables in each of 15 places.
    start = noisy.init(batches()[0])
    state, _ = noisy.train_step(start, batches()[0])
    grads, _ = noisy.grad_step(start, batches()[0])
    noise = [np.ravel((start.params[k] - state.params[k]) / 0.1 - grads[k]) for k in grads]
    assert 0.7 < np.concatenate(noise).std() < 2.5


def products(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
    """A loss in which each parameter has a gradient of its own: the mean of one column."""
    return jnp.mean(batch @ params["w"]) + jnp.mean(batch[:, 0]) * params["b"], (model_state, {})


def columns(key: Any, inputs: Any) -> Any:
    return {"b": jnp.float32(0), "w": jnp.zeros(inputs.shape[1])}, {}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_zero_nans_cleans_the_gradient_of_every_batch(accumulate):
    """Before it could spoil the sum of a window."""
    loader = [np.full((4, 3), 1 + i, np.float32) for i in range(4)]
    loader[2][1, 2] = np.nan
    options = {"gradient_accumulation_steps": accumulate, "loss_fn": products, "criterion": None}
    a_trainer = trainer(library.zero_nans(), model=(columns, lambda *_: None), optimizer=optax.sgd(1.0), **options)
    state, _ = a_trainer.fit(a_trainer.init(loader[0]), loader, 1)
    grads = np.array([[batch.mean() if np.isfinite(batch).all() else np.nan] * 3 for batch in loader])
    grads[2] = [3, 3, 0]
    np.testing.assert_allclose(state.params["w"], -grads.sum(axis=0) / accumulate)
    np.testing.assert_allclose(state.params["b"], -10 / accumulate)
    assert not np.any(jax.tree.leaves(state.callback_states["zero_nans"].found_nan)[0])  # the last batch had none


NESTED: Any = Hyperparam(1.0)
NUMBERS: list[Any] = [float("nan"), float("inf"), True, "1", None, [1.0], Hyperparam(NESTED)]


@pytest.mark.parametrize(
    ("factory", "argument", "values", "allowed"),
    [
        (library.clip_by_global_norm, "max_norm", [0, -1.0], "a finite number above 0"),
        (library.clip_by_value, "max_value", [0, -1.0], "a finite number above 0"),
        (library.adaptive_grad_clip, "clipping", [0, -1.0], "a finite number above 0"),
        (library.adaptive_grad_clip, "eps", [0, -1.0], "a finite number above 0"),
        (library.gradient_noise, "eta", [-1e-3], "a finite number from 0 on"),
        (library.gradient_noise, "gamma", [-1e-3], "a finite number from 0 on"),
    ],
)
def test_refuses(factory, argument, values, allowed):
    for value in values + NUMBERS:
        for given in (value, Hyperparam(value)):
            with pytest.raises(ValueError) as caught:
                factory(**{argument: given})
            inner = given.value if isinstance(given, Hyperparam) else given
            assert str(caught.value) == f"{factory.__name__}: {argument} must be {allowed}, got {inner!r}"


def test_takes_any_real_number():
    for value in (1, 0.5, np.float32(0.5), np.int64(1), Hyperparam(np.float64(2))):
        library.clip_by_global_norm(value)  # pyright: ignore[reportArgumentType]


def test_refuses_what_is_no_transformation():
    for bad in (3, optax.clip, None):
        with pytest.raises(TypeError, match="from_optax: expected an optax.GradientTransformation, got "):
            library.from_optax(bad)  # pyright: ignore[reportArgumentType]
