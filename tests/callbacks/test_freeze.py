"""Frozen parameters keep their bits; the others change as they would."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import batches, standard_promotion, trainer

import ant_jax as ant


library = ant.callbacks

PATHS = ["decoder/bias", "decoder/kernel", "encoder/bias", "encoder/kernel"]


def init(key: Any, inputs: Any) -> tuple[Any, Any]:
    first, second = jax.random.split(key)
    encoder = {"bias": jnp.full(5, -0.0), "kernel": 0.5 * jax.random.normal(first, (inputs.shape[-1], 5))}
    return {
        "decoder": {"bias": jnp.zeros(3), "kernel": 0.5 * jax.random.normal(second, (5, 3))},
        "encoder": encoder,
    }, {}


def apply(params: Any, model_state: Any, inputs: Any, key: Any) -> tuple[Any, Any]:
    for layer in ("encoder", "decoder"):
        bias = params[layer]["bias"][None]
        inputs = jnp.tanh(inputs @ params[layer]["kernel"] + jnp.broadcast_to(bias, (len(inputs), bias.shape[1])))
    return inputs, model_state


def network(*callbacks: ant.Callback, **options: Any) -> ant.Trainer:
    return trainer(*callbacks, model=(init, apply), **options)


def changed(start: ant.TrainState, state: ant.TrainState) -> list[str]:
    """The paths of the parameters that have not the same bits any more, the sign of a zero included."""
    pairs = zip(jax.tree.leaves(start.params), jax.tree.leaves(state.params), strict=True)
    return [
        path for path, (a, b) in zip(PATHS, pairs, strict=True) if np.asarray(a).tobytes() != np.asarray(b).tobytes()
    ]


@pytest.mark.parametrize(
    ("filter", "frozen"),
    [
        ("encoder/*", PATHS[2:]),
        ("*/bias", [PATHS[0], PATHS[2]]),
        ("decoder/kernel", [PATHS[1]]),
        (["encoder/bias", "decoder/k*"], [PATHS[1], PATHS[2]]),
        (lambda path: path.startswith("enc"), PATHS[2:]),
        ("*", PATHS),
    ],
    ids=["prefix", "suffix", "path", "patterns", "function", "all"],
)
def test_what_is_frozen_keeps_its_bits_and_the_rest_changes(filter, frozen):
    a_trainer = network(library.freeze(filter), optimizer=optax.sgd(0.1, momentum=0.9))
    start = a_trainer.init(batches()[0])
    state, _ = a_trainer.train_step(start, batches()[0])
    assert changed(start, state) == [path for path in PATHS if path not in frozen]


def test_neither_weight_decay_nor_momentum_moves_it():
    """Also when it is not frozen at first: what the optimizer remembers of it would push it on."""
    optimizer = standard_promotion(optax.chain(optax.trace(0.9), optax.adamw(0.05, weight_decay=0.3)))
    options: dict[str, Any] = {"optimizer": optimizer, "gradient_accumulation_steps": 2, "fuse": False}
    frozen, free = network(library.freeze("encoder/*"), **options), network(**options)
    pushed, _ = free.fit(free.init(batches()[0]), batches(4), 1)
    assert changed(free.init(batches()[0]), pushed) == PATHS
    state, _ = frozen.fit(pushed, batches(4), 3)
    assert changed(pushed, state) == PATHS[:2]
    # The others take the steps of an optimizer that has only them.
    labels = {"decoder": "train", "encoder": "freeze"}
    parts = {"train": optimizer, "freeze": optax.set_to_zero()}
    alone = network(**{**options, "optimizer": optax.partition(parts, labels)})  # pyright: ignore[reportArgumentType]
    expected, _ = alone.fit(alone.init(batches()[0], params=free.init(batches()[0]).params), batches(4), 1)
    actual, _ = frozen.fit(frozen.init(batches()[0]), batches(4), 1)
    for name, leaf in actual.params["decoder"].items():
        np.testing.assert_allclose(leaf, expected.params["decoder"][name], rtol=1e-5, atol=1e-7)


def test_listed_first_it_counts_in_no_norm_and_listed_last_it_does():
    first = network(library.freeze("encoder/*"), library.gradient_norm(), library.clip_by_global_norm(1e-3))
    last = network(library.gradient_norm(), library.clip_by_global_norm(1e-3), library.freeze("encoder/*"))
    start = first.init(batches()[0])
    grads, _ = first.grad_step(start, batches()[0])
    of_all, of_rest = optax.tree.norm(grads), optax.tree.norm(grads["decoder"])
    assert of_all > 1.2 * of_rest
    state, logs = first.train_step(start, batches()[0])
    np.testing.assert_allclose(logs["grad_norm"], of_rest, rtol=1e-6)
    moved = optax.tree.norm(optax.tree.sub(state.params, start.params))
    np.testing.assert_allclose(moved, 0.1 * 1e-3, rtol=1e-3)  # sgd(0.1), all of the norm for the decoder
    _, logs = last.train_step(last.init(batches()[0]), batches()[0])
    np.testing.assert_allclose(logs["grad_norm"], of_all, rtol=1e-6)


def test_the_sign_of_a_zero_does_not_depend_on_what_the_compiler_makes_of_adding_zero():
    callback: Any = library.freeze("encoder/bias")
    state = network().init(batches()[0])
    _, updates, _ = callback.on_before_apply(0, None, state, jax.tree.map(jnp.ones_like, state.params), {})
    frozen = np.asarray(state.params["encoder"]["bias"]) + np.asarray(updates["encoder"]["bias"])
    assert np.signbit(frozen).all()


@pytest.mark.parametrize(
    ("filter", "named"),
    [("encodr/*", "'encodr/*'"), (["encoder/*", "head/*"], "'head/*'"), (lambda path: False, "<function <lambda>")],
    ids=["pattern", "one of the patterns", "function"],
)
def test_what_matches_nothing_is_refused_with_the_paths_there_are(filter, named):
    with pytest.raises(ValueError) as caught:
        network(library.freeze(filter)).init(batches()[0])
    message = str(caught.value)
    assert message.startswith(f"freeze: {named}") and message.endswith(f"none of the parameters {', '.join(PATHS)}")


@pytest.mark.parametrize("bad", [3, None, [], [3], ["encoder/*", None], b"encoder"])
def test_refuses(bad):
    with pytest.raises(TypeError, match="freeze: filter must be a pattern, patterns, or a function of a path, got "):
        library.freeze(bad)
