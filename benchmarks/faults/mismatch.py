"""Checkpoints of something else: refused, with the path of what differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ant_jax as ant
from benchmarks.faults.trials import Bench, Row, expect


FEATURES, CLASSES, BATCH = 4, 3, 8


def model(names: tuple[str, ...] = ("kernel", "bias"), dtype: Any = jnp.float32, extra: Any = None) -> Any:
    """A linear model whose parameters are called so."""
    kernel, bias = names

    def init(key: Any, inputs: Any) -> Any:
        params = {kernel: jax.random.normal(key, (FEATURES, CLASSES), dtype), bias: jnp.zeros(CLASSES, dtype)}
        return params | ({} if extra is None else {"extra": jnp.zeros(extra)}), {"mean": jnp.zeros(FEATURES)}

    def apply(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
        return inputs @ params[kernel] + params[bias], model_state

    return init, apply


def without_bias() -> Any:
    init, _ = model()
    return (
        lambda key, inputs: ({"kernel": init(key, inputs)[0]["kernel"]}, init(key, inputs)[1]),
        lambda params, model_state, inputs, key: (inputs @ params["kernel"], model_state),
    )


def without_model_state() -> Any:
    init, apply = model()
    return lambda key, inputs: (init(key, inputs)[0], {}), lambda p, s, x, k: (apply(p, s, x, k)[0], {})


def counting(memory: Any, traced: bool = True) -> ant.Callback:
    same = lambda epoch, trainer, state, logs: (state, logs)  # noqa: E731
    return ant.Callback(name="counting", init=lambda state: memory, traced=traced, on_epoch_end=same)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A trainer that what was saved does not fit, and the path that the error must name."""

    path: str
    options: dict[str, Any]
    saved: dict[str, Any] = dataclasses.field(default_factory=dict)


counts = {"callbacks": [counting({"count": jnp.int32(0)})]}
KINDS = {
    "a parameter renamed": Kind("params/weight: missing", {"model": model(("weight", "bias"))}),
    "a parameter more": Kind("params/extra: missing", {"model": model(extra=2)}),
    "a parameter less": Kind("params/bias: unexpected", {"model": without_bias()}),
    "a parameter of another shape": Kind(
        "params/extra: expected", {"model": model(extra=2)}, {"model": model(extra=3)}
    ),
    "a parameter of another dtype": Kind("params/kernel: expected", {"model": model(dtype=jnp.bfloat16)}),
    "no model state": Kind("model_state/mean: unexpected", {"model": without_model_state()}),
    "another optimizer": Kind("opt_state/0/mu/kernel: ", {"optimizer": optax.sgd(0.1, momentum=0.9)}),
    "gradient accumulation": Kind("accumulator/", {"gradient_accumulation_steps": 3}),
    "another precision": Kind("loss_scale/", {"precision": "float16"}),
    "a memory of another form": Kind(
        "callback_states/counting/count: ", {"callbacks": [counting({"count": jnp.float32(0)})]}, counts
    ),
    "a memory that is on the host by now": Kind(
        "callback_states/counting/count: unexpected", {"callbacks": [counting({"count": 0}, traced=False)]}, counts
    ),
}


def trainer(options: dict[str, Any]) -> ant.Trainer:
    settings = {"optimizer": optax.adam(0.1), "criterion": optax.softmax_cross_entropy_with_integer_labels}
    return ant.Trainer(**{"model": model(), **settings, "progress_bar": False, **options})


def loader(seed: int = 0) -> ant.ArrayLoader:
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(4 * BATCH, FEATURES)).astype(np.float32)
    return ant.ArrayLoader((inputs, rng.integers(0, CLASSES, 4 * BATCH).astype(np.int32)), BATCH)


def start(a_trainer: ant.Trainer) -> ant.TrainState:
    return a_trainer.init(next(iter(loader())))


def rows(bench: Bench) -> Iterator[Row]:
    trials = bench.trials("mismatched checkpoints: refused with the path named", 12)
    for name, kind in KINDS.items():
        with trials.one(name) as directory:
            before = trainer(kind.saved)
            before.save(directory, start(before))
            after = trainer(kind.options)
            for like in (None, start(after)):
                # Without a state to compare with, whether parameters are the model's is known when it sees a batch.
                if like is not None or not kind.path.startswith(("params", "model_state")):
                    refused(kind.path, lambda like=like, after=after: after.restore(directory, like=like))
            refused(kind.path, lambda after=after: after.fit(start(after), loader(), 1, resume=directory))
    for name, check in (("another kind of key", other_key), ("other data inside an epoch", other_data)):
        with trials.one(name) as directory:
            check(directory)
    yield trials.row()


def refused(path: str, attempt: Callable[[], Any]) -> None:
    try:
        attempt()
    except ant.StateMismatch as error:
        expect(path in str(error), f"{path!r} is not named in: {error}")
    else:
        raise AssertionError("it was not refused")


def other_key(directory: Any) -> None:
    a_trainer = trainer({})
    state = start(a_trainer)
    a_trainer.save(directory, state.replace(key=jax.random.key(0, impl="rbg")))
    refused("key: expected a random key of kind threefry", lambda: a_trainer.restore(directory, like=state))
    refused("key: expected a random key of kind threefry", lambda: a_trainer.fit(state, loader(), 1, resume=directory))


def other_data(directory: Any) -> None:
    saving = trainer({"callbacks": [ant.callbacks.checkpoint(directory, every=2), failing()]})
    try:
        saving.fit(start(saving), loader(), 1)
    except ZeroDivisionError:
        pass
    refused("crc32: expected", lambda: trainer({}).fit(start(trainer({})), loader(seed=1), 1, resume=directory))


def failing() -> ant.Callback:
    return ant.Callback(name="failing", every=3, on_batch_end=lambda i, trainer, state, logs: (state, {"x": 1 // 0}))
