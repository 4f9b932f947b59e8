"""Averages of the weights: what they are, and what evaluation makes of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import assert_bit_equal, batches, host, trainer

import ant_jax as ant
from ant_jax._trees import named_leaves


library = ant.callbacks


def test_ema_averages_after_every_update():
    a_trainer = trainer(library.ema(0.8))
    start = a_trainer.init(batches()[0])
    state, average = start, start.params
    for batch in batches(4):
        state, _ = a_trainer.train_step(state, batch)
        average = jax.tree.map(lambda old, new: 0.8 * old + 0.2 * new, average, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), _average(state), average)
    fitted, _ = a_trainer.fit(start, batches(4), 1)
    assert_bit_equal(fitted, state, "callback_states")


def _average(state: ant.TrainState, name: str = "ema") -> Any:
    return state.callback_states[name]["average"]


def skipping(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
    """Skip the batches whose inputs are far too large."""
    return state.skip_batch(when=logs["loss"] > 50), grads, logs


def test_ema_averages_updates_and_not_batches():
    """With accumulation, and where batches are skipped, also whole windows of them."""
    a_trainer = trainer(library.ema(0.8), host("skip", on_backward_end=skipping), gradient_accumulation_steps=2)
    loader = batches(7)
    for i in (1, 2, 3):  # the second batch of the first window, and the whole second one
        loader[i] = (1000 * loader[i][0], loader[i][1])
    start = a_trainer.init(loader[0])
    state, average = start, start.params
    for i, batch in enumerate(loader[:6]):
        before = state
        state, logs = a_trainer.train_step(state, batch)
        assert float(logs["step_skipped"]) == (i in (1, 2, 3))
        if i in (1, 5):  # an update
            assert np.any(state.params["kernel"] != before.params["kernel"])
            average = jax.tree.map(lambda old, new: 0.8 * old + 0.2 * new, average, state.params)
        else:
            assert_bit_equal(state, before, "params", "callback_states")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), _average(state), average)
    assert not state.callback_states["ema"]["updated"]
    # The last window of an epoch has one batch; and a run that goes on in the middle is the same run.
    whole, _ = a_trainer.fit(start, loader, 2)
    cut, _ = a_trainer.fit(start, loader, 1)
    cut, _ = a_trainer.fit(cut, loader, 2)
    assert_bit_equal(cut, whole)
    assert np.any(_average(whole)["kernel"] != whole.params["kernel"])


def test_a_step_that_overflows_is_no_update():
    a_trainer = trainer(library.ema(0.5), precision="float16")
    start = a_trainer.init(batches()[0])
    state, logs = a_trainer.train_step(start, (1e4 * batches()[0][0], batches()[0][1]))
    assert logs["step_skipped"] == 1
    assert_bit_equal(state, start, "params", "callback_states")


@pytest.fixture(scope="module", params=["ema", "swa"])
def evaluating(request) -> tuple[ant.Trainer, str, int]:
    """A trainer that evaluates an average, the average's name, and the first epoch whose end is evaluated with it."""
    callbacks = {
        "ema": [library.ema(0.7, evaluate=True)],
        "swa": [library.ema(0.7, name="other"), library.swa(1, evaluate=True)],
    }[request.param]
    return trainer(*callbacks, fuse=False), request.param, {"ema": 0, "swa": 2}[request.param]


@pytest.fixture(scope="module")
def bare() -> ant.Trainer:
    return trainer(fuse=False)


def test_evaluation_is_of_the_average_and_training_of_the_parameters(evaluating, bare):
    a_trainer, name, first = evaluating
    loader, val_loader = batches(2), batches(2, seed=1)
    start = a_trainer.init(loader[0])
    state, plain = start, bare.init(loader[0])
    expected: list[Any] = []
    for epoch in range(4):
        before = _average(state, name)  # SWA has those of the epochs before
        state, _ = a_trainer.fit(state, loader, epoch + 1, val_loader)
        plain, _ = bare.fit(plain, loader, epoch + 1)
        average = (before if epoch >= first else plain.params) if name == "swa" else _average(state, name)
        expected.append(bare.evaluate(plain.replace(params=average), val_loader)["val_loss"])
        assert_bit_equal(state, plain, "params", "opt_state")  # to the bit as without
        assert not state.callback_states[name]["swapped"]
    np.testing.assert_allclose(state.history.to_dict()["val_loss"], expected, rtol=1e-6)
    raw = bare.evaluate(plain, val_loader)["val_loss"]
    assert abs(raw - expected[-1]) > 1e-4
    # By hand it is the average, too: for SWA the one that this epoch's end is part of.
    by_hand = bare.evaluate(plain.replace(params=_average(state, name)), val_loader)
    np.testing.assert_allclose(a_trainer.evaluate(state, val_loader)["val_loss"], by_hand["val_loss"], rtol=1e-6)
    assert_bit_equal(a_trainer.fit(start, loader, 4, val_loader)[0], state)  # in one run and in four


