"""Callbacks made of callbacks."""

from typing import Any

import numpy as np
import optax
import pytest
from problems import assert_bit_equal, batches, host, trainer

import ant_jax as ant


library = ant.callbacks


def fit(*callbacks: ant.Callback, epochs: int = 2, **options: Any) -> tuple[ant.TrainState, ant.History]:
    a_trainer = trainer(*callbacks, **options)
    return a_trainer.fit(a_trainer.init(batches()[0]), batches(5), epochs, batches(1))


def recorder(log: list[Any], **options: Any) -> ant.Callback:
    def note(name: str) -> Any:
        def hook(lead: Any, trainer: Any, state: Any, logs: Any) -> Any:
            log.append((name, int(lead)))
            return state, logs

        return hook

    return host("recorder", on_batch_end=note("batch"), on_epoch_end=note("epoch"), **options)


def test_every_makes_a_host_callback_look_rarely_and_in_some_epochs():
    log: list[Any] = []
    fit(library.every(recorder(log), batches=2, epochs=2), epochs=4)
    looks = [("batch", 1), ("batch", 3), ("batch", 4)]
    assert log == [*looks, ("epoch", 1), *looks, ("epoch", 3)]


def test_a_log_that_is_published_rarely_has_the_mean_of_the_batches_that_have_it():
    _, whole = fit(library.gradient_norm(), epochs=1)
    norms: list[Any] = []
    look = lambda i, trainer, state, logs: (norms.extend(logs.window["grad_norm"]), (state, logs))[1]  # noqa: E731
    _, rare = fit(library.every(library.gradient_norm(), batches=2), host("look", every=5, on_batch_end=look), epochs=1)
    assert [bool(np.isnan(norm)) for norm in norms] == [True, False, True, False, True]
    np.testing.assert_allclose(rare[0]["train_grad_norm"], np.nanmean(norms), rtol=1e-6)
    assert whole[0]["train_loss"] == rare[0]["train_loss"]


def test_when_is_decided_at_run_time_in_the_step_and_by_python_on_the_host():
    half = library.from_optax(optax.scale(0.5))
    always, _ = fit(half)
    assert_bit_equal(always, fit(library.when(lambda state, logs: state.step >= 0, half))[0])
    never, _ = fit(library.when(lambda state, logs: state.step < 0, half))
    assert_bit_equal(never, fit()[0], "params")
    log: list[Any] = []
    fit(library.when(lambda state, logs: state.epoch == 1, recorder(log, every=5)))
    assert log == [("batch", 4), ("epoch", 1)]


def test_what_is_left_out_at_run_time_does_not_make_the_host_ask_whether_to_stop():
    a_trainer = trainer(library.when(lambda state, logs: state.step < 3, library.gradient_norm()))
    state = a_trainer.init(batches()[0])
    program = a_trainer._programs.train(a_trainer._part(state), state.key, batches()[0])
    assert not program.may_stop


def test_a_chain_is_its_callbacks_in_a_row():
    noise, clip = library.gradient_noise(0.01), library.clip_by_global_norm(0.1)
    row, _ = fit(noise, clip)
    chained, _ = fit(library.chain(noise, clip))
    assert_bit_equal(row, chained, "params", "opt_state")
    assert chained.callback_states["chain"].keys() == {"gradient_noise", "clip_by_global_norm"}


def test_a_failing_member_of_a_chain_is_named():
    bad = host("bad", on_epoch_end=lambda epoch, trainer, state, logs: None)
    with pytest.raises(ant.CallbackReturnError, match="on_epoch_end returned None") as caught:
        fit(library.chain(recorder([]), bad))
    assert "in on_epoch_end of callback 'bad'" in caught.value.__notes__


def test_failures_are_borne_told_and_counted(caplog):
    calls: list[int] = []

    def fail(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        calls.append(epoch)
        raise ConnectionError("the server is down")

    state, _ = fit(library.tolerate(host("tracker", on_epoch_end=fail), failures=2), epochs=4)
    assert state.epoch == 4
    assert calls == [0, 1]
    first, second = (record.getMessage() for record in caplog.records)
    told = "callback 'tracker' failed in on_epoch_end (failure 1 of 2; the run goes on): ConnectionError: the server is"
    assert first.startswith(told)
    assert "it is not called any more" in second


def test_ctrl_c_is_no_failure():
    def interrupt(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(library.tolerate(host("tracker", on_epoch_end=interrupt)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: library.every(library.ema()), "every: give batches=, epochs= or both"),
        (lambda: library.every(library.ema(), batches=0), "every: batches must be a whole number of batches.*got 0"),
        (lambda: library.every(library.ema(), epochs=2), "of callback 'ema' runs in compiled code.*give batches="),
        (lambda: library.every(library.swa(0), batches=2), "callback 'swa' has no hook of batches"),
        (lambda: library.chain(), "chain: give it callbacks"),
        (lambda: library.chain(library.ema(), library.log_progress()), "run at the same places and as often"),
        (lambda: library.chain(library.ema(), library.ema()), "two callbacks are named 'ema'"),
        (lambda: library.tolerate(library.ema()), "callback 'ema' has hooks inside the step"),
        (lambda: library.tolerate(library.log_progress(), failures=0), "tolerate: failures must be.*got 0"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
