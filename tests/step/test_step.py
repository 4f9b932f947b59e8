"""The arithmetic of a step: accumulation, clipping, precision, losses, and the errors of criteria and metrics."""

import contextlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    BATCH,
    CLASSES,
    FEATURES,
    LINEAR,
    adam,
    apply,
    assert_bit_equal,
    batches,
    cross_entropy,
    host,
    squares,
    standard_promotion,
    trainer,
)  # fmt: skip

import ant_jax as ant


def gradient_of(params: Any, inputs: Any, targets: Any) -> Any:
    """The mean gradient over some examples, by hand."""
    return jax.grad(lambda params: squares(apply(params, {}, inputs, None)[0], targets).mean())(params)


def joined(parts: list[Any]) -> tuple[Any, Any]:
    inputs, targets = (np.concatenate(part) for part in zip(*parts, strict=True))
    return inputs, targets


@pytest.mark.parametrize("fuse", [True, False])
def test_a_window_updates_with_the_mean_over_its_examples_also_when_cut_short(fuse):
    loader = batches(4) + batches(1, batch=3, seed=1)  # windows of 3 and of 2 batches, the last of them shorter
    a_trainer = trainer(criterion=squares, gradient_accumulation_steps=3, fuse=fuse)
    start = a_trainer.init(loader[0])
    state, _ = a_trainer.fit(start, loader, 1)
    params = start.params
    for window in (loader[:3], loader[3:]):
        grads = gradient_of(params, *joined(window))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.params, params)
    assert not state.window_open


def test_accumulation_by_steps_divides_by_their_number_always():
    loader = batches(5)
    a_trainer = trainer(criterion=squares, gradient_accumulation_steps=3, accumulation_mean="steps")
    start = a_trainer.init(loader[0])
    state, _ = a_trainer.fit(start, loader, 1)
    params = start.params
    for window in (loader[:3], loader[3:]):
        parts = [gradient_of(params, *batch) for batch in window]
        grads = jax.tree.map(lambda *g: sum(g) / 3, *parts)  # the last window has two batches, and still
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.params, params)