def test_swa_is_the_mean_of_the_ends_of_epochs():
    ends: list[Any] = []

    def keep(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        ends.append(jax.tree.map(np.asarray, state.params))
        return state, logs

    # Windows of three do not fit into epochs of four batches: the last one is cut short.
    a_trainer = trainer(library.swa(2), host(on_epoch_end=keep), gradient_accumulation_steps=3)
    start = a_trainer.init(batches()[0])
    state = start
    for epochs in (1, 2, 3, 6):
        state, _ = a_trainer.fit(state, batches(4), epochs)
        memory = state.callback_states["swa"]
        assert int(memory["count"]) == max(0, epochs - 2)
        counted = ends[2:epochs] or [start.params]
        for name, leaf in memory["average"].items():
            mean = np.mean([end[name] for end in counted], axis=0)
            np.testing.assert_allclose(leaf, mean, rtol=1e-5, atol=1e-7)
    assert_bit_equal(a_trainer.fit(start, batches(4), 6)[0], state)


def begun(*callbacks: ant.Callback, **params: Any) -> ant.TrainState:
    """A state with these parameters and the memories of the callbacks."""
    model = (lambda key, inputs: (params, {}), lambda params, model_state, inputs, key: (inputs, model_state))
    return trainer(*callbacks, model=model, optimizer=optax.identity()).init(batches()[0])


MOVING = ("bfloat16", "float16", "float32", "float64", "complex64", "complex128")


@pytest.mark.parametrize("dtype", MOVING)
def test_an_average_of_parameters_of_any_dtype_moves(dtype):
    with jax.enable_x64("64" in dtype or "128" in dtype):
        ema: Any = library.ema(0.999)
        swa: Any = library.swa(0)
        start = begun(ema, swa, w=jnp.ones(3, dtype))

        def one(i: Any, state: ant.TrainState) -> ant.TrainState:
            moved = {name: (leaf + (i % 2 + 1).astype(leaf.dtype)) for name, leaf in start.params.items()}
            state = state.replace(params=moved)
            state, _, logs = ema.on_before_apply(i, None, state, moved, {})
            state, _ = ema.on_batch_end(i, None, state, logs)
            return swa.on_epoch_end(i, None, state, logs)[0]

        state = jax.jit(lambda state: jax.lax.fori_loop(0, 3000, one, state))(start.replace(host=None, stop=None))
        precise = jnp.dtype(jnp.float32 if "16" in dtype else dtype)
        ema_share = 1 - 0.999**3000
        for name, expected in (("ema", 1 + 1.5 * ema_share), ("swa", 2.5)):
            average = _average(state, name)
            assert average["w"].dtype == precise
            tolerance = 1e-12 if precise in (jnp.float64, jnp.complex128) else 3e-4
            np.testing.assert_allclose(average["w"], np.full(3, expected), rtol=tolerance + 5e-4 * (name == "ema"))


@pytest.mark.parametrize("decay", [0.999, ant.Hyperparam(0.999)])
def test_an_average_of_what_does_not_move_is_that(decay):
    with jax.enable_x64(True):
        ema: Any = library.ema(decay)
        swa: Any = library.swa(0)
        start = begun(ema, swa, real=jnp.full(3, 1 / 3), complex=jnp.full(3, 1 / 3 + 3j))

        def one(i: Any, state: ant.TrainState) -> ant.TrainState:
            state, _, logs = ema.on_before_apply(i, None, state, state.params, {})
            return swa.on_epoch_end(i, None, ema.on_batch_end(i, None, state, logs)[0], logs)[0]

        state = jax.jit(lambda state: jax.lax.fori_loop(0, 20_000, one, state))(start.replace(host=None, stop=None))
        for name in ("ema", "swa"):
            for leaf, param in zip(jax.tree.leaves(_average(state, name)), jax.tree.leaves(start.params), strict=True):
                np.testing.assert_allclose(leaf, param, rtol=1e-12)


def test_the_count_of_an_average_does_not_overflow():
    swa: Any = library.swa(0)
    state = begun(swa, w=jnp.ones(3))
    state = state.with_callback_state("swa", {**state.callback_states["swa"], "count": jnp.int32(2**31 - 1)})
    memory = swa.on_epoch_end(7, None, state, {})[0].callback_states["swa"]
    assert memory["count"] == 2**31 - 1
    np.testing.assert_array_equal(memory["average"]["w"], np.ones(3))


@pytest.mark.parametrize("average", [library.ema(0.5, evaluate=True), library.swa(0, evaluate=True)])
def test_an_average_of_a_low_precision_is_evaluated_in_it_and_lost_nowhere(average):
    a_trainer, bare = (trainer(*callbacks, fuse=False, precision="bfloat16") for callbacks in ([average], []))
    loader, val_loader = batches(3), batches(2, seed=1)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), a_trainer.init(loader[0]).params)
    state = start = a_trainer.init(loader[0], params=params)
    plain = bare.init(loader[0], params=params)
    kept: Any = None
    for epoch in range(3):
        before = _average(state, average.name) if average.name == "swa" and epoch else None
        state, history = a_trainer.fit(state, loader, epoch + 1, val_loader)
        plain, _ = bare.fit(plain, loader, epoch + 1)
        assert_bit_equal(state, plain, "params", "opt_state")
        kept = _average(state, average.name)
        assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(jnp.float32)}
        evaluated = before or (plain.params if average.name == "swa" else kept)
        evaluated = plain.replace(params=optax.tree.cast_like(evaluated, plain.params))
        assert history[-1]["val_loss"] == bare.evaluate(evaluated, val_loader)["val_loss"]
        by_hand = optax.tree.cast_like(kept, state.params)  # as the docstring says
        pairs = (a_trainer, state), (bare, plain)
        outputs = [one.predict(run.replace(params=by_hand), loader[0][0]) for one, run in pairs]
        np.testing.assert_array_equal(*outputs)
    assert_bit_equal(a_trainer.fit(start, loader, 3, val_loader)[0], state)
    assert any(np.any(leaf != leaf.astype(jnp.bfloat16).astype(jnp.float32)) for leaf in jax.tree.leaves(kept))


