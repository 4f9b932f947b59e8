import jax
import jax.numpy as jnp
import optax
import pytest
from problems import adam, batches, trainer

import ant_jax as ant


@pytest.fixture(scope="module")
def a_trainer():
    return trainer(ant.callbacks.ema(), optimizer=adam(), max_grad_norm=1.0)


def test_a_state_says_where_it_is_and_what_it_has(a_trainer):
    state = a_trainer.init(batches()[0])
    assert repr(state).splitlines() == [
        "TrainState(step=0, epoch=0, batch_idx=0)",
        "parameters: 15",
        "  bias: float32[3] (3)",
        "  kernel: float32[4,3] (12)",
        "bytes: 245 B (params 60 B, opt_state 124 B, callback_states 61 B)",
        "memories of callbacks: ema",
    ]
    state, _ = a_trainer.fit(state, batches(), 2)
    assert repr(state.request_stop()).startswith("TrainState(step=10, epoch=2, batch_idx=0, stop requested)\n")


def test_a_state_of_many_parameters_fits_on_a_screen():
    def init(key, inputs):
        return {f"layer_{i:03}": jnp.zeros((2, 3)) for i in range(200)}, {}

    state = trainer(model=(init, lambda params, state, inputs, key: (inputs, state))).init(batches()[0])
    lines = repr(state).splitlines()
    assert len(lines) < 30
    assert lines[1] == "parameters: 1,200"
    assert lines[-3:-1] == ["  and 180 more (1,080)", "bytes: 4.7 KiB (params 4.7 KiB)"]


def test_a_state_without_numbers_has_a_summary_too(a_trainer):
    state = a_trainer.init(batches()[0])
    seen = []
    jax.jit(lambda state: seen.append(repr(state)))(state)
    assert ", in compiled code)" in seen[0].splitlines()[0]
    copied = jax.tree.map(lambda leaf: jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf, state)
    for leaf in jax.tree.leaves(copied):
        if isinstance(leaf, jax.Array):
            leaf.delete()
    assert repr(copied).startswith("TrainState(step=?, epoch=0, batch_idx=0)\nparameters: 15\n")


def test_a_state_that_has_lost_its_place_has_a_summary_too(a_trainer):
    state = a_trainer.init(batches()[0])
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    for lost in (stack, jax.tree.map(lambda leaf: leaf * 0 if leaf.dtype == jnp.int32 else leaf, state)):
        assert repr(lost).startswith("TrainState(of no known epoch)\nparameters: ")
    assert repr(jax.tree.map(lambda leaf: leaf.shape, state)).startswith("TrainState(without epoch)")


def test_a_trainer_names_what_it_was_given(a_trainer):
    assert repr(a_trainer).splitlines() == [
        "Trainer(",
        "    model=(init, apply),",
        "    optimizer=GradientTransformation,",
        "    criterion=softmax_cross_entropy_with_integer_labels,",
        "    callbacks=[ema],",
        "    max_grad_norm=1.0,",
        "    progress_bar=False,",
        ")",
    ]
    big = trainer(model=(lambda key, x: ({"w": jnp.zeros((99, 99))}, {}), lambda *a: a), optimizer=optax.sgd(0.1))
    assert len(repr(big)) < 500
