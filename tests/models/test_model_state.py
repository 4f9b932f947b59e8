"""The form that a model state keeps, and what of it moves in other ways than by being returned."""

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from flax.training.train_state import TrainState as FlaxState
from problems import CLASSES, FEATURES, batches, host, squares, trainer

import ant_jax as ant
from ant_jax._models.model_state import with_form_of


@pytest.fixture(autouse=True)
def standard_promotion() -> Iterator[None]:
    # Flax's own layers promote dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def running(first: Any, then: Any) -> Any:
    """A model that keeps ``first``, and makes ``then`` of it."""
    return (
        lambda key, x: ({"w": jnp.ones((FEATURES, CLASSES))}, first),
        lambda p, s, x, key: (x @ p["w"], s if key is None else then(s)),
    )


STATES: dict[str, tuple[Any, Any, Any]] = {
    "cut to integers": (
        {"a": {"mean": 0}}, lambda s: {"a": {"mean": 0.5 + s["a"]["mean"] / 2}},
        r"a/mean: expected int32\[\], got float32",
    ),
    "another shape": (
        {"c": jnp.zeros(3)}, lambda s: {"c": jnp.zeros(4)}, r"c: expected float32\[3\], got float32\[4\]",
    ),
    "one more": ({}, lambda s: {"new": jnp.zeros(())}, r"new: unexpected, float32\[\]"),
    "one less": ({"c": jnp.zeros(3), "d": 0.0}, lambda s: {"d": s["d"]}, r"c: missing, expected float32\[3\]"),
    "a narrower integer": ({"c": jnp.int8(0)}, lambda s: {"c": jnp.int32(300)}, r"c: expected int8\[\], got int32\[\]"),
    "a complex number": ({"c": 0.0}, lambda s: {"c": s["c"] + 1j}, r"c: expected float32\[\], got complex64"),
    "no array": ({"c": 0.0}, lambda s: {"c": "text"}, "c: expected .*got str"),
    "no boolean": ({"c": jnp.bool_(True)}, lambda s: {"c": 2}, r"c: expected bool\[\], got Python int"),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_a_state_of_another_form_is_refused_by_its_path(case):
    first, then, message = STATES[case]
    first = jax.tree.map(jnp.asarray, first)
    with pytest.raises(TypeError, match=f"the model returned a model state of another form(.|\\n)*{message}"):
        with_form_of(first, then(first), "the model")


@pytest.mark.parametrize("general", [False, True], ids=["criterion", "loss_fn"])
def test_it_is_refused_before_anything_is_compiled(general, compilations):
    first, then, message = STATES["cut to integers"]
    init, apply = running(first, then)

    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        outputs, model_state = apply(params, model_state, batch[0], key)
        return squares(outputs, batch[1]).mean(), (model_state, {})

    options = {"criterion": None, "loss_fn": loss_fn} if general else {"criterion": squares}
    a_trainer = trainer(model=(init, apply), **options)
    state = a_trainer.init(batches()[0])
    compilations.reset()
    owner = "loss_fn" if general else "the model"
    for run in (a_trainer.train_step, a_trainer.grad_step):
        with pytest.raises(TypeError, match=f"{owner} returned a model state of another form(.|\\n)*{message}"):
            run(state, batches()[0])
    assert compilations.count == 0


@dataclasses.dataclass(frozen=True)
class Ordered:
    """A container of a user's own, whose leaves come in the order in which they were put."""

    items: tuple[tuple[str, Any], ...]


jax.tree_util.register_pytree_with_keys(
    Ordered,
    lambda it: ([(jax.tree_util.DictKey(name), leaf) for name, leaf in it.items], tuple(name for name, _ in it.items)),
    lambda names, leaves: Ordered(tuple(zip(names, leaves, strict=True))),
)


def test_a_model_state_is_matched_by_key_and_takes_numbers():
    first = {"o": collections.OrderedDict(b=jnp.zeros(()), a=jnp.ones(())), "n": jnp.zeros(()), "k": jnp.int32(0)}
    first["own"] = Ordered((("b", jnp.zeros(())), ("a", jnp.ones(()))))

    def then(s: Any) -> Any:
        own = dict(s["own"].items)
        return {
            "o": collections.OrderedDict(a=s["o"]["a"] + 1, b=s["o"]["b"] - 1), "n": 1, "k": s["k"] + 1,
            "own": Ordered((("a", own["a"] + 1), ("b", own["b"] - 1))),
        }  # fmt: skip

    a_trainer = trainer(model=running(first, then), criterion=squares)
    start = a_trainer.init(batches()[0])
    state, _ = a_trainer.fit(start, batches(3), 1)
    assert jax.tree.structure(state.model_state) == jax.tree.structure(start.model_state)
    assert (state.model_state["o"]["a"], state.model_state["o"]["b"]) == (4, -3)
    assert dict(state.model_state["own"].items) == {"a": 4, "b": -3}
    assert (state.model_state["n"], state.model_state["k"]) == (1, 3)
    assert state.model_state["n"].dtype == jnp.float32


class Sows(nn.Module):
    collection: str

    @nn.compact
    def __call__(self, x):
        self.sow(self.collection, "squares", (x**2).sum())
        return nn.Dense(CLASSES)(x)


def test_a_collection_that_grows_is_named_and_intermediates_are_not_kept():
    a_trainer = trainer(model=Sows("penalties"))
    with pytest.raises(
        TypeError, match=r"sow.* collection 'penalties' another form(.|\n)*squares/1: unexpected(.|\n)*loss_fn"
    ):
        a_trainer.train_step(a_trainer.init(batches()[0]), batches()[0])
    a_trainer = trainer(model=Sows("intermediates"))
    state, _ = a_trainer.train_step(a_trainer.init(batches()[0]), batches()[0])
    assert state.model_state == {}


def test_what_is_sown_can_be_a_loss():
    module = Sows("penalties")

    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        outputs, sown = module.apply({"params": params}, batch[0], mutable=["penalties"])
        return squares(outputs, batch[1]).mean(), (model_state, {"penalty": sown["penalties"]["squares"][0]})

    a_trainer = trainer(model=module, criterion=None, loss_fn=loss_fn)
    _, logs = a_trainer.train_step(a_trainer.init(batches()[0]), batches()[0])
    np.testing.assert_allclose(logs["penalty"], (batches()[0][0] ** 2).sum(), rtol=1e-6)


class Fp8(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp)(x)[:, :CLASSES]


def wide_batches() -> list[Any]:
    rng = np.random.default_rng(0)
    return [((3 * rng.normal(size=(16, 16))).astype(np.float32), rng.integers(0, CLASSES, 16)) for _ in range(4)]


@pytest.mark.filterwarnings("ignore")  # of linen's fp8 layers
@pytest.mark.parametrize("options", [
    {}, {"precision": "bfloat16"}, {"gradient_accumulation_steps": 2}, {"general": True},
], ids=str)  # fmt: skip
def test_the_scales_of_fp8_layers_move_as_with_flax_own_train_state(options):
    model, loader, general = Fp8(), wide_batches(), options.pop("general", False)

    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        return squares(model.apply({"params": params, **model_state}, batch[0]), batch[1]).mean() / 64, (
            model_state,
            {},
        )

    loss = {"criterion": None, "loss_fn": loss_fn} if general else {"criterion": lambda o, t: squares(o, t) / 64}
    a_trainer = trainer(model=model, optimizer=optax.sgd(0.01), **loss, **options)
    start = a_trainer.init(loader[0])
    state, _ = a_trainer.fit(start, loader, 1)
    kept = {"params": start.params, **start.model_state}
    theirs = FlaxState.create(apply_fn=model.apply, params=kept, tx=optax.sgd(0.01))

    @jax.jit
    def step(theirs: Any, batch: Any) -> Any:
        grads = jax.grad(lambda params: squares(model.apply(params, batch[0]), batch[1]).mean() / 64)(theirs.params)
        return theirs.apply_gradients(grads=grads)

    for batch in loader:
        theirs = step(theirs, batch)
    ours, expected = (tree["_overwrite_with_gradient"] for tree in (state.model_state, theirs.params))
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    if options in ({}, {"precision": "bfloat16"}):
        tolerance = 0.05 if options else 1e-5
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance), ours, expected)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), ours, start.model_state["_overwrite_with_gradient"])
    assert all(jax.tree.leaves(moved))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(ours))
    inputs = next(leaf for path, leaf in jax.tree_util.tree_leaves_with_path(ours) if "input_amax" in str(path))
    np.testing.assert_allclose(inputs[0], np.abs(loader[-1][0]).max(), rtol=1e-2)
    if not options and not general:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.params, theirs.params["params"])


