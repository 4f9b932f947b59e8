"""Launches: how many, what they compile, what they copy, and that the host does not wait for them."""

import threading
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from problems import (
    BATCH,
    LINEAR,
    adam,
    apply,
    assert_bit_equal,
    batches,
    cross_entropy,
    data,
    host,
    leaves_of,
    trainer,
)

import ant_jax as ant
from ant_jax._engine import buffers as _live, chunks, programs as _engine
from ant_jax._engine.programs import TrainProgram


class Conv(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Conv(2, (2,))(x[..., None]).reshape(len(x), -1))


def look(every: int | None, name: str = "look") -> ant.Callback:
    return host(name, every=every, on_batch_end=lambda batch_idx, trainer, state, logs: (state, logs))


STANDARD = {
    "none": [],
    "clip_by_global_norm": [ant.callbacks.clip_by_global_norm(1.0)],
    "from_optax": [ant.callbacks.from_optax(optax.add_noise(0.1, 0.5, jax.random.key(0)))],
    "gradient_norm": [ant.callbacks.gradient_norm()],
    "early_stopping": [ant.callbacks.early_stopping()],
    "ema": [ant.callbacks.ema()],
    "log_progress": [ant.callbacks.log_progress(2, printer=lambda line: None)],
    "progress_bar": [ant.callbacks.progress_bar()],
}


