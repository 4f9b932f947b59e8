"""Take a trained torch model over, train it on, and bring it back.

    pip install ".[examples,torch]" && python examples/07_from_torch.py

The model is written in flax as it is in torch; its parameters and batch statistics come over by name. Torch flattens
images as (C, H, W) and JAX as (H, W, C), so `flattened` says what the Linear after it reads; and flax's batch norm is
told torch's momentum.
"""

import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import ant_jax as ant
from ant_jax.interop import torch as ant_torch


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.MaxPool2d(2)
        )
        self.classifier = torch.nn.Linear(8 * 4 * 4, 10)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(8, (3, 3), padding=1, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
        return nn.Dense(10, name="classifier")(x.reshape(len(x), -1))


# What has another name in JAX, and what torch flattens before the Linear.
WAYS = {"names": {"features.0": "conv", "features.1": "norm"}, "flattened": {"classifier": (8, 4, 4)}}


def load_data():
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    return train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)


def train_in_torch(model: TorchNet, images, labels) -> None:
    """One epoch, by hand: what you have had so far."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    inputs, targets = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    for x, y in zip(inputs.split(32), targets.split(32), strict=True):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def accuracy_in_torch(model: TorchNet, images, labels) -> float:
    with torch.no_grad():
        outputs = model.eval()(torch.from_numpy(images).permute(0, 3, 1, 2))
    return float((outputs.argmax(1).numpy() == labels).mean())


def main() -> None:
    torch.manual_seed(0)
    x_train, x_val, y_train, y_val = load_data()
    torch_model = TorchNet()
    train_in_torch(torch_model, x_train, y_train)
    before = accuracy_in_torch(torch_model, x_val, y_val)
    print(f"trained in torch: accuracy {before:.4f}")

    trainer = ant.Trainer(
        Net(),
        optax.adam(1e-3),
        optax.softmax_cross_entropy_with_integer_labels,
        metrics={"accuracy": ant.metrics.accuracy},
        progress_bar=False,
    )
    batch = (x_train[:1], y_train[:1])
    template = trainer.init(batch)
    params, model_state = ant_torch.from_state_dict(
        torch_model.state_dict(), template.params, template.model_state, **WAYS
    )
    state = trainer.init(batch, params=params, model_state=model_state)
    taken_over = trainer.evaluate(state, [(x_val, y_val)])["val_accuracy"]
    print(f"taken over:       accuracy {taken_over:.4f}")
    assert jnp.isclose(taken_over, before)

    state, history = trainer.fit(state, ant.ArrayLoader((x_train, y_train), 32), 10, [(x_val, y_val)])
    trained_on = history[-1]["val_accuracy"]
    print(f"trained on:       accuracy {trained_on:.4f}")

    back = ant_torch.to_state_dict(state.params, state.model_state, like=torch_model.state_dict(), **WAYS)
    torch_model.load_state_dict(back)
    after = accuracy_in_torch(torch_model, x_val, y_val)
    print(f"back in torch:    accuracy {after:.4f}")
    assert np.isclose(after, trained_on) and after > max(before, 0.95)


if __name__ == "__main__":
    main()
