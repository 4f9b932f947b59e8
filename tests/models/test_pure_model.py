"""Linen, nnx and pairs of functions, with dropout and batch norm in both modes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx
from problems import CLASSES, FEATURES, LINEAR, adam, batches, trainer

import ant_jax as ant


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(8)(x))
        return nn.Dense(CLASSES)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


class LinenDeterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic: bool):
        return nn.Dense(CLASSES)(nn.Dropout(0.5)(x, deterministic=deterministic))


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(FEATURES, 8, rngs=rngs), nnx.Linear(8, CLASSES, rngs=rngs)])
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.layers[1](self.dropout(nnx.relu(self.norm(self.layers[0](x)))))


@pytest.fixture(autouse=True)
def standard_promotion():
    # Flax's own layers promote dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


MODELS = {"linen": LinenNet, "nnx": lambda: NnxNet(nnx.Rngs(0))}


@pytest.mark.parametrize("kind", MODELS)
def test_dropout_and_batch_norm_in_training_and_evaluation(kind):
    model = ant.pure_functions(MODELS[kind]())
    inputs = jnp.asarray(batches()[0][0])
    params, model_state = model.init(jax.random.key(0), inputs)
    evaluated, same = model.apply(params, model_state, inputs, None)
    again, _ = model.apply(params, model_state, inputs, None)
    np.testing.assert_array_equal(evaluated, again)
    jax.tree.map(np.testing.assert_array_equal, same, model_state)
    trained = [model.apply(params, model_state, inputs, jax.random.key(i)) for i in (1, 1, 2)]
    np.testing.assert_array_equal(trained[0][0], trained[1][0])
    assert not np.array_equal(trained[0][0], trained[2][0])  # another key, another mask
    new_state = trained[0][1]
    assert jax.tree.structure(new_state) == jax.tree.structure(model_state)
    for before, after in zip(jax.tree.leaves(model_state), jax.tree.leaves(new_state), strict=True):
        assert not np.array_equal(before, after)  # mean and variance have moved


@pytest.mark.parametrize("kind", MODELS)
def test_training_moves_statistics_and_evaluation_does_not(kind):
    model = MODELS[kind]()
    a_trainer = trainer(model=model, optimizer=adam())
    start = a_trainer.init(batches()[0])
    state, history = a_trainer.fit(start, batches(), 20, batches())
    assert history[-1]["val_loss"] < history[0]["val_loss"]
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(start.model_state), jax.tree.leaves(state.model_state), strict=True)
    ]
    assert all(changed) and len(changed) == 2
    outputs = a_trainer.predict(state, batches()[0][0])
    np.testing.assert_array_equal(outputs, a_trainer.predict(state, batches()[0][0]))


def test_the_users_nnx_module_stays_as_it_is():
    model = NnxNet(nnx.Rngs(0))
    model.train()
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    a_trainer = trainer(model=model)
    a_trainer.fit(a_trainer.init(batches()[0]), batches(), 1, batches())
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert not model.dropout.deterministic


def test_a_linen_module_may_take_deterministic():
    model = ant.pure_functions(LinenDeterministic())
    inputs = jnp.ones((2, FEATURES))
    params, state = model.init(jax.random.key(0), inputs)
    evaluated, _ = model.apply(params, state, inputs, None)
    np.testing.assert_array_equal(evaluated[0], evaluated[1])
    assert not np.array_equal(model.apply(params, state, inputs, jax.random.key(0))[0], evaluated)


@pytest.mark.parametrize("bad", [3, LinenNet, (LINEAR[0],), (LINEAR[0], 3), None])
def test_anything_else_is_refused(bad):
    message = "model must be a flax.linen.Module, a flax.nnx.Module or a pair of functions"
    with pytest.raises(TypeError, match=message) as caught:
        trainer(model=bad)
    assert ("make an instance of it" in str(caught.value)) == isinstance(bad, type)


def test_all_kinds_are_trained_by_the_same_callbacks():
    callbacks: list[Any] = [
        ant.callbacks.gradient_norm(),
        ant.callbacks.clip_by_global_norm(1.0),
        ant.callbacks.ema(0.9),
    ]
    for model in (LINEAR, LinenNet(), NnxNet(nnx.Rngs(0))):
        a_trainer = trainer(*callbacks, model=model)
        _, history = a_trainer.fit(a_trainer.init(batches()[0]), batches(), 2)
        assert set(history[0]) == {"train_loss", "train_grad_norm"}
