"""Optimizers that ask for more than the gradients train as in a loop by hand."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from problems import apply, batches, cross_entropy, trainer

import ant_jax as ant


def loss_of(params: Any, batch: Any) -> Any:
    return cross_entropy(apply(params, {}, batch[0], None)[0], batch[1]).mean()


def by_hand(optimizer: Any, params: Any, loader: list[Any], *wanted: str) -> Any:
    """Train with optax alone, and give `update` those extra arguments."""

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        value_fn = functools.partial(loss_of, batch=batch)
        value, grad = jax.value_and_grad(value_fn)(params)
        given = {
            "value": value,
            "grad": grad,
            "value_fn": lambda params: value_fn(params),
            "grad_fn": lambda params, _: jax.grad(value_fn)(params),
            "obj_fn": value_fn,
        }
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, state = optimizer.update(grad, state, params, **{name: given[name] for name in wanted})
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for batch in loader:
        params, state = step(params, state, batch)
    return params, state


def asking(init: Any, update: Any) -> optax.GradientTransformationExtraArgs:
    """Make a transformation whose `update` has arguments of its own."""
    return optax.GradientTransformationExtraArgs(init, update)


def strict(updates: Any, state: Any, params: Any = None, *, value: Any, grad: Any) -> Any:
    return jax.tree.map(lambda u, g: -0.1 * (u + 0.5 * g) * value, updates, grad), state


adversary = optax.chain(contrib.normalize(), optax.sgd(0.05))
line = ("value", "grad", "value_fn")
OPTIMIZERS: dict[str, tuple[optax.GradientTransformation, tuple[str, ...]]] = {
    "sam": (contrib.sam(optax.sgd(0.1), adversary), ()),
    "opaque_sam": (contrib.sam(optax.sgd(0.1), adversary, opaque_mode=True), ("grad_fn",)),
    "opaque_sam_of_3": (contrib.sam(optax.sgd(0.1), adversary, sync_period=3, opaque_mode=True), ("grad_fn",)),
    "sam_in_a_chain": (
        optax.chain(optax.clip(0.1), contrib.sam(optax.sgd(0.1), adversary, opaque_mode=True)),
        ("grad_fn",),
    ),
    "lbfgs": (optax.lbfgs(), line),
    "backtracking": (optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10, store_grad=True)), line),
    "zoom_after_clipping": (optax.chain(optax.clip(0.1), optax.lbfgs()), line),
    "reduce_on_plateau": (optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau(patience=1)), ("value",)),
    "polyak": (optax.polyak_sgd(), ("value",)),
    "momo": (contrib.momo(0.1), ("value",)),
    "prodigy": (contrib.prodigy(0.1), ()),
    "sophia": (contrib.sophia(0.1, update_interval=2), ("obj_fn",)),
    "steps": (optax.MultiSteps(optax.polyak_sgd(), 2).gradient_transformation(), ("value",)),
    "injected": (optax.inject_hyperparams(optax.polyak_sgd)(scaling=0.5), ("value",)),
    "partitioned": (
        optax.partition({"a": optax.polyak_sgd(), "b": optax.sgd(0.1)}, {"kernel": "a", "bias": "b"}),
        ("value",),
    ),
    "own": (asking(lambda params: optax.EmptyState(), strict), ("value", "grad")),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_given_what_it_asks_for(name):
    optimizer, wanted = OPTIMIZERS[name]
    loader = batches(6)
    a_trainer = trainer(optimizer=optimizer)
    start = a_trainer.init(loader[0])
    params, opt_state = by_hand(optimizer, start.params, loader, *wanted)
    state, _ = a_trainer.fit(start, loader, 1)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
    jax.tree.map(close, state.params, params)
    jax.tree.map(close, state.opt_state, opt_state)


@pytest.mark.parametrize("name", ["opaque_sam", "backtracking"])
def test_a_step_by_hand_gives_the_optimizer_the_same(name):
    loader = batches(3)
    a_trainer = trainer(optimizer=OPTIMIZERS[name][0])
    state = start = a_trainer.init(loader[0])
    for batch in loader:
        state, _ = a_trainer.train_step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, a_trainer.fit(start, loader, 1)[0].params, state.params)


@pytest.mark.parametrize("name", ["opaque_sam", "sam", "reduce_on_plateau", "own"])
def test_a_transformation_of_gradients_is_given_what_it_asks_for(name):
    transformation, wanted = OPTIMIZERS[name]
    loader = batches(4)
    a_trainer = trainer(ant.callbacks.from_optax(transformation), optimizer=optax.identity())
    start = a_trainer.init(loader[0])
    params, _ = by_hand(transformation, start.params, loader, *wanted)
    state, _ = a_trainer.fit(start, loader, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), state.params, params)


def remembering() -> optax.GradientTransformationExtraArgs:
    """Remembers the value that it was given."""

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **_: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, updates), jnp.append(state, value)[1:]

    return asking(lambda params: jnp.zeros(3), update)


@pytest.mark.parametrize("place", ["optimizer", "callback", "inside"])
@pytest.mark.parametrize("mean", ["examples", "steps"])
def test_the_value_of_a_window_is_its_mean_loss(place, mean):
    sizes = (4, 4, 4, 4, 4, 4, 4, 3)  # windows of 3, 3 and 2 batches
    loader = [batches(1, size, seed)[0] for seed, size in enumerate(sizes)]
    options: dict[str, Any] = {"gradient_accumulation_steps": 3, "accumulation_mean": mean}
    callbacks = [ant.callbacks.from_optax(remembering())] if place == "callback" else []
    if place != "callback":
        options["optimizer"] = remembering() if place == "optimizer" else optax.chain(optax.clip(1.0), remembering())
    a_trainer = trainer(*callbacks, **options)
    state, _ = a_trainer.fit(a_trainer.init(loader[0]), loader, 1)
    losses = np.array([float(loss_of(state.params, batch)) for batch in loader])
    weights = np.array(sizes, float)
    expected = [
        losses[part].sum() / 3 if mean == "steps" else np.average(losses[part], weights=weights[part])
        for part in (slice(0, 3), slice(3, 6), slice(6, 8))
    ]
    seen = state.callback_states["from_optax"] if place == "callback" else state.opt_state
    np.testing.assert_allclose(seen if place != "inside" else seen[1], np.array(expected), rtol=1e-6)


def test_a_batch_that_is_skipped_is_in_no_value():
    loader = batches(6)
    spoilt = [(np.full_like(x, np.nan), t) if i == 1 else (x, t) for i, (x, t) in enumerate(loader)]
    a_trainer = trainer(ant.callbacks.skip_nonfinite(), optimizer=remembering(), gradient_accumulation_steps=2)
    state, _ = a_trainer.fit(a_trainer.init(loader[0]), spoilt, 1)
    losses = [float(loss_of(state.params, batch)) for batch in loader]
    expected = [losses[0], np.mean(losses[2:4]), np.mean(losses[4:])]
    np.testing.assert_allclose(state.opt_state, np.array(expected), rtol=1e-6)


@pytest.mark.parametrize("optimizer", [optax.lbfgs(), OPTIMIZERS["opaque_sam"][0], OPTIMIZERS["sophia"][0]])
def test_a_window_of_several_batches_has_no_loss_at_other_parameters(optimizer):
    a_trainer = trainer(optimizer=optimizer, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"evaluates the loss at other parameters .* gradient_accumulation_steps is 2"):
        a_trainer.fit(a_trainer.init(batches()[0]), batches(), 1)


def test_what_the_trainer_does_not_have_is_named():
    def update(updates: Any, state: Any, params: Any = None, *, tag: Any, **_: Any) -> Any:
        return updates, state

    optimizer = asking(lambda params: optax.EmptyState(), update)
    a_trainer = trainer(optimizer=optimizer)
    with pytest.raises(TypeError, match="tag") as error:
        a_trainer.fit(a_trainer.init(batches()[0]), batches(), 1)
    assert "value, grad, value_fn, grad_fn, obj_fn" in "".join(error.value.__notes__)


def test_values_of_a_scaled_loss_are_unscaled_and_drawn_with_the_key_of_the_batch():
    def noisy(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
        noise = 0 if key is None else jax.random.normal(key, (len(inputs), 3), inputs.dtype)
        return apply(params, {}, inputs, None)[0] + noise, model_state

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, grad: Any, value_fn: Any, grad_fn: Any):
        again = grad_fn(params)
        differences = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), grad, again)
        return updates, jnp.stack([value, value_fn(params), jax.tree.reduce(jnp.maximum, differences)])

    optimizer = optax.chain(asking(lambda params: jnp.zeros(3), update), optax.sgd(0.1))
    for precision in ("float32", "float16"):
        a_trainer = trainer(model=(trainer().model[0], noisy), optimizer=optimizer, precision=precision)
        state, history = a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 1)
        value, again, difference = np.asarray(state.opt_state[0])
        assert value == history[0]["train_loss"]
        np.testing.assert_allclose(again, value, rtol=1e-6)
        assert difference < 1e-6
