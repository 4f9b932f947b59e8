"""Tiny problems that compile in a moment."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ant_jax as ant


FEATURES, CLASSES, BATCH = 4, 3, 8


def data(examples: int = 5 * BATCH, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(examples, FEATURES)).astype(np.float32), rng.integers(0, CLASSES, examples).astype(np.int32)


def batches(count: int = 5, batch: int = BATCH, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    inputs, targets = data(count * batch, seed)
    return [(inputs[i : i + batch], targets[i : i + batch]) for i in range(0, count * batch, batch)]


def init(key: Any, inputs: Any) -> tuple[Any, Any]:
    kernel = 0.5 * jax.random.normal(key, (inputs.shape[-1], CLASSES))
    return {"bias": jnp.zeros(CLASSES), "kernel": kernel}, {}


def apply(params: Any, model_state: Any, inputs: Any, key: Any) -> tuple[Any, Any]:
    del key
    return inputs @ params["kernel"] + jnp.broadcast_to(params["bias"], (len(inputs), CLASSES)), model_state


LINEAR = (init, apply)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def standard_promotion(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Let optax promote dtypes as it likes: its Adam is not written for strict promotion, which the tests run under."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return transformation.update(updates, state, params)

    return optax.GradientTransformation(transformation.init, update)


def adam(learning_rate: float = 0.01) -> optax.GradientTransformation:
    return standard_promotion(optax.adam(learning_rate))


def squares(outputs: Any, targets: Any) -> Any:
    """A criterion whose gradients are simple: half the squared distance from the one-hot targets."""
    return 0.5 * jnp.sum((outputs - jax.nn.one_hot(targets, CLASSES)) ** 2, axis=-1)


def trainer(*callbacks: ant.Callback, **options: Any) -> ant.Trainer:
    settings = {"model": LINEAR, "optimizer": optax.sgd(0.1), "criterion": cross_entropy, "progress_bar": False}
    return ant.Trainer(**{**settings, "callbacks": callbacks, **options})


def host(name: str = "host", *, every: int | None = 1, **hooks: Any) -> ant.Callback:
    return ant.Callback(name=name, every=every, **hooks)


def numbers(leaf: Any) -> np.ndarray:
    """A leaf as numpy, a random key as its data."""
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def leaves_of(state: ant.TrainState) -> list[np.ndarray]:
    """Everything in a state that is numbers, as numpy."""
    sums = None if state.host is None else state.host.log_sums
    return [numbers(leaf) for leaf in jax.tree.leaves((state.values(), sums))]


def assert_bit_equal(a: ant.TrainState, b: ant.TrainState, *fields: str) -> None:
    """Assert that two states are the same, to the bit, in some fields or in all."""
    for field in fields or ("step", "params", "model_state", "opt_state", "accumulator", "callback_states"):
        left, right = getattr(a, field), getattr(b, field)
        assert jax.tree.structure(left) == jax.tree.structure(right), field
        for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            np.testing.assert_array_equal(numbers(x), numbers(y), err_msg=field, strict=True)


class Clock:
    """Stands still but where a test moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def passing(self, **seconds: float) -> ant.Callback:
        """Let so much time pass in some hooks."""

        def hook_of(by: float) -> Any:
            def hook(*arguments: Any) -> Any:
                self.now += by
                return arguments[-2:]

            return hook

        hooks: Any = {name: hook_of(by) for name, by in seconds.items()}
        return host("passing", **hooks)