def test_on_backward_end_comes_every_batch_and_on_before_update_every_window():
    def publish(name: str):
        return lambda batch_idx, trainer, state, grads, logs: (state, grads, {**logs, name: optax.tree.norm(grads)})

    def look(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        seen.update(logs.window)
        return state, logs

    seen: dict[str, Any] = {}
    a_trainer = trainer(
        host("a", on_backward_end=publish("batch_norm"), on_before_update=publish("update_norm")),
        host("b", every=100, on_batch_end=look),
        gradient_accumulation_steps=2,
    )
    _, history = a_trainer.fit(a_trainer.init(batches()[0]), batches(5), 1)
    assert np.isfinite(seen["batch_norm"]).all()
    assert np.isfinite(seen["update_norm"]).tolist() == [False, True, False, True, True]
    expected = np.average(seen["update_norm"][[1, 3, 4]], weights=[2, 2, 1])
    np.testing.assert_allclose(history[0]["train_update_norm"], expected, rtol=1e-6)


def test_from_optax_is_chain_bit_for_bit():
    def noisy() -> optax.GradientTransformation:
        return standard_promotion(
            optax.chain(optax.clip(0.05), optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.trace(0.9))
        )

    for options in ({}, {"gradient_accumulation_steps": 2}):
        by_callback = trainer(ant.callbacks.from_optax(noisy()), optimizer=adam(), **options)
        by_chain = trainer(optimizer=optax.chain(noisy(), adam()), **options)
        state, _ = by_callback.fit(by_callback.init(batches()[0]), batches(5), 2)
        expected, _ = by_chain.fit(by_chain.init(batches()[0]), batches(5), 2)
        assert_bit_equal(state, expected, "params")


def test_max_grad_norm_clips_after_the_hooks():
    blow_up = host(
        on_before_update=lambda b, t, state, grads, logs: (state, jax.tree.map(lambda g: 1e3 * g, grads), logs)
    )
    a_trainer = trainer(blow_up, max_grad_norm=0.5, optimizer=optax.sgd(1.0))
    start = a_trainer.init(batches()[0])
    state, _ = a_trainer.fit(start, batches(1), 1)
    moved = optax.tree.norm(optax.tree.sub(state.params, start.params))
    np.testing.assert_allclose(moved, 0.5, rtol=1e-5)
    by_callback = trainer(blow_up, ant.callbacks.clip_by_global_norm(0.5), optimizer=optax.sgd(1.0))
    same, _ = by_callback.fit(by_callback.init(batches()[0]), batches(1), 1)
    assert_bit_equal(same, state, "params")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_trains_in_it_and_shows_float32_to_hooks(precision):
    seen: dict[str, Any] = {}

    def model(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
        seen["inputs"], seen["kernel"] = inputs.dtype, params["kernel"].dtype
        return apply(params, {}, inputs, key)[0], {"mean": inputs.mean(0)}

    def hook(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        seen["grads"] = {leaf.dtype for leaf in jax.tree.leaves(grads)}
        seen["loss"] = logs["loss"].dtype
        return state, grads, logs

    pair = (lambda key, inputs: (LINEAR[0](key, inputs)[0], {"mean": jnp.zeros(FEATURES)}), model)
    a_trainer = trainer(host(on_backward_end=hook), model=pair, precision=precision)
    state, history = a_trainer.fit(a_trainer.init(batches()[0]), batches(5), 3)
    assert seen == {
        "inputs": jnp.dtype(precision), "kernel": jnp.dtype(precision), "grads": {jnp.dtype("float32")},
        "loss": jnp.dtype("float32"),
    }  # fmt: skip
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.model_state))} == {jnp.dtype("float32")}
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    exact = trainer(model=pair)
    expected, _ = exact.fit(exact.init(batches()[0]), batches(5), 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.02), state.params, expected.params)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_overflows_is_skipped_and_logged(accumulate):
    rows: dict[str, Any] = {}

    def look(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        rows.update(logs.window)
        return state, logs

    counter = ant.Callback(
        name="counter",
        init=lambda state: {"norm": 0.0},
        on_backward_end=lambda b, t, state, grads, logs: (
            state.with_callback_state(
                "counter", {"norm": state.callback_states["counter"]["norm"] + optax.tree.norm(grads)}
            ),
            grads,
            logs,
        ),
    )
    loader = batches(4)
    # In float16 the square of this input overflows, and with it every gradient.
    loader[1] = (np.full_like(loader[1][0], 6e4), loader[1][1])
    # Small losses, so that nothing else overflows at the first scale, which is 65536.
    small = lambda outputs, targets: squares(outputs, targets) / 64  # noqa: E731
    options: dict[str, Any] = {"criterion": small, "gradient_accumulation_steps": accumulate}
    a_trainer = trainer(counter, host("look", every=100, on_batch_end=look), precision="float16", **options)
    start = a_trainer.init(loader[0])
    state, history = a_trainer.fit(start, loader, 1)
    assert rows["step_skipped"].tolist() == [0, 1, 0, 0]
    assert rows["loss_scale"].tolist() == [2**16, 2**16, 2**15, 2**15]
    assert history[0]["train_step_skipped"] == 0.25
    assert np.isfinite(history[0]["train_loss"])
    assert np.isfinite(state.callback_states["counter"]["norm"])  # what it saw of the overflow has not stayed
    assert int(state.step) == 4
    # The others are trained on as if the skipped batch had not been there.
    expected = start.params
    for window in [[loader[0]], [loader[2]], [loader[3]]] if accumulate == 1 else [[loader[0]], loader[2:]]:
        grads = gradient_of(expected, *joined(window))
        expected = jax.tree.map(lambda p, g: p - 0.1 * g / 64, expected, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state.params, expected)


def test_a_general_loss_trains_on_any_batch_and_knows_evaluation():
    modes: list[bool] = []

    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        modes.append(key is None)
        outputs, _ = apply(params, {}, batch["x"], key)
        losses = cross_entropy(outputs, batch["y"])
        return losses.mean(), ({"seen": model_state["seen"] + 1}, {"worst": losses.max()})

    pair = (lambda key, batch: (LINEAR[0](key, batch["x"])[0], {"seen": jnp.int32(0)}), LINEAR[1])
    loader = [{"x": inputs, "y": targets} for inputs, targets in batches(3)]
    a_trainer = trainer(model=pair, criterion=None, loss_fn=loss_fn)
    state, history = a_trainer.fit(a_trainer.init(loader[0]), loader, 2, loader)
    assert list(history[0]) == ["train_loss", "train_worst", "val_loss", "val_worst"]
    assert int(state.model_state["seen"]) == 6
    assert set(modes) == {True, False}
    expected, _ = trainer().fit(trainer().init(batches()[0]), batches(3), 2)
    assert_bit_equal(state, expected, "params")


CRITERIA = {
    "floats for classes": (
        {"loader": [(b[0], b[1].astype(np.float32)) for b in batches(2)]},
        TypeError, r"in criterion, called with outputs float32\[8,3\] and targets float32\[8\]",
    ),
    "one column too many": (
        {"criterion": lambda o, t: jnp.zeros((len(o), len(o)))}, ValueError,
        r"criterion must return one value an example, or their mean as a scalar; it returned float32\[8,8\] for",
    ),
    "a wrong length": (
        {"criterion": lambda o, t: jnp.zeros(3)}, ValueError, r"it returned float32\[3\]",
    ),
    "not an array": (
        {"criterion": lambda o, t: None}, TypeError, "criterion must return an array, got NoneType",
    ),
    "a whole number": (
        {"criterion": lambda o, t: (o.argmax(-1) != t).astype(jnp.int32)}, ValueError,
        r"criterion must return a real floating loss, which has a gradient, got int32\[8\]",
    ),
    "a complex number": (
        {"criterion": lambda o, t: jax.lax.complex(o, o).sum(-1)}, ValueError,
        r"criterion must return a real floating loss, which has a gradient, got complex64\[8\]",
    ),
    "a metric too": (
        {"metrics": {"m": lambda o, t: jnp.zeros((1, 2))}}, ValueError, "metric 'm' must return one value an example",
    ),
    "rank of metric targets": (
        {"metrics": {"accuracy": ant.metrics.accuracy}, "criterion": lambda o, t: jnp.mean(o),
         "loader": [(b[0], b[1][:, None]) for b in batches(2)]},
        ValueError, r"targets must be integer classes of shape \(8,\)(.|\n)*in metric 'accuracy'",
    ),
    "not a pair": (
        {"loader": [b[0] for b in batches(2)]}, TypeError,
        r"criterion needs batches of the form \(inputs, targets\), got float32\[8,4\]; .* loss_fn",
    ),
    "loss_fn without logs": (
        {"criterion": None, "loss_fn": lambda p, s, b, k: (jnp.float32(0), s)}, TypeError,
        r"loss_fn must return \(loss, \(model_state, logs\)\)",
    ),
    "loss_fn of a vector": (
        {"criterion": None, "loss_fn": lambda p, s, b, k: (jnp.zeros(8), (s, {}))}, ValueError,
        r"loss_fn must return a scalar loss, the mean over the batch, got float32\[8\]",
    ),
    "loss_fn with a reserved log": (
        {"criterion": None, "loss_fn": lambda p, s, b, k: (jnp.float32(0), (s, {"loss": 1.0}))}, ValueError,
        "loss_fn returned a log named 'loss', which the trainer writes itself",
    ),
    "loss_fn of a whole number": (
        {"criterion": None, "loss_fn": lambda p, s, b, k: (jnp.int32(0), (s, {}))}, ValueError,
        r"loss_fn must return a real floating loss, which has a gradient, got int32\[\]",
    ),
    "loss_fn without a loss": (
        {"criterion": None, "loss_fn": lambda p, s, b, k: (None, (s, {}))}, ValueError,
        "loss_fn must return a scalar loss, the mean over the batch, got NoneType",
    ),
    "loss_fn without a log's value": (
        {"criterion": None, "loss_fn": lambda p, s, b, k: (jnp.float32(0), (s, {"a": None}))}, TypeError,
        "loss_fn returned the log 'a' as NoneType; a log is a number or an array under a string",
    ),
    "loss_fn with nested logs": (
        {"criterion": None, "loss_fn": lambda p, s, b, k: (jnp.float32(0), (s, {"a": {"b": 1.0}}))}, TypeError,
        "loss_fn returned the log 'a' as dict; .* a name of its own, such as 'outer/inner'",
    ),
    "loss_fn with a log of no name": (
        {"criterion": None, "loss_fn": lambda p, s, b, k: (jnp.float32(0), (s, {3: 1.0}))}, TypeError,
        "loss_fn returned the log 3 as Python float; .* under a string",
    ),
    "a metric of several": (
        {"metrics": {"m": lambda o, t: {"a": 1.0}}}, TypeError, "metric 'm' must return an array, got dict",
    ),
    "a metric of none": (
        {"metrics": {"m": lambda o, t: None}}, TypeError, "metric 'm' must return an array, got NoneType",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CRITERIA)
def test_a_wrong_criterion_metric_or_loss_is_explained(case, compilations):
    options, kind, message = CRITERIA[case]
    a_trainer = trainer(**{key: value for key, value in options.items() if key != "loader"})
    loader = options.get("loader", batches(2))
    state = a_trainer.init(batches()[0])
    compilations.reset()
    with pytest.raises(kind) as caught:
        a_trainer.fit(state, loader, 1)
    assert re.search(message, "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])]))
    assert compilations.count == 0  # it comes out before anything is compiled


@pytest.mark.parametrize("criterion", [optax.l2_loss, lambda o, t: jnp.mean((o - t) ** 2)], ids=["each", "mean"])
def test_column_and_row_are_not_broadcast_against_each_other(criterion):
    pair = (lambda key, x: ({"w": jnp.ones((FEATURES, 1))}, {}), lambda p, s, x, key: (x @ p["w"], s))
    loader = [(inputs, targets.astype(np.float32)) for inputs, targets in batches(2)]
    a_trainer = trainer(model=pair, criterion=criterion)
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match=r"float32\[8,1\] and targets float32\[8\]"):
        a_trainer.fit(a_trainer.init(loader[0]), loader, 1)
    columns = [(inputs, targets[:, None]) for inputs, targets in loader]
    a_trainer.fit(a_trainer.init(columns[0]), columns, 1)


@pytest.mark.parametrize("params", [{}, [], {"a": {}}])
def test_nothing_to_train_is_an_error(params):
    pair = (lambda key, x: (params, {"w": jnp.ones(3)}), lambda p, s, x, key: (x[:, :CLASSES], s))
    a_trainer = trainer(model=pair, criterion=squares)
    state = a_trainer.init(batches()[0])
    assert np.isfinite(a_trainer.evaluate(state, batches())["val_loss"])
    for run in (lambda: a_trainer.fit(state, batches(), 1), lambda: a_trainer.grad_step(state, batches()[0])):
        with pytest.raises(
            ValueError, match=r"no parameters to train; its model state has: w: float32\[3\].*nnx.Param"
        ):
            run()


COMPLEX = (
    lambda key, x: (
        {"w": 0.1 * jax.random.normal(key, (FEATURES, CLASSES), jnp.complex64), "b": jnp.zeros(CLASSES)},
        {},
    ),
    lambda p, s, x, key: (jnp.abs(x.astype(jnp.complex64) @ p["w"]) + p["b"].astype(jnp.float32)[None], s),
)


def complex_steps(loader: list[Any], params: Any, clip: float | None = None) -> Any:
    """Gradient descent by hand, on the conjugate of what JAX calls the gradient."""

    def loss_of(params: Any, inputs: Any, targets: Any) -> Any:
        return squares(COMPLEX[1](params, {}, inputs, None)[0], targets).mean()

    for batch in loader:
        grads = jax.grad(loss_of)(params, *batch)
        grads = jax.tree.map(jnp.conj, grads)
        if clip is not None:
            grads, _ = optax.clip_by_global_norm(clip).update(grads, optax.EmptyState())
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    return params


@pytest.mark.parametrize("options", [
    {}, {"max_grad_norm": 0.1}, {"gradient_accumulation_steps": 2}, {"precision": "bfloat16"}, {"precision": "float16"},
], ids=str)  # fmt: skip
def test_complex_parameters_go_down(options):
    seen: dict[str, Any] = {}

    def look(batch_idx: Any, trainer: Any, state: Any, grads: Any, logs: Any) -> Any:
        seen.update({name: leaf.dtype for name, leaf in grads.items()})
        return state, grads, logs

    loader = batches(4)
    with jax.numpy_dtype_promotion("standard"):
        a_trainer = trainer(
            host(on_backward_end=look), ant.callbacks.gradient_norm(), ant.callbacks.ema(0.5),
            model=COMPLEX, criterion=squares, **options,
        )  # fmt: skip
        start = a_trainer.init(loader[0])
        state, history = a_trainer.fit(start, loader, 1)
        joint = [joined(loader[:2]), joined(loader[2:])] if "gradient_accumulation_steps" in options else loader
        expected = complex_steps(joint, start.params, options.get("max_grad_norm"))
        grads, _ = a_trainer.grad_step(start, loader[0])
    assert seen == {"w": jnp.complex64, "b": jnp.float32}
    tolerance = 1e-5 if options.get("precision") is None else 0.02
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), state.params, expected)
    average = state.callback_states["ema"]["average"]
    assert average["w"].dtype == jnp.complex64
    assert np.all(np.abs(average["w"].imag) > 0)
    assert np.isfinite(history[0]["train_grad_norm"])
    by_hand = complex_steps(loader[:1], start.params)
    tolerance = 1e-5 if options.get("precision") is None else 0.2
    np.testing.assert_allclose(start.params["w"] - 0.1 * grads["w"], by_hand["w"], atol=tolerance)