@pytest.mark.parametrize("name", STANDARD)
@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, {"fuse": False}], ids=["", "acc", "unfused"]
)
def test_nothing_compiles_after_the_first_epoch(name, options, compilations):
    arrays = data(6 * BATCH + 3)
    loader, val_loader = ant.ArrayLoader(arrays, BATCH), ant.ArrayLoader(arrays, BATCH)
    late: list[int] = []

    def note(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        if epoch == 1:
            compilations.reset()
        late.append(compilations.count if epoch else 0)
        return state, logs

    with jax.numpy_dtype_promotion("standard"):
        a_trainer = trainer(*STANDARD[name], host("note", on_epoch_begin=note), **options)
        state = a_trainer.init(next(iter(loader)))
        state, _ = a_trainer.fit(state, loader, 4, val_loader)
        assert late == [0, 0, 0, 0]
        state, _ = a_trainer.fit(state, loader, 6, val_loader)  # nor does another fit compile anything
        assert compilations.count == 0


@pytest.fixture
def launches(monkeypatch) -> list[int]:
    """The number of steps of every launch, with the pace set so high that it bounds none of them."""
    counts: list[int] = []
    launch = TrainProgram.launch

    def counted(self: TrainProgram, live: Any, cursor: Any, count: int) -> Any:
        counts.append(count)
        return launch(self, live, cursor, count)

    monkeypatch.setattr(TrainProgram, "launch", counted)
    monkeypatch.setattr(_engine.LaunchSizer, "launched", lambda self, steps, log: None)
    monkeypatch.setattr(_engine.LaunchSizer, "__init__", lambda self, step_bytes: setattr(self, "steps", 10**6))
    return counts


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere every chunk is transferred beforehand")
@pytest.mark.parametrize(
    ("every", "fuse", "place"), [(1, True, jax.Array), (100, True, np.ndarray), (1, False, np.ndarray)]
)
def test_on_a_cpu_only_chunks_of_many_launches_are_transferred_beforehand(monkeypatch, every, fuse, place):
    places: set[Any] = set()
    launch = TrainProgram.launch

    def seen(self: TrainProgram, live: Any, cursor: Any, count: int) -> Any:
        places.update(map(type, jax.tree.leaves(cursor.chunk.batches)))
        return launch(self, live, cursor, count)

    monkeypatch.setattr(TrainProgram, "launch", seen)
    a_trainer = trainer(look(every), fuse=fuse)
    a_trainer.fit(a_trainer.init(batches()[0]), ant.ArrayLoader(data(200 * BATCH), BATCH), 1)
    assert len(places) == 1 and issubclass(places.pop(), place)


def test_launches_reach_to_the_next_look(launches):
    a_trainer = trainer(look(100), look(150, "other"), ant.callbacks.ema())
    a_trainer.fit(a_trainer.init(batches()[0]), ant.ArrayLoader(data(250 * BATCH), BATCH), 1)
    assert launches == [100, 50, 50, 50]


def test_traced_callbacks_add_no_launch(launches):
    callbacks = [ant.callbacks.gradient_norm(name=f"norm{i}") for i in range(8)]
    a_trainer = trainer(*callbacks, ant.callbacks.ema(), ant.callbacks.clip_by_global_norm(1.0))
    a_trainer.fit(a_trainer.init(batches()[0]), ant.ArrayLoader(data(200 * BATCH), BATCH), 2)
    assert launches == [200, 200]


def test_a_chunk_is_bounded_in_memory_and_chunks_share_an_epoch_evenly(launches, monkeypatch):
    monkeypatch.setattr(chunks, "MAX_CHUNK_BYTES", 40 * 4 * BATCH * 5)
    a_trainer = trainer()
    a_trainer.fit(a_trainer.init(batches()[0]), ant.ArrayLoader(data(100 * BATCH + 1), BATCH), 1)
    assert launches == [34, 34, 32, 1]


def test_the_first_launches_are_short_and_find_their_pace(monkeypatch):
    counts: list[int] = []
    launch = TrainProgram.launch
    monkeypatch.setattr(
        TrainProgram, "launch", lambda s, live, cursor, n: counts.append(n) or launch(s, live, cursor, n)
    )
    a_trainer = trainer()
    a_trainer.fit(a_trainer.init(batches()[0]), ant.ArrayLoader(data(200 * BATCH), BATCH), 1)
    assert counts[0] == 1
    assert all(after <= 2 * before for before, after in zip(counts, counts[1:], strict=False))
    assert sum(counts) == 200


@pytest.mark.parametrize("callbacks", [[], [look(1)], [look(3), ant.callbacks.ema()]], ids=["none", "every=1", "ema"])
def test_the_state_that_is_passed_in_stays_readable(callbacks):
    a_trainer = trainer(*callbacks, optimizer=adam())
    state = a_trainer.init(batches()[0])
    before = leaves_of(state)
    first, _ = a_trainer.fit(state, batches(), 2)
    between = leaves_of(first)
    a_trainer.fit(first, batches(), 3)
    for old, new in zip(before + between, leaves_of(state) + leaves_of(first), strict=True):
        np.testing.assert_array_equal(old, new)


def test_whatever_a_host_hook_keeps_stays_as_it_was():
    kept: list[tuple[Any, Any, Any, Any]] = []

    def keep(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        views = jax.tree.map(np.asarray, state.params)
        kept.append((state, state.params["kernel"], views, jax.tree.map(np.array, state.params)))
        return state, logs

    best = host(
        "best",
        init=lambda state: None or {"params": state.params},
        on_batch_end=lambda batch_idx, trainer, state, logs: (
            state.with_callback_state("best", {"params": state.params}) if batch_idx == 1 else state, logs,
        ),
    )  # fmt: skip
    a_trainer = trainer(host("keep", on_batch_end=keep), best)
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(6), 1)
    assert len({float(copy["kernel"][0, 0]) for *_, copy in kept}) == 6
    for a_state, kernel, views, copy in kept:
        np.testing.assert_array_equal(a_state.params["kernel"], copy["kernel"])
        np.testing.assert_array_equal(kernel, copy["kernel"])
        np.testing.assert_array_equal(views["kernel"], copy["kernel"])
    np.testing.assert_array_equal(state.callback_states["best"]["params"]["kernel"], kept[1][-1]["kernel"])


def test_a_run_whose_callbacks_keep_nothing_copies_nothing(monkeypatch):
    copied: list[int] = []
    copy = _live._copied
    monkeypatch.setattr(_live, "_copied", lambda leaf: copied.append(leaf.size) or copy(leaf))
    a_trainer = trainer(look(1), ant.callbacks.gradient_norm(), optimizer=adam())
    state = a_trainer.init(batches()[0])
    a_trainer.fit(state, batches(10), 3, batches(1))
    # The caller's own, before the first launch.
    assert len(copied) == len(jax.tree.leaves((state.step, state.params, state.opt_state)))


@pytest.mark.parametrize("fuse", [True, False])
def test_a_state_that_the_caller_does_not_keep_is_overwritten_in_place(monkeypatch, fuse):
    copied: list[int] = []
    monkeypatch.setattr(_live, "_copied", lambda leaf: copied.append(leaf.size))
    a_trainer = trainer(look(1), optimizer=adam(), fuse=fuse)
    states = [a_trainer.init(batches()[0])]
    arrays = [weakref.ref(leaf) for leaf in jax.tree.leaves(states[0].params)]
    state, _ = a_trainer.fit(states.pop(), batches(), 2, batches(1))
    assert not copied and all(array() is None for array in arrays)
    states = [state]
    del state
    a_trainer.fit(state=states.pop(), train_loader=batches(), num_epochs=3)
    assert not copied


def test_a_resumed_run_keeps_neither_the_state_that_it_was_given_nor_the_one_it_read(tmp_path, monkeypatch):
    copied: list[int] = []
    a_trainer = trainer(look(1), optimizer=adam())
    a_trainer.save(tmp_path, a_trainer.fit(a_trainer.init(batches()[0]), batches(), 1)[0])
    monkeypatch.setattr(_live, "_copied", lambda leaf: copied.append(leaf.size))
    states = [a_trainer.init(batches()[0])]
    arrays = [weakref.ref(leaf) for leaf in jax.tree.leaves(states[0].params)]
    a_trainer.fit(states.pop(), batches(), 2, resume=tmp_path)
    assert not copied and all(array() is None for array in arrays)


def test_a_state_begins_with_the_arrays_that_a_model_has_and_not_with_copies():
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
    a_trainer = trainer(model=(lambda key, inputs: (params, {}), LINEAR[1]))
    state = a_trainer.init(batches()[0])
    assert state.params["kernel"] is params["kernel"]
    state, _ = a_trainer.fit(state, batches(), 1)
    np.testing.assert_array_equal(params["kernel"], 1.0)


def test_convolutions_on_a_cpu_are_not_put_into_a_loop(monkeypatch):
    def program(model: Any, **options: Any) -> TrainProgram:
        a_trainer = trainer(model=model, **options)
        live = _live.Buffers(a_trainer.init(batches()[0]), frozenset())
        return a_trainer._programs.train(live.part(), live.key, batches()[0])

    assert program(LINEAR).fused
    assert not program(Conv()).fused
    assert program(Conv(), fuse=True).fused
    assert not program(LINEAR, fuse=False).fused
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert program(Conv()).fused


def test_an_unfused_convolution_trains_to_the_same_numbers():
    loader = batches(4) + batches(1, batch=3)
    looser, fused = trainer(look(2), model=Conv()), trainer(model=Conv(), fuse=True)
    state, history = looser.fit(looser.init(loader[0]), loader, 2, loader)
    expected, same_history = fused.fit(fused.init(loader[0]), loader, 2, loader)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, expected.params)
    assert list(history[0]) == list(same_history[0])


