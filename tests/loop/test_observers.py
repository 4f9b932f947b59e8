"""Observers: they see what host callbacks see, in the order of the loop, and the run is the same without them."""

import re
import signal
from typing import Any

import jax
import numpy as np
import optax
import pytest
from problems import BATCH, assert_bit_equal, batches, data, host, standard_promotion, trainer

import ant_jax as ant
from ant_jax import testing
from ant_jax._engine.launch_size import LaunchSizer
from ant_jax._engine.programs import TrainProgram
from ant_jax._hooks.observed import Facts, ObservedState, ObserverError


library = ant.callbacks
SIDE_HOOKS = ["on_train_begin", "on_train_end"]
SIDE_HOOKS += ["on_epoch_begin", "on_evaluate_begin", "on_evaluate_end", "on_epoch_end"]
BATCH_HOOKS = ["on_batch_begin", "on_batch_end"]


def number(value: Any) -> Any:
    return np.asarray(value).tolist()


def notes(seen: list[Any], name: str, observer: bool = True, every: Any = 1, hooks: Any = ()) -> ant.Callback:
    """A callback that writes down its hooks, and all that it is given."""

    def hook_of(hook: str) -> Any:
        def function(*arguments: Any) -> Any:
            *lead, _, state, logs = arguments
            place = state.epoch, state.batch_idx, state.examples, state.batch_size, int(state.step), state.total_steps
            window = {log: number(values) for log, values in logs.window.items()}
            note = hook, name, *lead[:1], place, {log: number(logs[log]) for log in logs}, window, len(state.history)
            seen.append(note)
            return None if observer else (state, logs)

        return function

    wanted: Any = {hook: hook_of(hook) for hook in hooks or [*SIDE_HOOKS, *BATCH_HOOKS]}
    return ant.Callback(name=name, observer=observer, every=every, **wanted)


def fit(*callbacks: ant.Callback, epochs: int = 2, loader: Any = None, **options: Any) -> ant.TrainState:
    names = ("steps_per_epoch", "prefetch")
    of_fit: dict[str, Any] = {name: options.pop(name) for name in names if name in options}
    a_trainer = trainer(*callbacks, **options)
    loader = ant.ArrayLoader(data(6 * BATCH + 3), BATCH) if loader is None else loader
    return a_trainer.fit(a_trainer.init(batches()[0]), loader, epochs, batches(1), **of_fit)[0]


def sized() -> ant.Callback:
    """Asks for larger batches inside each epoch."""

    def on_epoch_begin(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        return state.request_batch_size(BATCH).request_batch_size(2 * BATCH, from_batch=2), logs

    return host("sized", on_epoch_begin=on_epoch_begin)


def some_norms() -> ant.Callback:
    return library.every(library.gradient_norm(), batches=2)


class NoLength:
    def __iter__(self) -> Any:
        return iter(batches(4))


WAYS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "fused": ([], {"fuse": True}),
    "a launch a step": ([], {"fuse": False}),
    "accumulating": ([], {"gradient_accumulation_steps": 3}),
    "a log that not every batch has": ([some_norms], {}),
    "batches that grow": ([sized], {}),
    "a list": ([], {"loader": batches(5)}),
    "a loader without a length": ([], {"loader": NoLength(), "steps_per_epoch": 3}),
    "nothing read ahead": ([], {"loader": batches(4), "prefetch": 0}),
    "a traced stop": ([lambda: library.stop_at(1e9, "loss", per="batch")], {}),
}


