"""Train a flax.linen module, a flax.nnx module and a pair of plain functions with one list of callbacks.

    python examples/04_any_model.py

A trainer takes each of the three as it is. Callbacks see parameters and gradients as pytrees, so they need not know
which kind of model made them. Dropout and batch norm change by themselves between training and evaluation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import ant_jax as ant


class LinenModel(linen.Module):
    """Batch norm and dropout in linen: an argument named `train` tells it what it is doing."""

    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.Dense(128)(x)
        x = linen.relu(linen.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = linen.Dropout(0.2, deterministic=not train)(x)
        return linen.Dense(10)(x)


class NnxModel(nnx.Module):
    """The same in nnx: its layers know whether the model is in training or in evaluation mode."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.norm = nnx.BatchNorm(128, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def init(key, inputs):
    """Plain JAX: make the parameters, and the model state, of which this model has none."""
    keys = jax.random.split(key)
    he = jax.nn.initializers.he_normal()
    params = {
        "hidden": {"kernel": he(keys[0], (inputs.shape[-1], 128)), "bias": jnp.zeros(128)},
        "out": {"kernel": he(keys[1], (128, 10)), "bias": jnp.zeros(10)},
    }
    return params, {}


def apply(params, model_state, inputs, key):
    """Return the logits and the model state; there is a `key` in training, and `None` in evaluation."""
    x = jax.nn.relu(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    if key is not None:
        x = jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x / 0.8, 0.0)
    return x @ params["out"]["kernel"] + params["out"]["bias"], model_state


def main(epochs: int = 15):
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    x_train, x_val, y_train, y_val = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    train_loader = ant.ArrayLoader((x_train, y_train), batch_size=32)
    val_loader = ant.ArrayLoader((x_val, y_val), batch_size=128, shuffle=False)

    # Callbacks are configuration and never change, so trainers can share them: what a callback remembers is in a state.
    callbacks = [
        ant.callbacks.gradient_norm(),
        ant.callbacks.from_optax(optax.centralize(), name="centralize"),
        ant.callbacks.clip_by_global_norm(1.0),
        ant.callbacks.ema(decay=0.98),
        ant.callbacks.early_stopping("val_loss", patience=5),
    ]
    models = {"flax.linen": LinenModel(), "flax.nnx": NnxModel(nnx.Rngs(0)), "(init, apply)": (init, apply)}

    print(f"{'model':14} {'parameters':>10} {'epochs':>6} {'accuracy':>9} {'averaged':>9}")
    accuracies = {}
    for name, model in models.items():
        trainer = ant.Trainer(
            model,
            optax.adam(2e-3),
            optax.softmax_cross_entropy_with_integer_labels,
            metrics={"accuracy": ant.metrics.accuracy},
            callbacks=callbacks,
            progress_bar=False,
        )
        state = trainer.init((x_train, y_train), seed=0)
        state, history = trainer.fit(state, train_loader, epochs, val_loader)
        accuracies[name] = history[-1]["val_accuracy"]
        average = state.replace(params=state.callback_states["ema"]["average"])
        averaged = trainer.evaluate(average, val_loader)["val_accuracy"]
        size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        print(f"{name:14} {size:10,} {state.epoch:6} {accuracies[name]:9.2%} {averaged:9.2%}")
    return accuracies


if __name__ == "__main__":
    main()
