"""What is trained: models in words, their initial weights, and their batches; the same for every peer.

Weights are numpy arrays in the tree that flax linen makes, since every other layout follows from it.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sysconfig
from collections.abc import Callable
from typing import Any

import numpy as np


Arrays = tuple[np.ndarray, np.ndarray]

LEARNING_RATE, MAX_GRAD_NORM = 1e-3, 1.0  # Adam, and the norm that gradients are clipped to, for every workload


TRAINERS = (
    "ant", "ant-standard", "fused", "fused-standard", "step", "torch", "torch-deferred", "torch-compile", "torch-usual",
    "lightning", "lightning-usual", "keras",
)  # fmt: skip
COUNTS = (1, 8, 32)  # of callbacks
CALLBACKS = (
    "ant", "step", *(f"ant-{kind}-{count}" for kind in ("traced", "100", "each") for count in COUNTS),
    "torch", *(f"torch-each-{count}" for count in COUNTS),
)  # fmt: skip
LOADERS = ("ant", "ant-numpy", "ant-dataloader", "ant-grain", "prefetched", "torch", "torch-usual")
FEW = ("ant", "fused", "torch")


@dataclasses.dataclass(frozen=True)
class MLP:
    """Dense layers with ReLU between them; ``sizes`` from the inputs to the classes."""

    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class CNN:
    """Two convolutions of 3x3, the second with stride 2, and a dense layer, on square images of one channel."""

    side: int = 28
    channels: tuple[int, int] = (16, 32)
    classes: int = 10

    @property
    def flat(self) -> tuple[int, int, int]:
        """Channels, height and width of what the dense layer reads."""
        half = (self.side + 1) // 2
        return self.channels[1], half, half


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A causal byte model: pre-norm blocks with attention and a GELU of four times the width."""

    width: int = 64
    layers: int = 2
    heads: int = 4
    length: int = 64
    vocabulary: int = 256


Model = MLP | CNN | Transformer


@dataclasses.dataclass(frozen=True)
class Workload:
    """One training.

    Attributes:
        name: on the command line.
        shows: what it is for.
        model: what is trained.
        batch_size: examples.
        steps: of an epoch.
        make_data: ``make_data(examples)`` returns inputs and integer targets.
        peers: who trains it, by name.
    """

    name: str
    shows: str
    model: Model
    batch_size: int
    steps: int
    make_data: Callable[[Model, int], Arrays]
    peers: tuple[str, ...] = TRAINERS

    def data(self) -> Arrays:
        """The arrays of an epoch."""
        return self.make_data(self.model, self.steps * self.batch_size)

    def batches(self) -> list[Arrays]:
        """The same, cut into batches, in the order in which every peer sees them."""
        inputs, targets = self.data()
        size = self.batch_size
        return [(inputs[i : i + size], targets[i : i + size]) for i in range(0, len(inputs), size)]

    def examples(self) -> list[Arrays]:
        """The same, one by one, as datasets hold them."""
        return list(zip(*self.data(), strict=True))

    def of_steps(self, steps: int) -> Workload:
        """The same with epochs of so many steps."""
        return dataclasses.replace(self, steps=steps)


# Inputs come again and again, each time with another label. So no model can learn them by heart, and however long it
# trains, its numbers do not become denormal ones, with which processors are slow. (With an epoch of ten steps of the
# tiny model they do all the same: units die, and what Adam remembers of their gradients fades to nothing.)
DISTINCT, REDRAWN = 256, 0.2


