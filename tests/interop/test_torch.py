"""A torch model and a JAX model with its parameters compute the same; layer by layer, and as whole networks."""

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen as nn, nnx

import ant_jax as ant
from ant_jax.interop import torch as ant_torch


@pytest.fixture(autouse=True)
def standard_promotion():
    # Flax's own layers promote dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class TorchNet(torch.nn.Module):
    """One layer, named ``layer``."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        is_attention = isinstance(self.layer, torch.nn.MultiheadAttention)
        return self.layer(x, x, x, need_weights=False)[0] if is_attention else self.layer(x)


class LinenNet(nn.Module):
    layer: nn.Module

    def __call__(self, x):
        return self.layer(x)


class NnxNet(nnx.Module):
    def __init__(self, layer: Any):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x, decode=False) if isinstance(self.layer, nnx.MultiHeadAttention) else self.layer(x)


def plain(layer: Callable[..., Any], state: tuple[str, ...] = (), **shapes: tuple[int, ...]) -> ant.PureModel:
    """Two functions whose only layer is ``layer(inputs, **parameters)``; ``state`` names what is in the model state."""

    def init(key: Any, inputs: Any) -> Any:
        leaves = {name: jnp.ones(shape) for name, shape in shapes.items()}
        params = {name: leaf for name, leaf in leaves.items() if name not in state}
        return {"layer": params}, {"layer": {name: leaves[name] for name in state}} if state else {}

    def apply(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
        return layer(inputs, **params["layer"], **model_state.get("layer", {})), model_state

    return ant.PureModel(init, apply)


SPATIAL = {3: "H", 4: "HW", 5: "HWD"}


def convolution(x: Any, w: Any, b: Any, **options: Any) -> Any:
    axes = SPATIAL[x.ndim]
    layout = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return jax.lax.conv_general_dilated(x, w, dimension_numbers=layout, **options) + b


def transposed_convolution(x: Any, w: Any, b: Any, **options: Any) -> Any:
    return jax.lax.conv_transpose(x, w, **options) + b


def normalized(x: Any, scale: Any, bias: Any, axis: Any = -1) -> Any:
    return (x - x.mean(axis, keepdims=True)) / jnp.sqrt(x.var(axis, keepdims=True) + 1e-5) * scale + bias


def group_norm(x: Any, scale: Any, bias: Any) -> Any:
    groups = x.reshape(*x.shape[:-1], 2, -1)
    mean, var = (f(groups, (1, 2, 4), keepdims=True) for f in (jnp.mean, jnp.var))
    return ((groups - mean) / jnp.sqrt(var + 1e-5)).reshape(x.shape) * scale + bias


def batch_norm(x: Any, scale: Any, bias: Any, mean: Any, var: Any) -> Any:
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


# To draw what every test replaces takes most of its time.
CHEAP: dict[str, Any] = {"kernel_init": nnx.initializers.ones_init(), "rngs": nnx.Rngs(0)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer in torch and in JAX; ``shape`` is that of torch's inputs, ``options`` those of the conversion."""

    reference: Callable[[], torch.nn.Module]
    linen: Callable[[], nn.Module]
    nnx: Callable[[], Any]
    plain: Callable[[], ant.PureModel] | None
    shape: tuple[int, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    channels_first: bool = False
    integers: bool = False

    def torch_inputs(self) -> np.ndarray:
        random = np.random.default_rng(0)
        if self.integers:
            return random.integers(0, 7, self.shape)
        return random.normal(size=self.shape).astype(np.float32)

    def model(self, kind: str) -> ant.PureModel:
        if kind == "linen":
            return ant.pure_functions(LinenNet(self.linen()))
        if kind == "nnx":
            return ant.pure_functions(NnxNet(self.nnx()))
        assert self.plain
        return self.plain()

    def jax_outputs(self, model: ant.PureModel, params: Any, model_state: Any) -> np.ndarray:
        """What the JAX model makes of the inputs, laid out as torch lays it out."""
        inputs = self.torch_inputs()
        if self.channels_first:
            inputs = np.moveaxis(inputs, 1, -1)
        outputs = np.asarray(model.apply(params, model_state, jnp.asarray(inputs), None)[0])
        return np.moveaxis(outputs, -1, 1) if self.channels_first else outputs

    def torch_outputs(self, model: torch.nn.Module) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(self.torch_inputs())).numpy()