@pytest.mark.parametrize("cast", [True, False])
def test_a_precision_in_which_no_product_is_computed_is_noticed(cast):
    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        x, y = batch
        kernel = params["kernel"] if cast else params["kernel"].astype(x.dtype)
        outputs = (x.astype(kernel.dtype) @ kernel).astype(jnp.float32)
        return jnp.mean((outputs - y) ** 2), (model_state, {})

    model = (lambda key, batch: ({"kernel": jnp.ones((3, 1))}, {}), lambda *arguments: None)
    batch = np.ones((4, 3), np.float32), np.ones((4, 1), np.float32)
    a_trainer = trainer(model=model, criterion=None, loss_fn=loss_fn, precision="bfloat16")
    state = a_trainer.init(batch)
    words = r"precision='bfloat16' has no effect: .*inputs.astype\(jnp.bfloat16\)"
    with contextlib.nullcontext() if cast else pytest.warns(UserWarning, match=words):
        a_trainer.fit(state, [batch] * 3, 2)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_loss_fn_keeps_the_digits_of_its_batch_and_its_loss(precision):
    seen: dict[str, Any] = {}

    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        seen.update(kernel=params["kernel"].dtype, x=batch["x"].dtype, y=batch["y"].dtype, i=batch["i"].dtype)
        outputs, _ = apply(params, {}, batch["x"].astype(params["kernel"].dtype), key)
        losses = (outputs.astype(jnp.float32)[:, 0] - batch["y"]) ** 2
        return losses.mean(), (model_state, {"target": batch["y"].mean()})

    inputs, targets = batches(1)[0]
    batch = {"x": inputs, "y": 1000 + targets.astype(np.float32) / 8, "i": targets}
    pair = (lambda key, batch: (LINEAR[0](key, batch["x"])[0], {}), LINEAR[1])
    a_trainer = trainer(model=pair, criterion=None, loss_fn=loss_fn, precision=precision)
    _, logs = a_trainer.train_step(a_trainer.init(batch), batch)
    assert seen == {"kernel": jnp.dtype(precision), "x": jnp.float32, "y": jnp.float32, "i": jnp.int32}
    np.testing.assert_allclose(logs["target"], batch["y"].mean(), rtol=1e-6)
    assert logs["loss"].dtype == jnp.float32
    lazy = lambda p, s, batch, key: (apply(p, {}, batch["x"].astype(p["kernel"].dtype), key)[0].mean(), (s, {}))  # noqa: E731
    a_trainer = trainer(model=pair, criterion=None, loss_fn=lazy, precision=precision)
    with pytest.raises(TypeError, match=f"loss_fn computed its loss in {precision}.*outputs.astype"):
        a_trainer.train_step(a_trainer.init(batch), batch)


