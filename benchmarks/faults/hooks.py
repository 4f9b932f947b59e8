"""Exceptions in every hook, and bad returns of every hook: each an error that names the hook."""

from __future__ import annotations

import contextlib
import io
import itertools
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp

import ant_jax as ant
from ant_jax._hooks.callback import HOOKS
from ant_jax.testing._compare import difference
from ant_jax.testing._problem import Problem, problem
from benchmarks.faults.children import unfinished
from benchmarks.faults.trials import Bench, Row, expect


EPOCHS = 2
NAMES = tuple(name for name in HOOKS if name != "on_exception")


class OnPurpose(Exception):
    pass


def rows(bench: Bench) -> Iterator[Row]:
    yield exceptions(bench)
    yield bad_returns(bench)


def exceptions(bench: Bench) -> Row:
    """At the first call and at a later one, with one callback and with another one beside it."""
    kinds = list(itertools.product(NAMES, (1, 2), (False, True)))
    trials = bench.trials("exceptions in every hook: kept, named, resumed exactly", 36)
    whole = {alone: run(problem(*(() if alone else (ant.callbacks.ema(0.9),)))) for alone in (True, False)}
    for name, call, beside in kinds[:: max(1, round(1 / bench.scale))]:
        with trials.one(f"{name}, call {call}, {'another beside' if beside else 'alone'}") as directory:
            others = [ant.callbacks.ema(0.9)] if beside else []
            told: list[BaseException] = []
            failing = raising(name, call)
            run_that_fails(directory / "run", name, [failing, *others, told_to(told)])
            expect(len(told) == 1 and isinstance(told[0], OnPurpose), "the other callback was not told of it")
            mended = problem(*others, saving(directory / "run"))
            differs = difference(whole[not beside], run(mended, directory / "run"))
            expect(not differs, f"the run that went on with the hook mended ended otherwise: {differs}")
            expect(not unfinished(directory / "run"), "temporary directories are left")
    return trials.row(hooks=len(NAMES))


def run_that_fails(directory: pathlib.Path, name: str, callbacks: list[ant.Callback]) -> None:
    tiny = problem(*callbacks, saving(directory))
    try:
        run(tiny, directory)
        if name in ("on_train_begin", "on_train_end"):  # a later call is that of a later run
            shutil.rmtree(directory)
            run(tiny, directory)
    except OnPurpose as error:
        notes = " ".join(error.__notes__)
        expect(f"in {name} of callback 'failing'" in notes, f"the hook is not named: {notes}")
    else:
        raise AssertionError("the exception was lost")
    saving_again = problem().trainer.checkpointer(directory)  # raises if the directory is still locked
    saving_again.close()


def run(tiny: Problem, resume: pathlib.Path | None = None) -> ant.TrainState:
    with contextlib.redirect_stdout(io.StringIO()):
        return tiny.trainer.fit(tiny.state, tiny.train_loader, EPOCHS, tiny.val_loader, resume=resume)[0]


def saving(directory: pathlib.Path) -> ant.Callback:
    return ant.callbacks.checkpoint(directory, every=2)


def told_to(told: list[BaseException]) -> ant.Callback:
    def on_exception(exception: BaseException, trainer: Any, state: Any, logs: Any) -> Any:
        told.append(exception)
        return state, logs

    return ant.Callback(name="told", on_exception=on_exception)


def raising(name: str, call: int) -> ant.Callback:
    """A callback whose hook raises at that call of it; of a hook inside the step, at that tracing of it."""
    calls = itertools.count(1)

    def hook(*arguments: Any) -> Any:
        if next(calls) == call:
            raise OnPurpose(name)
        return arguments[2 if HOOKS[name].lead else 1 :]

    return ant.Callback(name="failing", **{name: with_parameters(name, hook)})


def with_parameters(name: str, hook: Callable[..., Any]) -> Any:
    """The hook with the parameters that it must have."""
    lead = HOOKS[name].lead
    parameters = ", ".join([*([lead] if lead else []), "trainer", *HOOKS[name].values])
    return eval(f"lambda {parameters}: hook({parameters})", {"hook": hook})


def bad_returns(bench: Bench) -> Row:
    """Every kind of bad return from every hook, before any parameter changes."""
    kinds = list(itertools.product(NAMES, BAD))
    trials = bench.trials("bad returns of every hook: named", 108)
    for name, kind in kinds[:: max(1, round(1 / bench.scale))]:
        with trials.one(f"{name}, {kind}"):
            refused(name, BAD[kind])
    return trials.row(hooks=len(NAMES), kinds=len(BAD))


def refused(name: str, spoil: Callable[..., Any]) -> None:
    def hook(*arguments: Any) -> Any:
        return spoil(*arguments[2 if HOOKS[name].lead else 1 :])

    tiny = problem(ant.Callback(name="failing", **{name: with_parameters(name, hook)}))
    try:
        run(tiny)
    except ant.CallbackReturnError as error:
        text = " ".join([str(error), *error.__notes__])
        expect(name in str(error) and "in " + name + " of callback 'failing'" in text, f"the hook is not named: {text}")
    else:
        raise AssertionError("it was not refused")


def spoilt(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Change the first array of what the hook is about: gradients, updates, or else parameters."""

    def spoil(*values: Any) -> Any:
        state, *tree, logs = values
        if tree:
            return state, change(tree[0]), logs
        return state.replace(params=change(state.params)), logs

    return spoil


def with_bias(change: Callable[[Any], Any]) -> Callable[..., Any]:
    return spoilt(lambda tree: {"dense": {**tree["dense"], "bias": change(tree["dense"]["bias"])}})


BAD: dict[str, Callable[..., Any]] = {
    "nothing": lambda *values: None,
    "the state alone": lambda *values: values[0],
    "a list": lambda *values: list(values),
    "one value more": lambda *values: (*values, None),
    "the wrong order": lambda *values: values[::-1],
    "a leaf less": spoilt(lambda tree: {"dense": {"kernel": tree["dense"]["kernel"]}}),
    "a leaf more": spoilt(lambda tree: {**tree, "more": jnp.zeros(3)}),
    "a scalar for an array": with_bias(jnp.sum),
    "another shape": with_bias(lambda leaf: leaf[None]),
    "half precision": with_bias(lambda leaf: leaf.astype(jnp.bfloat16)),
    "whole numbers": with_bias(lambda leaf: leaf.astype(jnp.int32)),
    "a log that is text": lambda *values: (*values[:-1], {**values[-1], "text": "text"}),
}
