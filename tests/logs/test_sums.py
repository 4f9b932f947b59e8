"""Sums and means of logs: exact however long an epoch is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from problems import host

import ant_jax as ant
from ant_jax._logs.packing import FEW, GROUP, pack
from ant_jax._logs.sums import LogSums, mean, means, plus, zero_sums


def summed(logs: Any, batches: int, examples: int, start: LogSums | None = None, weights: Any = None) -> LogSums:
    """The sums of a step's logs over so many batches, in a compiled loop as in training."""

    @jax.jit
    def run(sums: LogSums, logs: Any, weights: Any, count: Any) -> LogSums:
        return lax.fori_loop(0, count, lambda _, sums: sums.add(pack(logs, weights), examples), sums)

    weights = weights or {}
    return run(zero_sums(jax.eval_shape(pack, logs, weights)) if start is None else start, logs, weights, batches)


@pytest.mark.parametrize(("batches", "examples"), [(10**6, 32), (10**6, 1), (600, 2**22), (2049, 2**20), (10**5, 33)])
def test_the_mean_of_a_constant_is_the_constant(batches, examples):
    values: dict[str, Any] = {"loss": 0.7, "third": -0.1, "vector": [0.7, 1e-3], "count": 3}
    logs = {name: jnp.asarray(value) for name, value in values.items()}
    got = means(summed(logs, batches, examples), batches * examples)
    for name in logs:
        np.testing.assert_allclose(got[name], logs[name], rtol=6e-8)
    assert {mean.dtype for mean in got.values()} == {jnp.dtype("float32")}


def test_what_ten_billion_batches_have_summed_takes_up_more_still():
    before = rest = 10**10 * 100 * float(np.float32(0.7))
    words = []
    for _ in range(3):
        words.append(np.full(1, rest, np.float32))
        rest -= float(words[-1][0])
    logs = {"loss": jnp.float32(0.7)}
    form = zero_sums(jax.eval_shape(pack, logs))
    after = summed(logs, 10**5, 100, jax.tree.map(lambda zeros: jnp.array(words), form))
    grown = sum(float(word) for word in np.asarray(after.totals.scalars)[::-1, 0]) - before
    np.testing.assert_allclose(grown, 10**5 * 100 * float(np.float32(0.7)), rtol=1e-6)


@pytest.mark.parametrize("weight", [1, 3, 2**22])
def test_the_sum_of_weights_is_as_exact(weight):
    logs: dict[str, Any] = {"loss": jnp.float32(1), "rare": jnp.float32(0.7), "vector": jnp.full(2, 0.7)}
    count = 10**5
    sums = summed(logs, count, 8, weights={name: jnp.int32(weight) for name in ("rare", "vector")})
    assert np.asarray(sums.totals.weights()["rare"]).astype(np.float64).sum() == weight * count
    got: Any = means(sums, 8 * count)
    np.testing.assert_allclose(got["rare"], np.float32(0.7), rtol=6e-8)
    np.testing.assert_allclose(got["vector"], np.full(2, 0.7, np.float32), rtol=6e-8)


def test_what_stands_for_no_example_may_be_nan_and_what_is_infinite_stays_so():
    logs = {"loss": jnp.float32(1), "skipped": jnp.float32(np.nan), "infinite": jnp.float32(-np.inf)}
    never = summed(logs, 3, 8, weights={"skipped": jnp.int32(0)})
    later = {**logs, "skipped": jnp.float32(5), "infinite": jnp.float32(1)}
    sums = summed(later, 1, 8, never, {"skipped": jnp.int32(8)})
    assert means(sums, 32) == {"loss": 1, "infinite": -np.inf, "skipped": 5}
    assert not np.isnan(sums.totals.scalars).any()
    with jax.debug_nans(True):
        assert np.isnan(means(never, 24)["skipped"])


def test_means_of_many_logs_are_the_same_as_of_few():
    assert FEW < 100 and GROUP < 100
    logs = {f"log{i}": jnp.float32(i) for i in range(100)} | {"loss": jnp.float32(-1)}
    assert means(summed(logs, 7, 3), 21) == logs


@pytest.mark.parametrize("on_device", [True, False])
def test_what_host_hooks_publish_is_summed_as_exactly(on_device):
    value: Any = jnp.float32(0.7) if on_device else 0.7
    total: Any = jnp.array([1e7, 0, 0]) if on_device else np.array([1e7, 0, 0])
    for _ in range(1000):
        total = plus(total, value, 1)
    expected = (1e7 + 1000 * float(value)) / 10**7
    np.testing.assert_allclose(mean(total, 10**7), expected, rtol=6e-8 if on_device else 1e-15)


def test_what_host_hooks_publish_may_be_any_number():
    vector = plus(plus(None, np.array([1, 2]), 2), np.array([3, 4]), 2)
    np.testing.assert_array_equal(mean(vector, 4), [2, 3])
    assert mean(plus(plus(None, 1.0, 3), jnp.float32(2), 1), 4) == 1.25  # on the host, then on the device
    assert mean(plus(plus(None, float("inf"), 1), 1.0, 1), 2) == np.inf
    assert mean(plus(None, jnp.int32(7), 2), 2) == 7
    assert mean(plus(None, True, 2), 2) == 1


class Endless:
    """The same batch without end."""

    def __init__(self, examples: int):
        self._batch = (np.zeros(examples, np.uint8), np.zeros(examples, np.uint8))

    def __iter__(self) -> Any:
        while True:
            yield self._batch


def test_an_epoch_of_more_than_two_billion_examples():
    model = (lambda key, x: ({"w": jnp.zeros(())}, {}), lambda p, s, x, key: (p["w"], s))
    publish = host("publish", every=100, on_batch_end=lambda i, t, state, logs: (state, {**logs, "mine": logs["loss"]}))
    trainer = ant.Trainer(model, optax.sgd(0.0), lambda o, t: 0.7 + 0 * o, callbacks=[publish], progress_bar=False)
    loader = Endless(2**24)
    state = trainer.init(next(iter(loader)))
    history = trainer.fit(state, loader, 1, [next(iter(loader))] * 130, steps_per_epoch=130)[1]
    assert history[0] == dict.fromkeys(("train_loss", "train_mine", "val_loss"), float(np.float32(0.7)))
