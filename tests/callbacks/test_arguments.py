"""A bad argument is refused by its factory, where it is written, with the value and what is allowed."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ant_jax as ant
from ant_jax._arguments import check_count, check_flag, check_function, check_path


library: Any = ant.callbacks

PATHS = ("", None, 3)
FUNCTIONS = (3, "f", lambda one, two, three, four: None)
FLAGS = ("no", 3, None)
COUNTS = (0, -1, 2.0, True, "3")
NAMES = ("", 3)


class Ignoring(ant.writers.Writer):
    def write_scalars(self, step: int, scalars: Any, *, epoch: int) -> None:
        pass


# Factory, argument, a way to call it with a value for that argument, values that are not allowed.
BAD: list[tuple[str, str, Callable[[Any], Any], tuple[Any, ...]]] = [
    ("adaptive_grad_clip", "clipping", lambda bad: library.adaptive_grad_clip(bad), (0, math.inf, "1")),
    ("adaptive_grad_clip", "eps", lambda bad: library.adaptive_grad_clip(eps=bad), (0, math.nan)),
    ("batch_size_schedule", "sizes", lambda bad: library.batch_size_schedule(bad), ({}, {1: 8}, 8)),
    ("batch_size_schedule", "sizes[0]", lambda bad: library.batch_size_schedule({0: bad}), COUNTS),
    ("batch_size_schedule", "per", lambda bad: library.batch_size_schedule({0: 8}, per=bad), ("step", 3)),
    ("chain", "callback", lambda bad: library.chain(bad), (3,)),
    ("checkpoint", "directory", lambda bad: library.checkpoint(bad), PATHS),
    *(
        ("checkpoint", argument, lambda bad, argument=argument: library.checkpoint("a", **{argument: bad}), values)
        for argument, values in {
            "every": COUNTS,
            "every_epochs": COUNTS,
            "every_seconds": (0, "3"),
            "keep": COUNTS,
            "keep_best": COUNTS,
            "monitor": NAMES,
            "mode": ("least", None),
            "save_last": FLAGS,
            "allow_nonfinite": FLAGS,
            "clock": FUNCTIONS,
        }.items()
    ),
    ("clip_by_global_norm", "max_norm", lambda bad: library.clip_by_global_norm(bad), (0, "1", True)),
    ("clip_by_value", "max_value", lambda bad: library.clip_by_value(bad), (0, "1")),
    ("csv_log", "path", lambda bad: library.csv_log(bad), (*PATHS, ".")),
    ("csv_log", "every", lambda bad: library.csv_log("a.csv", every=bad), COUNTS),
    *(
        ("early_stopping", argument, lambda bad, argument=argument: library.early_stopping(**{argument: bad}), values)
        for argument, values in {
            "monitor": NAMES,
            "patience": COUNTS,
            "min_delta": (-1, "1"),
            "mode": ("least",),
            "baseline": (math.nan, "1"),
            "start_epoch": (-1, 2.0),
            "restore_best": FLAGS,
        }.items()
    ),
    ("ema", "decay", lambda bad: library.ema(bad), (0, 1, "1")),
    ("ema", "evaluate", lambda bad: library.ema(evaluate=bad), FLAGS),
    ("every", "batches", lambda bad: library.every(library.centralize(), batches=bad), (-1, 2.0)),
    ("every", "epochs", lambda bad: library.every(library.csv_log("a.csv"), epochs=bad), (-1, 2.0)),
    ("freeze", "filter", lambda bad: library.freeze(bad), ("", ["a", ""], 3, lambda: True)),
    ("from_optax", "GradientTransformation", lambda bad: library.from_optax(bad), (3,)),
    ("gradient_noise", "eta", lambda bad: library.gradient_noise(bad), (-1, "1")),
    ("gradient_noise", "gamma", lambda bad: library.gradient_noise(gamma=bad), (-1, "1")),
    ("gradient_statistics", "per_layer", lambda bad: library.gradient_statistics(per_layer=bad), FLAGS),
    ("gradient_statistics", "histograms", lambda bad: library.gradient_statistics(histograms=bad), FLAGS),
    ("json_log", "path", lambda bad: library.json_log(bad), (*PATHS, ".")),
    ("json_log", "every", lambda bad: library.json_log("a.json", every=bad), COUNTS),
    ("learning_rate_schedule", "schedule", lambda bad: library.learning_rate_schedule(bad), (*FUNCTIONS, lambda: 1)),
    ("learning_rate_schedule", "per", lambda bad: library.learning_rate_schedule(abs, per=bad), ("batch",)),
    ("learning_rate_schedule", "hyperparam", lambda bad: library.learning_rate_schedule(abs, hyperparam=bad), NAMES),
    ("log_hyperparams", "names[0]", lambda bad: library.log_hyperparams(bad), (*NAMES, None)),
    ("log_to", "writer", lambda bad: library.log_to(bad), (3, "a.csv", ant.writers.CSVWriter)),
    ("log_to", "every", lambda bad: library.log_to(Ignoring(), every=bad), COUNTS),
    ("log_to", "epochs", lambda bad: library.log_to(Ignoring(), epochs=bad), FLAGS),
    ("log_progress", "every", lambda bad: library.log_progress(bad), COUNTS),
    ("log_progress", "printer", lambda bad: library.log_progress(printer=bad), FUNCTIONS),
    ("log_progress", "clock", lambda bad: library.log_progress(clock=bad), FUNCTIONS),
    ("memory", "reader", lambda bad: library.memory(reader=bad), FUNCTIONS),
    ("mlflow", "experiment", lambda bad: library.mlflow(bad), (*NAMES, None)),
    ("mlflow", "tracking_uri", lambda bad: library.mlflow(tracking_uri=bad), NAMES),
    ("mlflow", "every", lambda bad: library.mlflow(every=bad), COUNTS),
    ("plot_history", "path", lambda bad: library.plot_history(bad), (*PATHS, ".")),
    ("plot_history", "suffix", lambda bad: library.plot_history(f"a{bad}"), (".txt",)),
    ("plot_history", "names[1]", lambda bad: library.plot_history("a.png", "loss", bad), NAMES),
    ("profile", "directory", lambda bad: library.profile(bad), PATHS),
    ("profile", "start", lambda bad: library.profile("a", start=bad), (-1, 2.0)),
    ("profile", "steps", lambda bad: library.profile("a", steps=bad), COUNTS),
    ("profile", "epoch", lambda bad: library.profile("a", epoch=bad), (-1, 2.0)),
    ("profile_steps", "every", lambda bad: library.profile_steps(every=bad), COUNTS),
    ("profile_steps", "printer", lambda bad: library.profile_steps(printer=bad), FUNCTIONS),
    ("profile_steps", "clock", lambda bad: library.profile_steps(clock=bad), FUNCTIONS),
    ("progress_bar", "file", lambda bad: library.progress_bar(file=bad), ("x", 3)),
    ("progress_bar", "clock", lambda bad: library.progress_bar(clock=bad), FUNCTIONS),
    *(
        ("reduce_on_plateau", name, lambda bad, name=name: library.reduce_on_plateau(**{name: bad}), values)
        for name, values in {
            "monitor": NAMES,
            "factor": (0, 1, "1"),
            "patience": (-1, 2.0),
            "mode": ("least",),
            "threshold": (-1,),
            "threshold_mode": ("share",),
            "cooldown": (-1, 2.0),
            "min_value": (-1,),
            "eps": (-1,),
            "hyperparam": NAMES,
        }.items()
    ),
    ("roll_back", "every", lambda bad: library.roll_back(every=bad), COUNTS),
    ("roll_back", "times", lambda bad: library.roll_back(times=bad), COUNTS),
    ("skip_nonfinite", "max_consecutive", lambda bad: library.skip_nonfinite(max_consecutive=bad), COUNTS),
    ("stop_at", "threshold", lambda bad: library.stop_at(bad), (math.nan, "1")),
    ("stop_at", "monitor", lambda bad: library.stop_at(1.0, bad), NAMES),
    ("stop_at", "mode", lambda bad: library.stop_at(1.0, mode=bad), ("least",)),
    ("stop_at", "per", lambda bad: library.stop_at(1.0, per=bad), ("step",)),
    ("swa", "start_epoch", lambda bad: library.swa(bad), (-1, 2.0)),
    ("swa", "evaluate", lambda bad: library.swa(1, evaluate=bad), FLAGS),
    ("tensorboard", "directory", lambda bad: library.tensorboard(bad), PATHS),
    ("tensorboard", "every", lambda bad: library.tensorboard("a", every=bad), COUNTS),
    ("throughput", "peak_flops", lambda bad: library.throughput(peak_flops=bad), (0, "1")),
    ("throughput", "clock", lambda bad: library.throughput(clock=bad), FUNCTIONS),
    ("time_limit", "seconds", lambda bad: library.time_limit(bad), (0, "1")),
    ("time_limit", "clock", lambda bad: library.time_limit(1.0, clock=bad), FUNCTIONS),
    ("tolerate", "failures", lambda bad: library.tolerate(library.csv_log("a.csv"), failures=bad), COUNTS),
    ("wandb", "project", lambda bad: library.wandb(bad), NAMES),
    ("wandb", "every", lambda bad: library.wandb(every=bad), COUNTS),
    ("wandb", "tag", lambda bad: library.wandb("a", tag=bad), ("baseline",)),
    ("when", "predicate", lambda bad: library.when(bad, library.centralize()), (*FUNCTIONS, lambda: 1)),
]

# The factories that are log_to with a writer, which checks what it is given.
WRITERS = {
    "csv_log": "CSVWriter",
    "json_log": "JSONLinesWriter",
    "mlflow": "MLflowWriter",
    "tensorboard": "TensorBoardWriter",
    "wandb": "WandbWriter",
}
WITHOUT_ARGUMENTS = {"centralize", "gradient_norm", "terminate_on_nan", "zero_nans"}


def test_every_factory_is_there():
    factories = {name for name, item in vars(library).items() if callable(item) and not isinstance(item, type)}
    assert {factory for factory, *_ in BAD} | WITHOUT_ARGUMENTS == factories


@pytest.mark.parametrize(
    ("factory", "argument", "call", "value"),
    [
        pytest.param(factory, argument, call, value, id=f"{factory}-{argument}-{number}")
        for factory, argument, call, values in BAD
        for number, value in enumerate(values)
    ],
)
def test_a_bad_argument_is_refused(factory, argument, call, value):
    with pytest.raises((TypeError, ValueError)) as caught:
        call(value)
    message = str(caught.value)
    assert argument in message
    assert repr(value) in message
    if factory != "chain":  # its error is about one of what it is made of
        owners = {factory} if argument in ("every", "epochs") else {factory, WRITERS.get(factory, factory)}
        assert message.partition(": ")[0] in owners
    assert re.search("must be|has no argument|expected|is not an ant_jax.Callback", message)


@pytest.mark.parametrize("factory", sorted({factory for factory, *_ in BAD} | WITHOUT_ARGUMENTS))
def test_a_bad_name_is_refused(factory):
    calls = {
        "batch_size_schedule": lambda name: library.batch_size_schedule({0: 8}, name=name),
        "clip_by_global_norm": lambda name: library.clip_by_global_norm(1.0, name=name),
        "clip_by_value": lambda name: library.clip_by_value(1.0, name=name),
        "freeze": lambda name: library.freeze("a", name=name),
        "from_optax": lambda name: library.from_optax(__import__("optax").centralize(), name=name),
        "learning_rate_schedule": lambda name: library.learning_rate_schedule(abs, name=name),
        "chain": lambda name: library.chain(library.centralize(), name=name),
        "log_to": lambda name: library.log_to(Ignoring(), name=name),
        "swa": lambda name: library.swa(1, name=name),
        "stop_at": lambda name: library.stop_at(1.0, name=name),
        "time_limit": lambda name: library.time_limit(1.0, name=name),
        **{
            path: lambda name, path=path: getattr(library, path)("a.png", name=name)
            for path in ("checkpoint", "csv_log", "json_log", "plot_history", "profile", "tensorboard")
        },
    }
    if factory in ("every", "tolerate", "when"):  # the name is that of the callback that they are given
        return
    with pytest.raises(TypeError, match="name must be a non-empty string, got 3"):
        calls.get(factory, lambda name: getattr(library, factory)(name=name))(3)


def test_what_is_allowed_passes(tmp_path):
    check_path("a", "b", tmp_path)
    check_path("a", "b", tmp_path / "new.csv", file=True)
    check_flag("a", "b", np.bool_(True))
    check_function("a", "b", str, "one", "two")  # has no signature
    check_function("a", "b", lambda one, *, two=2: one, "one")
    with pytest.raises(TypeError, match=r"must be a function of \(one\), got .* which takes \(one, \*, two\)"):
        check_function("a", "b", lambda one, *, two: one, "one")


def test_a_whole_number_of_numpy_is_one():
    count = check_count("a", "b", np.int64(3))
    assert (type(count), count) == (int, 3)
    assert library.csv_log("a.csv", every=np.int32(3)).every == 3
    assert library.profile_steps(every=np.int64(5)).every == 5
