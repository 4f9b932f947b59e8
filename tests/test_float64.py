"""Training in float64, where `jax_enable_x64` is set."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import BATCH, LINEAR, batches, data, host
from test_conformance import CASES, adam, offline

import ant_jax as ant


__all__ = ["offline"]  # a fixture

GROUPS = 9


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def wide(batch: Any) -> Any:
    return batch[0].astype(np.float64), batch[1]


LOADER = [wide(batch) for batch in batches(5)]


def cross_entropy(outputs: Any, targets: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)


def make(*callbacks: ant.Callback, **options: Any) -> ant.Trainer:
    settings = {"optimizer": adam, "criterion": cross_entropy, "progress_bar": False}
    return ant.Trainer(LINEAR, **{**settings, "callbacks": callbacks, **options})


@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.usefixtures("offline")
def test_every_callback_trains_evaluates_and_goes_on(group, tmp_path: pathlib.Path):
    # Of one name, or with an average that is evaluated, no two are in a group.
    callbacks = [CASES[name].make(tmp_path) for name in list(CASES)[group::GROUPS]]
    a_trainer = make(*callbacks)
    inputs, targets = data(5 * BATCH + 3)
    loader = ant.ArrayLoader((inputs.astype(np.float64), targets), BATCH)
    state = a_trainer.init(LOADER[0])
    state, _ = a_trainer.fit(state, loader, 1, LOADER[:2])
    a_trainer.save(tmp_path / "saved", state)
    state, history = a_trainer.fit(a_trainer.restore(tmp_path / "saved"), loader, 2, LOADER[:2])
    assert len(history) == 2 or state.stop
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float64")}
    assert np.isfinite(history[-1]["train_loss"]) and np.isfinite(history[-1]["val_loss"])


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a launch a step": {"fuse": False},
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipped": {"max_grad_norm": 0.1},
    "bfloat16": {"precision": "bfloat16"},
    "float16": {"precision": "float16"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_whatever_the_options(name, tmp_path):
    rare = ant.callbacks.every(ant.callbacks.gradient_statistics(per_layer=False), batches=2)
    a_trainer = make(rare, metrics={"accuracy": ant.metrics.accuracy}, **OPTIONS[name])
    state = a_trainer.init(LOADER[0])
    state, history = a_trainer.fit(state, LOADER, 2, LOADER[:2])
    outputs = a_trainer.predict(state, LOADER[0][0])
    state, logs = a_trainer.train_step(state, LOADER[0])
    grads, _ = a_trainer.grad_step(state, LOADER[0])
    metrics = a_trainer.evaluate(state, LOADER)
    assert 0 < metrics["val_accuracy"] <= 1 and np.isfinite(history[1]["train_grad_norm"])
    if "float" not in name:
        found = {outputs.dtype, logs["loss"].dtype, grads["kernel"].dtype, state.params["kernel"].dtype}
        assert found == {jnp.dtype("float64")}


def test_a_mean_keeps_its_precision():
    value = 0.7 + 1e-12
    publish = host("publish", on_batch_end=lambda i, t, state, logs: (state, {**logs, "mine": logs["loss"]}))
    logs = {"low": jnp.float32, "whole": jnp.int64, "vector": lambda x: jnp.full(2, x)}

    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        loss = value + 0 * params["kernel"].sum()
        return loss, (model_state, {name: make(loss) for name, make in logs.items()})

    a_trainer = make(publish, criterion=None, loss_fn=loss_fn)
    state, history = a_trainer.fit(a_trainer.init(LOADER[0]), LOADER, 1, LOADER[:3])
    for name in ("train_loss", "train_mine", "val_loss"):
        assert abs(history[0][name] - value) < 1e-15
    np.testing.assert_allclose(history[0]["train_vector"], value, rtol=1e-15)
    assert history[0]["train_low"] == np.float32(value) and history[0]["train_whole"] == 0


def test_an_improvement_that_float32_does_not_hold_is_one():
    publish = host("mine", on_epoch_end=lambda epoch, t, state, logs: (state, {**logs, "mine": 1 - 1e-12 * epoch}))
    a_trainer = make(publish, ant.callbacks.early_stopping("mine", patience=1))
    state, history = a_trainer.fit(a_trainer.init(LOADER[0]), LOADER, 4)
    assert len(history) == 4 and state.callback_states["early_stopping"]["best"] == 1 - 3e-12