@pytest.mark.filterwarnings("ignore")
def test_the_scales_of_fp8_layers_are_no_scaled_gradients():
    # One step, since sums of linen's scaled inputs are soon too large for float16.
    batch = wide_batches()[0]
    a_trainer = trainer(model=Fp8(), criterion=lambda o, t: squares(o, t) / 64, precision="float16")
    state, logs = a_trainer.train_step(a_trainer.init(batch), batch)
    assert logs["step_skipped"] == 0
    scales = state.model_state["_overwrite_with_gradient"]["Dense_0"]["Fp8DirectDotGeneralOp_0"]
    np.testing.assert_allclose(scales["input_amax_history"][0], np.abs(batch[0]).max(), rtol=1e-2)


class Shrinks(nnx.Module):
    """Writes to its parameter in the call."""

    def __init__(self) -> None:
        self.kernel, self.bias = nnx.Param(jnp.ones((FEATURES, CLASSES))), nnx.Param(jnp.zeros((1, CLASSES)))

    def __call__(self, x):
        self.kernel[...] = self.kernel[...] * 0.75
        return x @ self.kernel[...] + self.bias[...]


def test_what_a_model_writes_to_a_parameter_is_kept():
    rate_of_nothing = trainer(model=Shrinks(), optimizer=optax.sgd(0.0))
    start = rate_of_nothing.init(batches()[0])
    state, _ = rate_of_nothing.fit(start, batches(3), 1, batches(2))
    np.testing.assert_allclose(state.params["kernel"], np.full((FEATURES, CLASSES), 0.75**3), rtol=1e-6)
    assert state.model_state == {}
    np.testing.assert_allclose(
        rate_of_nothing.predict(state, batches()[0][0]), batches()[0][0] @ state.params["kernel"] * 0.75, rtol=1e-5
    )


