"""Whether a criterion broadcasts columns and rows against each other."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import FEATURES, batches, trainer

from ant_jax._step.broadcasts import stretches


@pytest.fixture(autouse=True)
def rank_promotion() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


QUANTILES = np.array([0.1, 0.5, 0.9], np.float32)
# Outputs [8, 1] and targets [8].
APART = {
    "each": lambda o, t: (o[:, 0] - t) ** 2,
    "mean": lambda o, t: jnp.mean((o[:, 0] - t) ** 2),
    "squeezed": lambda o, t: jnp.mean(jnp.abs(jnp.squeeze(o) - t)),
    "targets as a column": lambda o, t: optax.l2_loss(o, t[:, None]).mean(),
    "statistics": lambda o, t: jnp.var(o) + (jnp.mean(o) - jnp.mean(t)) ** 2,
    "centred": lambda o, t: jnp.mean(jnp.abs((o - jnp.mean(o)).ravel() - (t - jnp.mean(t)))),
    "r2": lambda o, t: 1 - jnp.var(o[:, 0] - t) / jnp.var(t),
    "correlation": lambda o, t: jnp.corrcoef(o.ravel(), t)[0, 1] ** 2,
    "product": lambda o, t: t @ o[:, 0] / 8,
    "vmap": lambda o, t: jax.vmap(lambda o, t: (o[0] - t) ** 2)(o, t).mean(),
    "scan": lambda o, t: jax.lax.scan(lambda s, x: (s + (x[0][0] - x[1]) ** 2, None), 0.0, (o, t))[0] / 8,
    "pinball": lambda o, t: jnp.mean(jnp.maximum((t[:, None] - o) * QUANTILES, (o - t[:, None]) * (1 - QUANTILES))),
    "pairs": lambda o, t: jnp.mean(jnp.abs((o - o.T) - (t[:, None] - t[None, :]))),
}
AGAINST = {
    "mean": lambda o, t: jnp.mean((o - t) ** 2),
    "each": lambda o, t: (o - t) ** 2,
    "jit": jax.jit(lambda o, t: jnp.mean((o - t) ** 2)),
    "where": lambda o, t: jnp.where(t > 0, o, 0.0).mean(),
    "optax": lambda o, t: optax.huber_loss(o, t).mean(),
    "scaled": lambda o, t: jnp.mean(jnp.abs(2.0 * o - t / 3)),
    "a row": lambda o, t: jnp.mean(jnp.abs(o - t[None, :])),
    "over one axis": lambda o, t: jnp.mean((o - t) ** 2, axis=0),
    "vmap": lambda o, t: jax.vmap(lambda o: jnp.mean((o - t) ** 2))(o).mean(),
    "cond": lambda o, t: jax.lax.cond(t[0] > 0, lambda: ((o - t) ** 2).mean(), lambda: 0.0),
    "custom": jax.checkpoint(lambda o, t: jnp.mean(jnp.logaddexp(o, t))),
}


@pytest.mark.parametrize("case", [*(f"apart: {name}" for name in APART), *(f"against: {name}" for name in AGAINST)])
def test_a_column_and_a_row_are_told_from_what_is_compared_rightly(case):
    kind, name = case.split(": ")
    function = (APART if kind == "apart" else AGAINST)[name]
    column, row = jnp.arange(8.0)[:, None], jnp.arange(8.0) ** 2
    assert stretches(function, column, row) == (kind == "against")
    if name not in ("targets as a column", "each", "over one axis", "scan", "vmap"):
        assert stretches(lambda row, column: function(column, row), row, column) == (kind == "against")


def test_a_criterion_that_compares_rightly_trains_and_one_that_does_not_is_refused():
    column = (lambda key, x: ({"w": jnp.ones((FEATURES, 1))}, {}), lambda p, s, x, key: (x @ p["w"], s))
    loader = [(inputs, targets.astype(np.float32)) for inputs, targets in batches(2)]
    right = trainer(model=column, criterion=APART["mean"], metrics={"r2": APART["r2"]})
    state, history = right.fit(right.init(loader[0]), loader, 2)
    each = trainer(model=column, criterion=APART["each"])
    _, expected = each.fit(each.init(loader[0]), loader, 2)
    np.testing.assert_allclose(history[1]["train_loss"], expected[1]["train_loss"], rtol=1e-6)
    for options in ({"criterion": AGAINST["mean"]}, {"criterion": APART["mean"], "metrics": {"m": AGAINST["jit"]}}):
        wrong = trainer(model=column, **options)
        with pytest.raises(ValueError, match=r"targets float32\[8\].*and it broadcasts them against each other"):
            wrong.fit(state, loader, 3)
        with pytest.raises(ValueError, match="and it broadcasts them against each other"):
            wrong.evaluate(state, loader)
