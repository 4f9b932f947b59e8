"""Numbers gone bad, at five places and five instants, under every policy: no checkpoint on disk has one."""

from __future__ import annotations

import collections
import contextlib
import io
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ant_jax as ant
from ant_jax._checkpoint.reading import read
from ant_jax._finite import NonFiniteError
from ant_jax._trees import named_leaves
from benchmarks.faults.children import committed
from benchmarks.faults.trials import Bench, Row, Trials, expect


PLACES = ("loss", "gradient", "parameters", "optimizer", "batch")
EPOCHS, BATCHES, EVERY, BATCH = 3, 8, 4, 8
LAST = EPOCHS * BATCHES - 1
# The step at which the number goes bad: the first, the last, one that is saved after, one at an epoch's edge, any.
INSTANTS = {"first": 0, "last": LAST, "saved": EVERY - 1, "edge": BATCHES, "any": 13}


def policies() -> dict[str, Any]:
    found: dict[str, Any] = {"raise": ant.callbacks.terminate_on_nan, "skip": ant.callbacks.skip_nonfinite}
    roll_back = getattr(ant.callbacks, "roll_back", None)
    if roll_back is not None:
        found["roll back"] = lambda: roll_back(every=EVERY, times=3)
    return found


def rows(bench: Bench) -> Iterator[Row]:
    for policy, make in policies().items():
        trials = bench.trials(f"numbers gone bad, policy {policy}: none on disk", len(PLACES) * len(INSTANTS))
        counts: collections.Counter[str] = collections.Counter()
        for place in PLACES[: bench.count(len(PLACES))]:
            at_place(bench, trials, counts, make, place)
        yield trials.row(**counts)
    if "roll back" not in policies():
        print("numbers gone bad, policy roll back: not run, ant_jax.callbacks has no roll_back", flush=True)


def at_place(bench: Bench, trials: Trials, counts: Any, make: Any, place: str) -> None:
    """All instants with one trainer, and so one compilation."""
    directory = bench.root / "nonfinite"
    poison = poisoning(place)
    trainer = ant.Trainer(
        model(),
        optax.adam(0.01),
        optax.softmax_cross_entropy_with_integer_labels,
        callbacks=[poison, make(), ant.callbacks.checkpoint(directory, every=EVERY, keep=100)],
        progress_bar=False,
    )
    for instant, step in INSTANTS.items():
        with trials.one(f"{place}, {instant}"):
            shutil.rmtree(directory, ignore_errors=True)
            counts[outcome(trainer, step, place)] += 1
            check_disk(directory)
    shutil.rmtree(directory, ignore_errors=True)


def outcome(trainer: ant.Trainer, step: int, place: str) -> str:
    """Train with the number going bad at a step; the run must end well, or with an error that says what is bad."""
    inputs, targets = data()
    if place == "batch":
        inputs = inputs.copy()
        inputs[step % BATCHES * BATCH] = np.nan
    state = trainer.init((inputs[:1], targets[:1]))
    state = state.with_callback_state("poison", {"at": jnp.int32(step)})
    loader = ant.ArrayLoader((inputs, targets), BATCH, shuffle=False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            state, _ = trainer.fit(state, loader, EPOCHS)
    except NonFiniteError as error:
        expect("not finite" in str(error), f"the error does not say so: {error}")
        return "ended_with_the_error"
    bad = [name for name, leaf in named_leaves(state.params).items() if not np.isfinite(leaf).all()]
    expect(not bad, f"the run ended without an error, and {bad} are not finite")
    return "ended_well"


def poisoning(place: str) -> ant.Callback:
    """Makes a number bad, at the step that its memory says."""

    def on_backward_end(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        now = state.step == state.callback_states["poison"]["at"]

        def spoilt(leaf: Any) -> Any:
            return jnp.where(now, jnp.nan, leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        if place == "loss":
            logs = {**logs, "loss": spoilt(logs["loss"])}
        elif place == "gradient":
            grads = {**grads, "bias": spoilt(grads["bias"])}
        elif place == "parameters":
            state = state.replace(params={**state.params, "kernel": spoilt(state.params["kernel"])})
        elif place == "optimizer":
            state = state.replace(opt_state=jax.tree.map(spoilt, state.opt_state))
        return state, grads, logs

    return ant.Callback(
        name="poison", init=lambda state: {"at": jnp.int32(-1)}, traced=True, on_backward_end=on_backward_end
    )


def check_disk(directory: pathlib.Path) -> None:
    """Read all that is there."""
    for step in committed(directory):
        arrays = read(directory, step).arrays
        bad = ["/".join(keys) for keys, leaf in arrays.items() if keys[0] == "params" and not np.isfinite(leaf).all()]
        expect(not bad, f"in the checkpoint of step {step} {bad} are not finite")


def model() -> Any:
    def init(key: Any, inputs: Any) -> Any:
        return {"kernel": jax.random.normal(key, (4, 3)), "bias": jnp.zeros(3)}, {}

    def apply(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
        return inputs @ params["kernel"] + params["bias"], model_state

    return init, apply


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    examples = BATCHES * BATCH
    return rng.normal(size=(examples, 4)).astype(np.float32), rng.integers(0, 3, examples).astype(np.int32)
