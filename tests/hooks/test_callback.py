"""Making callbacks: names, both styles, what is refused."""

import dataclasses
import re
from typing import Any, cast

import pytest

import ant_jax as ant
from ant_jax._hooks.callback import check_callbacks, hooks_of


@dataclasses.dataclass(frozen=True)
class Patience(ant.Callback):
    patience: int = 5
    every: int | range | None = 10

    def on_epoch_end(self, epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        return state, logs


def test_a_subclass_has_its_name_in_snake_case_and_only_the_hooks_that_it_defines():
    callback = Patience(patience=3)
    assert callback.name == "patience"
    assert list(hooks_of(callback)) == ["on_epoch_end"]
    assert (callback.patience, callback.every, callback.traced) == (3, 10, False)


def test_a_subclass_may_make_its_name_a_field():
    @dataclasses.dataclass(frozen=True)
    class Named(ant.Callback):
        name: str = "first"

    assert check_callbacks([Named(), Named(name="second")])[1].name == "second"


def test_a_type_checker_sees_a_wrong_return():
    """Pyright refuses an ignored error that is none, so each line holds that there is one."""
    ant.Callback(name="none", on_train_end=lambda trainer, state, logs: None)  # pyright: ignore[reportArgumentType]
    ant.Callback(name="order", on_epoch_end=lambda epoch, trainer, state, logs: (logs, state))  # pyright: ignore[reportArgumentType]
    ant.Callback(name="two", on_backward_end=lambda i, trainer, state, grads, logs: (state, logs))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="on_batch_end is called with"):
        ant.Callback(name="few", on_batch_end=lambda i, state, logs: (state, logs))  # pyright: ignore[reportArgumentType]
    ant.Callback(
        name="right", on_backward_end=lambda i, trainer, state, grads, logs: (state, grads, {**logs, "x": 1.0})
    )


def test_every_hook_can_be_given_as_a_function():
    function = lambda *arguments: arguments[-2:]  # noqa: E731
    callback = ant.Callback(name="all", **dict.fromkeys(ant.HOOKS, function))  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert hooks_of(callback) == dict.fromkeys(ant.HOOKS, function)


def test_a_misspelt_hook_raises_when_the_callback_is_made():
    with pytest.raises(
        TypeError, match="Callback 'typo' has no hook or argument named 'on_epoch_edn'; did you mean 'on_epoch_end'?"
    ):
        ant.Callback(name="typo", on_epoch_edn=print)  # pyright: ignore[reportCallIssue]
    with pytest.raises(
        TypeError, match="class Typo has no hook or argument named .on_backwards_end.; did you mean 'on_backward_end'?"
    ):

        class Typo(ant.Callback):
            def on_backwards_end(self) -> None: ...

    with pytest.raises(TypeError, match="the hooks are on_train_begin, on_epoch_begin"):
        ant.Callback(name="typo", zzz=print)  # pyright: ignore[reportCallIssue]


def test_a_callback_cannot_change():
    callback = ant.Callback(name="fixed")
    with pytest.raises(TypeError, match=r"callback 'fixed' cannot change .* state.callback_states\['fixed'\]"):
        callback.wait = 1

    class Mutable(ant.Callback):
        def __init__(self):
            self.wait = 0

    with pytest.raises(TypeError, match=r"@dataclasses.dataclass\(frozen=True\)"):
        Mutable()


BAD_EVERY = [0, -1, 1.5, True, "often", range(0), range(0, 9, 3), range(-1, 3)]


@pytest.mark.parametrize("every", BAD_EVERY, ids=repr)
def test_a_bad_every_is_refused(every):
    got = re.escape(repr(every))
    with pytest.raises(ValueError, match=rf"'rare': every must be a whole number of batches, a range .*, got {got}"):
        ant.Callback(name="rare", every=every)
    with pytest.raises(ValueError, match="every must be a whole number"):
        check_callbacks([Patience(every=every)])


def test_a_traced_callback_has_no_every():
    with pytest.raises(ValueError, match="is traced, so it runs in every step; every=7 is for host ones"):
        ant.Callback(name="both", traced=True, every=7)


def test_a_hook_that_cannot_be_called_raises_when_the_callback_is_made():
    message = (
        r"on_epoch_end is called with \(epoch, trainer, state, logs\), and cannot be: it takes \(epoch, trainer, logs"
    )
    with pytest.raises(TypeError, match=message):
        ant.Callback(name="torch", on_epoch_end=cast(Any, lambda epoch, trainer, logs=None: None))

    @dataclasses.dataclass(frozen=True)
    class Torch(ant.Callback):
        def on_train_begin(self, trainer: Any, logs: Any = None, more: Any = None, *, needed: Any) -> None: ...

    with pytest.raises(TypeError, match="'torch': on_train_begin is called with"):
        check_callbacks([Torch()])
    with pytest.raises(TypeError, match=r"callbacks must be a sequence; write callbacks=\[...\]"):
        check_callbacks(ant.callbacks.ema())  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="has no hook or argument named 'onEpochEnd'; did you mean 'on_epoch_end'?"):

        class Camel(ant.Callback):
            def onEpochEnd(self) -> None: ...  # noqa: N802


def test_a_list_of_callbacks_is_checked():
    with pytest.raises(ValueError, match="two callbacks are named 'same'; a name keys the callback's memory"):
        check_callbacks([ant.Callback(name="same"), ant.Callback(name="same")])
    with pytest.raises(TypeError, match=r"callbacks\[1\] is not an ant_jax.Callback but .*ema.*; call the factory"):
        check_callbacks([ant.Callback(name="fine"), ant.callbacks.ema])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="'x': on_epoch_end must be a function, got 3"):
        ant.Callback(name="x", on_epoch_end=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="a callback's name must be a non-empty string"):
        ant.Callback()
