"""What is saved comes back to the bit, in any container, and what does not fit is named."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import BATCH, adam, assert_bit_equal, batches, data, host, leaves_of, trainer

import ant_jax as ant


def remember(name: str = "remember") -> ant.Callback:
    """A host callback with a memory of every kind that can be saved."""

    def on_epoch_end(epoch: Any, trainer: Any, state: Any, logs: Any) -> Any:
        memory = {
            "seen": [*state.callback_states[name]["seen"], epoch],
            "best": float("inf"),
            "text": "é",
            "kinds": {3: (1.5, None, np.arange(3, dtype=np.int16), jnp.ones(2, jnp.bfloat16))},
        }
        return state.with_callback_state(name, memory), {**logs, "vector": np.array([0.1, 0.2], np.float32)}

    return host(name, init=lambda state: {"seen": []}, on_epoch_end=on_epoch_end)


def publish() -> ant.Callback:
    return host("publish", on_batch_end=lambda i, trainer, state, logs: (state, {**logs, "twice": 2 * logs["loss"]}))


def grab(states: list[ant.TrainState], every: int | None = 1) -> ant.Callback:
    """Keeps the state of every moment at which a run may be saved."""

    def on_checkpoint(trainer: Any, state: Any, logs: Any) -> Any:
        states.append(state)
        return state, logs

    identity = lambda i, trainer, state, logs: (state, logs)  # noqa: E731
    return host("grab", every=every, on_batch_end=identity, on_checkpoint=on_checkpoint)


OPTIONS = {
    "plain": {},
    "adam": {"optimizer": adam()},
    "accumulating": {"gradient_accumulation_steps": 3},
    "float16": {"precision": "float16", "optimizer": adam()},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_run_goes_on_from_every_moment_in_a_new_trainer_bit_for_bit(options, tmp_path):
    states: list[ant.TrainState] = []
    observers = (ant.callbacks.gradient_noise(0.01), ant.callbacks.early_stopping("train_loss"), remember(), publish())

    def new(*more: ant.Callback) -> ant.Trainer:
        return trainer(*observers, *more, **options)

    loader = ant.ArrayLoader(data(4 * BATCH + 3), BATCH)
    first = new(grab(states))
    whole, history = first.fit(first.init(batches()[0]), loader, 2, batches(1))
    assert len(states) == 10
    for place, state in enumerate(states):
        directory = tmp_path / str(place)
        first.save(directory, state)
        second = new(grab([]))
        restored = second.restore(directory)
        for old, got in zip(leaves_of(state), leaves_of(restored), strict=True):
            np.testing.assert_array_equal(old, got, strict=True)
        assert restored.host == state.host
        if place % 3 == 1 or place > 7:
            resumed, resumed_history = second.fit(restored, loader, 2, batches(1))
            assert_bit_equal(whole, resumed, "step", "params", "opt_state", "accumulator")
            assert resumed_history == history
            memory = resumed.callback_states["remember"]
            assert memory["seen"] == [0, 1]
            assert [type(item) for item in memory["kinds"][3][:2]] == [float, type(None)]


def test_restoring_compiles_nothing_anew(tmp_path, compilations):
    a_trainer = trainer(ant.callbacks.ema(0.9))
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 1)
    a_trainer.save(tmp_path, state)
    state = a_trainer.restore(tmp_path)
    a_trainer.fit(state, batches(2), 2)
    compilations.reset()
    a_trainer.fit(a_trainer.restore(tmp_path), batches(2), 2)
    assert compilations.count == 0


def test_orbax_alone_reads_the_parameters(tmp_path):
    import orbax.checkpoint as ocp

    a_trainer = trainer()
    state = a_trainer.init(batches()[0])
    a_trainer.save(tmp_path, state)
    arrays = ocp.StandardCheckpointer().restore(tmp_path / "step_0" / "arrays")
    jax.tree.map(np.testing.assert_array_equal, arrays["params"], state.params)


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


def test_newest_chosen_and_missing(tmp_path):
    a_trainer = trainer()
    states = [a_trainer.init(batches()[0])]
    for batch in batches(2):
        states.append(a_trainer.train_step(states[-1], batch)[0])
        a_trainer.save(tmp_path, states[-1])
    assert int(a_trainer.restore(tmp_path).step) == 2
    assert_bit_equal(a_trainer.restore(tmp_path, step=1), states[1])
    with pytest.raises(FileNotFoundError, match="has no checkpoint of step 7; the steps there are: 1, 2"):
        a_trainer.restore(tmp_path, step=7)
    with pytest.raises(FileNotFoundError, match="there is no directory .*nowhere"):
        a_trainer.restore(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="has checkpoints of steps 1, 2, and the state to save is at step 1"):
        a_trainer.save(tmp_path, states[1])


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
    old = trainer(ant.callbacks.ema(0.9), remember(), ant.callbacks.centralize())
    state, _ = old.fit(old.init(batches()[0]), batches(2), 1)
    old.save(tmp_path, state)
    new = trainer(remember("other"), ant.callbacks.centralize(), ant.callbacks.swa(0), ant.callbacks.clip_by_value(1.0))
    restored = new.restore(tmp_path)
    assert sorted(record.getMessage() for record in caplog.records) == [
        "restore: the checkpoint has a memory of callback 'ema', which this trainer does not have",
        "restore: the checkpoint has a memory of callback 'remember', which this trainer does not have",
        "restore: the checkpoint has no memory of callback 'other', which starts afresh",
        "restore: the checkpoint has no memory of callback 'swa', which starts afresh",
    ]
    assert_bit_equal(restored, state, "params", "opt_state")
    new.fit(restored, batches(2), 2)


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
