"""Write callbacks: pure functions that take the state, the gradients and the logs, and return them.

    python examples/02_write_a_callback.py

One rule holds for every hook: what comes after `trainer` goes in and comes out, in the same order. The example shows

1. one callback written in both styles, as a factory of pure functions and as a frozen dataclass, which train to the
   same bits;
2. a callback that rewrites gradients inside the compiled step and has a memory of its own;
3. a callback on the host that looks every 20 batches and still sees the values of every batch;
4. an observer, which looks at every batch as a torch logger does, returns nothing, and costs no launch;
5. all of them at once, together with some that the library has;
6. how to test a callback: `ant_jax.testing.check_callback` holds it to what the library's own are held to.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import ant_jax as ant
from ant_jax import testing


# --- 1. One callback, two styles: hold one layer still for the first steps, as fine-tuning often does
#
# (Gradients that are zero from the first step on keep Adam's updates at zero; weight decay would move the layer still.)


def freeze(layer: str, steps: int) -> ant.Callback:
    """A factory of pure functions: the hyper-parameters are in the closure."""

    def on_backward_end(batch_idx, trainer, state, grads, logs):
        held = state.step < steps  # known only when the step runs, so `where` chooses and not a Python `if`
        still = jax.tree.map(lambda grad: jnp.where(held, 0.0, grad), grads[layer])
        return state, {**grads, layer: still}, logs

    return ant.Callback(name="freeze", on_backward_end=on_backward_end)


@dataclasses.dataclass(frozen=True)
class Freeze(ant.Callback):
    """The same as a frozen dataclass: the hyper-parameters are its fields, and its name is `freeze` too."""

    layer: str
    steps: int

    def on_backward_end(self, batch_idx, trainer, state, grads, logs):
        held = state.step < self.steps
        still = jax.tree.map(lambda grad: jnp.where(held, 0.0, grad), grads[self.layer])
        return state, {**grads, self.layer: still}, logs


# --- 2. Memory: clip to a percentile of the norms so far (Seetharaman et al. 2020, https://arxiv.org/abs/2007.14469)


def auto_clip(percentile: float = 25.0, window: int = 128, name: str = "auto_clip") -> ant.Callback:
    """Nobody has to guess a threshold: it is a percentile of the last `window` gradient norms."""

    def init(state):
        return jnp.full(window, jnp.nan)  # NaN: no norm yet

    def on_backward_end(batch_idx, trainer, state, grads, logs):
        norm = optax.tree.norm(grads)
        norms = state.callback_states[name].at[state.step % window].set(norm)
        threshold = jnp.nanpercentile(norms, percentile)
        factor = jnp.minimum(1.0, threshold / jnp.maximum(norm, 1e-12))
        grads = jax.tree.map(lambda grad: factor * grad, grads)
        return state.with_callback_state(name, norms), grads, {**logs, "clipped_to": threshold}

    return ant.Callback(name=name, init=init, on_backward_end=on_backward_end)


# --- 3. On the host: look rarely, miss nothing


def worst_batch(every: int = 20) -> ant.Callback:
    """Print the largest loss of every window of batches.

    All steps between two looks run as one compiled program, which keeps their values on the device: `logs.window` has
    an array for every log, one value a batch.
    """

    def on_batch_end(batch_idx, trainer, state, logs):
        losses = logs.window["loss"]
        first, worst = batch_idx + 1 - len(losses), int(np.argmax(losses))
        print(
            f"  epoch {state.epoch}, batches {first} to {batch_idx}: mean loss {losses.mean():.3f}, "
            f"largest {losses[worst]:.3f} at batch {first + worst}"
        )
        return state, logs

    return ant.Callback(name="worst_batch", every=every, on_batch_end=on_batch_end)


# --- 4. An observer: it only looks, so it can be told of each batch of a launch when that is done


def surprises(above: float = 2.0) -> ant.Callback:
    """Print every batch whose loss is large."""

    def on_batch_end(batch_idx, trainer, state, logs):
        if logs["loss"] > above:
            print(
                f"  epoch {state.epoch}, batch {batch_idx}: loss {logs['loss']:.3f}, of {logs['batch_size']} examples"
            )

    return ant.Callback(name="surprises", observer=True, on_batch_end=on_batch_end)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.Dense(128)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(10)(x)


def main(epochs: int = 5, every: int = 20):
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    x_train, x_val, y_train, y_val = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    train_loader = ant.ArrayLoader((x_train, y_train), batch_size=32)
    val_loader = ant.ArrayLoader((x_val, y_val), batch_size=128, shuffle=False)

    def train(*callbacks: ant.Callback):
        trainer = ant.Trainer(
            MLP(),
            optax.adam(2e-3),
            optax.softmax_cross_entropy_with_integer_labels,
            metrics={"accuracy": ant.metrics.accuracy},
            callbacks=callbacks,
            progress_bar=False,
        )
        start = trainer.init((x_train, y_train), seed=0)
        state, history = trainer.fit(start, train_loader, epochs, val_loader)
        return trainer, start, state, history

    forever = epochs * len(train_loader)
    _, start, by_factory, _ = train(freeze("Dense_0", forever))
    _, _, by_dataclass, _ = train(Freeze("Dense_0", forever))
    assert bit_equal(by_factory.params, by_dataclass.params)
    assert bit_equal(by_factory.params["Dense_0"], start.params["Dense_0"])
    assert not bit_equal(by_factory.params["Dense_1"], start.params["Dense_1"])
    print("freeze: both styles gave the same bits; the first layer is as it was, the second has learned")

    print(f"Several callbacks, one of which looks every {every} batches:")
    trainer, _, state, history = train(
        Freeze("Dense_0", steps=20),
        ant.callbacks.gradient_norm(),  # they run in this order: this is the norm before auto_clip, the next one after
        auto_clip(percentile=25.0),
        ant.callbacks.gradient_norm(name="clipped_norm"),
        ant.callbacks.ema(decay=0.95),
        worst_batch(every),
        surprises(above=2.0),
    )
    print(history)
    print(f"auto_clip remembers {np.isfinite(state.callback_states['auto_clip']).sum()} gradient norms")
    averaged = state.replace(params=state.callback_states["ema"]["average"])
    for weights, chosen in {"last": state, "averaged": averaged}.items():
        print(f"accuracy of the {weights} weights: {trainer.evaluate(chosen, val_loader)['val_accuracy']:.2%}")

    testing.check_callback(auto_clip)  # pure, resumable, compiled once, the same bits fused and unfused, ...
    print("auto_clip keeps every promise that check_callback knows")
    return history


def bit_equal(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


if __name__ == "__main__":
    main()
