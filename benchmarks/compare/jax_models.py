"""The models in flax linen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks.compare import workloads


class MLP(nn.Module):
    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        *hidden, last = self.sizes[1:]
        for i, size in enumerate(hidden):
            x = nn.relu(nn.Dense(size, name=f"dense_{i}")(x))
        return nn.Dense(last, name=f"dense_{len(hidden)}")(x)


class CNN(nn.Module):
    channels: tuple[int, int]
    classes: int

    @nn.compact
    def __call__(self, x):
        padding = ((1, 1), (1, 1))  # with a stride "SAME" would pad otherwise than torch can
        for i, (channels, stride) in enumerate(zip(self.channels, (1, 2), strict=True)):
            x = nn.relu(nn.Conv(channels, (3, 3), strides=stride, padding=padding, name=f"conv_{i}")(x))
        return nn.Dense(self.classes, name="dense")(x.reshape(len(x), -1))


class Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):
        *lead, width = x.shape
        norm = nn.LayerNorm(epsilon=1e-5, name="attention_norm")(x)
        heads = (nn.Dense(width, name=name)(norm) for name in ("query", "key", "value"))
        query, key, value = (head.reshape(*lead, self.heads, width // self.heads) for head in heads)
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + nn.Dense(width, name="out")(attended.reshape(x.shape))
        wide = nn.gelu(nn.Dense(4 * width, name="wide")(nn.LayerNorm(epsilon=1e-5, name="mlp_norm")(x)))
        return x + nn.Dense(width, name="narrow")(wide)


class Transformer(nn.Module):
    width: int
    layers: int
    heads: int
    length: int
    vocabulary: int

    @nn.compact
    def __call__(self, tokens):
        positions = nn.Embed(self.length, self.width, name="positions")(jnp.arange(tokens.shape[1]))
        x = nn.Embed(self.vocabulary, self.width, name="tokens")(tokens) + positions[None]
        for i in range(self.layers):
            x = Block(self.heads, name=f"block_{i}")(x)
        return nn.Dense(self.vocabulary, name="logits")(nn.LayerNorm(epsilon=1e-5, name="norm")(x))


def linen(model: workloads.Model) -> nn.Module:
    """The linen module of a model in words."""
    match model:
        case workloads.MLP(sizes):
            return MLP(sizes)
        case workloads.CNN(channels=channels, classes=classes):
            return CNN(channels, classes)
        case workloads.Transformer():
            return Transformer(model.width, model.layers, model.heads, model.length, model.vocabulary)
