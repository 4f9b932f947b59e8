"""Train a classifier of handwritten digits: gradient clipping, a gradient-norm log and early stopping.

    python examples/01_digits.py

The data are scikit-learn's 1797 grey images of 8 x 8 pixels, so nothing is downloaded. The example fails unless it
classifies 97 % of the held-out digits correctly.
"""

import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import ant_jax as ant


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.Dense(256)(x))
        x = nn.Dropout(0.3, deterministic=not train)(x)
        return nn.Dense(10)(x)


def main(epochs: int = 60, goal: float = 0.97):
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)  # pixels are 0 to 16
    x_train, x_val, y_train, y_val = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    train_loader = ant.ArrayLoader((x_train, y_train), batch_size=32)
    val_loader = ant.ArrayLoader((x_val, y_val), batch_size=128, shuffle=False)

    trainer = ant.Trainer(
        MLP(),
        optax.adamw(3e-3),
        optax.softmax_cross_entropy_with_integer_labels,
        metrics={"accuracy": ant.metrics.accuracy},
        callbacks=[
            ant.callbacks.gradient_norm(),  # publishes "grad_norm", of the gradient before it is clipped
            ant.callbacks.clip_by_global_norm(1.0),
            ant.callbacks.early_stopping("val_loss", patience=5),
        ],
    )
    state = trainer.init((x_train[:1], y_train[:1]), seed=0)
    state, history = trainer.fit(state, train_loader, epochs, val_loader)
    print(history)

    accuracy = trainer.evaluate(state, val_loader)["val_accuracy"]
    print(f"validation accuracy {accuracy:.2%} after {state.epoch} of at most {epochs} epochs")
    if accuracy < goal:
        raise SystemExit(f"that is below the goal of {goal:.0%}")
    return history


if __name__ == "__main__":
    main()