@jax.jit
def long_product(start: Any) -> Any:
    return jax.lax.fori_loop(0, 400, lambda i, x: jnp.tanh(x @ x), start)


class Gate:
    """A zero on the device that is not there before the gate is opened, and so is nothing that is computed from it."""

    def __init__(self) -> None:
        self._opened = threading.Event()
        pass_by = jax.jit(lambda x: jax.pure_callback(self._wait, jax.ShapeDtypeStruct((), jnp.float32), x[0, 0]))
        start = jnp.zeros((200, 200))
        self._opened.set()
        pass_by(long_product(start)).block_until_ready()  # compiles
        self._opened.clear()
        # A program with a callback runs on the calling thread, unless what it is given is not there yet.
        self.zero = pass_by(long_product(start))

    def _wait(self, zero: Any) -> Any:
        self._opened.wait(timeout=20)  # a host that waits for the device would wait for ever
        return np.asarray(zero)

    def open(self) -> None:
        self._opened.set()


@pytest.mark.parametrize("fuse", [True, False])
def test_the_host_does_not_wait_for_the_device_between_looks(fuse):
    """The host comes to all its looks while the device has yet to begin the first step."""
    ready: list[bool] = []

    def look_without_reading(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        ready.append(logs["loss"].is_ready())
        if len(ready) == 2 * 9:
            gate.open()
        return state, {**logs, "published": logs["loss"]}

    looks = [host(f"look{i}", every=4, on_batch_end=look_without_reading) for i in range(3)]
    a_trainer = trainer(*looks, ant.callbacks.gradient_norm(), fuse=fuse)
    loader = ant.ArrayLoader(data(12 * BATCH), BATCH)
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), loader, 1)  # compiles
    gate = Gate()
    next(iter(a_trainer._programs._train.values())).pace.steps = 100
    late = state.replace(params=jax.tree.map(lambda leaf: leaf + gate.zero, state.params))
    a_trainer.fit(late, loader, 2)
    assert ready[9:] == 9 * [False]