@pytest.mark.parametrize("every", [1, 2, 4, range(1, 4)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_it_sees_what_a_host_callback_sees(way, every):
    others, options = WAYS[way]
    seen: dict[bool, list[Any]] = {True: [], False: []}
    for observer, of_side in seen.items():
        fit(*(make() for make in others), notes(of_side, "notes", observer, every), **options)
    assert [note[:3] for note in seen[True]] == [note[:3] for note in seen[False]]
    np.testing.assert_equal(seen[True], seen[False])


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("every", [1, 3, 100, None], ids=str)
def test_beside_other_callbacks_all_hooks_come_in_order(position, every):
    """All of a hook before any of the next, in the order of the list; the batches in theirs."""
    log: list[Any] = []
    callbacks = [notes(log, "a"), notes(log, "b", every=2)]
    callbacks.insert(position, notes(log, "host", observer=False, every=every))
    fit(*callbacks)
    order = [callback.name for callback in callbacks]
    batch_notes = [(note[3][0], note[2], note[0], note[1]) for note in log if note[0] in BATCH_HOOKS]
    assert batch_notes == sorted(batch_notes, key=lambda n: (n[0], n[1], n[2] == "on_batch_end", order.index(n[3])))
    assert [n[1:3] for n in batch_notes if n[3] == "a"] == [(i, hook) for i in range(7) for hook in BATCH_HOOKS] * 2
    letters = {"on_train_begin": "T", "on_epoch_begin": "E", "on_batch_begin": "B", "on_batch_end": "b"}
    letters |= {"on_evaluate_begin": "V", "on_evaluate_end": "v", "on_epoch_end": "e", "on_train_end": "t"}
    assert re.fullmatch(r"TTT(EEE(B+b+)*VVVvvveee)*ttt", "".join(letters[note[0]] for note in log))


def test_what_callbacks_before_it_publish_at_a_batch_is_in_its_logs():
    def published(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        return state, {**logs, "by_host": 10.0 * batch_idx}

    before, after = [], []
    fit(notes(before, "before"), host("host", every=3, on_batch_end=published), notes(after, "after"), epochs=1)
    of_after = {note[2]: note[4].get("by_host") for note in after if note[0] == "on_batch_end"}
    assert of_after == {0: None, 1: None, 2: 20.0, 3: None, 4: None, 5: 50.0, 6: 60.0}
    assert not any("by_host" in note[4] for note in before if note[0] == "on_batch_end")


def costs_of(monkeypatch: Any, compilations: Any, *callbacks: ant.Callback) -> tuple[ant.TrainState, list[int], int]:
    """Train with as many steps a launch as the callbacks allow; returns the state, the launches, what was compiled."""
    launches, launch = [], TrainProgram.launch

    def counted(*arguments: Any) -> Any:
        launched = launch(*arguments)
        launches.append(launched.steps)
        return launched

    with monkeypatch.context() as patch:
        patch.setattr(TrainProgram, "launch", counted)
        patch.setattr(LaunchSizer, "steps", property(lambda pace: 10**6, lambda pace, steps: None), raising=False)
        compilations.reset()
        return fit(*callbacks), launches, compilations.count


def test_the_run_is_that_of_a_run_without_them(monkeypatch, compilations):
    costs_of(monkeypatch, compilations)  # what is compiled once for all runs is compiled now
    bare, launches, compiled = costs_of(monkeypatch, compilations)
    observers = [notes([], "a"), notes([], "b", every=3), notes([], "c", every=None), notes([], "d", every=range(2, 4))]
    state, observed_launches, observed_compiled = costs_of(monkeypatch, compilations, *observers)
    assert_bit_equal(bare, state)
    assert bare.history == state.history
    assert (observed_launches, observed_compiled) == (launches, compiled)


def test_rarely_it_looks_once_while_the_host_has_control():
    """``every=None``: fewer looks than batches, and no batch is left out of their windows."""
    seen: list[Any] = []
    fit(notes(seen, "rare", every=None), loader=batches(40))
    looks = [note for note in seen if note[0] == "on_batch_end"]
    assert sum(len(note[5]["loss"]) for note in looks) == 80
    assert [note[2] for note in looks if note[3][1] == 40] == [39, 39]


def test_it_may_return_what_it_was_given():
    fit(ant.Callback(name="polite", observer=True, on_batch_end=lambda i, trainer, state, logs: (state, logs)))


CHANGES: dict[str, Any] = {
    "another state": lambda state, logs: (ObservedState(Facts(0, 0, 0, None, ant.History(), 0, False)), logs),
    "other logs": lambda state, logs: (state, {**logs, "x": 1.0}),
    "7": lambda state, logs: 7,
}


@pytest.mark.parametrize("others", [[], ["host"]], ids=["alone", "beside another"])
@pytest.mark.parametrize("hook", ["on_epoch_begin", "on_batch_begin", "on_batch_end", "on_epoch_end", "on_checkpoint"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_refused_by_name(change, hook, others):
    changes: Any = {hook: lambda *arguments: CHANGES[change](*arguments[-2:])}
    observer = ant.Callback(name="meddler", observer=True, **changes)
    with pytest.raises(ant.CallbackReturnError) as caught:
        fit(observer, *(notes([], name, observer=False) for name in others))
    assert str(caught.value).startswith(f"{hook} of observer 'meddler' returned {change}"[:40])
    assert "observer=False" in str(caught.value)


@pytest.mark.parametrize(
    "read",
    [
        lambda state: state.params, lambda state: state.opt_state, lambda state: state.callback_states,
        lambda state: state.hyperparams, lambda state: state.key, lambda state: state.request_stop(),
        lambda state: state.request_batch_size(3), lambda state: state.replace(step=3),
        lambda state: state.with_callback_state("a", 3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("hook", ["on_batch_end", "on_epoch_end"])
def test_what_it_cannot_read_is_refused_with_the_remedy(read, hook):
    hooks: Any = {hook: lambda *arguments: read(arguments[-2]) and None}
    with pytest.raises(ObserverError, match="observer=False") as caught:
        fit(ant.Callback(name="curious", observer=True, **hooks))
    assert any(f"in {hook} of callback 'curious' (epoch 0" in note for note in caught.value.__notes__)


def test_the_view_is_plain_and_cannot_be_written_to():
    state = ObservedState(Facts(1, 5, 160, None, ant.History(), 2**31 + 5, True, each=32), ago=1)
    assert (state.epoch, state.batch_idx, state.examples, state.step, state.stop) == (1, 4, 128, 4, True)
    assert repr(state) == f"ObservedState(epoch=1, batch_idx=4, total_steps={2**31 + 4})"
    with pytest.raises(AttributeError):
        state.epoch = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError, match="no attribute 'epok'"):
        _ = state.epok


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"traced": True}, "leave out traced=True"),
        ({"on_backward_end": lambda i, t, s, g, logs: (s, g, logs)}, "on_backward_end runs inside the step"),
        ({"on_before_apply": lambda i, t, s, u, logs: (s, u, logs)}, "on_before_apply runs inside the step"),
        ({"init": lambda state: {}}, "the memory that init makes"),
    ],
)
def test_what_no_observer_can_be_is_refused_when_it_is_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        ant.Callback(name="wrong", observer=True, **arguments)


class Failing(Exception):
    pass


def fails_at(batch: int, every: int = 1, error: type[BaseException] = Failing) -> ant.Callback:
    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> None:
        if batch_idx == batch and state.epoch == 1:
            raise error

    return ant.Callback(name="failing", observer=True, every=every, on_batch_end=on_batch_end)


@pytest.mark.parametrize("others", [[], ["host"]], ids=["alone", "beside another"])
def test_what_it_raises_ends_the_run_and_is_blamed_on_its_batch(others):
    after: list[Any] = []
    ended: list[Any] = []

    def on_exception(exception: BaseException, trainer: Any, state: Any, logs: Any) -> None:
        ended.append((type(exception), trainer.whole))

    watches = ant.Callback(name="watches", observer=True, on_exception=on_exception)
    with pytest.raises(Failing) as caught:
        fit(fails_at(3), notes(after, "after"), watches, *(notes([], name, observer=False) for name in others))
    assert caught.value.__notes__[0] == "in on_batch_end of callback 'failing' (epoch 1, batch 3)"
    assert [note[:3] for note in after][-1] == ("on_batch_begin", "after", 3)
    assert ended == [(Failing, False)]  # a checkpoint taken now would leave batches out
    assert caught.value.train_state.epoch == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_a_second_ctrl_c_acts_in_it_at_once():
    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> None:
        if batch_idx == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("it goes on")

    with pytest.raises(KeyboardInterrupt):
        fit(ant.Callback(name="impatient", observer=True, on_batch_end=on_batch_end))


def test_what_waits_is_told_before_on_exception():
    seen: list[Any] = []

    def broken() -> Any:
        yield from batches(5)
        raise Failing

    with pytest.raises(Failing) as caught:
        fit(notes(seen, "notes"), loader=broken(), epochs=1)
    state: Any = caught.value.train_state  # pyright: ignore[reportAttributeAccessIssue]
    assert [note[2] for note in seen if note[0] == "on_batch_end"] == list(range(state.batch_idx))


@pytest.mark.parametrize("every", [1, 3, None], ids=str)
def test_over_killed_and_resumed_runs_it_sees_each_batch_once(tmp_path, every):
    """The windows that are open when a run is killed go on."""
    seen: list[tuple[int, int]] = []
    windows: list[float] = []

    def observer() -> ant.Callback:
        def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> None:
            seen.append((state.epoch, batch_idx))
            windows.extend(number(logs.window["loss"]))

        return ant.Callback(name="seen", observer=True, every=every, on_batch_end=on_batch_end)

    def dies(at: Any) -> ant.Callback:
        def on_checkpoint(trainer: Any, state: Any, logs: Any) -> Any:
            if (state.epoch, state.batch_idx) == at:
                raise Failing
            return state, logs

        return host("dies", every=2, on_checkpoint=on_checkpoint, on_batch_end=lambda i, t, state, logs: (state, logs))

    def run(directory: Any, at: Any = None) -> None:
        saving = library.checkpoint(directory, every=2)
        a_trainer = trainer(observer(), saving, dies(at))
        a_trainer.fit(a_trainer.init(batches()[0]), batches(7), 2, resume=directory)

    run(tmp_path / "straight")
    straight = list(seen), list(windows)
    seen.clear()
    windows.clear()
    for at in [(0, 4), (1, 2)]:
        with pytest.raises(Failing):
            run(tmp_path / "killed", at)
    run(tmp_path / "killed")
    assert windows == straight[1]
    assert seen == straight[0] or every is None  # whose looks depend on the clock


def test_chains_and_other_combinators_of_observers_are_observers():
    seen: list[Any] = []
    chained = library.chain(notes(seen, "a"), notes(seen, "b"))
    assert chained.observer
    fit(
        chained,
        library.every(notes(seen, "every", hooks=["on_batch_end"]), batches=3),
        library.when(lambda state, logs: state.step > 3, notes(seen, "when", hooks=["on_batch_end"])),
        library.tolerate(notes(seen, "tolerate", hooks=["on_batch_end"])),
        epochs=1,
    )
    ends = {name: [n[2] for n in seen if n[:2] == ("on_batch_end", name)] for name in ("a", "b", "every", "when")}
    assert ends == {"a": [*range(7)], "b": [*range(7)], "every": [2, 5, 6], "when": [*range(3, 7)]}
    assert [note[1] for note in seen if note[:1] == ("on_batch_end",) and note[1] in "ab"] == ["a", "b"] * 7


def test_in_a_chain_with_others_it_is_called_as_they_are():
    seen: list[Any] = []
    fit(library.chain(notes(seen, "observer"), notes(seen, "host", observer=False), name="both"), epochs=1)
    assert [note[1] for note in seen if note[0] == "on_batch_end"] == ["observer", "host"] * 7
    with pytest.raises(ant.CallbackReturnError, match="of observer 'meddler' returned other logs"):
        meddler = ant.Callback(name="meddler", observer=True, on_epoch_end=lambda e, t, state, logs: (state, {}))
        fit(library.chain(meddler, notes([], "host", observer=False)))


def test_tolerated_failures_of_an_observer_do_not_end_the_run(caplog):
    fit(library.tolerate(fails_at(3), failures=1))
    assert "callback 'failing' failed in on_batch_end" in caplog.text


def test_when_a_number_goes_bad_all_batches_before_are_told():
    seen: list[Any] = []
    loader = batches(5)
    loader[3][0][:] = np.inf
    with jax.debug_nans(True), pytest.raises(ant.NonFiniteError, match="batch 3 of epoch 0"):
        fit(notes(seen, "notes"), loader=loader)
    assert [note[2] for note in seen if note[0] == "on_batch_end"] == [0, 1, 2]


def test_by_hand_and_in_evaluations_by_hand_it_works_as_others():
    seen: list[Any] = []
    observer = notes(seen, "notes")
    a_trainer = trainer(observer)
    state = a_trainer.init(batches()[0])
    state, _ = a_trainer.train_step(state, batches()[0])  # no host hooks
    a_trainer.evaluate(state, batches(2))
    assert [(note[0], note[2][4]) for note in seen] == [("on_evaluate_begin", 1), ("on_evaluate_end", 1)]
    assert observer.on_batch_end(0, a_trainer, state, ant.Logs({"loss": 1.0})) is None  # pyright: ignore


def test_it_keeps_every_promise_of_a_callback():
    testing.check_callback(lambda: notes([], "notes"))
    testing.check_callback(lambda: notes([], "notes", every=2), gradient_accumulation_steps=2)


def test_what_it_keeps_makes_nothing_be_copied(monkeypatch):
    """It keeps every view and all logs, and no launch has to spare an array for it."""
    kept: list[Any] = []
    copied: list[Any] = []
    from ant_jax._engine import buffers as _live

    monkeypatch.setattr(_live, "_copied", lambda leaf: copied.append(leaf) or jax.device_put(leaf, may_alias=False))
    keeps: Any = dict.fromkeys(BATCH_HOOKS, lambda *arguments: kept.append(arguments))
    observer = ant.Callback(name="keeper", observer=True, **keeps)
    a_trainer = trainer(observer, optimizer=standard_promotion(optax.adam(0.01)))
    a_trainer.fit(a_trainer.init(batches()[0]), batches(5), 1)
    without = len(copied)
    a_trainer = trainer(optimizer=standard_promotion(optax.adam(0.01)))
    a_trainer.fit(a_trainer.init(batches()[0]), batches(5), 1)
    assert len(copied) == 2 * without
    losses = [logs["loss"] for *_, logs in kept[1::2]]
    assert len(set(map(float, losses))) == 5 and {loss.dtype for loss in losses} == {np.dtype("float32")}