def conv_case(
    shape: tuple[int, ...], ins: int, outs: int, kernel: tuple[int, ...], stride: int, padding: int, groups: int = 1
) -> Case:
    rank = len(kernel)
    layer = [torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d][rank - 1]
    options: dict[str, Any] = {"strides": stride, "padding": padding, "feature_group_count": groups}
    lax_options = {
        "window_strides": (stride,) * rank,
        "padding": [(padding, padding)] * rank,
        "feature_group_count": groups,
    }
    return Case(
        lambda: layer(ins, outs, kernel, stride=stride, padding=padding, groups=groups),
        lambda: nn.Conv(outs, kernel, **options),
        lambda: nnx.Conv(ins, outs, kernel, **options, **CHEAP),
        lambda: plain(functools.partial(convolution, **lax_options), w=(*kernel, ins // groups, outs), b=(outs,)),
        shape,
        channels_first=True,
    )


def transposed_case(shape: tuple[int, ...], ins: int, outs: int, kernel: tuple[int, ...], reverse: bool) -> Case:
    rank, stride, padding, output_padding, dilation = len(kernel), 3, 1, 1, 2
    layer = [torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d][rank - 1]
    low = [dilation * (size - 1) - padding for size in kernel]
    options: dict[str, Any] = {
        "strides": (stride,) * rank,
        "padding": [(size, size + output_padding) for size in low],
        "transpose_kernel": reverse,
    }
    channels = (outs, ins) if reverse else (ins, outs)
    lax_layer = functools.partial(transposed_convolution, **options, rhs_dilation=(dilation,) * rank)
    flax = {**options, "kernel_dilation": dilation}
    return Case(
        lambda: layer(ins, outs, kernel, stride, padding, output_padding, dilation=dilation),
        lambda: nn.ConvTranspose(outs, kernel, **flax),
        lambda: nnx.ConvTranspose(ins, outs, kernel, **flax, **CHEAP),
        lambda: plain(lax_layer, w=(*kernel, *channels), b=(outs,)),
        shape,
        {"transpose_kernel": {"layer": reverse}},
        channels_first=True,
    )


CASES = {
    "Linear": Case(
        lambda: torch.nn.Linear(4, 6),
        lambda: nn.Dense(6),
        lambda: nnx.Linear(4, 6, **CHEAP),
        lambda: plain(lambda x, kernel, bias: x @ kernel + bias, kernel=(4, 6), bias=(6,)),
        (3, 4),
    ),
    "square Linear without bias": Case(
        lambda: torch.nn.Linear(4, 4, bias=False),
        lambda: nn.Dense(4, use_bias=False),
        lambda: nnx.Linear(4, 4, use_bias=False, **CHEAP),
        lambda: plain(lambda x, w: x @ w, w=(4, 4)),
        (3, 4),
    ),
    "Conv1d": conv_case((2, 3, 9), 3, 4, (3,), 2, 1),
    "Conv2d": conv_case((2, 3, 9, 8), 3, 4, (3, 2), 2, 1),
    "square Conv2d": conv_case((2, 3, 9, 8), 3, 3, (3, 3), 1, 1),
    "Conv3d": conv_case((2, 2, 5, 6, 7), 2, 3, (2, 3, 4), 1, 0),
    "grouped Conv2d": conv_case((2, 6, 7, 7), 6, 9, (3, 2), 1, 0, groups=3),
    "depthwise Conv2d": conv_case((2, 4, 7, 7), 4, 8, (3, 3), 1, 1, groups=4),
    "ConvTranspose1d": transposed_case((2, 3, 5), 3, 4, (4,), False),
    "ConvTranspose2d": transposed_case((2, 3, 5, 6), 3, 4, (3, 4), False),
    "square ConvTranspose2d": transposed_case((2, 3, 5, 6), 3, 3, (3, 4), False),
    "ConvTranspose2d, transpose_kernel": transposed_case((2, 3, 5, 6), 3, 4, (3, 4), True),
    "square ConvTranspose2d, transpose_kernel": transposed_case((2, 3, 5, 6), 3, 3, (3, 4), True),
    "Embedding": Case(
        lambda: torch.nn.Embedding(7, 7),
        lambda: nn.Embed(7, 7),
        lambda: nnx.Embed(7, 7, rngs=rngs()),
        lambda: plain(lambda x, embedding: embedding[x], embedding=(7, 7)),
        (2, 5),
        integers=True,
    ),
    "LayerNorm": Case(
        lambda: torch.nn.LayerNorm(6),
        lambda: nn.LayerNorm(epsilon=1e-5),
        lambda: nnx.LayerNorm(6, epsilon=1e-5, rngs=rngs()),
        lambda: plain(normalized, scale=(6,), bias=(6,)),
        (3, 6),
    ),
    "GroupNorm": Case(
        lambda: torch.nn.GroupNorm(2, 6),
        lambda: nn.GroupNorm(2, epsilon=1e-5),
        lambda: nnx.GroupNorm(6, 2, epsilon=1e-5, rngs=rngs()),
        lambda: plain(group_norm, scale=(6,), bias=(6,)),
        (3, 6, 4, 4),
        channels_first=True,
    ),
    "RMSNorm": Case(
        lambda: torch.nn.RMSNorm(6, eps=1e-5),
        lambda: nn.RMSNorm(epsilon=1e-5),
        lambda: nnx.RMSNorm(6, epsilon=1e-5, rngs=rngs()),
        lambda: plain(lambda x, scale: x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale, scale=(6,)),
        (3, 6),
    ),
    "BatchNorm1d": Case(
        lambda: torch.nn.BatchNorm1d(6),
        lambda: nn.BatchNorm(use_running_average=True),
        lambda: nnx.BatchNorm(6, rngs=rngs()),
        lambda: plain(batch_norm, ("mean", "var"), scale=(6,), bias=(6,), mean=(6,), var=(6,)),
        (3, 6),
    ),
    "BatchNorm2d without affine": Case(
        lambda: torch.nn.BatchNorm2d(6, affine=False),
        lambda: nn.BatchNorm(use_running_average=True, use_bias=False, use_scale=False),
        lambda: nnx.BatchNorm(6, use_bias=False, use_scale=False, rngs=rngs()),
        lambda: plain(functools.partial(batch_norm, scale=1.0, bias=0.0), ("mean", "var"), mean=(6,), var=(6,)),
        (3, 6, 2, 2),
        channels_first=True,
    ),
    "PReLU": Case(
        lambda: torch.nn.PReLU(),
        lambda: nn.PReLU(),
        lambda: nnx.PReLU(),
        lambda: plain(lambda x, negative_slope: jnp.where(x >= 0, x, negative_slope * x), negative_slope=()),
        (3, 6),
    ),
    "MultiheadAttention": Case(
        lambda: torch.nn.MultiheadAttention(8, 2, batch_first=True),
        lambda: nn.MultiHeadDotProductAttention(2),
        lambda: nnx.MultiHeadAttention(2, 8, **CHEAP),
        None,
        (2, 5, 8),
    ),
    "MultiheadAttention without bias": Case(
        lambda: torch.nn.MultiheadAttention(8, 4, batch_first=True, bias=False),
        lambda: nn.MultiHeadDotProductAttention(4, use_bias=False),
        lambda: nnx.MultiHeadAttention(4, 8, use_bias=False, **CHEAP),
        None,
        (2, 5, 8),
    ),
}
KINDS = ("linen", "nnx", "plain")
ALL = [(name, kind) for name, case in CASES.items() for kind in KINDS if kind != "plain" or case.plain]
each = pytest.mark.parametrize(("name", "kind"), ALL)


def randomized(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter and buffer of a torch model other values than it begins with."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            value.fill_(7)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        else:
            value.normal_(generator=generator)
    return model.eval()


def random_like(tree: Any, seed: int = 1) -> Any:
    """A tree of positive numbers, as variances are."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(random.uniform(0.2, 1.0, leaf.shape), leaf.dtype), tree)


def assert_close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * float(np.abs(expected).max()))


def assert_same(actual: Any, expected: Any) -> None:
    """The same bits, in the same structure."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def assert_same_state_dict(actual: Any, expected: Any) -> None:
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype and torch.equal(actual[key], value), key


@functools.cache
def prepared(name: str, kind: str) -> tuple[Case, ant.PureModel, tuple[Any, Any]]:
    """A case, its model in JAX, and the form of this one's parameters and model state."""
    case = CASES[name]
    model, inputs = case.model(kind), case.torch_inputs()
    inputs = jnp.asarray(np.moveaxis(inputs, 1, -1) if case.channels_first else inputs)
    return case, model, jax.eval_shape(model.init, jax.random.key(0), inputs)


@each
def test_a_layer_gives_the_same_outputs_with_torchs_parameters(name, kind):
    case, model, trees = prepared(name, kind)
    reference = randomized(TorchNet(case.reference()))
    filled = ant_torch.from_state_dict(reference.state_dict(), *trees, **case.options)
    assert_close(case.jax_outputs(model, *filled), case.torch_outputs(reference))


@each
def test_a_torch_layer_gives_the_same_outputs_with_the_parameters_of_jax(name, kind):
    case, model, trees = prepared(name, kind)
    trees, other = random_like(trees), randomized(TorchNet(case.reference()))
    other.load_state_dict(ant_torch.to_state_dict(*trees, like=other.state_dict(), **case.options), strict=True)
    assert_close(case.torch_outputs(other), case.jax_outputs(model, *trees))


@each
def test_there_and_back_keeps_every_bit(name, kind):
    case, _, trees = prepared(name, kind)
    there = randomized(TorchNet(case.reference())).state_dict()
    like = {key: torch.full_like(value, 7) for key, value in there.items()}
    filled = ant_torch.from_state_dict(there, *trees, **case.options)
    assert jax.tree.structure(filled) == jax.tree.structure(trees)
    assert_same_state_dict(ant_torch.to_state_dict(*filled, like=like, **case.options), there)


class TorchCnn(torch.nn.Module):
    """Convolutions, batch norm, a flatten and two Linear layers; 2x12x8 images, 4x3x2 before the flatten."""

    def __init__(self):
        super().__init__()
        layers = torch.nn
        self.features = layers.Sequential(
            layers.Conv2d(2, 3, 3, padding=1), layers.BatchNorm2d(3), layers.ReLU(), layers.MaxPool2d(2),
            layers.Conv2d(3, 4, 3, stride=2, padding=1), layers.BatchNorm2d(4), layers.ReLU(),
        )  # fmt: skip
        self.fc1 = layers.Linear(4 * 3 * 2, 8)
        self.fc2 = layers.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        return self.fc2(torch.relu(self.fc1(self.features(x).flatten(1))))


class LinenCnn(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.max_pool(nn.relu(norm()(nn.Conv(3, (3, 3), padding=1)(x))), (2, 2), strides=(2, 2))
        x = nn.relu(norm()(nn.Conv(4, (3, 3), strides=2, padding=1)(x)))
        return nn.Dense(5, name="fc2")(nn.relu(nn.Dense(8, name="fc1")(x.reshape(x.shape[0], -1))))


class NnxCnn(nnx.Module):
    def __init__(self):
        self.convs = nnx.List(
            [nnx.Conv(2, 3, (3, 3), padding=1, **CHEAP), nnx.Conv(3, 4, (3, 3), strides=2, padding=1, **CHEAP)]
        )
        self.norms = nnx.List([nnx.BatchNorm(3, momentum=0.9, rngs=rngs()), nnx.BatchNorm(4, rngs=rngs())])
        self.fc1, self.fc2 = nnx.Linear(24, 8, **CHEAP), nnx.Linear(8, 5, **CHEAP)

    def __call__(self, x):
        x = nn.max_pool(nn.relu(self.norms[0](self.convs[0](x))), (2, 2), strides=(2, 2))
        x = nn.relu(self.norms[1](self.convs[1](x)))
        return self.fc2(nn.relu(self.fc1(x.reshape(x.shape[0], -1))))


LINEN_NAMES: dict[str, Any] = {
    "features.0": "Conv_0",
    "features.1": "BatchNorm_0",
    "features.4": "Conv_1",
    "features.5": ("BatchNorm_1",),
}
NNX_NAMES: dict[str, Any] = {
    "features.0": "convs/0",
    "features.1": ("norms", 0),
    "features.4": "convs/1",
    "features.5": ("norms", 1),
}
FLATTENED = {"fc1": (4, 3, 2)}
IMAGES = np.random.default_rng(0).normal(size=(3, 12, 8, 2)).astype(np.float32)


def outputs_of(model: torch.nn.Module, inputs: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(inputs))).numpy()


@pytest.mark.parametrize(("model", "names"), [(LinenCnn(), LINEN_NAMES), (NnxCnn(), NNX_NAMES)], ids=["linen", "nnx"])
def test_a_cnn_goes_to_the_trainer_and_comes_back_trained(model, names):
    options = {"names": names, "flattened": FLATTENED}
    reference = randomized(TorchCnn())
    a_trainer = ant.Trainer(model, optax.sgd(0.01), optax.softmax_cross_entropy_with_integer_labels, progress_bar=False)
    batch = (IMAGES, np.array([0, 1, 2]))
    state = a_trainer.init(batch)
    params, model_state = ant_torch.from_state_dict(reference.state_dict(), state.params, state.model_state, **options)
    state = a_trainer.init(batch, params=params).replace(model_state=model_state)
    expected = outputs_of(reference, np.moveaxis(IMAGES, -1, 1))
    assert_close(a_trainer.predict(state, IMAGES), expected)

    state, _ = a_trainer.fit(state, [batch], 2)
    back = ant_torch.to_state_dict(state.params, state.model_state, like=reference.state_dict(), **options)
    other = TorchCnn().eval()
    other.load_state_dict(back, strict=True)
    trained = outputs_of(other, np.moveaxis(IMAGES, -1, 1))
    assert_close(trained, a_trainer.predict(state, IMAGES))
    assert not np.allclose(trained, expected, rtol=1e-3)
    assert all(int(value) == 7 for key, value in back.items() if key.endswith("num_batches_tracked"))


def block(layers: Any, x: Any) -> Any:
    """What both kinds of blocks compute with their layers."""
    x = x + layers.self_attn(layers.norm1(x))
    return x + layers.linear2(jax.nn.gelu(layers.linear1(layers.norm2(x)), approximate=False))


class LinenBlock(nn.Module):
    def setup(self):
        self.self_attn = nn.MultiHeadDotProductAttention(2)
        self.linear1, self.linear2 = nn.Dense(12), nn.Dense(8)
        self.norm1, self.norm2 = nn.LayerNorm(epsilon=1e-5), nn.LayerNorm(epsilon=1e-5)

    def __call__(self, x):
        return block(self, x)


class LinenTransformer(nn.Module):
    def setup(self):
        self.tokens = nn.Embed(11, 8)
        self.position = self.param("position", nn.initializers.zeros, (1, 5, 8))
        self.layers = [LinenBlock() for _ in range(2)]

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.tokens.attend(x)


class NnxBlock(nnx.Module):
    def __init__(self):
        self.self_attn = nnx.MultiHeadAttention(2, 8, decode=False, **CHEAP)
        self.linear1, self.linear2 = nnx.Linear(8, 12, **CHEAP), nnx.Linear(12, 8, **CHEAP)
        self.norm1, self.norm2 = (nnx.LayerNorm(8, epsilon=1e-5, rngs=rngs()) for _ in range(2))

    def __call__(self, x):
        return block(self, x)


class NnxTransformer(nnx.Module):
    def __init__(self):
        self.tokens = nnx.Embed(11, 8, rngs=rngs())
        self.position = nnx.Param(jnp.zeros((1, 5, 8)))
        self.layers = nnx.List([NnxBlock() for _ in range(2)])

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.position[...]
        for layer in self.layers:
            x = layer(x)
        return self.tokens.attend(x)


class TorchTransformer(torch.nn.Module):
    """Two blocks of torch's own; the output layer is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.tokens = torch.nn.Embedding(11, 8)
        self.position = torch.nn.Parameter(torch.zeros(1, 5, 8))
        layer = functools.partial(torch.nn.TransformerEncoderLayer, 8, 2, 12, 0.0, activation="gelu", norm_first=True)
        self.layers = torch.nn.ModuleList([layer(batch_first=True) for _ in range(2)])
        self.head = torch.nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Any) -> Any:
        x = self.tokens(tokens) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("make", [LinenTransformer, NnxTransformer])
def test_a_transformer_with_tied_weights_needs_no_names(make):
    model, reference = ant.pure_functions(make()), randomized(TorchTransformer())
    tokens = np.random.default_rng(0).integers(0, 11, (2, 5))
    trees = jax.eval_shape(model.init, jax.random.key(0), tokens)
    params, model_state = ant_torch.from_state_dict(reference.state_dict(), *trees)
    assert_close(model.apply(params, model_state, tokens, None)[0], outputs_of(reference, tokens))

    changed = random_like(params)
    other = randomized(TorchTransformer(), seed=3)
    other.load_state_dict(ant_torch.to_state_dict(changed, like=other.state_dict()), strict=True)
    assert_close(outputs_of(other, tokens), model.apply(changed, model_state, tokens, None)[0])


def test_attention_of_separate_linear_layers():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (torch.nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: Any) -> Any:
            heads = [f(x).unflatten(-1, (3, 2)).transpose(1, 2) for f in (self.q, self.k, self.v)]
            return self.o(torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))

    model, reference = nn.MultiHeadDotProductAttention(3), randomized(Attention())
    x = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    names = {"q": "query", "k": "key", "v": "value", "o": "out"}
    template = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params, _ = ant_torch.from_state_dict(reference.state_dict(), template, names=names)
    assert_close(model.apply({"params": params}, x), outputs_of(reference, x))


def test_attention_with_keys_and_values_of_other_widths():
    reference = randomized(torch.nn.MultiheadAttention(8, 2, kdim=3, vdim=5, batch_first=True))
    model = nn.MultiHeadDotProductAttention(2)
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(2, 4, width)).astype(np.float32) for width in (8, 3, 5))
    template = jax.eval_shape(model.init, jax.random.key(0), q, k, v)["params"]
    params, _ = ant_torch.from_state_dict(reference.state_dict(), template)
    with torch.no_grad():
        expected = reference(*map(torch.from_numpy, (q, k, v)))[0].numpy()
    assert_close(model.apply({"params": params}, q, k, v), expected)
    like = reference.state_dict()
    assert_same_state_dict(ant_torch.to_state_dict(params, like=like), like)


@jax.tree_util.register_pytree_with_keys_class
class EquinoxLike(dict):
    """A layer whose fields are attributes, and whose weight lies as torch's does."""

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey(name), self[name]) for name in sorted(self)], tuple(sorted(self))

    @classmethod
    def tree_unflatten(cls, names: Any, leaves: Any) -> "EquinoxLike":
        return cls(zip(names, leaves, strict=True))


def test_a_leaf_named_weight_keeps_torchs_layout():
    reference = randomized(torch.nn.Sequential(torch.nn.Conv2d(2, 3, (3, 2)), torch.nn.Linear(4, 5)))
    like = reference.state_dict()
    form = [
        EquinoxLike(weight=jnp.zeros((3, 2, 3, 2)), bias=jnp.zeros((3, 1, 1))),
        EquinoxLike(weight=jnp.zeros((5, 4)), bias=jnp.zeros(5)),
    ]
    params, _ = ant_torch.from_state_dict(like, form)
    assert isinstance(params[0], EquinoxLike)
    np.testing.assert_array_equal(params[0]["weight"], like["0.weight"])
    np.testing.assert_array_equal(params[0]["bias"][:, 0, 0], like["0.bias"])
    np.testing.assert_array_equal(params[1]["weight"], like["1.weight"])
    assert_same_state_dict(ant_torch.to_state_dict(params, like=like), like)


@pytest.mark.parametrize("container", [flax.core.freeze, lambda tree: (list(tree.values()),), lambda tree: tree])
def test_the_structure_of_the_template_stays(container):
    form = container({"a": {"kernel": jnp.zeros((2, 3))}, "b": {"kernel": jnp.zeros((3, 2))}})
    keys = ["0.0", "0.1"] if isinstance(form, tuple) else ["a", "b"]
    weights = {f"{key}.weight": np.random.rand(*shape) for key, shape in zip(keys, [(3, 2), (2, 3)], strict=True)}
    params, model_state = ant_torch.from_state_dict(weights, form, {})
    assert jax.tree.structure(params) == jax.tree.structure(form) and model_state == {}
    assert ant_torch.from_state_dict(weights, form)[1] is None


@pytest.mark.parametrize("of_torch", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_jax", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_values_take_the_dtype_of_the_side_that_they_go_to(of_torch, of_jax):
    weight = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).to(of_torch)
    params, _ = ant_torch.from_state_dict({"fc.weight": weight}, {"fc": {"kernel": jnp.zeros((2, 3), of_jax)}})
    assert params["fc"]["kernel"].dtype == of_jax
    expected = jnp.asarray(weight.double().numpy().T.astype(np.float32)).astype(of_jax)
    np.testing.assert_array_equal(params["fc"]["kernel"], expected)
    back = ant_torch.to_state_dict(params, like={"fc.weight": weight})["fc.weight"]
    assert back.dtype == of_torch
    assert torch.equal(back, torch.from_numpy(np.array(expected.T, np.float32)).to(of_torch))


def test_integers_and_scalars_are_taken_over():
    values = {"count": torch.tensor(3), "mask": torch.tensor([True, False]), "scale": torch.tensor(0.5)}
    form = {"count": jnp.int32(0), "mask": jnp.zeros(2, bool), "gain": jnp.float32(0)}
    params, _ = ant_torch.from_state_dict(values, form, names={"scale": "gain"})
    assert params["count"] == 3 and params["gain"] == 0.5 and params["mask"].tolist() == [True, False]
    back = ant_torch.to_state_dict(params, like=values, names={"scale": "gain"})
    assert_same_state_dict(back, values)


def test_numpy_arrays_stay_numpy_arrays():
    weights = {"fc.weight": np.arange(6.0).reshape(3, 2)}
    params, _ = ant_torch.from_state_dict(weights, {"fc": {"kernel": np.zeros((2, 3), np.float64)}})
    assert type(params["fc"]["kernel"]) is np.ndarray and params["fc"]["kernel"].dtype == np.float64
    back = ant_torch.to_state_dict(params, like=weights)["fc.weight"]
    assert type(back) is np.ndarray and np.array_equal(back, weights["fc.weight"])


def test_the_two_sides_share_no_memory():
    weight = torch.zeros(4096)
    params, _ = ant_torch.from_state_dict({"norm.weight": weight}, {"norm": {"scale": jnp.ones(4096)}})
    weight.fill_(7)
    assert not params["norm"]["scale"].any()
    back = ant_torch.to_state_dict(params, like={"norm.weight": weight})["norm.weight"]
    back.fill_(8)
    assert not params["norm"]["scale"].any() and bool((weight == 7).all())


def test_parameters_stay_where_the_template_is():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P(None, "x"))
    weights = {"fc.weight": np.arange(8, dtype=np.float32).reshape(4, 2)}
    forms = jax.device_put(jnp.zeros((2, 4)), sharding), jax.ShapeDtypeStruct((2, 4), jnp.float32, sharding=sharding)
    for form in forms:
        params, _ = ant_torch.from_state_dict(weights, {"fc": {"kernel": form}})
        assert params["fc"]["kernel"].sharding == sharding
        np.testing.assert_array_equal(ant_torch.to_state_dict(params, like=weights)["fc.weight"], weights["fc.weight"])


