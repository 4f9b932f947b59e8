"""What is saved comes back in its containers, and what does not fit is named."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import adam, assert_bit_equal, batches, host, trainer

import ant_jax as ant
from ant_jax._checkpoint.snapshot import take_snapshot
from ant_jax._state.host_fields import PLAIN_FIELDS, HostFields
from ant_jax._state.train_state import DATA_FIELDS


def test_every_field_of_a_state_is_saved():
    """Whoever adds a field decides how it is saved."""
    fields = {field.name for field in dataclasses.fields(ant.TrainState)}
    inside_the_step = {"skip", "objective"}
    assert fields == {*DATA_FIELDS, "callback_states", "stop", "host", *inside_the_step}
    host_fields = set(HostFields._fields)
    assert host_fields == {*PLAIN_FIELDS, "history", "log_sums", "published", "windows", "loader", "device_names"}


CONTAINERS: dict[str, Any] = {
    "a list whose paths sort otherwise than its items": lambda kernel: [*(jnp.ones(i) for i in range(1, 13)), kernel],
    "numbers for names, and empty ones": lambda kernel: {7: (kernel, None, ()), 10: {}},
    "no elements": lambda kernel: {"kernel": kernel, "none": jnp.zeros((0, 3), jnp.bfloat16)},
}


@pytest.mark.parametrize("contain", CONTAINERS.values(), ids=CONTAINERS)
def test_parameters_come_back_in_their_containers(contain, tmp_path):
    def init(key: Any, inputs: Any) -> Any:
        return contain(jax.random.normal(key, (4, 3))), {}

    def apply(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
        return inputs @ next(leaf for leaf in jax.tree.leaves(params) if leaf.shape == (4, 3)), model_state

    a_trainer = trainer(model=(init, apply))
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 1)
    a_trainer.save(tmp_path, state)
    assert_bit_equal(trainer(model=(init, apply)).restore(tmp_path), state)


def with_random_keys(impl: str) -> ant.Trainer:
    """A trainer that keeps typed random keys wherever a state may have them."""

    def init(key: Any, inputs: Any) -> Any:
        return {"kernel": jnp.ones((4, 3))}, {"rng": jax.random.key(3, impl=impl), "many": [some(5)]}

    def apply(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
        return inputs @ params["kernel"], {**model_state, "rng": jax.random.split(model_state["rng"])[0]}

    def some(seed: int) -> Any:
        return jax.random.split(jax.random.key(seed, impl=impl), (2, 1))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, {"rng": jax.random.fold_in(state["rng"], 1)}

    def on_batch_end(batch_idx: Any, trainer: Any, state: Any, logs: Any) -> Any:
        memory = state.callback_states["traced"]
        return state.with_callback_state("traced", {"rng": jax.random.fold_in(memory["rng"], batch_idx)}), logs

    optimizer = optax.chain(
        optax.sgd(0.1), optax.GradientTransformation(lambda params: {"rng": jax.random.key(7, impl=impl)}, update)
    )
    traced = ant.Callback(
        name="traced", traced=True, init=lambda state: {"rng": some(8)[0, 0]}, on_batch_end=on_batch_end
    )
    on_host = host("host", init=lambda state: {"rng": some(9)}, on_epoch_end=lambda e, t, state, logs: (state, logs))
    return trainer(traced, on_host, model=(init, apply), optimizer=optimizer, gradient_accumulation_steps=2)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_random_keys_come_back_wherever_they_are(impl, tmp_path):
    a_trainer = with_random_keys(impl)
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(3), 1)
    a_trainer.save(tmp_path, state)
    restored = with_random_keys(impl).restore(tmp_path)
    assert_bit_equal(restored, state)
    for tree in (restored.model_state, restored.opt_state, restored.callback_states):
        keys = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
        assert {str(jax.random.key_impl(key)) for key in keys} == {impl}
    again, _ = with_random_keys(impl).fit(restored, batches(3), 2)
    assert_bit_equal(again, a_trainer.fit(state, batches(3), 2)[0])
    taken_over = a_trainer.restore_params(tmp_path, a_trainer.init(batches()[0]), model_state=True)
    assert_bit_equal(taken_over, state, "params", "model_state")


@flax.struct.dataclass
class Linear:
    """Parameters in a container of their own, as Equinox's are."""

    kernel: Any
    scales: tuple[Any, ...]


def test_other_containers_need_a_state_to_follow(tmp_path):
    def init(key: Any, inputs: Any) -> Any:
        return Linear(jax.random.normal(key, (4, 3)), (jnp.ones(()), [jnp.ones(3)])), {}

    def apply(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
        return inputs @ params.kernel * params.scales[0] * jnp.ones((len(inputs), 1)), model_state

    a_trainer = trainer(model=(init, apply))
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 1)
    a_trainer.save(tmp_path, state)
    with pytest.raises(ant.StateMismatch, match=r"restore\(directory, like=trainer.init\(example_batch\)\)"):
        a_trainer.restore(tmp_path)
    assert_bit_equal(a_trainer.restore(tmp_path, like=a_trainer.init(batches()[0], seed=3)), state)


