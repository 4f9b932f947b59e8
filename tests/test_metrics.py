"""Metrics of classes: what they count, and what they refuse rather than broadcast."""

import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import metrics


@pytest.mark.parametrize("shape", [(1,), (3,), (4, 1), (), (2, 1)])
@pytest.mark.parametrize("metric", [metrics.accuracy, metrics.top_k_accuracy(2)], ids=["accuracy", "top 2"])
def test_targets_of_another_shape_are_refused(metric, shape):
    with pytest.raises(ValueError, match=r"must be integer classes of shape \(4,\) for outputs of shape \(4, 3\)"):
        metric(jnp.zeros((4, 3)), jnp.zeros(shape, jnp.int32))


@pytest.mark.parametrize("leading", [(5,), (2, 5)])
def test_they_count_the_right_class_among_the_best(leading):
    rng = np.random.default_rng(0)
    outputs, targets = rng.normal(size=(*leading, 4)).astype(np.float32), rng.integers(0, 4, leading)
    places = np.argsort(np.argsort(-outputs, axis=-1), axis=-1)
    place = np.take_along_axis(places, targets[..., None], -1)[..., 0]
    given = jnp.asarray(outputs), jnp.asarray(targets)
    np.testing.assert_array_equal(metrics.accuracy(*given), place < 1)
    np.testing.assert_array_equal(metrics.top_k_accuracy(2)(*given), place < 2)
