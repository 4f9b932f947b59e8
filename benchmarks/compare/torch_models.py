"""The models in torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.compare import workloads
from benchmarks.compare.workloads import weights


class MLP(nn.Module):
    def __init__(self, sizes: tuple[int, ...]):
        super().__init__()
        self.names = [f"dense_{i}" for i in range(len(sizes) - 1)]
        for name, inputs, outputs in zip(self.names, sizes, sizes[1:], strict=False):
            self.add_module(name, nn.Linear(inputs, outputs))

    def forward(self, x):
        for name in self.names[:-1]:
            x = F.relu(self.get_submodule(name)(x))
        return self.get_submodule(self.names[-1])(x)


class CNN(nn.Module):
    def __init__(self, model: workloads.CNN):
        super().__init__()
        first, second = model.channels
        self.conv_0 = nn.Conv2d(1, first, 3, padding=1)
        self.conv_1 = nn.Conv2d(first, second, 3, stride=2, padding=1)
        channels, height, width = model.flat
        self.dense = nn.Linear(channels * height * width, model.classes)

    def forward(self, x):
        return self.dense(F.relu(self.conv_1(F.relu(self.conv_0(x)))).flatten(1))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        norm = self.attention_norm(x)
        projected = (self.query(norm), self.key(norm), self.value(norm))
        heads = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in projected)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.narrow(F.gelu(self.wide(self.mlp_norm(x)), approximate="tanh"))


class Transformer(nn.Module):
    def __init__(self, model: workloads.Transformer):
        super().__init__()
        self.tokens = nn.Embedding(model.vocabulary, model.width)
        self.positions = nn.Embedding(model.length, model.width)
        self.blocks = [f"block_{i}" for i in range(model.layers)]
        for name in self.blocks:
            self.add_module(name, Block(model.width, model.heads))
        self.norm, self.logits = nn.LayerNorm(model.width), nn.Linear(model.width, model.vocabulary)
        self.register_buffer("places", torch.arange(model.length), persistent=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(self.places)
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        return self.logits(self.norm(x))


def module(model: workloads.Model) -> nn.Module:
    """The torch module of a model in words, with the initial weights."""
    match model:
        case workloads.MLP(sizes):
            made = MLP(sizes)
        case workloads.CNN():
            made = CNN(model)
        case workloads.Transformer():
            made = Transformer(model)
    made.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in in_torch(model, weights(model))})
    return made


def in_torch(model: workloads.Model, tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The weights with torch's names and layouts. (Not by ``ant_jax.interop``: torch's process is to import torch.)"""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from in_torch(model, value, f"{prefix}{name}.")
        elif name == "kernel" and value.ndim == 4:
            yield f"{prefix}weight", value.transpose(3, 2, 0, 1)
        elif name == "kernel" and isinstance(model, workloads.CNN):
            channels, height, width = model.flat  # which torch flattens in this order, and JAX with the channels last
            by_place = value.reshape(height, width, channels, -1).transpose(2, 0, 1, 3)
            yield f"{prefix}weight", by_place.reshape(value.shape).T
        elif name == "kernel":
            yield f"{prefix}weight", value.T
        else:
            yield f"{prefix}{'bias' if name == 'bias' else 'weight'}", value


def cross_entropy(outputs: Any, targets: Any) -> torch.Tensor:
    """The mean over all targets."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def tensors(model: workloads.Model, arrays: workloads.Arrays) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets as torch wants them: channels first, and 64-bit indices."""
    inputs, targets = map(torch.from_numpy, arrays)
    if isinstance(model, workloads.CNN):
        inputs = inputs.permute(0, 3, 1, 2).contiguous()
    return inputs.long() if isinstance(model, workloads.Transformer) else inputs, targets.long()


class Batches:
    """Arrays in memory, cut into batches: views, which copy nothing."""

    def __init__(self, workload: workloads.Workload):
        self._inputs, self._targets = tensors(workload.model, workload.data())
        self._size = workload.batch_size

    def __len__(self) -> int:
        return len(self._targets) // self._size

    def __iter__(self):
        return iter(zip(self._inputs.split(self._size), self._targets.split(self._size), strict=True))


def dataloader(workload: workloads.Workload) -> DataLoader[Any]:
    """The same batches out of torch's own loader, in this process."""
    return DataLoader(TensorDataset(*tensors(workload.model, workload.data())), workload.batch_size)
