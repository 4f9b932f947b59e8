"""Callbacks made of callbacks: run more rarely, on a condition, as one, or without harm when they fail."""

import io
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_bit_equal, batches, data, host, numbers, trainer

import ant_jax as ant
from ant_jax._hooks.callback import HOOKS, hooks_of


library = ant.callbacks

Call = tuple[str, Any]

BATCH = ("on_batch_begin", "on_batch_end")
EPOCH = ("on_epoch_begin", "on_epoch_end")
EVALUATE = ("on_evaluate_begin", "on_evaluate_end")
RUN = ("on_train_begin", "on_train_end")


def recorder(calls: list[Call], *hooks: str, name: str = "recorder", every: int | None = 1) -> ant.Callback:
    """A host callback that notes when each of its hooks is called: with the batch, the epoch, or nothing."""

    def recording(hook: str) -> Any:
        def function(*arguments: Any) -> Any:
            calls.append((hook.removeprefix("on_"), arguments[0] if HOOKS[hook].lead else None))
            return arguments[-2:]

        return function

    return host(name, every=every, **{hook: recording(hook) for hook in hooks})


def fitted(*callbacks: ant.Callback, count: int = 5, epochs: int = 1, val: bool = False, **options: Any) -> Any:
    a_trainer = trainer(*callbacks, **{"fuse": False, **options})
    return a_trainer.fit(a_trainer.init(batches()[0]), batches(count), epochs, batches(1) if val else None)


def publishing(name: str, hook: str = "on_batch_end", value: float = 1.0, **options: Any) -> ant.Callback:
    """A traced callback that publishes ``value * (batch_idx + 1)``."""

    def publish(batch_idx: Any, trainer: Any, state: Any, *rest: Any) -> Any:
        logs = {**rest[-1], name: value * (jnp.asarray(batch_idx, jnp.float32) + 1)}
        return state, *rest[:-1], logs

    hooks: dict[str, Any] = {hook: publish}
    return ant.Callback(name=name, traced=True, **options, **hooks)