def test_randomness_is_derived_from_the_step():
    seen: list[Any] = []

    def noisy(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
        outputs, _ = apply(params, {}, inputs, None)
        return (outputs if key is None else outputs + jax.random.normal(key, outputs.shape)), model_state

    def note(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        seen.append(float(logs["loss"]))
        return state, logs

    a_trainer = trainer(host(on_batch_end=note), model=(LINEAR[0], noisy), optimizer=optax.sgd(0.0))
    start = a_trainer.init(batches()[0], seed=7)
    state, _ = a_trainer.fit(start, [batches()[0]] * 3, 1)
    assert len(set(seen)) == 3  # the same batch, other noise
    assert jax.random.key_data(state.key).tolist() == jax.random.key_data(start.key).tolist()
    for i, loss in enumerate(seen):
        key = jax.random.fold_in(start.key, i)
        inputs, targets = batches()[0]
        expected = cross_entropy(noisy(start.params, {}, inputs, key)[0], targets).mean()
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_two_runs_in_a_row_are_the_same():
    a_trainer = trainer(*[c for name in ("early_stopping", "ema", "log_progress") for c in STANDARD[name]])
    start = a_trainer.init(batches()[0])
    runs = [a_trainer.fit(start, batches(), 3, batches(1)) for _ in range(2)]
    assert_bit_equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


# --- programs are kept apart by what decides their results


def noisy(params: Any, model_state: Any, inputs: Any, key: Any) -> tuple[Any, Any]:
    outputs, model_state = apply(params, model_state, inputs, None)
    return outputs + (0.0 if key is None else jax.random.normal(key, outputs.shape)), model_state


def test_a_trainer_takes_keys_of_every_kind_in_turn():
    def last_loss(a_trainer: ant.Trainer, impl: str) -> tuple[float, float]:
        state = a_trainer.init(batches()[0]).replace(key=jax.random.key(3, impl=impl))
        _, logs = a_trainer.train_step(state, batches()[0])
        return float(logs["loss"]), a_trainer.fit(state, batches(), 1)[1][0]["train_loss"]

    used = trainer(model=(LINEAR[0], noisy))
    kinds = ("threefry2x32", "rbg", "unsafe_rbg")
    losses = {impl: last_loss(used, impl) for impl in kinds}
    assert losses == {impl: last_loss(trainer(model=(LINEAR[0], noisy)), impl) for impl in kinds}
    assert len(set(losses.values())) == 3
    assert losses == {impl: last_loss(used, impl) for impl in kinds}


def test_a_trainer_trains_with_and_without_64_bits_in_turn():
    a_trainer = trainer(metrics={"mean": lambda outputs, targets: jnp.mean(outputs.astype(float))})
    start = a_trainer.init(batches()[0])
    _, before = a_trainer.fit(start, batches(), 1, batches(1))
    with jax.enable_x64(True):
        _, inside = a_trainer.fit(start, batches(), 1, batches(1))
    _, after = a_trainer.fit(start, batches(), 1, batches(1))
    assert before == after
    for name, value in before[0].items():
        np.testing.assert_allclose(inside[0][name], value, rtol=1e-5)
