"""The order of the hooks, what they see, and that the trained numbers are those of a loop written by hand."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import BATCH, LINEAR, adam, apply, assert_bit_equal, batches, cross_entropy, data, host, trainer

import ant_jax as ant
from ant_jax import HOOKS
from ant_jax._engine.launch_size import LaunchSizer
from ant_jax._state.host_fields import CYCLE


HOST_NAMES = [name for name, hook in HOOKS.items() if not hook.tree and name != "on_exception"]


def recorder(log: list[Any], name: str = "recorder", every: int | None = 1, stop_at: Any = None, fail_at: Any = None):
    """A callback that writes down its hooks; may ask to stop, or fail, at one of them."""

    def hook(hook_name: str):
        def function(*arguments: Any) -> Any:
            *lead, _, state, logs = arguments
            event = (hook_name, *(lead if hook_name != "on_exception" else ()))
            log.append(event)
            if event == fail_at:
                raise RuntimeError("on purpose")
            return (state.request_stop() if event == stop_at else state), logs

        return function

    return host(name, every=every, **{name: hook(name) for name in [*HOST_NAMES, "on_exception"]})


LETTERS = {
    "on_train_begin": "T",
    "on_train_end": "t",
    "on_epoch_begin": "E",
    "on_epoch_end": "e",
    "on_batch_begin": "B",
    "on_batch_end": "b",
    "on_evaluate_begin": "V",
    "on_evaluate_end": "v",
    "on_checkpoint": "c",
    "on_exception": "x",
}
GRAMMAR = re.compile(r"T(E((Bbc)*Bb)?(Vv)?ec)*t")


def spelled(log: list[Any]) -> str:
    return "".join(LETTERS[event[0]] for event in log)


def run(log: list[Any], *, epochs: int = 2, **options: Any) -> tuple[ant.TrainState, ant.History]:
    a_trainer = trainer(recorder(log, **options))
    state = a_trainer.init(batches()[0])
    return a_trainer.fit(state, batches(3), epochs, val_loader=batches(1))


def test_the_order_of_all_hooks():
    log: list[Any] = []
    run(log)
    one_epoch = lambda epoch: [  # noqa: E731
        ("on_epoch_begin", epoch),
        *(("on_batch_begin", 0), ("on_batch_end", 0), ("on_checkpoint",)),
        *(("on_batch_begin", 1), ("on_batch_end", 1), ("on_checkpoint",)),
        *(("on_batch_begin", 2), ("on_batch_end", 2)),
        ("on_evaluate_begin",),
        ("on_evaluate_end",),
        ("on_epoch_end", epoch),
        ("on_checkpoint",),
    ]
    assert log == [("on_train_begin",), *one_epoch(0), *one_epoch(1), ("on_train_end",)]


def test_all_callbacks_finish_a_hook_before_the_next_begins():
    log: list[Any] = []
    first, second = recorder(log, "first"), recorder(log, "second")
    a_trainer = trainer(first, second)
    a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 1, batches(1))
    assert log[::2] == log[1::2]


EVENTS = [
    ("on_train_begin",),
    ("on_epoch_begin", 0),
    ("on_batch_begin", 1),
    ("on_batch_end", 1),
    ("on_evaluate_begin",),
    ("on_evaluate_end",),
    ("on_epoch_end", 0),
    ("on_train_end",),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event[0])
def test_after_a_request_to_stop_open_scopes_close_in_order(event):
    log: list[Any] = []
    state, history = run(log, stop_at=event)
    assert GRAMMAR.fullmatch(spelled(log)), log
    assert state.stop
    after = log[log.index(event) + 1 :]
    # Nothing new begins, but for the first batch and the evaluation of an epoch that had begun.
    begun = [name for name, *_ in after if name in ("on_epoch_begin", "on_batch_begin")]
    assert begun == (["on_batch_begin"] if event == ("on_epoch_begin", 0) else [])
    assert len(history) == (0 if event == ("on_train_begin",) else 2 if event == ("on_train_end",) else 1)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event[0])
def test_after_an_exception_comes_on_exception_and_nothing_else(event):
    log: list[Any] = []
    with pytest.raises(RuntimeError, match="on purpose") as caught:
        run(log, fail_at=event)
    assert log[-1] == ("on_exception",)
    assert log[-2] == event
    assert any(f"in {event[0]} of callback 'recorder'" in note for note in caught.value.__notes__)


def test_the_note_names_epoch_and_batch():
    with pytest.raises(RuntimeError) as caught:
        run([], fail_at=("on_batch_end", 2))
    assert caught.value.__notes__ == [
        "in on_batch_end of callback 'recorder' (epoch 0, batch 2)",
        "the state of the run as it was then is this exception's attribute train_state",
    ]
    state: Any = caught.value.train_state  # pyright: ignore[reportAttributeAccessIssue]
    three = trainer().fit(trainer().init(batches()[0]), batches(3), 1)[0]
    assert_bit_equal(state, three, "params", "step")


def test_a_failing_on_exception_hides_neither_the_error_nor_the_others():
    log: list[Any] = []

    def fail(exception: Any, trainer: Any, state: Any, logs: Any) -> Any:
        raise ValueError("second")

    def boom(epoch: Any, trainer: Any, state: Any, logs: Any) -> Any:
        raise RuntimeError("first")

    a_trainer = trainer(host("a", on_exception=fail), recorder(log, "b"), host("c", on_epoch_end=boom))
    with pytest.raises(RuntimeError, match="first") as caught:
        a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 1)
    assert ("on_exception",) in log
    assert any(
        "on_exception of callback 'a' failed too: ValueError('second')" in note for note in caught.value.__notes__
    )


@pytest.mark.parametrize("every", [1, 2, 3, 5, 100, None])
def test_windows_hold_every_batch_once_and_pair_begin_with_end(every):
    log: list[Any] = []
    seen: list[float] = []
    whole: list[float] = []

    def look(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        seen.extend(logs.window["loss"])
        np.testing.assert_array_equal(logs.window["loss"][-1], logs["loss"])
        return state, logs

    def note(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        whole.append(float(logs["loss"]))
        return state, logs

    loader = batches(7) + batches(1, batch=3)
    rare = trainer(recorder(log, every=every), host("look", every=every, on_batch_end=look))
    rare.fit(rare.init(batches()[0]), loader, 2)
    each = trainer(host("note", on_batch_end=note))
    each.fit(each.init(batches()[0]), loader, 2)
    np.testing.assert_array_equal(np.array(seen, np.float32), np.array(whole, np.float32))
    assert GRAMMAR.fullmatch(spelled(log))
    if every:
        ends = [i for name, *lead in log if name == "on_batch_end" for i in lead]
        assert ends == 2 * [i for i in range(8) if (i + 1) % every == 0 or i == 7]


@pytest.mark.parametrize(
    ("chosen", "begins", "ends"), [(range(2, 5), 2, 5), (range(5, 99), 5, 8), (range(8, 9), None, 0)]
)
@pytest.mark.parametrize("fuse", [True, False])
def test_a_range_is_one_window_an_epoch(chosen, begins, ends, fuse):
    seen: list[Any] = []

    def begin(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        seen.append(batch_idx)
        return state, logs

    def end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        seen.append((batch_idx, state.batch_idx, len(logs.window["loss"])))
        return state, logs

    a_trainer = trainer(host(every=chosen, on_batch_begin=begin, on_batch_end=end), fuse=fuse)
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(8), 2)
    assert seen == ([] if begins is None else 2 * [begins, (ends - 1, ends, ends - begins)])
    bare = trainer(fuse=fuse)
    assert_bit_equal(state, bare.fit(bare.init(batches()[0]), batches(8), 2)[0], "params")


def test_a_window_that_a_run_goes_on_in_has_what_is_left_of_it():
    seen: list[tuple[int, int]] = []
    kept: list[Any] = []

    def look(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        seen.append((batch_idx, len(logs.window["loss"])))
        return state, logs

    def keep(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        kept.append(state)
        return state, logs

    a_trainer, keeper = trainer(host(every=10, on_batch_end=look)), trainer(host(on_batch_end=keep))
    keeper.fit(keeper.init(batches()[0]), batches(25), 1)
    for done, expected in ((13, [(19, 7), (24, 5)]), (20, [(24, 5)]), (22, [(24, 3)])):
        seen.clear()
        a_trainer.fit(kept[done - 1], batches(25), 1)
        assert seen == expected


def by_hand(
    optimizer: optax.GradientTransformation, loader: Any, epochs: int, params: Any
) -> tuple[Any, Any, list[Any]]:
    """The loop that everybody writes."""

    @jax.jit
    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        def loss_of(params: Any) -> Any:
            outputs, _ = apply(params, {}, batch[0], None)
            return cross_entropy(outputs, batch[1]).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, losses = optimizer.init(params), []
    for _ in range(epochs):
        for batch in loader:
            params, opt_state, loss = step(params, opt_state, batch)
            losses.append(loss)
    return params, opt_state, losses


@pytest.mark.parametrize("make", [lambda: optax.sgd(0.1, momentum=0.9), adam], ids=["sgd", "adam"])
@pytest.mark.parametrize("fuse", [True, False])
def test_no_callbacks_is_the_loop_written_by_hand_bit_for_bit(make, fuse):
    loader = batches(6) + batches(1, batch=5)
    a_trainer = trainer(optimizer=make(), fuse=fuse)
    start = a_trainer.init(loader[0])
    state, _ = a_trainer.fit(start, loader, 3)
    params, opt_state, _ = by_hand(make(), loader, 3, start.params)
    assert_bit_equal(state, state.replace(params=params, opt_state=opt_state))


def identity(traced: bool, **options: Any) -> ant.Callback:
    hooks: dict[str, Any] = {name: lambda *arguments: arguments[-2:] for name in HOST_NAMES}
    hooks |= {name: lambda *arguments: arguments[-3:] for name, hook in HOOKS.items() if hook.tree}
    return ant.Callback(name="identity", traced=traced, **hooks, **options)


@pytest.mark.parametrize(
    "callback",
    [
        identity(traced=True),
        identity(traced=False),
        identity(traced=False, every=3),
        identity(traced=False, every=None),
    ],
    ids=["traced", "every=1", "every=3", "every=None"],
)
@pytest.mark.parametrize("fuse", [True, False])
def test_identity_callbacks_and_any_chunking_change_no_bit(callback, fuse):
    loader = batches(7) + batches(1, batch=2)
    plain, looking = trainer(optimizer=adam()), trainer(callback, optimizer=adam(), fuse=fuse)
    start = plain.init(loader[0])
    expected, history = plain.fit(start, loader, 2, loader)
    actual, same_history = looking.fit(start, loader, 2, loader)
    assert_bit_equal(actual, expected)
    assert same_history == history


def test_epoch_values_are_means_over_examples():
    loader = batches(2) + batches(1, batch=3, seed=1)

    def publish(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        return state, {**logs, "size": logs["batch_size"]}

    def publish_traced(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        return state, grads, {**logs, "twice": 2.0 * logs["loss"], "vector": jnp.full(3, logs["loss"])}

    a_trainer = trainer(
        host("host", on_batch_end=publish),
        host("traced", on_backward_end=publish_traced),
        optimizer=optax.sgd(0.0),
        metrics={"accuracy": ant.metrics.accuracy},
    )
    state = a_trainer.init(loader[0])
    _, history = a_trainer.fit(state, loader, 1, loader)
    (logs,) = history
    expected = a_trainer.evaluate(state, [tuple(np.concatenate(part) for part in zip(*loader, strict=True))])
    assert list(logs) == [
        "train_loss", "train_accuracy", "train_size", "train_twice", "train_vector", "val_loss", "val_accuracy",
    ]  # fmt: skip
    np.testing.assert_allclose(logs["train_loss"], expected["val_loss"], rtol=1e-6)
    np.testing.assert_allclose(logs["train_accuracy"], expected["val_accuracy"], rtol=1e-6)
    np.testing.assert_allclose(logs["val_loss"], expected["val_loss"], rtol=1e-6)
    np.testing.assert_allclose(logs["train_twice"], 2 * logs["train_loss"], rtol=1e-6)
    np.testing.assert_allclose(logs["train_vector"], np.full(3, logs["train_loss"]), rtol=1e-6)
    assert logs["train_size"] == (8 * 8 + 8 * 8 + 3 * 3) / 19


def test_what_opens_a_scope_publishes_is_there_when_it_closes():
    def opening(name: str):
        return lambda *arguments: (arguments[-2], {**arguments[-1], name: 1.5})

    seen: dict[str, list[str]] = {}

    def closing(name: str):
        def hook(*arguments: Any) -> Any:
            seen[name] = list(arguments[-1])
            return arguments[-2:]

        return hook

    scopes = ("train", "epoch", "batch", "evaluate")
    hooks: dict[str, Any] = {f"on_{scope}_begin": opening(f"at_{scope}") for scope in scopes}
    hooks |= {f"on_{scope}_end": closing(scope) for scope in scopes}
    a_trainer = trainer(host(**hooks))
    _, history = a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 1, batches(1))
    assert seen["batch"] == ["batch_size", "loss", "at_batch"]
    assert seen["evaluate"] == ["at_evaluate", "val_loss"]
    assert seen["epoch"] == ["at_epoch", "train_loss", "train_at_batch", "at_evaluate", "val_loss"]
    assert seen["train"] == ["at_train", *seen["epoch"]]
    assert list(history[0]) == seen["epoch"]


def test_a_later_callback_sees_what_an_earlier_one_published():
    def first(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        return state, {**logs, "lr": 0.5}

    def second(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        return state, {**logs, "half_lr": logs["lr"] / 2}

    a_trainer = trainer(host("a", on_batch_end=first), host("b", on_batch_end=second))
    _, history = a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 1)
    assert history[0]["train_half_lr"] == 0.25


def test_a_callback_that_only_begins_batches_may_publish():
    a_trainer = trainer(host(on_batch_begin=lambda b, t, state, logs: (state, {**logs, "b": b, "i": state.step})))
    _, history = a_trainer.fit(a_trainer.init(batches()[0]), batches(3), 1)
    assert (history[0]["train_b"], history[0]["train_i"]) == (1.0, 1.0)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("traced", [True, False])
def test_a_stop_inside_an_accumulation_window_lets_it_close(fuse, traced):
    def stop(batch_idx: Any, trainer: Any, state: Any, logs: Any) -> Any:
        return state.request_stop(when=batch_idx == 4), logs

    options: dict[str, Any] = {"gradient_accumulation_steps": 3, "fuse": fuse}
    a_trainer = trainer(ant.Callback(name="stop", traced=traced, on_batch_end=stop), **options)
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(20), 2)
    assert int(state.step) == 6 and not state.window_open
    six = trainer(**options)
    expected, _ = six.fit(six.init(batches()[0]), batches(20)[:6], 1)
    assert_bit_equal(state, expected, "params")


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("may_stop", [True, False], ids=["a traced one that may", "alone"])
def test_a_stop_that_a_host_callback_has_asked_for_ends_the_run_with_the_window(may_stop, fuse, monkeypatch):
    # As many steps a launch as there are.
    monkeypatch.setattr(LaunchSizer, "steps", property(lambda pace: 10**6, lambda pace, steps: None), raising=False)
    asking: list[Any] = []

    def hook_of(name: str) -> Any:
        def hook(lead: int, trainer: Any, state: Any, logs: Any) -> Any:
            return state.request_stop(when=[name, lead] == asking), logs

        return hook

    hooks: Any = {name: hook_of(name) for name in ("on_epoch_begin", "on_batch_begin", "on_batch_end")}
    never = ant.Callback(name="never", traced=True, on_batch_end=lambda b, t, s, logs: (s.request_stop(b < 0), logs))
    options: dict[str, Any] = {"gradient_accumulation_steps": 3, "fuse": fuse}
    a_trainer = trainer(host(every=4, **hooks), *([never] if may_stop else []), **options)
    start = a_trainer.init(batches()[0])
    for *place, ends in (("on_epoch_begin", 0, 3), ("on_batch_begin", 4, 6), ("on_batch_end", 3, 6)):
        asking[:] = place
        state, history = a_trainer.fit(start, batches(20), 2)
        assert (int(state.step), bool(state.window_open), len(history)) == (ends, False, 1)
        assert_bit_equal(state, a_trainer.fit(start, batches(20)[:ends], 1)[0], "params")


def test_a_stop_at_the_beginning_of_an_epoch_comes_after_its_first_batch():
    state, history = run([], stop_at=("on_epoch_begin", 1))
    assert int(state.step) == 4
    assert [list(logs) for logs in history] == 2 * [["train_loss", "val_loss"]]


@pytest.mark.parametrize("fuse", [True, False])
def test_the_loop_makes_no_implicit_transfer(fuse):
    loader = ant.ArrayLoader(data(5 * BATCH + 2), BATCH)
    callbacks = [ant.callbacks.gradient_norm(), ant.callbacks.ema(), ant.callbacks.early_stopping()]
    a_trainer = trainer(*callbacks, identity(traced=False, every=2), fuse=fuse, gradient_accumulation_steps=2)
    state = a_trainer.init(next(iter(loader)))
    with jax.transfer_guard("disallow"):
        a_trainer.fit(state, loader, 3, loader)


@dataclasses.dataclass(frozen=True)
class StopWhenSmall(ant.Callback):
    """A traced callback that asks to stop in the middle of a launch."""

    limit: int = 4
    traced: bool = True

    def on_batch_end(self, batch_idx: Any, trainer: Any, state: Any, logs: Any) -> Any:
        return state.request_stop(when=batch_idx + 1 >= self.limit), logs


@pytest.mark.parametrize("fuse", [True, False])
def test_a_traced_hook_stops_the_run_at_the_very_batch(fuse):
    log: list[Any] = []
    a_trainer = trainer(StopWhenSmall(limit=4), recorder(log, every=100), fuse=fuse)
    state, history = a_trainer.fit(a_trainer.init(batches()[0]), batches(20), 3, batches(1))
    assert int(state.step) == 4
    assert ("on_batch_end", 3) in log
    assert GRAMMAR.fullmatch(spelled(log))
    assert len(history) == 1
    four = trainer().fit(trainer().init(batches()[0]), batches(20)[:4], 1)[0]
    assert_bit_equal(state, four, "params")


def test_num_epochs_counts_all_epochs_and_a_finished_run_is_left_alone(caplog):
    a_trainer = trainer()
    start = a_trainer.init(batches()[0])
    two, _ = a_trainer.fit(start, batches(), 2)
    four, history = a_trainer.fit(two, batches(), 4)
    straight, _ = a_trainer.fit(start, batches(), 4)
    assert_bit_equal(four, straight)
    assert (four.epoch, len(history)) == (4, 4)
    same, _ = a_trainer.fit(four, batches(), 4)
    assert same is four
    assert "nothing to do: the state has done 4 epochs and num_epochs is 4" in caplog.text


def test_fit_goes_on_inside_an_epoch():
    loader = ant.ArrayLoader(data(7 * BATCH), BATCH, seed=3)
    log: list[Any] = []
    a_trainer = trainer(optimizer=adam())
    start = a_trainer.init(next(iter(loader)))
    expected, history = a_trainer.fit(start, loader, 2)

    kept: list[Any] = []

    def keep(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        kept.append(state)
        return state, logs

    keeper = trainer(host("keep", on_batch_end=keep), optimizer=adam())
    keeper.fit(start, loader, 2)
    resumer = trainer(recorder(log, every=3), optimizer=adam())
    for middle in kept:
        log.clear()
        state, same_history = resumer.fit(middle, loader, 2)
        assert_bit_equal(state, expected)
        assert same_history == history
        assert not spelled(log).startswith("TE")  # the epoch has begun already
    with pytest.raises(ant.StateMismatch, match="state.host.log_sums is not of the form that this trainer, going on"):
        trainer(ant.callbacks.gradient_norm(), optimizer=adam()).fit(kept[2], loader, 2)


@pytest.mark.parametrize("hook", ["on_evaluate_begin", "on_evaluate_end", "on_epoch_end"])
def test_fit_goes_on_at_the_end_of_an_epoch(hook):
    kept: list[Any] = []

    def keep(*arguments: Any) -> Any:
        kept.append(arguments[-2])
        return arguments[-2:]

    hooks: dict[str, Any] = {hook: keep}
    a_trainer = trainer(host(**hooks), optimizer=adam())
    start = a_trainer.init(batches()[0])
    expected, history = a_trainer.fit(start, batches(3), 2, batches(1))
    for state in list(kept):
        again, same_history = a_trainer.fit(state, batches(3), 2, batches(1))
        assert_bit_equal(again, expected)
        assert same_history == history


def test_hooks_know_the_length_of_the_run():
    known: list[Any] = []

    def note(trainer: Any, state: Any, logs: Any) -> Any:
        known.append((trainer.num_epochs, trainer.steps_per_epoch))
        return state, logs

    a_trainer = trainer(host(on_train_begin=note))
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(3), 1)
    a_trainer.fit(state, iter(batches(9)), 3, steps_per_epoch=4)
    assert known == [(1, 3), (3, 4)]
    with pytest.raises(RuntimeError, match="known only to host hooks, while fit runs"):
        _ = a_trainer.num_epochs


def test_model_pairs_are_taken_as_they_are():
    assert ant.pure_functions(LINEAR).apply is apply


def test_what_host_callbacks_publish_is_a_mean_of_its_own_epoch():
    """Weighted by the examples of each batch, and no number of an epoch counts in the next."""

    def publish(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        value = 10.0 * state.epoch + batch_idx
        return state, {**logs, "number": value, "vector": np.array([value, -value]), "array": logs["loss"] + value}

    loader = batches(2) + batches(1, batch=3)
    a_trainer = trainer(host("publish", on_batch_end=publish))
    state, history = a_trainer.fit(a_trainer.init(loader[0]), loader, 3)
    again, same_history = a_trainer.fit(a_trainer.init(loader[0]), loader, 1)
    again, same_history = a_trainer.fit(again, loader, 3)
    assert same_history == history and dict(state.on_host().published) == {}
    for epoch, logs in enumerate(history):
        expected = 10 * epoch + (0 * 8 + 1 * 8 + 2 * 3) / 19
        assert logs["train_number"] == pytest.approx(expected)
        np.testing.assert_allclose(logs["train_vector"], [expected, -expected])
        assert logs["train_array"] == pytest.approx(expected + logs["train_loss"], rel=1e-6)


@pytest.mark.parametrize("fuse", [True, False])
def test_a_run_that_goes_on_after_a_request_to_stop_closes_its_window_and_no_more(fuse, tmp_path, monkeypatch):
    # As many steps a launch as there are.
    monkeypatch.setattr(LaunchSizer, "steps", property(lambda pace: 10**6, lambda pace, steps: None), raising=False)
    asked: list[ant.TrainState] = []

    def stop(batch_idx: Any, trainer: Any, state: Any, logs: Any) -> Any:
        return state.request_stop(when=batch_idx == 3), logs

    def keep(trainer: Any, state: Any, logs: Any) -> Any:
        if state.stop and state.batch_idx:
            asked.append(state)
        return state, logs

    identity = lambda i, trainer, state, logs: (state, logs)  # noqa: E731
    keeping = host("keep", on_batch_end=identity, on_checkpoint=keep)
    traced = ant.Callback(name="stop", traced=True, on_batch_end=stop)
    options: dict[str, Any] = {"gradient_accumulation_steps": 3, "fuse": fuse}
    a_trainer, without_looks = trainer(traced, keeping, **options), trainer(traced, **options)
    start = a_trainer.init(batches()[0])
    whole, history = a_trainer.fit(start, batches(20), 2, batches(1))
    assert (int(whole.step), whole.epoch, whole.window_open) == (6, 1, False)
    assert [(state.batch_idx, bool(state.window_open)) for state in asked] == [(4, True), (5, True)]
    for i, state in enumerate(list(asked)):
        a_trainer.save(tmp_path / str(i), state)
        for resuming in (a_trainer, without_looks):
            end, again = resuming.fit(start, batches(20), 2, batches(1), resume=tmp_path / str(i))
            assert_bit_equal(end, whole)
            assert again == history and end.stop and end.epoch == 1


@pytest.mark.parametrize(
    ("done", "seen"),
    [
        (1, [("begin", 2), ("end", 4, 3)]),
        (2, [("begin", 2), ("end", 4, 3)]),
        (3, [("end", 4, 2)]),
        (4, [("end", 4, 1)]),
        (5, []),
    ],
)
@pytest.mark.parametrize("fuse", [True, False])
def test_a_range_that_a_run_goes_on_before_in_or_after(done, seen, fuse):
    """Its first batch is no middle, its last one no more inside; what a run had seen of it, this trainer has not."""
    log: list[Any] = []

    def begin(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        log.append(("begin", batch_idx))
        return state, logs

    def end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        log.append(("end", batch_idx, len(logs.window["loss"])))
        return state, logs

    kept: list[ant.TrainState] = []
    keeper = trainer(host(on_batch_end=lambda i, t, state, logs: (kept.append(state), (state, logs))[1]))
    keeper.fit(keeper.init(batches()[0]), batches(7), 1)
    chosen: Any = range(2, 5)
    a_trainer = trainer(host(every=chosen, on_batch_begin=begin, on_batch_end=end), fuse=fuse)
    a_trainer.fit(kept[done - 1], batches(7), 1)
    assert log == seen


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_traced_callbacks_run_in_the_order_of_the_list_at_every_hook(names):
    """Each writes its letter behind those that are there."""

    def writing(name: str) -> ant.Callback:
        def hook_of(log: str) -> Any:
            def hook(*arguments: Any) -> Any:
                logs = arguments[-1]
                written = jnp.asarray(logs[log] if log in logs else 0.0, jnp.float32)
                return *arguments[len(arguments) - len(HOOKS[log].values) : -1], {
                    **logs, log: 10.0 * written + 1.0 + "ab".index(name)
                }  # fmt: skip

            return hook

        names = [*HOST_NAMES, *(hook for hook in HOOKS if HOOKS[hook].tree)]
        hooks: Any = {hook: hook_of(hook) for hook in names if hook != "on_checkpoint"}
        return ant.Callback(name=name, traced=True, **hooks)

    seen: dict[str, Any] = {}

    def on_train_end(trainer: Any, state: Any, logs: Any) -> Any:
        seen.update({name.removeprefix("train_"): float(value) for name, value in logs.items()})
        return state, logs

    a_trainer = trainer(*map(writing, names), host(on_train_end=on_train_end))
    a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 1, batches(1))
    for loss in ("loss", "val_loss"):
        del seen[loss]
    assert set(seen) == {hook for hook in HOOKS if hook not in ("on_exception", "on_checkpoint")}
    assert set(seen.values()) == {12.0 if names == "ab" else 21.0}


def test_a_state_is_whole_for_those_that_have_looked():
    """`on_checkpoint` comes for a callback after its own looks, and for all at the end of an epoch."""
    log: list[Any] = []

    def at(name: str) -> Any:
        def on_checkpoint(trainer: Any, state: Any, logs: Any) -> Any:
            log.append((name, state.epoch, state.batch_idx))
            return state, logs

        return on_checkpoint

    identity = lambda i, trainer, state, logs: (state, logs)  # noqa: E731
    looking = [host(name, every=n, on_batch_end=identity, on_checkpoint=at(name)) for name, n in (("a", 2), ("b", 3))]
    a_trainer = trainer(*looking, host("never", on_checkpoint=at("never")))
    a_trainer.fit(a_trainer.init(batches()[0]), batches(7), 1)
    inside = [("a", 0, 2), ("b", 0, 3), ("a", 0, 4), ("a", 0, 6), ("b", 0, 6)]
    assert log == [*inside, *((name, 1, 0) for name in ("a", "b", "never"))]


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 4, 5])
def test_an_epoch_of_fewer_steps_has_the_first_batches_of_its_order(fuse, steps):
    """Full batches and, when it is among them, the one that is cut short."""
    loader = ant.ArrayLoader(data(4 * BATCH + 3), BATCH, seed=7)
    a_trainer = trainer(fuse=fuse, optimizer=adam())
    start = a_trainer.init(batches()[0])
    state, history = a_trainer.fit(start, loader, 2, steps_per_epoch=steps)
    expected = start
    for epoch in range(2):
        first = [batch for _, batch in zip(range(steps), loader.batches(epoch), strict=False)]
        expected, _ = a_trainer.fit(expected, first, epoch + 1)
    assert_bit_equal(state, expected)
    assert history == expected.history and int(state.step) == 2 * steps


# --- what a host hook replaces in the state


def doubled(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf + leaf, tree)


Change = Callable[[ant.TrainState], ant.TrainState]
REPLACED: dict[str, Change] = {
    # Two batches before it begins anew, in a cycle of its own.
    "step": lambda state: state.replace(step=jnp.int32(CYCLE - 2)),
    "cycle": lambda state: state.replace(cycle=jnp.int32(1)),
    "params": lambda state: state.replace(params=doubled(state.params)),
    "model_state": lambda state: state.replace(model_state=doubled(state.model_state)),
    "opt_state": lambda state: state.replace(opt_state=doubled(state.opt_state)),
    "key": lambda state: state.replace(key=jax.random.key(7)),
    "accumulator": lambda state: state.replace(accumulator=doubled(state.accumulator)),
    "loss_scale": lambda state: state.replace(loss_scale=doubled(state.loss_scale)),
    "callback_states, on the device": lambda state: state.with_callback_state(
        "ema", doubled(state.callback_states["ema"])
    ),
    "callback_states, on the host": lambda state: state.with_callback_state("replacing", "another"),
}
FIELDS = ("step", "cycle", "params", "model_state", "opt_state", "key", "accumulator", "loss_scale", "callback_states")


class Replacing:
    """A run in which a host hook replaces something of the state, once."""

    def __init__(self) -> None:
        self._place: Any = None
        self._change: Change = lambda state: state
        self._kept: list[ant.TrainState] = []
        hooks: Any = {name: self._hook(name) for name in HOST_NAMES}
        callbacks = [ant.callbacks.ema(0.5), host("replacing", every=3, init=lambda state: "one", **hooks)]
        self._trainer = trainer(
            *callbacks,
            model=(lambda key, inputs: (LINEAR[0](key, inputs)[0], {"drift": jnp.float32(1.0)}), self._apply),
            optimizer=optax.sgd(0.1, momentum=0.9),
            gradient_accumulation_steps=2,
            precision="float16",
        )
        self.start = self._trainer.init(batches()[0])

    def _apply(self, params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
        outputs, _ = apply(params, {}, inputs, None)
        drift = model_state["drift"]
        outputs += jnp.arange(outputs.shape[-1], dtype=outputs.dtype)[None] * drift.astype(outputs.dtype)
        if key is None:
            return outputs, model_state
        return outputs + jax.random.normal(key, outputs.shape, outputs.dtype), {"drift": 0.75 * drift}

    def _hook(self, name: str) -> Any:
        def hook(*arguments: Any) -> Any:
            *_, state, logs = arguments
            if (name, state.epoch, state.batch_idx) != self._place or self._kept:
                return state, logs
            self._kept.append(state)
            return self._change(state), logs

        return hook

    def fit(self, state: ant.TrainState) -> tuple[ant.TrainState, list[float]]:
        state, history = self._trainer.fit(state, batches(7), 2, batches(1))
        return state, history.to_dict()["train_loss"]

    def replacing(self, place: Any, change: Change) -> tuple[Any, Any]:
        """What the run ends with whose hook makes the change, and the one that goes on from the state that it makes."""
        self._place, self._change = place, change
        self._kept.clear()
        got = self.fit(self.start)
        (state,) = self._kept
        return got, self.fit(change(state))


@pytest.fixture(scope="module")
def replacing() -> Replacing:
    return Replacing()


def assert_equal_ends(got: Any, expected: Any) -> None:
    assert_bit_equal(got[0], expected[0], *FIELDS)
    assert got[1] == expected[1]


@pytest.mark.parametrize("field", REPLACED)
def test_what_a_host_hook_replaces_in_the_state_is_what_the_run_goes_on_with(field, replacing):
    """Inside an epoch, in an accumulation window that is open."""
    got, expected = replacing.replacing(("on_batch_end", 0, 3), REPLACED[field])
    assert_equal_ends(got, expected)
    with pytest.raises(AssertionError):  # it matters
        assert_equal_ends(got, replacing.fit(replacing.start))


PLACES = [
    ("on_train_begin", 0, 0),
    ("on_epoch_begin", 0, 0),
    ("on_epoch_begin", 1, 0),
    ("on_batch_begin", 0, 3),
    ("on_batch_end", 1, 6),
    ("on_checkpoint", 0, 3),
    ("on_evaluate_begin", 0, 7),
    ("on_evaluate_end", 0, 7),
    ("on_epoch_end", 0, 7),
    ("on_checkpoint", 1, 0),
    ("on_train_end", 2, 0),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[0])
def test_every_host_hook_may_replace_every_field(place, replacing):
    """But for requests, and for what is there in the step alone."""
    others = {"stop", "host", "skip", "objective"}
    fields = {field.name for field in dataclasses.fields(ant.TrainState)} - others
    assert fields == {*FIELDS} == {name.partition(",")[0] for name in REPLACED}

    def replace(state: ant.TrainState) -> ant.TrainState:
        for change in REPLACED.values():
            state = change(state)
        return state

    got, expected = replacing.replacing(place, replace)
    assert_equal_ends(got, expected)
    with pytest.raises(AssertionError):
        assert_equal_ends(got, replacing.fit(replacing.start))
