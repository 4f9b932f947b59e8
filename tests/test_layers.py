"""Layers of nnx and linen, each held to the same promises, and to a loop by hand."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from problems import assert_bit_equal

import ant_jax as ant


EXAMPLES, LENGTH, FEATURES, UNITS = 4, 3, 2, 4


@pytest.fixture(autouse=True)
def standard_promotion() -> Iterator[None]:
    # Flax's own layers promote dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def criterion(outputs: Any, targets: Any) -> Any:
    return jnp.mean((outputs - targets) ** 2, axis=-1)


class Recurrent(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, both: bool = False):
        def rnn() -> nnx.RNN:
            return nnx.RNN(nnx.GRUCell(FEATURES, UNITS, rngs=rngs), rngs=rngs)

        self.rnn = nnx.Bidirectional(rnn(), rnn(), rngs=rngs) if both else rnn()
        self.head = nnx.Linear(2 * UNITS if both else UNITS, 1, rngs=rngs)

    def __call__(self, x):
        outputs: Any = self.rnn(x)
        return self.head(outputs[:, -1])


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, rate: float = 0.5):
        self.linear, self.dropout = nnx.Linear(FEATURES, FEATURES, rngs=rngs), nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.linear(x))


class Flat(nnx.Module):
    """Something, and a linear layer on its outputs at the last position."""

    def __init__(self, inner: Any, units: int, rngs: nnx.Rngs):
        self.inner, self.head = inner, nnx.Linear(units, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.inner(x)[:, -1])


class Stack(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, rate: float = 0.5):
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(functools.partial(Block, rate=rate)))(rngs)

    def __call__(self, x):
        return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


class Ensemble(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.members = nnx.split_rngs(splits=3)(nnx.vmap(Block))(rngs)

    def __call__(self, x):
        return nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(self.members, x).mean(0)


class Remat(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.block = Block(rngs, 0.0)

    def __call__(self, x):
        return nnx.remat(lambda block, x: block(x))(self.block, x)


class Shared(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.second = self.first

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


class Calls(nnx.Variable[Any]):
    """A Variable type of its own, which counts calls."""


class Counting(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear, self.calls = nnx.Linear(FEATURES, FEATURES, rngs=rngs), Calls(jnp.zeros((), jnp.int32))
        self.shift = jnp.full(FEATURES, 0.5)

    def __call__(self, x):
        self.calls[...] += 1
        return self.linear(x) + self.shift


class Attention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.inner = nnx.MultiHeadAttention(2, FEATURES, decode=False, dropout_rate=0.5, rngs=rngs)

    def __call__(self, x):
        return self.inner(x)


class LeftOn(nnx.Module):
    """Draws in evaluation, too."""

    def __init__(self, rngs: nnx.Rngs):
        self.block = Block(rngs)

    def __call__(self, x):
        return self.block.dropout(self.block.linear(x), deterministic=False)


class LinenNet(nn.Module):
    inner: Callable[..., Any]

    @nn.compact
    def __call__(self, x, train: bool = False):
        return nn.Dense(1)(self.inner(x, train)[:, -1])


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(FEATURES)(x))


class LinenScan(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        scan = nn.scan(
            lambda block, x, _: (block(x, train), None),
            variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=3,
        )  # fmt: skip
        return scan(LinenBlock(), x, None)[0]


def linen_ensemble(x: Any, train: bool) -> Any:
    options: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True, "dropout": True}}
    many = nn.vmap(LinenBlock, in_axes=(None, None), axis_size=3, **options)  # pyright: ignore[reportArgumentType]
    return many()(x, train).mean(0)


def linen_spectral(x: Any, train: bool) -> Any:
    return nn.SpectralNorm(nn.Dense(UNITS))(x, update_stats=train)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model.

    Attributes:
        make: makes it.
        draws: whether it draws in training.
    """

    make: Callable[[], Any]
    draws: bool = False


def of_nnx(inner: Callable[[nnx.Rngs], Any], units: int = FEATURES) -> Callable[[], Any]:
    def make() -> Any:
        rngs = nnx.Rngs(0)
        return Flat(inner(rngs), units, rngs)

    return make