def test_a_loop_by_hand_may_pass_on_what_a_model_returns():
    pure = ant.pure_functions(Shrinks())
    params, kept = pure.init(jax.random.key(0), None)
    inputs = jnp.ones((2, FEATURES))
    _, kept = pure.apply(params, kept, inputs, jax.random.key(1))
    doubled = jax.tree.map(lambda param: 2 * param, params)
    outputs, _ = pure.apply(doubled, kept, inputs, jax.random.key(2))
    np.testing.assert_allclose(outputs, FEATURES * 2 * 0.75)


class NnxSows(nnx.Module):
    def __init__(self) -> None:
        self.kernel = nnx.Param(jnp.ones((FEATURES, CLASSES)))

    def __call__(self, x):
        self.sow(nnx.Intermediate, "mean", x.mean())
        return x @ self.kernel[...]


@pytest.mark.filterwarnings("ignore:(?s).*sow:DeprecationWarning")
def test_intermediates_of_an_nnx_module_are_not_kept():
    model = NnxSows()
    model(jnp.ones((2, FEATURES)))
    a_trainer = trainer(model=model)
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 1)
    assert state.model_state == {}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_what_a_model_does_not_write_keeps_its_digits_in_low_precision(precision):
    a_trainer = trainer(model=Shrinks(), optimizer=optax.sgd(0.0), precision=precision)
    start = a_trainer.init(
        batches()[0], params={"kernel": jnp.full((FEATURES, CLASSES), 1.0), "bias": jnp.full((1, 3), 0.1)}
    )
    state, _ = a_trainer.train_step(start, batches()[0])
    np.testing.assert_array_equal(state.params["bias"], start.params["bias"])
    np.testing.assert_allclose(state.params["kernel"], 0.75)


def test_a_batch_that_is_skipped_puts_back_what_the_model_wrote():
    def skip_second(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        return state.skip_batch(batch_idx == 1), grads, logs

    a_trainer = trainer(host(on_backward_end=skip_second), model=Shrinks(), optimizer=optax.sgd(0.0))
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(3), 1)
    np.testing.assert_allclose(state.params["kernel"], np.full((FEATURES, CLASSES), 0.75**2), rtol=1e-6)
