"""Training under `jax_debug_nans`: no alarm in a sound run, and in another one the place of the first NaN."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ant_jax as ant


library = ant.callbacks
MODEL = (lambda key, x: ({"w": jnp.ones(3)}, {}), lambda p, s, x, key: (jnp.log(x @ p["w"]), s))
GOOD, BAD = ((np.full((4, 3), value, np.float32), np.ones(4, np.float32)) for value in (1, -1))


def make(*callbacks: ant.Callback, **options: Any) -> ant.Trainer:
    settings: dict[str, Any] = {"optimizer": optax.sgd(0.01), "progress_bar": False, **options}
    return ant.Trainer(MODEL, criterion=optax.l2_loss, callbacks=callbacks, **settings)


SOUND: dict[str, tuple[list[ant.Callback], dict[str, Any]]] = {
    "nothing": ([], {}),
    "every": ([library.every(library.gradient_norm(), batches=2)], {}),
    "never": ([library.every(library.gradient_statistics(), batches=9)], {}),
    "when": ([library.when(lambda state, logs: state.step > 2, library.gradient_norm())], {}),
    "accumulation": ([library.gradient_statistics(per_layer=False)], {"gradient_accumulation_steps": 2}),
    "guards": ([library.skip_nonfinite(), library.roll_back(every=2), library.terminate_on_nan()], {}),
    "float16": ([library.gradient_statistics(per_layer=False)], {"precision": "float16"}),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_run_raises_no_alarm(name, tmp_path):
    callbacks, options = SOUND[name]
    fuse = name not in ("when", "guards")
    readers = [library.csv_log(tmp_path / "log.csv", every=3), library.log_progress(2, printer=str)]
    with jax.debug_nans(True):
        a_trainer = make(*callbacks, *readers, fuse=fuse, **options)
        state, history = a_trainer.fit(a_trainer.init(GOOD), [GOOD] * 5, 2, [GOOD])
        a_trainer.train_step(state, GOOD)
    assert len(history) == 2


def test_what_waits_for_a_better_value_raises_no_alarm():
    waiting = [
        library.early_stopping(restore_best=True),
        library.early_stopping("train_loss", mode="max", name="max"),
        library.reduce_on_plateau(mode="max"),
    ]
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.01)
    with jax.debug_nans(True), jax.debug_infs(True):
        a_trainer = make(*waiting, optimizer=optimizer)
        _, history = a_trainer.fit(a_trainer.init(GOOD), [GOOD] * 2, 2, [GOOD])
    assert len(history) == 2


def test_what_is_published_of_gradients_that_overflow_float16_is_absent():
    # Gradients of 40 times the scale of the loss, 2**15, are too large; at the fourth step the scale is small enough.
    model = (lambda key, x: ({"w": jnp.zeros(())}, {}), lambda p, s, x, key: (x * p["w"], s))
    batch = np.full(4, 8, np.float32), np.full(4, -5, np.float32)
    windows: list[Any] = []

    def see(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        windows.append(logs.window)
        return state, logs

    with jax.debug_nans(True), jax.debug_infs(True):
        a_trainer = ant.Trainer(
            model,
            optax.sgd(0.0),
            optax.l2_loss,
            callbacks=[library.gradient_norm(), ant.Callback(name="see", every=9, on_batch_end=see)],
            precision="float16",
            progress_bar=False,
        )
        _, history = a_trainer.fit(a_trainer.init(batch), [batch] * 9, 1)
    skipped = int(round(9 * history[0]["train_step_skipped"]))
    assert 0 < skipped < 9
    assert history[0]["train_grad_norm"] == 40
    (window,) = windows
    np.testing.assert_array_equal(window["grad_norm"], [np.nan] * skipped + [40] * (9 - skipped))
    assert window.mean("grad_norm") == 40


@pytest.mark.parametrize("before", [False, True], ids=["", "compiled before"])
@pytest.mark.parametrize("fuse", [True, False])
def test_a_nan_has_its_step_its_operation_and_the_state_before_it(fuse, before):
    a_trainer = make(library.every(library.gradient_norm(), batches=2), fuse=fuse)
    start = a_trainer.init(GOOD)
    good, _ = a_trainer.fit(start, [GOOD] * 5, 1) if before else make(fuse=fuse).fit(start, [GOOD] * 5, 1)
    expected, _ = make(fuse=fuse).fit(good, [GOOD] * 3, 2)
    with jax.debug_nans(True), pytest.raises(FloatingPointError) as caught:
        a_trainer.fit(good, [*[GOOD] * 3, BAD, GOOD], 2)
    assert "encountered in log, at batch 3 of epoch 1 (step 8)" in str(caught.value)
    state: ant.TrainState = caught.value.train_state  # pyright: ignore[reportAttributeAccessIssue]
    assert (state.epoch, state.batch_idx, int(state.step)) == (1, 3, 8)
    np.testing.assert_array_equal(state.params["w"], expected.params["w"])


def test_an_infinity_is_found_where_jax_is_to_look_for_it():
    a_trainer = make()
    state, _ = a_trainer.fit(a_trainer.init(GOOD), [GOOD], 1)
    with jax.debug_infs(True), pytest.raises(FloatingPointError, match=r"log, at batch 1 of epoch 1") as caught:
        a_trainer.fit(state, [GOOD, (0 * GOOD[0], GOOD[1])], 2)
    assert hasattr(caught.value, "train_state")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_nan_in_a_step_by_hand_has_its_step_and_the_state_before_it(accumulation):
    a_trainer = make(gradient_accumulation_steps=accumulation)
    state = a_trainer.init(GOOD)
    with jax.debug_nans(True):
        state, _ = a_trainer.train_step(state, GOOD)
        with pytest.raises(ant.NonFiniteError, match="encountered in log, at step 1 by hand") as caught:
            a_trainer.train_step(state, BAD)
    assert caught.value.train_state is state  # pyright: ignore[reportAttributeAccessIssue]


def test_a_nan_in_the_evaluation_has_its_batch():
    a_trainer = make()
    state = a_trainer.init(GOOD)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="batch 1 of val_loader") as caught:
        a_trainer.fit(state, [GOOD], 1, [GOOD, BAD])
    assert hasattr(caught.value, "train_state")