def test_the_flattened_shape_matters_and_any_number_of_axes_will_do():
    weight = np.arange(2 * 24, dtype=np.float32).reshape(2, 24)
    image = np.arange(24, dtype=np.float32)
    for shape in [(2, 12), (2, 3, 4), (3, 2, 2, 2)]:
        options = {"flattened": {"fc": shape}}
        params, _ = ant_torch.from_state_dict({"fc.weight": weight}, {"fc": {"w": np.zeros((24, 2), "f")}}, **options)
        channels_last = np.moveaxis(image.reshape(shape), 0, -1).reshape(-1)
        np.testing.assert_array_equal(channels_last @ params["fc"]["w"], weight @ image)
        back = ant_torch.to_state_dict(params, like={"fc.weight": weight}, **options)
        np.testing.assert_array_equal(back["fc.weight"], weight)


def test_a_weight_in_torchs_layout_is_reordered_too():
    weight = np.arange(2 * 24, dtype=np.float32).reshape(2, 24)
    form = {"fc": {"weight": np.zeros((2, 24), "f")}}
    params, _ = ant_torch.from_state_dict({"fc.weight": weight}, form, flattened={"fc": (2, 3, 4)})
    expected = np.moveaxis(weight.reshape(2, 2, 3, 4), 1, -1).reshape(2, 24)
    np.testing.assert_array_equal(params["fc"]["weight"], expected)


