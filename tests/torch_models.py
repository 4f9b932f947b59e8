"""Three small models, each in torch and in flax, with the same initial weights and the same data.

What a layer leaves open is chosen alike on both sides: the normalizations' epsilon is 1e-5, GELU is the tanh
approximation, and torch's BatchNorm momentum of 0.1, the new value's share, is flax's 0.9, the old one's. Where a bias
has no effect its gradient is zero but for rounding, which Adam would blow up to full steps in directions of chance: so
it is with convolutions before a BatchNorm and with the keys of an attention, which therefore have none.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch
from flax import linen
from torch import nn

import ant_jax as ant
from ant_jax.interop.torch import from_state_dict


Batch = tuple[np.ndarray, np.ndarray]


class TorchCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 2 * 2, 4)

    def forward(self, images):
        hidden = nn.functional.silu(self.norm1(self.conv1(images)))
        hidden = nn.functional.silu(self.norm2(self.conv2(hidden)))
        return self.head(nn.functional.avg_pool2d(hidden, 2).flatten(1))


class FlaxCNN(linen.Module):
    @linen.compact
    def __call__(self, images, train: bool):
        hidden = linen.Conv(4, (3, 3), padding=1, use_bias=False, name="conv1")(images)
        hidden = linen.silu(linen.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name="norm1")(hidden))
        hidden = linen.Conv(6, (3, 3), strides=2, padding=1, use_bias=False, name="conv2")(hidden)
        hidden = linen.silu(linen.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name="norm2")(hidden))
        pooled = linen.avg_pool(hidden, (2, 2), strides=(2, 2))
        return linen.Dense(4, name="head")(pooled.reshape(len(images), -1))


VOCABULARY, LENGTH, WIDTH, HEADS = 16, 8, 16, 2


class TorchBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden):
        def split(layer):  # [batch, length, width] -> [batch, heads, length, width / heads]
            return layer(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2)

        normed = self.norm1(hidden)
        mixed = nn.functional.scaled_dot_product_attention(
            split(self.query), split(self.key), split(self.value), is_causal=True
        )
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(-2))
        return hidden + self.down(nn.functional.gelu(self.up(self.norm2(hidden)), approximate="tanh"))


class TorchTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.block = TorchBlock()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens):
        hidden = self.token(tokens) + self.position(torch.arange(LENGTH))
        return self.head(self.norm(self.block(hidden)))


class FlaxBlock(linen.Module):
    @linen.compact
    def __call__(self, hidden):
        def split(name):
            layer = linen.Dense(WIDTH, use_bias=name != "key", name=name)
            return layer(normed).reshape(*hidden.shape[:2], HEADS, -1)

        normed = linen.LayerNorm(epsilon=1e-5, name="norm1")(hidden)
        mixed = jax.nn.dot_product_attention(split("query"), split("key"), split("value"), is_causal=True)
        hidden = hidden + linen.Dense(WIDTH, name="out")(mixed.reshape(hidden.shape))
        normed = linen.LayerNorm(epsilon=1e-5, name="norm2")(hidden)
        return hidden + linen.Dense(WIDTH, name="down")(linen.gelu(linen.Dense(2 * WIDTH, name="up")(normed)))


class FlaxTransformer(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        position = linen.Embed(LENGTH, WIDTH, name="position")(np.arange(LENGTH))
        hidden = linen.Embed(VOCABULARY, WIDTH, name="token")(tokens) + position
        hidden = linen.LayerNorm(epsilon=1e-5, name="norm")(FlaxBlock(name="block")(hidden))
        return linen.Dense(VOCABULARY, name="head")(hidden)


def with_mistakes(rng: np.random.Generator, classes: np.ndarray) -> np.ndarray:
    """The classes, some of them wrong, so that a loss stays so large that its relative error means something."""
    return np.where(rng.random(len(classes)) < 0.25, rng.integers(0, 4, len(classes)), classes).astype(np.int32)


def vectors(rng: np.random.Generator, examples: int) -> Batch:
    """Points, each of the class that a fixed linear map says, in most cases."""
    inputs = rng.normal(size=(examples, 8))
    classes = np.argmax(inputs @ np.random.default_rng(1).normal(size=(8, 4)), axis=1)
    return inputs.astype(np.float32), with_mistakes(rng, classes)


def images(rng: np.random.Generator, examples: int) -> Batch:
    """Images, each of the class of its brightest quarter, in most cases."""
    inputs = rng.normal(size=(examples, 8, 8, 3))
    quarters = inputs.reshape(examples, 2, 4, 2, 4, 3).sum(axis=(2, 4, 5))
    return inputs.astype(np.float32), with_mistakes(rng, np.argmax(quarters.reshape(examples, 4), axis=1))


def sentences(rng: np.random.Generator, examples: int) -> Batch:
    """Tokens, where the right answer at each is the token before it."""
    tokens = rng.integers(0, VOCABULARY, (examples, LENGTH)).astype(np.int32)
    return tokens, np.roll(tokens, 1, axis=1)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model on both sides.

    Attributes:
        torch: makes the torch module.
        flax: the flax module.
        data: makes so many examples.
        names: the flax layers whose names differ from torch's.
        flattened: the layers that read flattened images, with the shape before.
        norm: a usual length of its gradient.
    """

    torch: Callable[[], nn.Module]
    flax: linen.Module
    data: Callable[[np.random.Generator, int], Batch]
    names: Mapping[str, str] | None = None
    flattened: Mapping[str, tuple[int, int, int]] | None = None
    norm: float = 1.0

    def torch_model(self) -> nn.Module:
        """The torch module, with the same initial weights at every call."""
        torch.manual_seed(0)
        return self.torch()

    @functools.cached_property
    def jax(self) -> tuple[Any, Any]:
        """The flax module as functions, with the torch module's initial weights."""
        init, apply = ant.pure_functions(self.flax)
        inputs, _ = self.data(np.random.default_rng(0), 1)
        shapes = jax.eval_shape(init, jax.random.key(0), inputs)
        weights = self.from_torch(self.torch_model().state_dict(), *shapes)
        return lambda key, inputs: weights, apply

    def from_torch(self, state_dict: Mapping[str, torch.Tensor], params: Any, model_state: Any = None) -> Any:
        """Parameters, or gradients, and the model state of the torch module, as the flax module has them."""
        return from_state_dict(state_dict, params, model_state, names=self.names, flattened=self.flattened)


PAIRS = {
    "mlp": Pair(
        lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)),
        linen.Sequential([linen.Dense(16), linen.tanh, linen.Dense(4)]),
        vectors,
        names={"0": "layers_0", "2": "layers_2"},
        norm=0.65,
    ),
    "cnn": Pair(TorchCNN, FlaxCNN(), images, flattened={"head": (6, 2, 2)}, norm=0.9),
    "transformer": Pair(TorchTransformer, FlaxTransformer(), sentences, norm=0.5),
}
