"""What is logged of gradients, parameters and updates is what numpy makes of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import adam, batches, host, trainer

import ant_jax as ant
from ant_jax.callbacks._statistics import HISTOGRAM_EXPONENTS, _histogram


library = ant.callbacks


def norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree))))


def test_gradient_norm_logs_the_norm_of_every_batch_before_clipping():
    norms: list[float] = []
    a_trainer = trainer(library.clip_by_global_norm(1e-3), library.gradient_norm(name="norm"))
    start = a_trainer.init(batches()[0])
    state = start
    for batch in batches(3):
        grads, _ = a_trainer.grad_step(state, batch)
        state, logs = a_trainer.train_step(state, batch)
        norms.append(float(logs["norm"]))
        np.testing.assert_allclose(logs["norm"], norm(grads), rtol=1e-6)
    _, history = a_trainer.fit(start, batches(3), 1)
    np.testing.assert_allclose(history[0]["train_norm"], np.mean(norms), rtol=1e-6)


@pytest.mark.parametrize("per_layer", [True, False])
def test_norms_are_numpys_in_all_and_of_each_parameter(per_layer):
    a_trainer = trainer(library.gradient_statistics(per_layer=per_layer), optimizer=adam())
    state = a_trainer.init(batches()[0])
    for batch in batches(2):
        grads, _ = a_trainer.grad_step(state, batch)
        after, logs = a_trainer.train_step(state, batch)
        trees = {"grad": grads, "param": state.params, "update": optax.tree.sub(after.params, state.params)}
        expected = {f"{kind}_norm": norm(tree) for kind, tree in trees.items()}
        if per_layer:
            for kind, tree in trees.items():
                expected |= {f"{kind}_norm/{path}": norm(leaf) for path, leaf in tree.items()}
        actual = {name: float(value) for name, value in logs.items() if "norm" in name}
        assert actual == pytest.approx(expected, rel=2e-5)
        assert not any("histogram" in name for name in logs)  # only on demand
        assert all(logs[name].dtype == jnp.float32 and logs[name].shape == () for name in expected)
        state = after


def test_with_accumulation_they_are_of_updates_and_the_epochs_mean_is_theirs():
    def look(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        seen.update(logs.window)
        return state, logs

    seen: dict[str, Any] = {}
    a_trainer = trainer(
        library.gradient_norm(name="of_batch"),
        library.gradient_statistics(histograms=True),
        host(every=100, on_batch_end=look),
        gradient_accumulation_steps=2,
    )
    start = a_trainer.init(batches()[0])
    _, history = a_trainer.fit(start, batches(5), 1)
    published = {name for name in seen if "_norm" in name or "histogram" in name}
    assert len(published) == 3 * 3 + 2
    for name in published:
        there = np.isfinite(seen[name]).reshape(5, -1).all(axis=1)
        assert there.tolist() == [False, True, False, True, True], name  # the last window has one batch
        mean = np.average(seen[name][there], axis=0, weights=[2, 2, 1])
        np.testing.assert_allclose(history[0][f"train_{name}"], mean, rtol=1e-5)
    assert np.isfinite(seen["of_batch"]).all()
    grads = [a_trainer.grad_step(start, batch)[0] for batch in batches(5)[:2]]
    np.testing.assert_allclose(seen["grad_norm"][1], norm(jax.tree.map(lambda a, b: (a + b) / 2, *grads)), rtol=1e-5)
    np.testing.assert_allclose(seen["param_norm"][1], norm(start.params), rtol=1e-6)
    np.testing.assert_allclose(seen["update_norm"][1], 0.1 * seen["grad_norm"][1], rtol=1e-5)


def test_parameters_of_a_low_precision_have_norms_in_float32():
    a_trainer = trainer(library.gradient_statistics(), precision="bfloat16")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), a_trainer.init(batches()[0]).params)
    state = a_trainer.init(batches()[0], params=params)
    _, logs = a_trainer.train_step(state, batches()[0])
    assert logs["param_norm"].dtype == logs["update_norm"].dtype == jnp.float32
    np.testing.assert_allclose(logs["param_norm"], norm(jax.tree.map(np.float32, params)), rtol=1e-5)


def test_a_histogram_counts_every_element_once():
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(40, 25)) * 2.0 ** rng.integers(-40, 20, (40, 25))).astype(np.float32)
    values[0, :8] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-42, 1.0, 2.0]
    histogram = jax.jit(_histogram)(values)
    assert histogram.shape == (len(HISTOGRAM_EXPONENTS),) == (32,) and histogram.dtype == jnp.float32
    assert histogram.sum() == values.size
    magnitudes = np.where(np.isnan(values), np.inf, np.abs(values))
    edges = [0.0, *(2.0**exponent for exponent in HISTOGRAM_EXPONENTS[1:]), np.inf]
    expected = [
        np.sum((magnitudes >= low) & ((magnitudes < high) | np.isinf(high)))
        for low, high in zip(edges[:-1], edges[1:], strict=True)
    ]
    assert histogram.tolist() == expected
    assert (histogram[0] > 0) and (histogram[-1] > 3)


def test_a_histogram_counts_beyond_what_float32_counts_by_ones():
    size = 2**24 + 2
    assert jax.jit(_histogram)(jnp.zeros(size))[0] == size


def test_histograms_are_of_each_parameter():
    a_trainer = trainer(library.gradient_statistics(per_layer=False, histograms=True))
    start = a_trainer.init(batches()[0])
    grads, _ = a_trainer.grad_step(start, batches()[0])
    _, logs = a_trainer.train_step(start, batches()[0])
    expected = {f"grad_histogram/{path}": _histogram(grad).tolist() for path, grad in grads.items()}
    actual = {name: log.tolist() for name, log in logs.items() if "histogram" in name}
    assert actual == expected


def test_logs_of_one_name_do_not_hide_each_other():
    two = [
        library.gradient_statistics(),
        library.clip_by_global_norm(0.01),
        library.gradient_statistics(name="clipped"),
    ]
    a_trainer = trainer(*two)
    _, history = a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 1)
    assert history[0]["train_clipped/grad_norm"] < history[0]["train_grad_norm"]
    assert "train_clipped/grad_norm/bias" in history[0]


@pytest.mark.parametrize("order", [1, -1])
def test_both_factories_go_together_under_their_default_names(order):
    both = [library.gradient_norm(), library.gradient_statistics()][::order]
    a_trainer = trainer(*both, gradient_accumulation_steps=2)
    alone = trainer(library.gradient_statistics(), gradient_accumulation_steps=2)
    start = a_trainer.init(batches()[0])
    _, history = a_trainer.fit(start, batches(2), 1)
    _, expected = alone.fit(start, batches(2), 1)
    prefixed = {f"train_gradient_statistics/{log[6:]}": value for log, value in expected[0].items() if "norm" in log}
    assert {log: value for log, value in history[0].items() if "statistics" in log} == prefixed
    norms = [norm(a_trainer.grad_step(start, batch)[0]) for batch in batches(2)]
    np.testing.assert_allclose(history[0]["train_grad_norm"], np.mean(norms), rtol=1e-6)  # of batches


def test_a_log_that_would_be_hidden_all_the_same_is_refused():
    colliding = trainer(library.gradient_norm(name="mine/grad_norm"), library.gradient_statistics(name="mine"))
    with pytest.raises(ValueError, match="another callback has published the log 'mine/grad_norm'; give that one or"):
        colliding.fit(colliding.init(batches()[0]), batches(2), 1)
