"""Numbers that are not finite: the run ends and says where the first one was, or goes on without the batch."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_bit_equal, host, trainer

import ant_jax as ant
from ant_jax._engine.launch_size import LaunchSizer


library = ant.callbacks


def init(key: Any, batch: Any) -> Any:
    return {"a": jnp.float32(1), "b": jnp.float32(2)}, {"seen": jnp.float32(0)}


def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
    """Where the second column is 0, the loss is finite and its gradient is not."""
    x, y = batch.astype(params["a"].dtype).T
    loss = jnp.mean(jnp.square(params["a"] * x)) + jnp.mean(jnp.sqrt(params["b"] * y))
    return loss.astype(jnp.float32), ({"seen": model_state["seen"] + jnp.mean(batch)}, {})


def guarded(*callbacks: ant.Callback, **options: Any) -> ant.Trainer:
    optimizer = optax.sgd(0.05, momentum=0.9)
    defaults = {"model": (init, lambda *_: None), "loss_fn": loss_fn, "criterion": None, "optimizer": optimizer}
    return trainer(*callbacks, **{**defaults, **options})


def good(count: int) -> list[np.ndarray]:
    return [np.random.default_rng(i).uniform(0.5, 1.5, (4, 2)).astype(np.float32) for i in range(count)]


def spoilt(batch: np.ndarray, column: int, value: float) -> np.ndarray:
    batch = batch.copy()
    batch[1, column] = value
    return batch


NAN, INFINITE, NO_GRADIENT = (0, float("nan")), (0, float("inf")), (1, 0.0)


@pytest.fixture(scope="module", params=[True, False], ids=["fused", "unfused"])
def terminating(request) -> ant.Trainer:
    return guarded(library.terminate_on_nan(), fuse=request.param)


@pytest.fixture(autouse=True)
def as_many_steps_a_launch_as_there_are(monkeypatch) -> None:
    monkeypatch.setattr(LaunchSizer, "steps", property(lambda pace: 10**6, lambda pace, steps: None), raising=False)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [(NAN, "the loss"), (INFINITE, "the loss"), (NO_GRADIENT, "the gradient of 'b'")],
    ids=["NaN", "infinite", "gradient"],
)
@pytest.mark.parametrize("val_loader", [None, good(1)], ids=["", "evaluated"])
def test_the_first_bad_batch_is_named_and_touches_nothing(terminating, spoil, what, val_loader):
    loader = good(8)
    spoilt_loader = [*loader[:6], spoilt(loader[6], *spoil), spoilt(loader[7], 0, float("nan"))]
    start = terminating.init(loader[0])

    def epochs() -> Iterator[np.ndarray]:
        yield from spoilt_loader

    with pytest.raises(library.NonFiniteError) as caught:
        terminating.fit(start, epochs(), 5, val_loader, steps_per_epoch=4)
    assert str(caught.value).startswith(f"{what} is not finite at batch 2 of epoch 1 (step 6); ")
    assert "in on_batch_end of callback 'terminate_on_nan' (epoch 1, batch 2)" in caught.value.__notes__
    state = caught.value.train_state  # pyright: ignore[reportAttributeAccessIssue]
    first, _ = terminating.fit(start, loader[:4], 1, val_loader)
    before, _ = terminating.fit(first, loader[4:6], 2, val_loader)
    assert_bit_equal(state, before, "params", "opt_state", "model_state")
    assert (state.epoch, state.batch_idx, int(state.step), len(state.history)) == (1, 3, 7, 1)
    # It can be looked at, and the run can go on, from the next batch.
    assert np.isfinite(terminating.evaluate(state, loader)["val_loss"])
    after, history = terminating.fit(state, good(4), 3)
    assert len(history) == 3 and int(after.step) == 7 + 1 + 4 and not after.stop


def test_a_parameter_is_named_before_what_it_spoils(terminating):
    start = terminating.init(good(1)[0])
    bad = start.replace(params={**start.params, "b": jnp.float32(-jnp.inf)})
    with pytest.raises(
        library.NonFiniteError, match=r"the parameter 'b' is not finite at batch 0 of epoch 0 \(step 0\)"
    ):
        terminating.fit(bad, good(2), 1)


@pytest.mark.parametrize(
    ("batches", "where"),
    [(2, r"at batch 1 of epoch 0 \(step 1\)"), (1, r"after the last update of epoch 0 \(step 0\)")],
)
def test_a_parameter_that_an_update_has_spoilt_is_found_also_when_no_batch_follows(batches, where):
    a_trainer = guarded(library.terminate_on_nan(), optimizer=optax.sgd(3e38), fuse=False)
    with pytest.raises(library.NonFiniteError, match=f"the parameter 'a' is not finite {where}"):
        a_trainer.fit(a_trainer.init(good(1)[0]), [10 * batch for batch in good(batches)], 1)


def test_gradients_are_looked_at_as_the_callbacks_before_left_them():
    def overflow(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        return state, {**grads, "a": grads["a"] * jnp.where(batch_idx == 1, jnp.inf, 1.0)}, logs

    before = guarded(host("overflow", on_backward_end=overflow), library.terminate_on_nan(), fuse=False)
    with pytest.raises(library.NonFiniteError, match="the gradient of 'a' is not finite at batch 1 of epoch 0"):
        before.fit(before.init(good(1)[0]), good(3), 1)
    # Cleaned gradients do not matter, a loss that is not finite does.
    cleaned = guarded(library.zero_nans(), library.terminate_on_nan(), fuse=False)
    loader = [good(1)[0], spoilt(good(1)[0], *NO_GRADIENT)]
    state, _ = cleaned.fit(cleaned.init(loader[0]), loader, 1)
    assert not state.stop
    with pytest.raises(library.NonFiniteError, match="the loss"):
        cleaned.fit(state, [spoilt(loader[0], *NAN)], 2)


def test_with_accumulation_the_open_window_closes_without_the_bad_batches():
    # It may look at every batch: the error waits for the window all the same.
    often = library.every(library.terminate_on_nan(), batches=1)
    a_trainer = guarded(often, optimizer=optax.sgd(0.1), gradient_accumulation_steps=3)
    loader = good(9)
    start = a_trainer.init(loader[0])
    bad = [*loader[:3], spoilt(loader[3], *NO_GRADIENT), spoilt(loader[4], *NAN), *loader[5:]]
    with pytest.raises(library.NonFiniteError, match=r"gradient of 'b' is not finite at batch 3 of epoch 0") as caught:
        a_trainer.fit(start, bad, 1)
    state = caught.value.train_state  # pyright: ignore[reportAttributeAccessIssue]
    assert (state.batch_idx, bool(state.window_open)) == (6, False)
    before, _ = a_trainer.fit(start, loader[:3], 1)
    grads, _ = a_trainer.grad_step(before, loader[5])
    for name, leaf in before.params.items():
        np.testing.assert_allclose(state.params[name], leaf - 0.1 * grads[name], rtol=1e-5)


@pytest.mark.parametrize(
    "callback",
    [library.terminate_on_nan(), library.skip_nonfinite(max_consecutive=1)],
    ids=lambda callback: callback.name,
)
def test_what_overflows_in_float16_is_the_loss_scales_business(callback):
    a_trainer = guarded(callback, precision="float16", fuse=False)
    state, history = a_trainer.fit(a_trainer.init(good(1)[0]), [4 * batch for batch in good(8)], 1)
    assert 0 < history[0]["train_step_skipped"] < 1 and not state.stop
    memory = state.callback_states[callback.name]
    assert [int(value) for value in memory.values()] == ([-1, -1, -1] if "step" in memory else [0, 0])

    def infinite(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        return params["a"].astype(batch.dtype) * jnp.mean(batch) + jnp.inf, (model_state, {})

    # Finite gradients of a loss that is none: nothing that a smaller scale could mend.
    a_trainer = guarded(callback, precision="float16", fuse=False, loss_fn=infinite)
    with pytest.raises(library.NonFiniteError, match="the loss is not finite at batch|1 batches in a row"):
        a_trainer.fit(a_trainer.init(good(1)[0]), good(2), 1)


# --- skip_nonfinite


@pytest.fixture(scope="module", params=[True, False], ids=["fused", "unfused"])
def skipping(request) -> ant.Trainer:
    return guarded(library.skip_nonfinite(max_consecutive=3), fuse=request.param)


def test_it_is_the_run_without_the_bad_batches(skipping, compilations):
    loader = good(6)
    start = skipping.init(loader[0])
    expected, wanted = skipping.fit(start, [loader[i] for i in (1, 3, 5)], 2)
    bad = {0: NAN, 2: NO_GRADIENT, 4: INFINITE}
    with_bad = [spoilt(batch, *bad[i]) if i in bad else batch for i, batch in enumerate(loader)]
    skipping.fit(start, with_bad, 1)
    compilations.reset()
    state, history = skipping.fit(start, with_bad, 2)
    assert compilations.count == 0
    assert_bit_equal(state, expected, "params", "opt_state", "model_state")
    assert int(state.step) == 12 and int(expected.step) == 6
    for epoch in (0, 1):
        np.testing.assert_array_equal(history[epoch]["train_loss"], wanted[epoch]["train_loss"])
        assert history[epoch]["train_step_skipped"] == 0.5 and wanted[epoch]["train_step_skipped"] == 0
    assert history.to_dict()["skipped_steps"] == [3, 6] and wanted.to_dict()["skipped_steps"] == [0, 0]
    # How many there were is part of the state that a run goes on from.
    cut, _ = skipping.fit(start, with_bad, 1)
    cut, _ = skipping.fit(cut, with_bad, 2)
    assert_bit_equal(cut, state)


def test_too_many_in_a_row_end_the_run(skipping):
    loader, bad = good(8), spoilt(good(1)[0], *NAN)
    start = skipping.init(loader[0])
    rare = [bad, bad, loader[0], bad, bad, loader[1]]
    state, history = skipping.fit(start, rare, 2)
    assert not state.stop and history[1]["skipped_steps"] == 8
    with pytest.raises(library.NonFiniteError) as caught:
        skipping.fit(start, [loader[0], bad, bad, bad, loader[1]], 1)
    assert "3 batches in a row, by batch 3 of epoch 0" in str(caught.value) and "max_consecutive=3" in str(caught.value)
    assert "in on_batch_end of callback 'skip_nonfinite' (epoch 0, batch 3)" in caught.value.__notes__
    state = caught.value.train_state  # pyright: ignore[reportAttributeAccessIssue]
    expected, _ = skipping.fit(start, [loader[0]], 1)
    assert_bit_equal(state, expected, "params", "opt_state", "model_state")
    # It can be evaluated, and fitted again: two bad ones are borne once more.
    assert np.isfinite(skipping.evaluate(state, good(1))["val_loss"])
    state, _ = skipping.fit(state, [*good(4), loader[1]], 1)
    state, _ = skipping.fit(state, rare, 2)
    assert not state.stop and int(state.callback_states["skip_nonfinite"]["skipped"]) == 3 + 4
    # The row goes on over the end of an epoch, and of a run.
    two, _ = skipping.fit(start, [loader[0], bad, bad], 1)
    with pytest.raises(library.NonFiniteError, match="3 batches in a row, by batch 0 of epoch 1"):
        skipping.fit(two, [bad, loader[0]], 2)


@pytest.mark.parametrize("mean", ["examples", "steps"])
def test_a_window_is_the_mean_of_the_batches_that_are_left(mean):
    a_trainer = guarded(
        library.skip_nonfinite(max_consecutive=3),
        optimizer=optax.sgd(0.1, momentum=0.5),
        gradient_accumulation_steps=2,
        accumulation_mean=mean,
    )
    loader, bad = good(6), spoilt(good(1)[0], *NAN)
    start = a_trainer.init(loader[0])
    windows = [[bad, loader[0]], [bad, bad], [loader[4], loader[5]]]
    state, history = a_trainer.fit(start, [batch for window in windows for batch in window], 1)
    params, momentum = start.params, jax.tree.map(jnp.zeros_like, start.params)
    for window in windows:
        there = [a_trainer.grad_step(start.replace(params=params), b)[0] for b in window if np.isfinite(b).all()]
        if there:  # a window that has lost all its batches makes no update: the momentum stays
            divisor = len(there) if mean == "examples" else 2
            momentum = jax.tree.map(lambda m, *g, n=divisor: 0.5 * m + sum(g) / n, momentum, *there)
            params = jax.tree.map(lambda p, m: p - 0.1 * m, params, momentum)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), state.params, params)
    assert history[0]["train_step_skipped"] == pytest.approx(0.5) and not state.window_open
    # Too many in a row, and then a good batch in the same window: the run does not end in silence.
    with pytest.raises(library.NonFiniteError, match="3 batches in a row, by batch 3"):
        a_trainer.fit(start, [loader[0], bad, bad, bad, loader[1], loader[2]], 1)
    with pytest.raises(library.NonFiniteError, match="3 batches in a row, by batch 3"):
        a_trainer.fit(start, [bad, bad, bad, loader[0], loader[1], loader[2]], 1)


def test_a_batch_can_be_skipped_only_where_its_gradient_is():
    def too_late(batch_idx: Any, trainer: Any, state: Any, logs: Any) -> Any:
        return state.skip_batch(), logs

    for callback in (
        host("late", on_batch_end=too_late),
        ant.Callback(name="late", traced=True, on_batch_end=too_late),
    ):
        a_trainer = guarded(callback)
        with pytest.raises(RuntimeError, match="state.skip_batch is for on_backward_end"):
            a_trainer.fit(a_trainer.init(good(1)[0]), good(1), 1)


@pytest.mark.parametrize("bad", [0, -1, 1.0, True, "3", None, float("nan")])
def test_refuses(bad):
    with pytest.raises(ValueError) as caught:
        library.skip_nonfinite(max_consecutive=bad)
    allowed = "a whole number of batches, at least 1"
    assert str(caught.value) == f"skip_nonfinite: max_consecutive must be {allowed}, got {bad!r}"


# --- going back, and what other callbacks remember


def spoiling(step: int) -> ant.Callback:
    """Makes the update of one step infinite."""

    def on_before_apply(batch_idx: Any, trainer: Any, state: Any, updates: Any, logs: Any) -> Any:
        return state, jax.tree.map(lambda leaf: jnp.where(state.step == step, jnp.inf, leaf), updates), logs

    return ant.Callback(name="spoil", on_before_apply=on_before_apply)


def leaving_out(*steps: int, name: str = "leave_out") -> ant.Callback:
    def on_backward_end(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        return state.skip_batch(when=jnp.isin(state.step, jnp.array(steps))), grads, logs

    return ant.Callback(name=name, on_backward_end=on_backward_end)


def test_a_request_to_skip_is_not_taken_back_by_a_later_callback():
    batches = good(6)
    both = guarded(leaving_out(1, 4), leaving_out(2, name="others"))
    state, history = both.fit(both.init(batches[0]), batches, 1)
    alone = guarded(leaving_out(1, 2, 4))
    expected, _ = alone.fit(alone.init(batches[0]), batches, 1)
    assert history[0]["train_step_skipped"] == 0.5
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), state.params, expected.params)


def counting() -> ant.Callback:
    """Remembers a sum that a spoilt number spoils, and in a memory of its own the number of batches."""

    def on_batch_end(batch_idx: Any, trainer: Any, state: Any, logs: Any) -> Any:
        memory = state.callback_states["sum"]
        total = memory["total"] + jnp.abs(state.params["a"])
        return state.with_callback_state("sum", {"total": total}), logs

    return ant.Callback(
        name="sum", traced=True, init=lambda state: {"total": jnp.float32(0)}, on_batch_end=on_batch_end
    )


def batch_counter() -> ant.Callback:
    def on_batch_end(batch_idx: Any, trainer: Any, state: Any, logs: Any) -> Any:
        return state.with_callback_state("batches", state.callback_states["batches"] + 1), logs

    return ant.Callback(name="batches", traced=True, init=lambda state: jnp.int32(0), on_batch_end=on_batch_end)


@pytest.mark.parametrize("order", ["before", "after", "chained", "in two chains"])
def test_averages_go_back_with_the_parameters_and_nothing_stays_spoilt(order):
    averages = [library.ema(ant.Hyperparam(0.75), evaluate=True), library.swa(0)]
    others, back = [*averages, counting(), batch_counter()], library.roll_back(every=1)
    callbacks = {
        "before": [back, *others],
        "after": [*others, back],
        "chained": [back, library.chain(*others)],
        "in two chains": [library.chain(library.chain(*others, name="inner"), name="outer"), back],
    }[order]
    batches, val = good(4), good(1)
    a_trainer = guarded(spoiling(6), *callbacks)
    state, history = a_trainer.fit(a_trainer.init(batches[0]), batches, 4, val)
    assert history.to_dict()["roll_backs"] == [0, 1, 1, 1]
    assert all(np.isfinite(history.to_dict()["val_loss"]))

    plain = guarded(leaving_out(6, 7), *others)  # neither the spoilt update nor the batch that found it
    expected, _ = plain.fit(plain.init(batches[0]), batches, 4, val)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)  # they are two programs
    jax.tree.map(close, (state.params, state.opt_state), (expected.params, expected.opt_state))
    memories = state.callback_states
    while "ema" not in memories:
        memories = memories[next(name for name in ("chain", "outer", "inner") if name in memories)]
    for name in ("ema", "swa"):
        jax.tree.map(close, memories[name]["average"], expected.callback_states[name]["average"])
    assert np.isfinite(memories["sum"]["total"])
    assert memories["batches"] == 16


def test_a_changed_number_does_not_go_back_with_its_average():
    def change(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        return (state.with_hyperparams(decay=0.25) if batch_idx == 1 else state), logs

    callbacks = [
        spoiling(2),
        library.roll_back(every=100),
        library.ema(ant.Hyperparam(0.75)),
        host(on_batch_end=change),
    ]
    a_trainer = guarded(*callbacks)
    state, history = a_trainer.fit(a_trainer.init(good(1)[0]), good(4), 1)
    assert history[0]["roll_backs"] == 1
    assert float(state.hyperparams["decay"]) == 0.25
    start = a_trainer.init(good(1)[0])
    assert_bit_equal(state, start, "params")  # kept at the first batch of all
    jax.tree.map(np.testing.assert_array_equal, state.callback_states["ema"]["average"], start.params)


def test_an_emptied_window_has_no_value_either():
    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **_: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, updates), jnp.append(state, value)[1:]

    make: Any = optax.GradientTransformationExtraArgs
    optimizer = make(lambda params: jnp.zeros(2), update)
    batches = good(4)
    spoilt_batches = [batches[0], spoilt(batches[1], *NAN), *batches[2:]]
    a_trainer = guarded(library.roll_back(every=1), optimizer=optimizer, gradient_accumulation_steps=2)
    state, _ = a_trainer.fit(a_trainer.init(batches[0]), spoilt_batches, 1)
    losses = [float(loss_fn(state.params, state.model_state, batch, None)[0]) for batch in batches]
    np.testing.assert_allclose(state.opt_state, np.array([0.0, np.mean(losses[2:])]), rtol=1e-6)


# --- roll_back

REST = ("params", "opt_state", "model_state")


@pytest.fixture(scope="module", params=[True, False], ids=["fused", "unfused"])
def rolling(request) -> ant.Trainer:
    return guarded(library.roll_back(every=3, times=2), fuse=request.param)


def as_kept(a_trainer: ant.Trainer, start: ant.TrainState, loader: list[Any], batch: int | None) -> ant.TrainState:
    """What there is to keep at a batch: the parameters before its update, the model state after its forward pass."""
    if batch is None:
        return start
    before = a_trainer.fit(start, loader[:batch], 1)[0] if batch else start
    _, (model_state, _) = loss_fn(before.params, before.model_state, loader[batch], None)
    return before.replace(model_state=model_state)


@pytest.mark.parametrize("spoil", [NAN, INFINITE, NO_GRADIENT], ids=["NaN", "infinite", "gradient"])
@pytest.mark.parametrize(
    ("bad", "kept"), [([0], None), ([1], 0), ([3], 0), ([4], 3), ([7], 6), ([3, 4], 0), ([0, 1], None)], ids=str
)
def test_it_goes_back_to_what_it_has_kept_and_on_with_what_follows(rolling, spoil, bad, kept):
    """Every third batch it keeps what is there in `on_backward_end`, unless that batch is bad itself."""
    loader = good(9)
    start = rolling.init(loader[0])
    state, history = rolling.fit(start, [spoilt(b, *spoil) if i in bad else b for i, b in enumerate(loader)], 1)
    expected = as_kept(rolling, start, loader, kept)
    expected, _ = rolling.fit(expected, loader[bad[-1] + 1 :], expected.epoch + 1)
    assert_bit_equal(state, expected, *REST)
    assert int(state.step) == 9 and not state.stop
    assert history[0]["roll_backs"] == int(state.callback_states["roll_back"]["times"]) == len(bad)
    assert history[0]["train_step_skipped"] == pytest.approx(len(bad) / 9)


def test_what_it_keeps_is_that_of_every_so_many_batches(rolling):
    loader = good(8)
    start = state = rolling.init(loader[0])
    for i, batch in enumerate(loader):
        state, _ = rolling.train_step(state, batch)
        kept = state.callback_states["roll_back"]["kept"]
        assert sorted(kept) == sorted((*REST, "memories"))
        expected = as_kept(rolling, start, loader, i - i % 3)
        for field in REST:
            there = jax.tree.leaves(kept[field]), jax.tree.leaves(getattr(expected, field))
            # By hand the forward pass is another program, which rounds in its own way.
            np.testing.assert_allclose(*there, rtol=1e-6, err_msg=f"{field} at {i}")


@pytest.mark.parametrize("what", ["params", "model_state"])
def test_it_goes_back_from_what_an_update_or_a_hook_has_spoilt(what):
    def spoil(batch_idx: Any, trainer: Any, state: Any, logs: Any) -> Any:
        spoilt = jax.tree.map(lambda leaf: jnp.where(batch_idx == 3, jnp.inf, leaf), getattr(state, what))
        return state.replace(**{what: spoilt}), logs

    callback = ant.Callback(name="spoil", traced=True, on_batch_end=spoil)
    a_trainer, loader = guarded(library.roll_back(every=1), callback), good(7)
    start = a_trainer.init(loader[0])
    state, history = a_trainer.fit(start, loader, 1)
    expected = as_kept(a_trainer, start, loader, 3)  # what batch 3 made is lost, and batch 4 counts for nothing
    expected, _ = a_trainer.fit(expected, loader[5:], 2)
    assert_bit_equal(state, expected, *REST)
    assert history[0]["roll_backs"] == 1


@pytest.mark.parametrize("mean", ["examples", "steps"])
def test_going_back_empties_the_window(mean):
    """The window in which it goes back has no more than the gradients that follow, and closes where it would have."""
    options: dict[str, Any] = {"gradient_accumulation_steps": 3, "accumulation_mean": mean}
    a_trainer = guarded(library.roll_back(every=2), optimizer=optax.sgd(0.1), **options)
    loader, steps = good(9), []
    start = a_trainer.init(loader[0])
    watch = host("watch", on_batch_end=lambda i, t, state, logs: (steps.append(state), (state, logs))[1])
    watching = guarded(library.roll_back(every=2), watch, optimizer=optax.sgd(0.1), **options)
    state, _ = watching.fit(start, [*loader[:4], spoilt(loader[4], *NO_GRADIENT), *loader[5:]], 1)
    assert [bool(step.window_open) for step in steps] == 3 * [True, True, False]
    assert float(optax.tree.norm(steps[4].accumulator.grads)) == 0 and int(steps[4].accumulator.examples) == 0
    params = start.params  # kept at step 2, in the first window; at step 4 nothing is
    for window in ([loader[5]], loader[6:]):
        grads = [a_trainer.grad_step(start.replace(params=params), batch)[0] for batch in window]
        divisor = 3 if mean == "steps" else len(window)
        params = jax.tree.map(lambda p, *g, n=divisor: p - 0.1 * sum(g) / n, params, *grads)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), state.params, params)


def test_once_too_often_ends_the_run_which_may_be_begun_again(rolling):
    loader, bad = good(4), spoilt(good(1)[0], *NAN)
    start = rolling.init(loader[0])
    state, history = rolling.fit(start, [loader[0], bad, bad], 1)
    assert history[0]["roll_backs"] == 2 and not state.stop
    with pytest.raises(library.NonFiniteError, match="by batch 1 of epoch 1, .* had gone back 2 times") as caught:
        rolling.fit(state, [loader[1], bad, loader[2]], 2)
    state = caught.value.train_state  # pyright: ignore[reportAttributeAccessIssue]
    assert (state.batch_idx, int(state.callback_states["roll_back"]["times"])) == (2, 3)
    state, _ = rolling.fit(state, [loader[1], bad, bad], 2)
    assert int(state.callback_states["roll_back"]["times"]) == 1  # it has begun to count anew
