"""What hooks return is judged, and who is to blame is named."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import batches, host, leaves_of, trainer

import ant_jax as ant
from ant_jax import HOOKS, CallbackReturnError


HOST_NAMES = [name for name, hook in HOOKS.items() if not hook.tree and name != "on_exception"]
GRADIENT_NAMES = [name for name, hook in HOOKS.items() if hook.tree]


def fit_with(hook_name: str, hook: Any, *, traced: bool = False, init: Any = None) -> Any:
    callback = ant.Callback(name="bad", traced=traced, init=init, **{hook_name: hook})
    a_trainer = trainer(callback)
    state = a_trainer.init(batches()[0])
    before = leaves_of(state)
    try:
        return a_trainer.fit(state, batches(2), 1, batches(1))
    finally:  # whatever happens, nothing of the caller's is lost
        for old, new in zip(before, leaves_of(state), strict=True):
            np.testing.assert_array_equal(old, new)


BAD = {
    "none": (lambda state, rest, logs: None, "{hook} returned None instead of {names}; did you forget `return"),
    "state alone": (lambda state, rest, logs: state, "{hook} returned state instead of the {n} values {names}"),
    "swapped": (lambda state, rest, logs: (logs, *rest, state), r"{hook} returned \(logs.*\) where \({names}\)"),
    "too many": (lambda state, rest, logs: (state, *rest, logs, 1), "values instead of the {n} values {names}"),
    "dropped log": (lambda state, rest, logs: (state, *rest, {}), "{hook} dropped the log '.*'; to publish a value"),
    "text": (lambda state, rest, logs: (state, *rest, {**logs, "a": "b"}), "{hook} published the log 'a' as str"),
    "nothing": (lambda state, rest, logs: (state, *rest, {**logs, "a": None}), "published the log 'a' as NoneType"),
    "nested": (lambda state, rest, logs: (state, *rest, {**logs, "a": {"b": 1}}), "published the log 'a' as dict"),
    "missing leaf": (
        lambda state, rest, logs: (state.replace(params={"bias": state.params["bias"]}), *rest, logs),
        "{hook} returned state.params of another structure, shape or dtype:\n  kernel: missing",
    ),
    "extra leaf": (
        lambda state, rest, logs: (state.replace(params={**state.params, "c": jnp.ones(1)}), *rest, logs),
        r"state.params of another.*\n  c: unexpected, float32\[1\]",
    ),
    "dtype": (
        lambda state, rest, logs: (
            state.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)), *rest, logs,
        ),
        r"bias: expected float32\[3\], got bfloat16\[3\]",
    ),
    "shape": (
        lambda state, rest, logs: (state.replace(opt_state=jnp.ones(2)), *rest, logs),
        "{hook} returned state.opt_state of another structure",
    ),
    "memories": (
        lambda state, rest, logs: (state.replace(callback_states={"ghost": 1}), *rest, logs),
        "{hook} changed who has a memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize(
    ("hook_name", "traced"),
    [(name, False) for name in HOST_NAMES] + [(name, True) for name in HOST_NAMES + GRADIENT_NAMES],
)
def test_a_bad_return_is_refused_with_the_hook_and_the_fault(hook_name, traced, fault):
    make, message = BAD[fault]
    if fault == "dropped log" and hook_name in ("on_train_begin", "on_epoch_begin", "on_evaluate_begin"):
        message = None  # there is no log yet to drop

    def hook(*arguments: Any) -> Any:
        values = arguments[arguments.index(next(a for a in arguments if isinstance(a, ant.TrainState))) :]
        return make(values[0], values[1:-1], values[-1])

    if message is None:
        fit_with(hook_name, hook, traced=traced)
        return
    names = HOOKS[hook_name].values
    with pytest.raises(
        CallbackReturnError, match=message.format(hook=hook_name, names=", ".join(names), n=len(names))
    ) as e:
        fit_with(hook_name, hook, traced=traced)
    assert any(f"in {hook_name} of callback 'bad'" in note for note in e.value.__notes__)


@pytest.mark.parametrize("hook_name", GRADIENT_NAMES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {"kernel": g["kernel"]}, "bias: missing"),
        (lambda g: jax.tree.map(jnp.sum, g), r"bias: expected float32\[3\], got float32\[\]"),
        (lambda g: jax.tree.map(lambda x: x.astype(jnp.float16), g), "got float16"),
        (lambda g: list(g.values()), "unexpected"),
        (lambda g: None, "missing"),
    ],
)
def test_gradients_keep_their_form(hook_name, change, message):
    returned = f"{hook_name} returned {HOOKS[hook_name].tree}"
    with pytest.raises(CallbackReturnError, match=f"{returned} of another(.|\n)*{message}"):
        fit_with(hook_name, lambda batch_idx, trainer, state, grads, logs: (state, change(grads), logs))


ASSIGNMENTS = {
    "grads": lambda state, grads: grads.update(bias=jnp.float32(0)),
    "deleted": lambda state, grads: grads.pop("bias"),
    "params": lambda state, grads: state.params.update(bias=jnp.zeros(3)),
}


@pytest.mark.parametrize("what", ASSIGNMENTS)
def test_changes_in_place_are_refused(what):
    def gradient_hook(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        ASSIGNMENTS[what](state, grads)
        return state, grads, logs

    with pytest.raises(CallbackReturnError, match="on_backward_end changed the state or the gradients in place"):
        fit_with("on_backward_end", gradient_hook)


def test_changes_in_place_on_the_host_are_refused():
    def assign(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        state.params["bias"] = jnp.zeros(3)
        return state, logs

    def remember(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        state.callback_states["bad"].append(epoch)
        return state, logs

    with pytest.raises(CallbackReturnError, match="on_epoch_end changed the state or the gradients in place"):
        fit_with("on_epoch_end", assign)
    with pytest.raises(CallbackReturnError, match="in place"):
        fit_with("on_epoch_end", remember, init=lambda state: [])


@pytest.mark.parametrize("use", [lambda x, b: [1, 2][b], lambda x, b: x[x > 0], lambda x, b: np.asarray(x)])
def test_other_uses_of_a_traced_value_get_the_remedy(use):
    def hook(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        use(grads["bias"], batch_idx)
        return state, grads, logs

    with pytest.raises(Exception) as caught:  # noqa: B017, PT011  # JAX has a type for each
        fit_with("on_backward_end", hook)
    assert any("write jnp.where" in note for note in caught.value.__notes__)


def test_a_python_if_in_a_traced_hook_gets_the_remedy():
    def hook(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        return (state, jax.tree.map(jnp.zeros_like, grads), logs) if logs["loss"] > 1 else (state, grads, logs)

    with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
        fit_with("on_backward_end", hook)
    assert caught.value.__notes__[0] == "in on_backward_end of callback 'bad', while tracing the compiled step"
    assert "write jnp.where(x > 0, a, b) or jax.lax.cond" in caught.value.__notes__[1]


def test_the_host_fields_are_out_of_reach_inside_the_step():
    for field in ("epoch", "batch_idx", "history"):

        def hook(batch_idx: Any, trainer: Any, state: Any, logs: Any, field: str = field) -> Any:
            getattr(state, field)
            return state, logs

        with pytest.raises(RuntimeError, match=f"state.{field} is a host field and has no value inside a traced hook"):
            fit_with("on_batch_end", hook, traced=True)


def test_the_trainer_keeps_epoch_position_and_history():
    for field in ({"epoch": 7}, {"batch_idx": 3}, {"history": ant.History([{"train_loss": 0.0}])}):
        with pytest.raises(CallbackReturnError, match="those are the trainer's. To end the run early"):
            fit_with(
                "on_epoch_end",
                lambda e, t, state, logs, field=field: (
                    state.replace(host=state.on_host()._replace(**field)),
                    logs,
                ),
            )


def test_the_key_never_changes_inside_the_step():
    def hook(batch_idx: Any, trainer: Any, state: Any, logs: Any) -> Any:
        return state.replace(key=jax.random.split(state.key)[0]), logs

    with pytest.raises(CallbackReturnError, match=r"draw from state.random_key\(name\)"):
        fit_with("on_batch_end", hook, traced=True)


def test_logs_are_read_only():
    def hook(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        logs["lr"] = 1.0
        return state, logs

    with pytest.raises(TypeError, match=r"logs are read-only; to publish 'lr', return \{\*\*logs, 'lr': value\}"):
        fit_with("on_epoch_end", hook)


def test_a_traced_memory_keeps_its_form_and_a_host_memory_need_not():
    def grow(epoch: Any, trainer: Any, state: Any, logs: Any) -> Any:
        memory = state.callback_states["bad"]
        return state.with_callback_state("bad", {"more": memory}), logs

    state, _ = fit_with("on_epoch_end", grow, init=lambda state: {"text": "anything"})
    assert state.callback_states["bad"] == {"more": {"text": "anything"}}
    with pytest.raises(CallbackReturnError, match=r"state.callback_states\['bad'\] of another structure"):
        fit_with("on_epoch_end", grow, traced=True, init=lambda state: {"count": 0})


def test_a_memory_whose_keys_cannot_be_sorted_is_named():
    def hook(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        return state.with_callback_state("bad", {"a": 1, 3: 2}), logs

    unsortable = r"is no pytree: the keys of a dict in it cannot be sorted, as when some are str and some int"
    with pytest.raises(TypeError, match=f"what init of callback 'bad' returned {unsortable}"):
        fit_with("on_epoch_end", hook, init=lambda state: {"a": 1, 3: 2})
    with pytest.raises(TypeError, match=rf"on_epoch_end returned state.callback_states\['bad'\], which {unsortable}"):
        fit_with("on_epoch_end", hook, init=lambda state: {})


def test_a_callback_without_init_has_no_memory():
    def hook(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        return state.with_callback_state("bad", 1), logs

    with pytest.raises(KeyError, match="no callback named 'bad' has a memory here"):
        fit_with("on_epoch_end", hook)


def test_an_exception_in_init_names_the_callback():
    with pytest.raises(ZeroDivisionError) as caught:
        fit_with("on_epoch_end", lambda *a: a[-2:], init=lambda state: 1 / 0)
    assert caught.value.__notes__ == ["in init of callback 'bad'"]


def test_host_hooks_may_change_the_weights_with_plain_numpy():
    def double(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        return state.replace(params=jax.tree.map(lambda x: 2 * np.asarray(x), state.params)), logs

    state, _ = fit_with("on_epoch_end", double)
    plain, _ = fit_with("on_epoch_end", lambda *arguments: arguments[-2:])
    for doubled, leaf in zip(jax.tree.leaves(state.params), jax.tree.leaves(plain.params), strict=True):
        assert isinstance(doubled, jax.Array)
        np.testing.assert_array_equal(doubled, 2 * leaf)


def test_traced_and_host_callbacks_see_the_other_ones_memories():
    def count(epoch: Any, trainer: Any, state: Any, logs: Any) -> Any:
        return state.with_callback_state("traced", state.callback_states["traced"] + 1), logs

    def note(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        seen = f"{state.callback_states['host']}{int(state.callback_states['traced'])}"
        return state.with_callback_state("host", seen), logs

    a_trainer = trainer(
        ant.Callback(name="traced", traced=True, init=lambda state: 0, on_epoch_end=count),
        host("host", init=lambda state: "seen:", on_epoch_end=note),
    )
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 3)
    assert state.callback_states["host"] == "seen:123"


def test_at_every_hook_on_the_host_a_callback_is_given_the_state_that_the_one_before_it_returned():
    """Also in `on_exception` where a callback between them fails at it."""
    names, seen = [*HOST_NAMES, "on_exception"], []

    def marking(name: str) -> Any:
        return lambda *arguments: (arguments[-2].with_callback_state("first", name), arguments[-1])

    def looking(name: str) -> Any:
        return lambda *arguments: (seen.append((name, arguments[-2].callback_states["first"])), arguments[-2:])[1]

    def fail(*arguments: Any) -> Any:
        raise InterruptedError

    marks: Any = {name: marking(name) for name in names}
    looks: Any = {name: looking(name) for name in names}
    a_trainer = trainer(
        host("first", init=lambda state: "", **marks),
        host("between", on_exception=fail),
        host("second", **looks),
        host("fails", on_train_end=fail),
    )
    with pytest.raises(InterruptedError):
        a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 1, batches(1))
    assert all(mark == name for name, mark in seen), seen
    assert {name for name, _ in seen} == set(names)


def test_at_every_hook_in_compiled_code_a_callback_is_given_the_state_that_the_one_before_it_returned():
    names = [name for name in HOST_NAMES if name != "on_checkpoint"] + GRADIENT_NAMES

    def hooks_that(change: Any) -> Any:
        def hook_of(number: int, name: str) -> Any:
            def hook(*arguments: Any) -> Any:
                state, *rest = arguments[-len(HOOKS[name].values) :]
                return change(state, number), *rest

            return hook

        return {name: hook_of(number, name) for number, name in enumerate(names)}

    def mark(state: Any, number: int) -> Any:
        return state.with_callback_state("first", jnp.int32(number))

    def look(state: Any, number: int) -> Any:
        marked = state.callback_states["first"] == number
        return state.with_callback_state("second", state.callback_states["second"].at[number].set(marked))

    a_trainer = trainer(
        ant.Callback(name="first", traced=True, init=lambda state: -1, **hooks_that(mark)),
        ant.Callback(name="second", traced=True, init=lambda state: jnp.zeros(len(names), bool), **hooks_that(look)),
    )
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 1, batches(1))
    marked = state.callback_states["second"]
    assert all(marked), [name for name, was in zip(names, marked, strict=True) if not was]
