"""A state is a pytree of arrays, and what only the host knows travels along with it."""

import copy
import functools
import pathlib
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import BATCH, adam, assert_bit_equal, batches, data, host, numbers, trainer

import ant_jax as ant
from ant_jax._state import host_fields as _host_fields


State = ant.TrainState
FIELDS = ("step", "cycle", "params", "model_state", "opt_state", "key", "accumulator", "stop", "callback_states")


def remember(trainer: Any, state: State, logs: Any) -> Any:
    """A host callback's memory that is no array."""
    del trainer
    return state.with_callback_state("remember", [*state.callback_states["remember"], state.epoch]), logs


def remembering() -> ant.Callback:
    return host("remember", init=lambda state: [], on_checkpoint=remember, on_batch_end=lambda i, t, s, logs: (s, logs))


def on_array(function: Callable[[jax.Array], Any]) -> Callable[[State], State]:
    """The map of a function over the leaves that are device arrays of numbers."""

    def of_leaf(leaf: Any) -> Any:
        return function(leaf) if isinstance(leaf, jax.Array) else leaf

    return lambda state: jax.tree.map(of_leaf, state)


def mapped(state: State) -> State:
    return jax.tree.map(
        lambda leaf: leaf[0], jax.vmap(lambda state: state)(jax.tree.map(lambda leaf: leaf[None], state))
    )


jitted = jax.jit(lambda state: state)
WAYS: dict[str, Callable[[State], State]] = {
    "jit": lambda state: jitted(state),
    "jit, changed": jax.jit(lambda state: state.replace(params=jax.tree.map(lambda leaf: leaf * 1, state.params))),
    "vmap": mapped,
    "tree.map": on_array(jnp.copy),
    "tree.map over all": lambda state: jax.tree.map(lambda leaf: leaf, state),
    "flatten": lambda state: jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state)),
    "device_put": lambda state: jax.device_put(state, jax.devices()[0]),
    "device_put, uncommitted": lambda state: jax.device_put(state),
    "device_get": jax.device_get,
    "scan": lambda state: jax.lax.scan(lambda state, _: (state, None), state, None, length=2)[0],
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
}
OPTIONS: dict[str, Any] = {"optimizer": adam(), "gradient_accumulation_steps": 2}


@functools.cache
def loader() -> ant.ArrayLoader:
    return ant.ArrayLoader(data(5 * BATCH + 3), BATCH)


@functools.cache
def run() -> tuple[ant.Trainer, list[State], State]:
    """A trainer, the states that its hooks were given, between epochs and inside one, and the end of the run."""
    kept: list[State] = []

    def keep(trainer: Any, state: State, logs: Any) -> Any:
        del trainer
        kept.append(state)
        return state, logs

    keeper = ant.Callback(name="keep", every=3, on_checkpoint=keep, on_batch_end=lambda i, t, s, logs: (s, logs))
    a_trainer = trainer(remembering(), ant.callbacks.ema(), keeper, **OPTIONS)
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), loader(), 3, batches(1))
    return a_trainer, kept, state


@functools.cache
def another() -> ant.Trainer:
    return trainer(remembering(), ant.callbacks.ema(), ant.Callback(name="keep"), **OPTIONS)


def assert_same(one: State, other: State) -> None:
    assert_bit_equal(one, other, *FIELDS)
    assert one.history == other.history
    assert (one.epoch, one.batch_idx, one.examples) == (other.epoch, other.batch_idx, other.examples)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inside", [False, True], ids=["between epochs", "inside an epoch"])
def test_a_state_that_has_been_through_a_function_trains_on_as_the_original(way, inside):
    _, kept, end = run()
    for state in [state for state in kept if bool(state.batch_idx) is inside and state.epoch < 3]:
        got = WAYS[way](state)
        assert (got.epoch, got.batch_idx, got.examples) == (state.epoch, state.batch_idx, state.examples)
        assert got.history == state.history
        assert got.callback_states["remember"] == state.callback_states["remember"]
        goes_on, _ = another().fit(got, loader(), 3, batches(1))
        assert_same(goes_on, end)