def test_a_state_to_follow_gives_places_and_no_values(tmp_path):
    mesh = jax.make_mesh((4,), ("x",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    counting = host("count", init=lambda state: int(state.step))
    old, new = trainer(), trainer(counting)
    state = old.train_step(old.init(batches()[0]), batches()[0])[0]
    old.save(tmp_path, state)
    like = new.init(batches()[0], seed=3).replace(callback_states={"count": 100})
    like = like.replace(params=jax.device_put(like.params, everywhere))
    restored = new.restore(tmp_path, like=like)
    assert_bit_equal(restored, state, "step", "params", "opt_state")
    assert restored.params["bias"].sharding == everywhere
    assert restored.callback_states == {"count": 1}  # made for a run that begins here


MISMATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "optimizer": ({"optimizer": adam()}, "opt_state/0/count: missing, expected int32"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "accumulator/examples: missing"),
    "precision": ({"precision": "float16"}, "loss_scale/scale: missing"),
}


@pytest.mark.parametrize(("options", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_another_trainers_checkpoint_is_refused_by_path(options, message, tmp_path):
    a_trainer = trainer()
    a_trainer.save(tmp_path, a_trainer.init(batches()[0]))
    with pytest.raises(ant.StateMismatch, match=message):
        trainer(**options).restore(tmp_path)


def test_extra_leaves_and_other_memories_are_refused(tmp_path):
    a_trainer = trainer(ant.callbacks.ema(0.9), optimizer=optax.sgd(0.1, momentum=0.9))
    a_trainer.save(tmp_path, a_trainer.init(batches()[0]))
    with pytest.raises(ant.StateMismatch, match=r"opt_state/0/trace/bias: unexpected, float32\[3\]"):
        trainer(ant.callbacks.ema(0.9)).restore(tmp_path)
    other = trainer(ant.callbacks.swa(0, name="ema"), optimizer=optax.sgd(0.1, momentum=0.9))
    with pytest.raises(ant.StateMismatch, match="callback_states/ema/count: missing"):
        other.restore(tmp_path)


def test_callbacks_come_and_go_and_are_named(tmp_path, caplog):
    old = trainer(ant.callbacks.ema(0.9), host("remember", init=lambda state: 0), ant.callbacks.centralize())
    state, _ = old.fit(old.init(batches()[0]), batches(2), 1)
    old.save(tmp_path, state)
    new = trainer(
        host("other", init=lambda state: 0),
        ant.callbacks.centralize(),
        ant.callbacks.swa(0),
        ant.callbacks.clip_by_value(1.0),
    )
    restored = new.restore(tmp_path)
    assert sorted(record.getMessage() for record in caplog.records) == [
        "restore: the checkpoint has a memory of callback 'ema', which this trainer does not have",
        "restore: the checkpoint has a memory of callback 'remember', which this trainer does not have",
        "restore: the checkpoint has no memory of callback 'other', which starts afresh",
        "restore: the checkpoint has no memory of callback 'swa', which starts afresh",
    ]
    assert_bit_equal(restored, state, "params", "opt_state")
    new.fit(restored, batches(2), 2)


def test_a_memory_that_has_moved_is_refused(tmp_path):
    def on_the_device(state: Any) -> Any:
        return {"count": jnp.int32(state.step)}

    def before_update(i: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        return state, grads, logs

    inside = trainer(ant.Callback(name="it", init=on_the_device, on_before_update=before_update))
    outside = trainer(host("it", init=lambda state: {"count": 0}))
    for number, (old, new, message) in enumerate([
        (inside, outside, r"callback_states/it/count: unexpected, int32\[\]"),
        (outside, inside, r"callback_states/it/count: missing, expected int32\[\]"),
    ]):  # fmt: skip
        old.save(tmp_path / str(number), old.init(batches()[0]))
        with pytest.raises(ant.StateMismatch, match=message):
            new.restore(tmp_path / str(number))


def test_a_random_key_of_another_kind_is_refused(tmp_path):
    a_trainer = trainer()
    state = a_trainer.init(batches()[0])
    a_trainer.save(tmp_path, state.replace(key=jax.random.key(0, impl="rbg")))
    with pytest.raises(ant.StateMismatch, match="key: expected a random key of kind threefry2x32, got rbg"):
        a_trainer.restore(tmp_path)


@pytest.mark.parametrize("memory", [lambda: 0, {"file": object()}, [{1, 2}]], ids=["function", "object", "set"])
def test_a_memory_that_cannot_be_saved_is_named(memory, tmp_path):
    a_trainer = trainer(host("strange", init=lambda state: memory))
    with pytest.raises(TypeError, match="the memory of callback 'strange'.* cannot be saved"):
        a_trainer.save(tmp_path, a_trainer.init(batches()[0]))


def test_leaves_that_orbax_would_mix_up_are_refused(tmp_path):
    a_trainer = trainer(ant.callbacks.from_optax(optax.identity()))
    state = a_trainer.init(batches()[0])
    state = state.replace(params={**state.params, "a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}})
    with a_trainer.checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match="under one name, 'params.a.b'"):
            checkpointer.save(state)


def test_random_keys_are_copied_for_whoever_keeps_their_data_does_not_keep_them():
    """The trainer copies what somebody refers to before a launch overwrites it; of an alias it cannot know."""
    a_trainer = trainer(ant.callbacks.gradient_noise(0.1))
    state = a_trainer.init(batches()[0])
    arrays, _ = take_snapshot(state, frozenset({"gradient_noise"}))
    key = state.callback_states["gradient_noise"].rng_key
    before = np.array(jax.random.key_data(key))
    jax.jit(lambda key: jax.random.split(key)[0], donate_argnums=0)(key)
    assert key.is_deleted()
    np.testing.assert_array_equal(arrays["callback_states", "gradient_noise", "rng_key"], before)
