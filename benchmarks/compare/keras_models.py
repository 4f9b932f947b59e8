"""The models in Keras, on its JAX backend."""

from __future__ import annotations

from typing import Any

import keras

from benchmarks.compare import workloads
from benchmarks.compare.workloads import weights


def mlp(model: workloads.MLP) -> Any:
    *hidden, last = model.sizes[1:]
    layers = [keras.layers.Dense(size, activation="relu", name=f"dense_{i}") for i, size in enumerate(hidden)]
    outputs = keras.layers.Dense(last, name=f"dense_{len(hidden)}")
    return keras.Sequential([keras.Input((model.sizes[0],)), *layers, outputs])


def cnn(model: workloads.CNN) -> Any:
    layers: list[Any] = [keras.Input((model.side, model.side, 1))]
    for i, (channels, stride) in enumerate(zip(model.channels, (1, 2), strict=True)):
        layers += [
            keras.layers.ZeroPadding2D(1),
            keras.layers.Conv2D(channels, 3, strides=stride, activation="relu", name=f"conv_{i}"),
        ]
    return keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(model.classes, name="dense")])


class Positions(keras.layers.Embedding):
    """A vector for every place of a sequence, whatever stands there."""

    def call(self, inputs):
        return super().call(keras.ops.expand_dims(keras.ops.arange(inputs.shape[1]), 0))


class Attention(keras.layers.Layer):
    """Causal attention of heads that lie side by side in the last axis."""

    def __init__(self, heads: int):
        super().__init__()
        self._heads = heads

    def call(self, query, key, value):
        batch, length, width = query.shape
        shape = (-1, length, self._heads, width // self._heads)
        heads = (keras.ops.reshape(each, shape) for each in (query, key, value))
        return keras.ops.reshape(keras.ops.dot_product_attention(*heads, is_causal=True), (-1, length, width))

    def compute_output_shape(self, query_shape, key_shape=None, value_shape=None):
        return query_shape


def transformer(model: workloads.Transformer) -> Any:
    def dense(width: int, name: str, **options: Any) -> Any:
        return keras.layers.Dense(width, name=name, **options)

    def norm(name: str) -> Any:
        return keras.layers.LayerNormalization(epsilon=1e-5, name=name)

    tokens = keras.Input((model.length,), dtype="int32")
    positions = Positions(model.length, model.width, name="positions")(tokens)
    x = keras.layers.Embedding(model.vocabulary, model.width, name="tokens")(tokens) + positions
    for i in range(model.layers):
        block = f"block_{i}"
        heads = norm(f"{block}.attention_norm")(x)
        heads = [dense(model.width, f"{block}.{name}")(heads) for name in ("query", "key", "value")]
        x = x + dense(model.width, f"{block}.out")(Attention(model.heads)(*heads))
        wide = dense(4 * model.width, f"{block}.wide", activation=lambda v: keras.activations.gelu(v, approximate=True))
        x = x + dense(model.width, f"{block}.narrow")(wide(norm(f"{block}.mlp_norm")(x)))
    return keras.Model(tokens, dense(model.vocabulary, "logits")(norm("norm")(x)))


def keras_model(model: workloads.Model) -> Any:
    """The Keras model of a model in words, with the initial weights."""
    match model:
        case workloads.MLP():
            made = mlp(model)
        case workloads.CNN():
            made = cnn(model)
        case workloads.Transformer():
            made = transformer(model)
    for layer in made.layers:
        if layer.weights:
            tree: Any = weights(model)
            for name in layer.name.split("."):
                tree = tree[name]
            order = (
                ("kernel", "bias") if "kernel" in tree else ("embedding",) if "embedding" in tree else ("scale", "bias")
            )
            layer.set_weights([tree[name] for name in order])
    return made