def test_a_jitted_function_of_the_state_is_traced_once_over_fit_resume_and_fit_again(tmp_path):
    traces: list[State] = []

    @jax.jit
    def norm(state: State) -> Any:
        traces.append(state)
        return optax.tree.norm(state.params)

    def look(*arguments: Any) -> Any:
        *_, state, logs = arguments
        return state, {**logs, "norm": norm(state)}

    def saving(*arguments: Any) -> Any:
        *_, state, logs = arguments
        norm(state)
        return state, logs

    traced = ("on_backward_end", "on_before_update", "on_before_apply")
    hooks: dict[str, Any] = {hook: look for hook in ant.HOOKS if hook not in (*traced, "on_exception")}
    hooks["on_checkpoint"] = saving
    looking = ant.Callback(name="looking", **hooks)
    keeping = ant.callbacks.checkpoint(tmp_path, every=2, keep=9)
    a_trainer = trainer(looking, keeping, remembering(), **OPTIONS)
    state = a_trainer.init(batches()[0])
    norm(state)
    a_trainer.fit(state, loader(), 2, batches(1))
    again = trainer(looking, keeping, remembering(), **OPTIONS)
    norm(again.restore(tmp_path))
    norm(again.restore(tmp_path, step=8))
    state, _ = again.fit(again.init(batches()[0]), loader(), 3, batches(1), resume=tmp_path)
    norm(state)
    state, _ = again.fit(state, loader(), 4, batches(1))
    norm(again.train_step(state, batches()[0])[0])
    assert len(traces) == 1


def test_a_jitted_function_that_changes_the_state_in_every_hook_changes_that_and_no_more():
    @jax.jit
    def halved(state: State) -> State:
        return state.replace(params=jax.tree.map(lambda leaf: leaf / 2, state.params))

    def by_hand(state: State) -> State:
        return state.replace(params=jax.tree.map(lambda leaf: leaf / 2, state.params))

    def end(change: Callable[[State], State], seed: int) -> State:
        def hook(*arguments: Any) -> Any:
            *_, state, logs = arguments
            return change(state), logs

        hooks: dict[str, Any] = dict.fromkeys(
            ("on_batch_begin", "on_batch_end", "on_epoch_begin", "on_epoch_end", "on_evaluate_end"), hook
        )
        a_trainer = trainer(ant.Callback(name="changing", **hooks), remembering(), **OPTIONS)
        return a_trainer.fit(a_trainer.init(batches()[0], seed=seed), loader(), 2, batches(1))[0]

    for seed in (0, 1):  # the second run meets what was traced in the first
        assert_same(end(halved, seed), end(by_hand, seed))


def test_a_stale_state_is_found_by_its_name_or_refused():
    a_trainer, kept, end = run()
    states = [state for state in kept if state.epoch < 3]
    through = jax.jit(lambda state: state.replace(step=state.step + 0))
    for state in states:
        assert through(state).history == state.history
    gone = states[-1].replace(host=states[-1].on_host()._replace(examples=0))
    oldest = through(gone)  # traced with another state
    del gone
    for index in range(_host_fields.RECENT):
        jax.tree.leaves(end.replace(host=end.on_host()._replace(examples=index)))
    with pytest.raises(ant.StateMismatch, match=r"'host' is \[.*before.replace\(params=changed.params\)"):
        a_trainer.fit(oldest, loader(), 3)
    assert oldest.step == states[-1].step  # and what is in it can be taken out
    assert_same(another().fit(states[-1].replace(params=oldest.params), loader(), 3, batches(1))[0], end)