@pytest.mark.parametrize("holds_at", ["begin", "end"])
@pytest.mark.parametrize(
    "average",
    [
        lambda: library.ema(0.9, evaluate=True),
        lambda: library.swa(0, evaluate=True),
        lambda: library.chain(library.ema(0.9, evaluate=True)),
    ],
    ids=["ema", "swa", "chain"],
)
def test_a_condition_that_holds_at_one_end_of_an_evaluation_mixes_up_no_weights(average, holds_at, bare):
    def holds(state: Any, logs: Any) -> bool:
        return "train_loss" in logs or ("val_loss" in logs) == (holds_at == "end")

    a_trainer = trainer(library.when(holds, average()), fuse=False)
    loader, val_loader = batches(), batches(2, seed=1)
    state, history = a_trainer.fit(a_trainer.init(loader[0]), loader, 3, val_loader)
    expected, raw = bare.fit(bare.init(loader[0]), loader, 3, val_loader)
    assert_bit_equal(state, expected, "params")
    swapped = [flag for path, flag in named_leaves(state.callback_states).items() if path.endswith("swapped")]
    assert len(swapped) == 1 and not swapped[0]
    assert (history[-1]["val_loss"] == raw[-1]["val_loss"]) == (holds_at == "end")  # the average had its place, or not


def test_only_one_average_is_evaluated():
    two = [library.ema(evaluate=True), library.swa(0, evaluate=True)]
    for callbacks in (two, [library.chain(two[0]), two[1]], [library.chain(*two)]):
        with pytest.raises(
            ValueError, match="swa: only one callback of a trainer may have evaluate=True, and '(ema|chain)' has"
        ):
            trainer(*callbacks).init(batches()[0])
    trainer(library.ema(evaluate=True), library.swa(0)).init(batches()[0])


NUMBERS: list[Any] = [float("nan"), float("inf"), True, "0.5", None, [0.5]]


@pytest.mark.parametrize("decay", [0, 1, -0.5, 2, *NUMBERS])
def test_ema_refuses(decay):
    for given in (decay, ant.Hyperparam(decay)):
        with pytest.raises(ValueError) as caught:
            library.ema(given)
        assert str(caught.value) == f"ema: decay must be a number between 0 and 1, got {decay!r}"


@pytest.mark.parametrize("start_epoch", [-1, 1.0, *NUMBERS])
def test_swa_refuses(start_epoch):
    with pytest.raises(ValueError) as caught:
        library.swa(start_epoch)
    assert str(caught.value) == f"swa: start_epoch must be a whole number, at least 0, got {start_epoch!r}"
