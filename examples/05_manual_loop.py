"""Write the training loop by hand, and measure it.

    python examples/05_manual_loop.py

`trainer.grad_step` and `trainer.train_step` are what `fit` is made of: pure, compiled functions of state and batch. The
example looks at the gradients of one batch, trains with a loop of its own, and then measures a step in two ways: with a
clock, and with JAX's profiler.
"""

import collections
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import ant_jax as ant


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


def main(epochs: int = 10, timed_epochs: int = 20):
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    x_train, x_val, y_train, y_val = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    train_loader = ant.ArrayLoader((x_train, y_train), batch_size=32)
    val_loader = ant.ArrayLoader((x_val, y_val), batch_size=128, shuffle=False)
    trainer = ant.Trainer(
        MLP(),
        optax.adam(2e-3),
        optax.softmax_cross_entropy_with_integer_labels,
        metrics={"accuracy": ant.metrics.accuracy},
        callbacks=[ant.callbacks.gradient_norm(), ant.callbacks.clip_by_global_norm(1.0)],
        progress_bar=False,
    )
    batch = (x_train[:32], y_train[:32])
    state = fresh = trainer.init(batch, seed=0)

    print("The gradients of one batch, which update nothing:")
    grads, metrics = trainer.grad_step(state, batch)
    for path, grad in jax.tree.leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        print(f"  {name:16} {grad.shape!s:10} norm {optax.tree.norm(grad):.3f}")
    print(f"  loss {metrics['loss']:.3f}, norm of all {optax.tree.norm(grads):.3f}")

    print("A loop by hand:")
    accuracy = 0.0
    for epoch in range(epochs):
        # The logs stay on the device until somebody reads them. Read once an epoch, they do not hold up the loop.
        logs = []
        for batch in train_loader.batches(epoch):
            state, step_logs = trainer.train_step(state, batch)  # the traced callbacks are in it, clipping for one
            logs.append(step_logs)
        sizes = [step_logs["batch_size"] for step_logs in logs]  # the last batch is smaller than the others
        loss, norm = (
            np.average([step_logs[name] for step_logs in logs], weights=sizes) for name in ("loss", "grad_norm")
        )
        accuracy = trainer.evaluate(state, val_loader)["val_accuracy"]
        print(f"  epoch {epoch}: loss {loss:.3f}, gradient norm {norm:.3f}, validation accuracy {accuracy:.2%}")

    steps = timed_epochs * len(train_loader)
    by_hand = seconds(lambda: train_by_hand(trainer, fresh, train_loader, timed_epochs))
    by_fit = seconds(lambda: trainer.fit(fresh, train_loader, timed_epochs))
    print(f"A step takes {1e6 * by_hand / steps:.0f} us by hand, where Python launches each by itself,")
    print(f"and {1e6 * by_fit / steps:.0f} us in fit, which launches many at once.")

    print("The operations in which the device spent most time, in us a step:")
    with tempfile.TemporaryDirectory() as directory:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # what the device does is enough
        with jax.profiler.trace(directory, profiler_options=options):
            jax.block_until_ready(train_by_hand(trainer, fresh, train_loader, epochs=1))  # wait before the profile ends
        for name, nanoseconds in longest_operations(directory, count=5):
            print(f"  {1e-3 * nanoseconds / len(train_loader):6.2f} {name}")
    return accuracy


def train_by_hand(trainer, state, loader, epochs):
    for epoch in range(epochs):
        for batch in loader.batches(epoch):
            state, _ = trainer.train_step(state, batch)
    return state


def seconds(train) -> float:
    """Return how long `train` takes when everything is compiled."""
    jax.block_until_ready(train())
    start = time.perf_counter()
    # JAX returns before the device is done: a clock that does not wait measures how fast work is handed over.
    jax.block_until_ready(train())
    return time.perf_counter() - start


def longest_operations(directory: str, count: int) -> list[tuple[str, int]]:
    """Sum the times of XLA's operations in a profile. (TensorBoard and Perfetto show the same file as a timeline.)"""
    (file,) = Path(directory).rglob("*.xplane.pb")
    totals: collections.Counter[str] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                if "hlo_op" in dict(event.stats):
                    totals[event.name] += round(event.duration_ns)
    return totals.most_common(count)


if __name__ == "__main__":
    main()