def windows(seen: dict[str, Any]) -> ant.Callback:
    """Keeps what the logs of every batch of the last epoch were."""

    def look(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        seen.update({name: values.tolist() for name, values in logs.window.items()})
        return state, logs

    return host("windows", every=1000, on_batch_end=look)


# --- every


def test_a_host_callback_looks_at_every_so_many_batches_as_if_made_so():
    made: list[Call] = []
    wrapped: list[Call] = []
    fitted(
        recorder(made, *BATCH, *EPOCH, name="made", every=2),
        library.every(recorder(wrapped, *BATCH, *EPOCH, name="wrapped", every=None), batches=2),
        epochs=2,
    )
    assert made == wrapped
    ends = [batch for hook, batch in wrapped if hook == "batch_end"]
    assert ends == [1, 3, 4] * 2 and ("epoch_end", 1) in wrapped


def test_every_so_many_epochs_only_those_of_the_run_come_always():
    calls: list[Call] = []
    callback = recorder(calls, *BATCH, *EPOCH, *EVALUATE, *RUN, "on_checkpoint")
    fitted(library.every(callback, epochs=3), count=1, epochs=7, val=True)
    of_an_epoch = [("batch_begin", 0), ("batch_end", 0), ("evaluate_begin", None), ("evaluate_end", None)]
    expected: list[Call] = [("train_begin", None)]
    for epoch in (2, 5):
        expected += [("epoch_begin", epoch), *of_an_epoch, ("epoch_end", epoch), ("checkpoint", None)]
    assert calls == [*expected, ("train_end", None)]


def test_batches_and_epochs_together():
    calls: list[Call] = []
    callback = recorder(calls, "on_batch_end", "on_epoch_end", "on_checkpoint")
    fitted(library.every(callback, batches=2, epochs=2), count=3, epochs=4)
    of_an_epoch = [("batch_end", 1), ("checkpoint", None), ("batch_end", 2)]
    assert calls == [call for epoch in (1, 3) for call in [*of_an_epoch, ("epoch_end", epoch), ("checkpoint", None)]]


def test_traced_hooks_run_at_the_last_of_so_many_batches_and_their_means_are_of_those():
    def double(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        return state, jax.tree.map(lambda grad: 3 * grad, grads), logs

    seen: dict[str, Any] = {}
    a_trainer = trainer(
        library.every(publishing("begin", "on_batch_begin"), batches=3),
        library.every(publishing("end"), batches=3),
        library.every(publishing("backward", "on_backward_end"), batches=2),
        library.every(publishing("update", "on_before_update"), batches=2),
        library.every(publishing("apply", "on_before_apply"), batches=2),
        library.every(host("double", on_backward_end=double), batches=2),
        publishing("always"),
        windows(seen),
    )
    start, loader = a_trainer.init(batches()[0]), batches(7) + batches(1, batch=2)
    state, history = a_trainer.fit(start, loader, 1)
    places = {"begin": [0, 3, 6], "end": [2, 5], "backward": [1, 3, 5, 7]}
    places |= {"update": places["backward"], "apply": places["backward"], "always": list(range(8))}
    examples = np.array([8] * 7 + [2])
    for name, there in places.items():
        expected = [float(i + 1) if i in there else np.nan for i in range(8)]
        np.testing.assert_array_equal(seen[name], expected, err_msg=name)
        mean = np.average(np.add(there, 1), weights=examples[there])
        np.testing.assert_allclose(history[0][f"train_{name}"], mean, rtol=1e-6, err_msg=name)
    expected = start
    for i, batch in enumerate(loader):
        grads, _ = a_trainer.grad_step(expected, batch)
        rate = 0.1 * (3 if i % 2 else 1)
        expected = expected.replace(params=jax.tree.map(lambda p, g, r=rate: p - r * g, expected.params, grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, expected.params)


def test_with_accumulation_hooks_of_updates_run_where_both_close():
    seen: dict[str, Any] = {}
    callbacks = [
        library.every(publishing("rare", "on_before_update"), batches=3),
        publishing("each", "on_before_update"),
        windows(seen),
    ]
    _, history = fitted(*callbacks, count=6, gradient_accumulation_steps=2)
    assert np.isfinite(seen["each"]).tolist() == [False, True] * 3
    assert np.isfinite(seen["rare"]).tolist() == [False] * 5 + [True]
    assert history[0]["train_rare"] == 6 and history[0]["train_each"] == 4


def test_a_traced_callbacks_epoch_hooks_are_left_out_with_their_memory():
    state, _ = fitted(library.every(library.swa(0), epochs=2), library.swa(0, name="each"), count=1, epochs=5)
    assert int(state.callback_states["swa"]["count"]) == 2
    assert int(state.callback_states["each"]["count"]) == 5


EVERY: Any = library.every  # the tests give them what type checkers would refuse
WHEN: Any = library.when
CHAIN: Any = library.chain
TOLERATE: Any = library.tolerate
NO_COUNTS: list[Any] = [0, -1, 1.5, True, "2", float("nan")]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EVERY(3, batches=2), TypeError, "is not an ant_jax.Callback but 3"),
        (lambda: EVERY(library.gradient_norm), TypeError, "; call the factory"),
        (lambda: EVERY(library.gradient_norm()), ValueError, "every: give batches=, epochs= or both"),
        (lambda: EVERY(library.swa(0), batches=2), ValueError, "'swa' has no hook of batches; give epochs= alone"),
        (lambda: EVERY(library.ema(), epochs=2), ValueError, "on_before_apply of callback 'ema' runs in compiled code"),
        (
            lambda: EVERY(library.swa(0, evaluate=True), epochs=2),
            ValueError,
            "on_evaluate_begin of callback 'swa' runs in compiled code, where the epoch is not known; give batches=",
        ),
        (lambda: EVERY(host("none"), batches=2), ValueError, "every: callback 'none' has no hooks"),
        (lambda: WHEN(True, library.ema()), TypeError, "when: predicate must be a function of (state, logs), got True"),
        (lambda: WHEN(lambda state, logs: True, None), TypeError, "is not an ant_jax.Callback but None"),
        (lambda: WHEN(lambda state, logs: True, host("none")), ValueError, "when: callback 'none' has no hooks"),
        (lambda: CHAIN(), ValueError, "chain: give it callbacks"),
        (lambda: CHAIN(library.ema(), library.ema()), ValueError, "two callbacks are named 'ema'"),
        (lambda: CHAIN(library.ema(), 3), TypeError, "callbacks[1] is not an ant_jax.Callback but 3"),
        (
            lambda: CHAIN(library.ema(), recorder([], *BATCH, every=2), library.centralize()),
            ValueError,
            "chain: callbacks of one chain run at the same places and as often; got 'ema': traced=True, every=1, "
            "'recorder': traced=False, every=2",
        ),
        (lambda: TOLERATE(None), TypeError, "is not an ant_jax.Callback but None"),
        (lambda: TOLERATE(host("none")), ValueError, "tolerate: callback 'none' has no hooks"),
        (lambda: TOLERATE(library.ema()), ValueError, "tolerate: callback 'ema' has hooks inside the step"),
        (lambda: TOLERATE(library.gradient_norm()), ValueError, "'grad_norm' has hooks inside the step"),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize("bad", NO_COUNTS)
def test_refuses_what_is_no_count(bad):
    for unit in ("batches", "epochs"):
        with pytest.raises(ValueError) as caught:
            EVERY(library.log_progress(), **{unit: bad})
        assert str(caught.value) == f"every: {unit} must be a whole number of {unit}, at least 1, or None, got {bad!r}"
    with pytest.raises(ValueError) as caught:
        TOLERATE(library.log_progress(), failures=bad)
    assert str(caught.value) == f"tolerate: failures must be a whole number of failures, at least 1, got {bad!r}"


# --- when


def test_a_host_callback_runs_where_the_condition_holds():
    calls: list[Call] = []
    odd = library.when(lambda state, logs: state.epoch % 2 == 1, recorder(calls, *EPOCH, "on_batch_end"))
    fitted(odd, count=1, epochs=4)
    of_an_epoch = ("epoch_begin", "batch_end", "epoch_end")
    assert calls == [(hook, 0 if hook == "batch_end" else epoch) for epoch in (1, 3) for hook in of_an_epoch]
    calls.clear()
    low = library.when(lambda state, logs: logs["loss"] < 0, recorder(calls, "on_batch_end"))  # an array, read
    fitted(low, library.when(lambda state, logs: np.bool_(True), recorder(calls, "on_epoch_end", name="always")))
    assert calls == [("epoch_end", 0)]


def test_a_traced_hook_that_is_left_out_costs_its_effect_and_nothing_more(compilations):
    def early(state: Any, logs: Any) -> Any:
        return state.step < 3

    seen: dict[str, Any] = {}
    a_trainer = trainer(
        library.when(early, publishing("update", "on_before_update")),
        library.when(early, library.from_optax(optax.trace(0.9), name="momentum")),
        library.when(lambda state, logs: logs["loss"] > 1e9, library.zero_nans()),
        library.when(lambda state, logs: False, publishing("never")),
        library.when(lambda state, logs: True, publishing("constant", value=2.0)),
        windows(seen),
        fuse=False,
    )
    loader, start = batches(5), a_trainer.init(batches()[0])
    first, _ = a_trainer.fit(start, loader[:3], 1)
    compilations.reset()
    state, history = a_trainer.fit(start, loader, 1)
    assert compilations.count == 0
    assert np.any(first.callback_states["momentum"].trace["kernel"] != 0)
    assert_bit_equal(state, first, "callback_states")  # as the third batch left it
    bare = trainer(fuse=False)
    after, _ = bare.fit(bare.init(loader[0], params=first.params), loader[3:], 1)
    for name, leaf in after.params.items():  # the last two batches are those of a run without
        np.testing.assert_allclose(leaf, state.params[name], rtol=1e-5, atol=1e-6)
    assert np.isnan(seen["update"]).tolist() == [False] * 3 + [True] * 2
    assert history[0]["train_update"] == 2 and history[0]["train_constant"] == 6 and "train_never" not in history[0]


def test_what_cannot_stop_does_not_make_the_host_ask():
    def rarely(state: Any, logs: Any) -> Any:
        return state.step % 2 == 0

    def may_stop(*callbacks: ant.Callback) -> bool:
        a_trainer = trainer(*callbacks)
        a_trainer.train_step(a_trainer.init(batches()[0]), batches()[0])
        (program,) = set(a_trainer._programs._train.values())
        return program.may_stop

    quiet = (library.ema(), library.gradient_statistics(), library.clip_by_value(1.0), library.zero_nans())
    assert not may_stop(*(library.when(rarely, callback) for callback in quiet))
    assert not may_stop(library.every(library.chain(*quiet), batches=2))
    assert may_stop(library.when(rarely, library.stop_at(0.0, "loss", per="batch")))


def test_what_can_stop_stops_where_the_condition_holds():
    state, _ = fitted(
        library.when(lambda state, logs: state.step > 2, library.stop_at(1e9, "loss", per="batch")), fuse=True
    )
    assert int(state.step) == 3 and state.stop
    skip = library.skip_nonfinite()  # its wish to skip passes the branch, too
    bad = batches(4)
    for batch in bad[:2]:
        batch[0][:] = np.nan
    a_trainer = trainer(library.when(lambda state, logs: state.step != 1, skip), fuse=False)
    state, history = a_trainer.fit(a_trainer.init(bad[0]), [bad[0], bad[2]], 1)
    assert np.isfinite(state.params["kernel"]).all() and history[0]["train_step_skipped"] == 0.5
    state, _ = a_trainer.fit(a_trainer.init(bad[0]), bad, 1)
    assert np.isnan(state.params["kernel"]).all()


def test_two_conditions_may_publish_one_log():
    seen: dict[str, Any] = {}
    low = library.when(lambda state, logs: state.step < 3, publishing("x", "on_backward_end"))
    high = library.when(lambda state, logs: state.step >= 3, library.chain(publishing("x", "on_backward_end", 10.0)))
    _, history = fitted(low, high, windows(seen))
    assert seen["x"] == [1, 2, 3, 40, 50] and history[0]["train_x"] == pytest.approx(96 / 5)
    rare = library.every(publishing("x", "on_backward_end"), batches=2)
    over, always = publishing("over"), publishing("x", "on_before_update", 10.0)
    _, history = fitted(rare, library.chain(always, name="always"), over, windows(seen))
    assert seen["x"] == [10, 20, 30, 40, 50] and history[0]["train_x"] == 30


def test_a_predicate_that_cannot_be_traced_is_explained():
    for predicate, message in (
        (lambda state, logs: state.epoch < 3, "state.epoch is a host field"),
        (lambda state, logs: "yes" if state.step < 3 else "no", "Attempted boolean conversion"),
    ):
        a_trainer = trainer(library.when(predicate, library.ema()))
        with pytest.raises(Exception, match=message) as caught:
            a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 1)
        assert any("callback 'ema'" in note for note in caught.value.__notes__)


# --- chain


def test_a_chain_is_its_callbacks_in_a_row_bit_for_bit():
    def members() -> list[ant.Callback]:
        return [
            library.centralize(),
            library.gradient_noise(0.01),
            library.clip_by_global_norm(ant.Hyperparam(0.5)),
            # The memory of the one before is there when its own is made.
            library.learning_rate_schedule(lambda update: 0.5 / (1 + update), hyperparam="max_norm"),
            library.gradient_norm(),
            library.ema(0.9, evaluate=True),
            library.swa(1),
            library.stop_at(-1.0, "train_loss"),
        ]

    options = {"gradient_accumulation_steps": 2, "epochs": 3, "val": True}
    row, history = fitted(*members(), **options)
    first = library.chain(*members()[:4], name="first")
    chained, same = fitted(library.chain(first, *members()[4:], name="all"), **options)
    assert_bit_equal(chained, row, "step", "params", "opt_state")
    assert history == same
    memories = dict(chained.callback_states["all"])
    memories |= memories.pop("first")
    assert memories.keys() == row.callback_states.keys()
    for a, b in zip(jax.tree.leaves(memories), jax.tree.leaves(row.callback_states), strict=True):
        np.testing.assert_array_equal(numbers(a), numbers(b))


def counting(name: str, by: int = 1, seen: list[Any] | None = None) -> ant.Callback:
    """A host callback that counts batches in its memory."""

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        if seen is not None:
            seen.append(dict(state.callback_states))
        return state.with_callback_state(name, state.callback_states[name] + by), {**logs, name: 1.0}

    return host(name, init=lambda state: 0, on_batch_end=on_batch_end)


def test_a_members_name_hides_that_of_a_callback_outside_and_of_the_chain():
    seen: list[Any] = []
    state, _ = fitted(
        counting("a"),
        library.chain(counting("a", 10), counting("b", 100, seen), name="chained"),
        library.chain(counting("itself", 1000), name="itself"),
        counting("b", 5),
    )
    assert state.callback_states == {
        "a": 5,
        "chained": {"a": 50, "b": 500},
        "itself": {"itself": 5000},
        "b": 25,
    }
    assert seen[1]["a"] == 20 and seen[1]["b"] == 100  # its own, and those of the members before it


def test_members_without_memories_make_a_chain_without_one():
    state, _ = fitted(library.chain(library.gradient_norm(), publishing("x")), count=1)
    assert state.callback_states == {}


def test_errors_in_a_chain_name_the_member():
    def boom(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        raise RuntimeError("boom")

    def wrong(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        return state

    for function, error in ((boom, RuntimeError), (wrong, ant.CallbackReturnError)):
        chain = library.chain(counting("fine"), host("member", on_epoch_end=function))
        with pytest.raises(error) as caught:
            fitted(chain, count=1)
        notes = caught.value.__notes__
        assert "in on_epoch_end of callback 'member'" in notes
        assert "in on_epoch_end of callback 'chain' (epoch 0)" in notes

    def misshapen(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        return state, {**grads, "bias": jnp.zeros(7)}, logs

    with pytest.raises(ant.CallbackReturnError, match=r"bias: expected float32\[3\], got float32\[7\]") as caught:
        fitted(library.chain(library.centralize(), host("member", on_backward_end=misshapen)), count=1)
    assert "in on_backward_end of callback 'member'" in caught.value.__notes__


def test_a_chain_of_host_callbacks_looks_as_often_and_has_every_hook():
    calls: list[Call] = []
    members = [recorder(calls, *(hook for hook in HOOKS if not HOOKS[hook].tree), name=name, every=2) for name in "ab"]
    chain = library.chain(*members)
    assert chain.every == 2 and not chain.traced
    fitted(chain, count=3, val=True)
    assert calls[::2] == calls[1::2]
    assert [batch for hook, batch in calls[::2] if hook == "batch_end"] == [1, 2]
    assert {hook for hook, _ in calls} == {hook.removeprefix("on_") for hook in hooks_of(members[0])} - {"exception"}


# --- tolerate


def failing(when: Any, hook: str = "on_epoch_end", **hooks: Any) -> ant.Callback:
    """A host callback whose hook changes the state and then fails where ``when(lead)``."""

    def function(*arguments: Any) -> Any:
        *_, state, logs = arguments
        state = state.with_callback_state("failing", state.callback_states["failing"] + 1)
        if when(arguments[0]):
            raise OSError("the server is down")
        return state, {**logs, "sent": 1.0}

    return host("failing", init=lambda state: 0, **{hook: function}, **hooks)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_failure_is_said_and_changes_nothing(caplog):
    tolerated = library.tolerate(failing(lambda epoch: epoch in (1, 3)), failures=3)
    with caplog.at_level(logging.WARNING, "ant_jax"):
        state, history = fitted(tolerated, count=1, epochs=5)
    assert messages(caplog) == [
        f"callback 'failing' failed in on_epoch_end (failure {n} of 3; the run goes on): OSError: the server is down"
        for n in (1, 2)
    ]
    assert state.callback_states["failing"] == 3
    assert ["sent" in logs for logs in history] == [True, False, True, False, True]


def test_after_so_many_it_is_given_up_on_and_a_new_run_tries_again(caplog):
    calls: list[Call] = []
    inner = recorder(calls, "on_train_begin", "on_batch_end", "on_train_end", name="failing")
    rest: dict[str, Any] = {hook: function for hook, function in hooks_of(inner).items() if hook != "on_batch_end"}

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        calls.append(("batch_end", batch_idx))
        raise OSError("down")

    a_trainer = trainer(library.tolerate(host("failing", on_batch_end=on_batch_end, **rest), failures=2), fuse=False)
    start = a_trainer.init(batches()[0])
    for _ in range(2):
        calls.clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ant_jax"):
            a_trainer.fit(start, batches(5), 1)
        assert [text.split("(")[1].split(")")[0] for text in messages(caplog)] == [
            "failure 1 of 2; the run goes on",
            "failure 2 of 2; it is not called any more",
        ]
        # What it has open it can close.
        assert calls == [("train_begin", None), ("batch_end", 0), ("batch_end", 1), ("train_end", None)]


def test_what_it_returns_wrongly_is_a_failure_and_what_ends_the_process_is_none(caplog):
    def wrong(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        return None

    with caplog.at_level(logging.WARNING, "ant_jax"):
        fitted(library.tolerate(host("wrong", on_epoch_end=wrong), failures=1), count=1, epochs=3)
    assert len(messages(caplog)) == 1 and "on_epoch_end returned None instead of state, logs" in messages(caplog)[0]

    def interrupt(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(library.tolerate(host("interrupt", on_batch_end=interrupt)))


def test_after_an_exception_it_is_told_and_may_fail_at_that(caplog):
    calls: list[Call] = []

    def boom(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        raise RuntimeError("boom")

    def told(exception: BaseException, trainer: Any, state: Any, logs: Any) -> Any:
        calls.append(("exception", type(exception)))
        raise OSError("down")

    with caplog.at_level(logging.WARNING, "ant_jax"), pytest.raises(RuntimeError, match="boom") as caught:
        fitted(library.tolerate(host("told", on_exception=told)), host("boom", on_epoch_end=boom), count=1)
    assert calls == [("exception", RuntimeError)]
    assert len(messages(caplog)) == 1 and not any("failed too" in note for note in caught.value.__notes__)


# --- all together


def test_combinators_of_combinators(caplog):
    calls: list[Call] = []
    rare = library.tolerate(library.every(failing(lambda batch: batch == 1, "on_batch_end"), batches=2), failures=5)
    inner = library.chain(library.clip_by_value(1e-3), publishing("x", "on_before_update"))
    both = library.every(library.when(lambda state, logs: state.step >= 2, inner), batches=2)
    pair = library.chain(recorder(calls, *EPOCH, name="one"), recorder(calls, *EPOCH, name="two"), name="pair")
    odd = library.when(lambda state, logs: state.epoch % 2 == 1, library.every(pair, epochs=3))
    seen: dict[str, Any] = {}
    with caplog.at_level(logging.WARNING, "ant_jax"):
        state, history = fitted(rare, both, odd, windows(seen), count=6, epochs=7)
    assert [hook for hook, epoch in calls] == ["epoch_begin"] * 2 + ["epoch_end"] * 2
    assert {epoch for _, epoch in calls} == {5}  # the last of three, and odd
    assert np.isfinite(seen["x"]).tolist() == [False, True] * 3
    assert history[0]["train_x"] == 5 and history[1]["train_x"] == 4  # batches 3 and 5 of the first epoch
    assert len(messages(caplog)) == 5
    assert state.callback_states["failing"] == 2 * 4  # batches 3 and 5 of the epochs before the fifth failure


@pytest.mark.parametrize(
    "member",
    [lambda: library.gradient_noise(0.01), lambda: library.batch_size_schedule({0: 4}, per="batch")],
    ids=["memory on the device", "memory on the host"],
)
def test_a_checkpoint_in_a_chain_holds_the_memory_of_the_chain(member, tmp_path):
    loader = ant.ArrayLoader(data(24), 8)

    def made() -> ant.Trainer:
        return trainer(library.chain(member(), library.checkpoint(tmp_path)))

    state, _ = made().fit(made().init(batches()[0]), loader, 2)
    restored = made().restore(tmp_path)
    assert_bit_equal(restored, state)
    assert restored.callback_states["chain"].keys() == state.callback_states["chain"].keys()


def test_what_misses_the_beginning_of_the_run_begins_later(tmp_path, capsys):
    late = lambda state, logs: state.epoch >= 1  # noqa: E731
    lines = io.StringIO()
    callbacks = [library.time_limit(60.0), library.progress_bar(file=lines), library.checkpoint(tmp_path)]
    state, history = fitted(*(library.when(late, callback) for callback in callbacks), epochs=3)
    assert len(history) == 3 and not state.stop
    assert state.callback_states["time_limit"]["seconds"] < 60
    assert "val" not in lines.getvalue() and lines.getvalue()
    assert len(list(tmp_path.glob("step_*"))) == 3


def test_what_is_open_is_closed_though_the_condition_no_longer_holds(tmp_path):
    early = library.when(lambda state, logs: state.epoch < 1, library.checkpoint(tmp_path))
    fitted(early, epochs=3)
    trainer().checkpointer(tmp_path).close()  # nobody holds it


@pytest.mark.parametrize("logs", [{"loss": 1.0}, {"loss": np.float32(1)}, {"loss": jnp.float32(1)}])
def test_by_hand_hooks_take_any_mapping_and_any_number(logs):
    def doubling(batch_idx: Any, trainer: Any, state: Any, logs: Any) -> Any:
        return state, {**logs, "doubled": 2 * logs["loss"]}

    def inner(name: str) -> ant.Callback:
        return ant.Callback(name=name, traced=True, on_batch_end=doubling)

    state = trainer().init(batches()[0])
    makers: list[Any] = [
        lambda: library.every(inner("a"), batches=2),
        lambda: library.when(lambda state, logs: logs["loss"] > 0, inner("b")),
        lambda: library.chain(inner("c"), inner("d")),
        lambda: library.chain(library.every(inner("e"), batches=2), inner("f")),
    ]
    for make in makers:
        for whole in (int, np.int64, jnp.int32):
            _, after = make().on_batch_end(whole(3), None, state, logs)
            assert float(after["doubled"]) == 2


def test_when_leaves_out_no_hook_in_which_a_callback_closes_what_it_has_open():
    def boom(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        raise RuntimeError("boom")

    called: list[str] = []
    hooks: dict[str, Any] = {
        name: lambda *arguments, name=name: (called.append(name), arguments[-2:])[1]
        for name in ("on_train_begin", "on_epoch_end", "on_train_end", "on_exception")
    }
    never = library.when(lambda state, logs: False, host("noted", **hooks))
    fitted(never, count=1)
    assert called == ["on_train_end"]
    called.clear()
    with pytest.raises(RuntimeError, match="boom"):
        fitted(never, host("boom", on_epoch_end=boom), count=1)
    assert called == ["on_exception"]