def test_many_states_that_are_alive_find_their_own_history():
    _, kept, _ = run()
    host = kept[-1].on_host()
    states = [kept[-1].replace(host=host._replace(examples=index)) for index in range(2 * _host_fields.RECENT)]
    through = jax.jit(lambda state: state)
    assert [state.examples for state in [through(state) for state in states]] == list(range(len(states)))
    leaves = [jax.tree.leaves(state) for state in states]
    again = [jax.tree.unflatten(jax.tree.structure(states[0]), leaves_of_one) for leaves_of_one in leaves]
    assert [state.examples for state in again] == list(range(len(states)))


LOST: dict[str, tuple[Callable[[State], Any], str]] = {
    "a stack": (lambda state: jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state), "a stack of 2 states"),
    "computed with": (
        lambda state: jax.tree.map(lambda leaf: leaf + 1 if leaf.dtype == np.int32 else leaf, state),
        "the state has lost its epoch, position and history",
    ),
    "cast": (
        lambda state: jax.tree.map(lambda leaf: leaf.astype(np.float32) if leaf.dtype == np.int32 else leaf, state),
        "the state has lost its epoch, position and history",
    ),
}


@pytest.mark.parametrize("how", LOST)
def test_a_state_whose_name_was_computed_with_is_refused(how):
    a_trainer, _, end = run()
    change, message = LOST[how]
    changed = change(end)
    for use in (lambda: changed.history, lambda: a_trainer.fit(changed, loader(), 9), lambda: changed.callback_states):
        with pytest.raises(ant.StateMismatch, match=message):
            use()


def test_equal_states_between_epochs_have_equal_leaves():
    ends = [trainer(remembering(), **OPTIONS) for _ in range(2)]
    one, other = (t.fit(t.init(batches()[0]), loader(), 2, batches(1))[0] for t in ends)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(numbers(mine), numbers(theirs), strict=True)
    longer = ends[0].fit(one, loader(), 3, batches(1))[0]
    assert jax.tree.structure(longer) == jax.tree.structure(one)


def test_the_leaves_are_arrays_and_the_structure_is_one():
    _, kept, end = run()
    for state in [*kept, end]:
        assert all(isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in jax.tree.leaves(state))
        assert jax.tree.structure(state) == jax.tree.structure(end)
        assert [leaf.shape for leaf in jax.tree.leaves(state)] == [leaf.shape for leaf in jax.tree.leaves(end)]


def test_what_compiled_code_may_read_of_the_host_fields():
    _, kept, _ = run()
    state = next(state for state in kept if state.batch_idx)

    @jax.jit
    def place(state: State) -> Any:
        for field in ("history", "examples", "batch_size", "total_steps"):
            with pytest.raises(RuntimeError, match=f"state.{field} is a host field and has no value inside"):
                getattr(state, field)
        assert state.callback_states.keys() == {"ema"}
        with pytest.raises(KeyError, match="a host callback's memory is out of reach of traced hooks"):
            state.with_callback_state("remember", [])
        return (
            state.epoch,
            state.batch_idx,
            state.request_stop().with_callback_state("ema", state.callback_states["ema"]),
        )

    for given in (state, state.replace(step=state.step)):
        epoch, batch_idx, after = place(given)
        assert (int(epoch), int(batch_idx)) == (state.epoch, state.batch_idx) == (after.epoch, after.batch_idx)
        assert after.stop and after.callback_states["remember"] == state.callback_states["remember"]


def test_fields_of_the_trainer_cannot_be_replaced():
    *_, end = run()
    for field in ("epoch", "batch_idx", "history", "log_sums", "parms"):
        with pytest.raises(
            TypeError, match=f"a state has no field '{field}' that can be replaced; those are accumulator,"
        ):
            end.replace(**{field: 1})
    with pytest.raises(AttributeError, match="a state has no attribute 'parms'"):
        _ = end.parms  # pyright: ignore[reportAttributeAccessIssue]