def test_the_classes_of_the_problem():
    assert batches()[0][0].shape == (BATCH, FEATURES)
    assert squares(jnp.zeros((2, CLASSES)), jnp.zeros(2, int)).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_micro_batch_draws_from_the_key_of_its_step(accumulate):
    drawn: list[float] = []

    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        outputs, _ = apply(params, {}, batch[0], key)
        return cross_entropy(outputs, batch[1]).mean(), (model_state, {"drawn": jax.random.uniform(key)})

    def look(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        drawn.extend(logs.window["drawn"].tolist())
        return state, logs

    options: dict[str, Any] = {"criterion": None, "loss_fn": loss_fn, "gradient_accumulation_steps": accumulate}
    a_trainer = trainer(host(every=100, on_batch_end=look), **options)
    start = a_trainer.init(batches()[0], seed=5)
    state, _ = a_trainer.fit(start, batches(5), 2)
    keys = [jax.random.fold_in(start.key, step) for step in range(10)]
    assert drawn == [float(jax.random.uniform(key)) for key in keys] and len(set(drawn)) == 10
    assert jax.random.key_data(state.key).tolist() == jax.random.key_data(start.key).tolist()


def test_the_mean_of_the_loss_scale_is_over_all_batches_also_those_that_overflowed():
    loader = [*batches(3), *batches(1, batch=4)]
    loader[1] = (np.full_like(loader[1][0], 6e4), loader[1][1])  # its square overflows in float16
    small = lambda outputs, targets: squares(outputs, targets) / 64  # noqa: E731
    a_trainer = trainer(precision="float16", criterion=small)
    state, history = a_trainer.fit(a_trainer.init(loader[0]), loader, 2)
    scales = [2.0**16, 2.0**16, 2.0**15, 2.0**15], [2.0**15, 2.0**15, 2.0**14, 2.0**14]
    for logs, of_epoch in zip(history, scales, strict=True):
        assert logs["train_loss_scale"] == pytest.approx(np.average(of_epoch, weights=[8, 8, 8, 4]), rel=1e-6)
        assert logs["train_step_skipped"] == np.float32(8 / 28)
    assert state.loss_scale is not None and float(state.loss_scale.scale) == 2.0**14


def test_the_loss_scale_never_falls_below_one():
    a_trainer = trainer(precision="float16")
    inputs, targets = batches(1)[0]
    loader = [(np.full_like(inputs, np.inf), targets)] * 20
    state, history = a_trainer.fit(a_trainer.init(loader[0]), loader, 1)
    assert state.loss_scale is not None and float(state.loss_scale.scale) == 1
    assert history[0]["train_step_skipped"] == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_that_overflows_leaves_the_model_state_as_it_was(accumulate):
    """Nothing of it stays: neither infinite statistics nor a count."""

    def model(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
        mean = model_state["mean"] + inputs.astype(jnp.float32).mean(0)
        return apply(params, {}, inputs, key)[0], {"mean": mean, "seen": model_state["seen"] + 1}

    initial = {"mean": jnp.zeros(FEATURES), "seen": jnp.int32(0)}
    pair = (lambda key, inputs: (LINEAR[0](key, inputs)[0], initial)), model
    small = lambda outputs, targets: squares(outputs, targets) / 64  # noqa: E731
    options: dict[str, Any] = {"criterion": small, "precision": "float16", "gradient_accumulation_steps": accumulate}
    a_trainer = trainer(model=pair, **options)
    loader = batches(4)
    loader[1] = (np.full_like(loader[1][0], 6e4), loader[1][1])
    state, history = a_trainer.fit(a_trainer.init(loader[0]), loader, 1)
    assert history[0]["train_step_skipped"] == 0.25 and int(state.model_state["seen"]) == 3
    without = sum(np.asarray(loader[i][0], np.float16).astype(np.float32).mean(0) for i in (0, 2, 3))
    np.testing.assert_allclose(state.model_state["mean"], without, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["batch_size", "loss", "step_skipped", "loss_scale"])
def test_a_log_of_the_trainers_own_is_refused(name):
    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        return apply(params, {}, batch[0], key)[0].mean(), (model_state, {name: jnp.float32(1)})

    a_trainer = trainer(criterion=None, loss_fn=loss_fn)
    with pytest.raises(ValueError, match=f"loss_fn returned a log named '{name}', which the trainer writes itself"):
        a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_mean_of_values_of_low_precision_is_in_float32(dtype):
    """In float16 the sum of these would overflow, and in bfloat16 the mean would be another one."""
    metric = lambda outputs, targets: (60000 + 256 * targets).astype(dtype)  # noqa: E731
    a_trainer = trainer(metrics={"metric": metric})
    _, history = a_trainer.fit(a_trainer.init(batches()[0]), batches(1), 1)
    values = np.asarray(jnp.asarray(60000 + 256 * batches(1)[0][1]).astype(dtype).astype(jnp.float32))
    assert history[0]["train_metric"] == pytest.approx(values.mean(dtype=np.float64), rel=1e-6)


def test_one_value_in_two_shapes_is_broadcast_to_nothing_else():
    pair = (lambda key, x: ({"w": jnp.ones((FEATURES, 1))}, {}), lambda p, s, x, key: (x @ p["w"], s))
    a_trainer = trainer(model=pair, criterion=lambda o, t: jnp.mean((o[:, 0] - t) ** 2))
    loader = [(inputs[:1], targets[:1].astype(np.float32)) for inputs, targets in batches(2)]
    state, _ = a_trainer.fit(a_trainer.init(loader[0]), loader, 1)
    assert int(state.step) == 2
