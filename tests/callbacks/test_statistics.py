"""What is logged of gradients, parameters and updates is what numpy makes of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import adam, batches, host, trainer

import ant_jax as ant
from ant_jax._logs.logs import Logs
from ant_jax._logs.packing import pack
from ant_jax._step.branches import run_if
from ant_jax.callbacks._statistics import GROUP, HISTOGRAM_EXPONENTS, SMALL, _histogram, _norms


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


def test_norms_of_leaves_of_any_shape_and_dtype_are_those_of_each_alone():
    rng = np.random.default_rng(0)
    shapes = [(), (1,), (3,), (0,), (2, 3), (6,), (3, 2), (SMALL,), (SMALL, 1), (SMALL + 1,), (1, SMALL + 1)]
    leaves = {
        f"{repeat}/{jnp.dtype(dtype)}-{len(shape)}/{shape}": jnp.asarray(rng.normal(size=shape), dtype)
        for repeat in "zy"
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64)
        for shape in shapes
    }
    (paths, norms), *others = jax.jit(_norms)(leaves).items()
    assert not others and paths == tuple(sorted(leaves)) and norms.dtype == jnp.float32
    for path, actual in zip(paths, norms, strict=True):
        leaf = leaves[path]
        alone = optax.tree.norm(leaf if jnp.iscomplexobj(leaf) else leaf.astype(jnp.float32))
        np.testing.assert_allclose(actual, alone, rtol=1e-6, err_msg=path)
    assert _norms({}) == {}


def test_norms_of_float64_leaves_stay_so_beside_others():
    with jax.enable_x64(True):
        vectors = _norms({"a": jnp.ones(3), "b": jnp.ones(3, jnp.float32), "c": jnp.full(3, 2.0)})
        assert vectors.keys() == {("a", "c"), ("b",)}
        assert vectors["a", "c"].dtype == jnp.float64 and vectors["b",].dtype == jnp.float32
        np.testing.assert_allclose(vectors["a", "c"], [3**0.5, 12**0.5], rtol=1e-15)


def operations(jaxpr: Any) -> int:
    """Count equations, without those that take entries out of a vector; where no hook reads them, XLA drops them."""
    inner = [
        value
        for equation in jaxpr.eqns
        if equation.params.get("name") != "_taken"
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns"))
    ]
    return len(jaxpr.eqns) + sum(operations(value) for value in inner if hasattr(value, "eqns"))


@pytest.mark.parametrize("in_branch", [True, False])
def test_norms_of_many_parameters_are_few_operations(in_branch):
    """XLA takes milliseconds to compile one."""
    callback: Any = library.gradient_statistics()

    def step(state: Any, loss: Any) -> Any:
        def update() -> Any:
            _, grads, after = callback.on_before_update(0, None, state, state.params, logs)
            return callback.on_before_apply(0, None, state, grads, after)[1:]

        logs = Logs({"loss": loss})
        _, logs = run_if(loss > 0, update, state.params, logs) if in_branch else update()
        return pack(logs, vectors=logs.vectors)

    def counted(parameters: int) -> int:
        params = {f"p{i:03}": jnp.ones(3) for i in range(parameters)}
        state = trainer().init(batches()[0]).replace(params=params, host=None, stop=None)
        jaxpr = jax.make_jaxpr(step)(state, jnp.float32(1))
        assert [out.shape for out in jaxpr.out_avals] == [(1 + 3 * (1 + parameters),)]
        return operations(jaxpr.jaxpr)

    assert counted(200) < 150
    assert counted(200) - counted(100) <= 3 * 2 * 100 / GROUP  # of norms, and what joins 25 parameters at a time


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