def test_a_step_by_hand_keeps_the_host_fields_compiled_or_not():
    a_trainer, kept, _ = run()
    for state in kept[:2]:
        step = jax.jit(lambda state, batch: a_trainer.train_step(state, batch)[0])
        one, other = a_trainer.train_step(state, batches()[0])[0], step(state, batches()[0])
        assert_same(one, other)
        assert (one.epoch, one.batch_idx, one.history) == (state.epoch, state.batch_idx, state.history)


def test_a_memory_that_cannot_be_saved_travels_too():
    lock = threading.Lock()
    a_trainer = trainer(host("odd", init=lambda state: lock, on_checkpoint=lambda t, s, logs: (s, logs)))
    state = a_trainer.init(batches()[0])
    assert jitted(state).callback_states["odd"] is lock
    assert a_trainer.fit(jitted(state), batches(), 1)[0].callback_states["odd"] is lock


def test_equal_beginnings_of_different_trainers_are_told_apart():
    """The host fields of a new state say little, but which memories are on the device."""
    plain, averaging = trainer(**OPTIONS), trainer(ant.callbacks.ema(), **OPTIONS)
    one, other = (t.init(batches()[0]) for t in (averaging, plain))
    assert jax.tree.structure(jitted(jitted(one))) == jax.tree.structure(one)
    assert jax.tree.leaves(other)  # which names the host fields of a trainer without memories
    assert jax.tree.structure(jitted(jitted(one))) == jax.tree.structure(one) != jax.tree.structure(other)
    assert jitted(one).callback_states.keys() == {"ema"}


def test_threads_do_not_meet_each_others_states():
    a_trainer = trainer(**OPTIONS)

    def hook(*arguments: Any) -> Any:
        *_, state, logs = arguments
        return jitted(state), logs

    through = trainer(host(on_batch_end=hook, on_epoch_end=hook), **OPTIONS)
    expected = [a_trainer.fit(a_trainer.init(batches()[0], seed=seed), batches(), 3)[0] for seed in range(3)]
    got: dict[int, State] = {}

    def one(seed: int) -> None:
        got[seed] = through.fit(through.init(batches()[0], seed=seed), batches(), 3)[0]

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, state in enumerate(expected):
        assert_bit_equal(got[seed], state)
        assert got[seed].history == state.history


IN_ANOTHER_PROCESS = """
import pickle, sys
sys.path[:0] = {path!r}
from test_train_state import another, batches, loader
state = pickle.loads(sys.stdin.buffer.read())
place = state.epoch, state.batch_idx, len(state.history), state.callback_states["remember"]
end, history = another().fit(state, loader(), 3, batches(1))
params = [end.params[name].tolist() for name in ("bias", "kernel")]
sys.stdout.buffer.write(pickle.dumps((place, params, list(history))))
"""


@pytest.mark.parametrize("inside", [False, True], ids=["between epochs", "inside an epoch"])
def test_a_pickled_state_trains_on_in_another_process(inside):
    _, kept, end = run()
    state = [state for state in kept if bool(state.batch_idx) is inside and state.epoch < 3][-1]
    code = IN_ANOTHER_PROCESS.format(path=[str(pathlib.Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(state), capture_output=True, check=True)
    place, params, history = pickle.loads(done.stdout)
    assert place == (state.epoch, state.batch_idx, len(state.history), state.callback_states["remember"])
    assert params == [end.params["bias"].tolist(), end.params["kernel"].tolist()]
    assert history == list(end.history)


def test_a_look_at_a_state_that_is_not_handed_to_jax_names_nothing(monkeypatch):
    """Names cost random bits, or a digest of the history, and are made where one is needed."""
    made: list[int] = []
    monkeypatch.setattr(_host_fields.os, "urandom", lambda count: made.append(count) or bytes(count))
    a_trainer = trainer(host(on_batch_end=lambda i, t, state, logs: (state.replace(params=state.params), logs)))
    a_trainer.fit(a_trainer.init(batches()[0]), batches(), 2)
    assert not made