def test_what_the_page_says_of_defaults_is_so():
    layers = torch.nn
    assert (layers.BatchNorm1d(2).momentum, nn.BatchNorm.momentum) == (0.1, 0.99)
    assert (layers.BatchNorm1d(2).eps, nn.BatchNorm.epsilon) == (1e-5, 1e-5)
    assert (layers.LayerNorm(2).eps, nn.LayerNorm.epsilon) == (1e-5, 1e-6)
    assert (layers.GroupNorm(1, 2).eps, nn.GroupNorm.epsilon) == (1e-5, 1e-6)
    assert (layers.RMSNorm(2).eps, nn.RMSNorm.epsilon) == (None, 1e-6)
    assert (layers.Conv2d(1, 1, 1).padding, nn.Conv.padding) == ((0, 0), "SAME")
    assert layers.MaxPool2d(3).stride == 3 and nn.max_pool(jnp.ones((1, 9, 9, 1)), (3, 3)).shape == (1, 7, 7, 1)
    assert layers.AvgPool2d(3).stride == 3 and nn.avg_pool(jnp.ones((1, 9, 9, 1)), (3, 3)).shape == (1, 7, 7, 1)
    assert not layers.MultiheadAttention(2, 1).batch_first and not nn.ConvTranspose.transpose_kernel
    x = np.array([0.5, 1.0, 2.5], np.float32)
    exact = layers.GELU()(torch.from_numpy(x)).numpy()
    assert_close(jax.nn.gelu(x, approximate=False), exact)
    assert not np.allclose(jax.nn.gelu(x), exact, rtol=1e-5)


def test_batch_norm_in_training_differs_by_the_unbiased_variance_alone():
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    reference, model = torch.nn.BatchNorm1d(3), nn.BatchNorm(use_running_average=False, momentum=0.9)
    reference(torch.from_numpy(x))
    _, updates = model.apply(model.init(jax.random.key(0), x), x, mutable="batch_stats")
    stats = updates["batch_stats"]
    assert_close(stats["mean"], reference.running_mean.numpy())  # type: ignore[union-attr]
    assert_close((stats["var"] - 0.9) * 5 / 4 + 0.9, reference.running_var.numpy())  # type: ignore[union-attr]


def test_nothing_imports_torch_by_itself():
    code = (
        "import sys, numpy as np; import ant_jax; assert 'ant_jax.interop' not in sys.modules; "
        "from ant_jax.interop import torch as t; weights = {'a.weight': np.ones((2, 3))}; "
        "params, _ = t.from_state_dict(weights, {'a': {'kernel': np.ones((3, 2))}}); "
        "t.to_state_dict(params, like=weights); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