def linear(rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(FEATURES, FEATURES, rngs=rngs)


NNX = {
    "RNN": Case(lambda: Recurrent(nnx.Rngs(0))),
    "Bidirectional": Case(lambda: Recurrent(nnx.Rngs(0), both=True)),
    "Dropout": Case(of_nnx(Block), draws=True),
    "BatchNorm": Case(of_nnx(lambda rngs: nnx.BatchNorm(FEATURES, rngs=rngs))),
    "scan": Case(of_nnx(lambda rngs: Stack(rngs, 0.0))),
    "scan of dropout": Case(of_nnx(Stack), draws=True),
    "vmap": Case(of_nnx(Ensemble), draws=True),
    "remat": Case(of_nnx(Remat)),
    "SpectralNorm": Case(of_nnx(lambda rngs: nnx.SpectralNorm(linear(rngs), rngs=rngs))),
    "WeightNorm": Case(of_nnx(lambda rngs: nnx.WeightNorm(linear(rngs), rngs=rngs))),
    "LoRA": Case(of_nnx(lambda rngs: nnx.LoRA(FEATURES, 2, FEATURES, base_module=linear(rngs), rngs=rngs))),
    "shared": Case(of_nnx(Shared)),
    "own Variable": Case(of_nnx(Counting)),
    "attention": Case(of_nnx(Attention), draws=True),
    "left on": Case(of_nnx(LeftOn), draws=True),
}

LINEN = {
    "RNN": Case(lambda: LinenNet(lambda x, train: nn.RNN(nn.GRUCell(UNITS))(x))),
    "Bidirectional": Case(
        lambda: LinenNet(lambda x, train: nn.Bidirectional(nn.RNN(nn.GRUCell(UNITS)), nn.RNN(nn.GRUCell(UNITS)))(x))
    ),
    "Dropout": Case(lambda: LinenNet(lambda x, train: LinenBlock()(x, train)), draws=True),
    "BatchNorm": Case(lambda: LinenNet(lambda x, train: nn.BatchNorm(use_running_average=not train)(x))),
    "scan": Case(lambda: LinenNet(lambda x, train: LinenScan()(x, train)), draws=True),
    "remat": Case(lambda: nn.remat(LinenNet, static_argnums=(2,))(lambda x, train: LinenBlock()(x, train)), draws=True),
    "vmap": Case(lambda: LinenNet(linen_ensemble), draws=True),
    "SpectralNorm": Case(lambda: LinenNet(linen_spectral)),
    "WeightNorm": Case(lambda: LinenNet(lambda x, train: nn.WeightNorm(nn.Dense(UNITS))(x))),
    "attention": Case(
        lambda: LinenNet(
            lambda x, train: nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=not train)(x)
        ),
        draws=True,
    ),
}

CASES = {f"{kind} {name}": case for kind, cases in (("nnx", NNX), ("linen", LINEN)) for name, case in cases.items()}


def batches(count: int = 2) -> list[Any]:
    rng = np.random.default_rng(0)
    shapes = (EXAMPLES, LENGTH, FEATURES), (EXAMPLES, 1)
    return [tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes) for _ in range(count)]


def optimizer() -> optax.GradientTransformation:
    return optax.sgd(0.005)


def trainer_of(model: Any) -> ant.Trainer:
    return ant.Trainer(model, optimizer(), criterion, progress_bar=False)


def nnx_by_hand(model: Any, start: ant.TrainState) -> tuple[Any, Any]:
    """Train with nnx' own tools; the module must not draw."""
    del start
    update = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, update: Any, batch: Any) -> None:
        update.update(model, nnx.grad(lambda model: criterion(model(batch[0]), batch[1]).mean())(model))

    for batch in batches():
        step(model, update, batch)
    return nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))


def linen_by_hand(model: Any, start: ant.TrainState) -> tuple[Any, Any]:
    params, kept, opt_state = start.params, start.model_state, optimizer().init(start.params)

    @jax.jit
    def step(params: Any, kept: Any, opt_state: Any, batch: Any, key: Any) -> Any:
        def loss_of(params: Any) -> Any:
            variables = {"params": params, **kept}
            outputs, new = model.apply(variables, batch[0], True, rngs={"params": key}, mutable=list(kept))
            return criterion(outputs, batch[1]).mean(), new

        grads, kept_now = jax.grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer().update(grads, opt_state, params)
        return optax.apply_updates(params, updates), kept_now, opt_state

    for index, batch in enumerate(batches()):
        params, kept, opt_state = step(params, kept, opt_state, batch, jax.random.fold_in(start.key, index))
    return params, kept


def assert_close(ours: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_it_trains_as_by_hand_evaluates_predicts_saves_and_resumes(name, tmp_path):
    case, loader = CASES[name], batches()
    model = case.make()
    trainer = ant.Trainer(model, optimizer(), criterion, progress_bar=False)
    state = trainer.init(loader[0])
    middle, first = trainer.fit(state, loader, 1, loader)
    by_hand = (
        None if name.startswith("nnx") and case.draws else nnx_by_hand if name.startswith("nnx") else linen_by_hand
    )
    if by_hand is not None:
        params, kept = by_hand(model, state)
        assert_close(middle.params, params)
        assert_close(middle.model_state, kept)
    end, history = trainer.fit(middle, loader, 2, loader)
    assert all(np.isfinite(value) for logs in history for value in logs.values())
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (state.params, end.params)), strict=True))
    assert trainer.evaluate(end, loader) == {"val_loss": history[-1]["val_loss"]}
    outputs = trainer.predict(end, loader[0][0])
    assert outputs.shape == (EXAMPLES, 1)
    np.testing.assert_array_equal(outputs, trainer.predict(end, loader[0][0]))
    trainer.save(tmp_path, middle)
    resumed, _ = trainer.fit(trainer.restore(tmp_path), loader, 2, loader)
    assert_bit_equal(resumed, end)
    # Another key draws otherwise, and changes nothing else.
    _, other = trainer.fit(state.replace(key=jax.random.key(7)), loader, 1)
    assert (other[0]["train_loss"] != first[0]["train_loss"]) == case.draws