def noise(model: Model, examples: int) -> Arrays:
    """Inputs of noise, each at least twice, if there is room, with every label."""
    rng = np.random.default_rng(0)
    shape, classes = ((model.sizes[0],), model.sizes[-1]) if isinstance(model, MLP) else ((28, 28, 1), 10)
    distinct = rng.standard_normal((max(1, min(DISTINCT, examples // (2 * classes))), *shape), np.float32)
    times, rows = np.divmod(rng.permutation(examples), len(distinct))
    return distinct[rows], (times % classes).astype(np.int32)


def digits(model: Model, examples: int) -> Arrays:
    """scikit-learn's digits, again and again."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    rng = np.random.default_rng(0)
    rows = rng.permutation(np.arange(examples) % len(found.data))
    labels = np.where(rng.random(examples) < REDRAWN, rng.integers(0, 10, examples), found.target[rows])
    return (found.data[rows] / 16).astype(np.float32), labels.astype(np.int32)


def library_source(model: Model, examples: int) -> Arrays:
    """Pieces of the source of Python's standard library, and each byte's next."""
    assert isinstance(model, Transformer)
    text = b"".join(path.read_bytes() for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")))
    data = np.frombuffer(text, np.uint8)
    starts = np.random.default_rng(0).integers(0, len(data) - model.length - 1, examples)
    pieces = data[starts[:, None] + np.arange(model.length + 1)].astype(np.int32)
    return pieces[:, :-1].copy(), pieces[:, 1:].copy()


def mlp_on_noise(name: str, shows: str, hidden: int = 64, steps: int = 1000, peers: tuple[str, ...] = ()) -> Workload:
    return Workload(name, shows, MLP((64, hidden, 10)), 32, steps, noise, peers)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("tiny", "10-20-2 MLP, batch 16: pure overhead", MLP((10, 20, 2)), 16, 1000, noise),
        Workload("digits", "64-64-10 MLP on digits, batch 32: small", MLP((64, 64, 10)), 32, 1000, digits),
        Workload("medium-32", "784-128-10 MLP, batch 32", MLP((784, 128, 10)), 32, 300, noise),
        Workload("medium-512", "784-128-10 MLP, batch 512", MLP((784, 128, 10)), 512, 60, noise),
        Workload("cnn", "CNN 28x28, batch 32: the trap on a CPU", CNN(), 32, 30, noise),
        Workload("transformer", "byte transformer, d=64, 2 layers, T=64, batch 16", Transformer(), 16, 30,
                 library_source),
        mlp_on_noise("callbacks", "callbacks on the 64-64-10 MLP: so many in the step, on the host every 100 batches, "
                     "on the host at every batch; torch's at every batch", peers=CALLBACKS),
        mlp_on_noise("streaming", "the 64-64-10 MLP, its batches from a loader, or from memory", peers=LOADERS),
        *(mlp_on_noise(f"steps-{n}", f"64-64-10 MLP, epochs of {n} steps", steps=n, peers=FEW)
          for n in (10, 100, 10_000)),
        *(mlp_on_noise(f"hidden-{n}", f"64-{n}-10 MLP", n, 200, FEW) for n in (16, 256, 1024)),
    )
}  # fmt: skip


@functools.cache
def weights(model: Model) -> dict[str, Any]:
    """The initial weights, in the tree of the linen model; kernels of variance 1 over the number of inputs."""
    rng = np.random.default_rng(1)

    def dense(inputs: int, outputs: int) -> dict[str, np.ndarray]:
        return layer((inputs, outputs))

    def layer(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        scale = np.float32(np.prod(shape[:-1]) ** -0.5)
        return {"kernel": scale * rng.standard_normal(shape, np.float32), "bias": np.zeros(shape[-1], np.float32)}

    def norm(width: int) -> dict[str, np.ndarray]:
        return {"scale": np.ones(width, np.float32), "bias": np.zeros(width, np.float32)}

    def embedding(rows: int, width: int) -> dict[str, np.ndarray]:
        return {"embedding": np.float32(0.02) * rng.standard_normal((rows, width), np.float32)}

    def block(width: int) -> dict[str, Any]:
        return {
            "attention_norm": norm(width), "query": dense(width, width), "key": dense(width, width),
            "value": dense(width, width), "out": dense(width, width), "mlp_norm": norm(width),
            "wide": dense(width, 4 * width), "narrow": dense(4 * width, width),
        }  # fmt: skip

    match model:
        case MLP(sizes):
            return {f"dense_{i}": dense(a, b) for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))}
        case CNN(channels=(first, second), classes=classes, flat=flat):
            convs = {"conv_0": layer((3, 3, 1, first)), "conv_1": layer((3, 3, first, second))}
            return {**convs, "dense": dense(int(np.prod(flat)), classes)}
        case Transformer(width=width):
            return {
                "tokens": embedding(model.vocabulary, width),
                "positions": embedding(model.length, width),
                **{f"block_{i}": block(width) for i in range(model.layers)},
                "norm": norm(width),
                "logits": dense(width, model.vocabulary),
            }
