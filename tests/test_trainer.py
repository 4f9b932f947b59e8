"""The trainer's arguments and methods, by hand and in fit."""

import copy
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    BATCH,
    CLASSES,
    LINEAR,
    adam,
    apply,
    assert_bit_equal,
    batches,
    cross_entropy,
    data,
    host,
    leaves_of,
    trainer,
)  # fmt: skip

import ant_jax as ant
from ant_jax import StateMismatch


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"criterion": None}, TypeError, "either criterion"),
        ({"loss_fn": lambda *a: None}, TypeError, "either criterion"),
        ({"criterion": 3}, TypeError, "criterion must be a function, got 3"),
        ({"optimizer": "adam"}, TypeError, "optimizer must be an optax.GradientTransformation, got 'adam'"),
        ({"metrics": {"loss": cross_entropy}}, ValueError, "a metric cannot be named 'loss'"),
        ({"metrics": {"batch_size": cross_entropy}}, ValueError, "a metric cannot be named 'batch_size'"),
        ({"metrics": {"m": 3}}, TypeError, "metric 'm' must be a function"),
        ({"criterion": None, "loss_fn": cross_entropy, "metrics": {"m": cross_entropy}}, TypeError, "need a criterion"),
        (
            {"gradient_accumulation_steps": 0},
            ValueError,
            "gradient_accumulation_steps must be a positive whole number, got 0",
        ),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm must be positive or None, got -1.0"),
        (
            {"precision": "float64"},
            ValueError,
            "precision must be one of 'float32', 'bfloat16', 'float16', or an ant_jax.Precision, got 'float64'",
        ),
        ({"accumulation_mean": "batches"}, ValueError, "accumulation_mean must be one of 'examples', 'steps'"),
        ({"fuse": "never"}, ValueError, "fuse must be one of 'auto', True, False, got 'never'"),
        ({"criterion": "mse"}, TypeError, "criterion must be a function, got 'mse'"),
        ({"criterion": dict}, TypeError, "criterion must be a function, got <class 'dict'>; make an instance of it"),
        ({"optimizer": optax.adam}, TypeError, r"GradientTransformation, got <function adam .*; call it, as in optax"),
        (
            {"metrics": [cross_entropy]},
            TypeError,
            r"metrics must be a mapping \{name: metric\(outputs, targets\)\}, got",
        ),
        ({"metrics": {3: cross_entropy}}, TypeError, "a metric's name must be a string, got 3"),
        ({"max_grad_norm": [1.0]}, ValueError, r"max_grad_norm must be positive or None, got \[1.0\]"),
        ({"max_grad_norm": {}}, ValueError, r"max_grad_norm must be positive or None, got \{\}"),
        ({"max_grad_norm": b"1"}, ValueError, "max_grad_norm must be positive or None, got b'1'"),
        ({"max_grad_norm": float("nan")}, ValueError, "max_grad_norm must be positive or None, got nan"),
        ({"gradient_accumulation_steps": 2.0}, ValueError, "must be a positive whole number, got 2.0"),
        ({"progress_bar": "no"}, ValueError, "progress_bar must be one of True, False, got 'no'"),
        ({"check_batches": None}, ValueError, "check_batches must be one of True, False, got None"),
        (
            {"callbacks": ant.callbacks.ema()},
            TypeError,
            r"callbacks must be a sequence; write callbacks=\[...\] around",
        ),
        ({"callbacks": ant.callbacks.ema}, TypeError, "must be a sequence of callbacks, got .*; call the factory"),
        ({"callbacks": [ant.callbacks.ema]}, TypeError, r"callbacks\[0\] is not .*; call the factory"),
        ({"callbacks": None}, TypeError, "callbacks must be a sequence of callbacks, got None"),
        ({"model": LINEAR[0]}, TypeError, "model must be a flax.linen.Module, a flax.nnx.Module or a pair"),
    ],
)
def test_bad_arguments(options, kind, message):
    with pytest.raises(kind, match=message):
        trainer(**options)


def test_duplicate_names_and_the_progress_bar():
    with pytest.raises(ValueError, match="two callbacks are named 'ema'"):
        trainer(ant.callbacks.ema(), ant.callbacks.ema())
    names = lambda *callbacks: [c.name for c in trainer(*callbacks, progress_bar=True)._events.callbacks]  # noqa: E731
    assert names() == ["progress_bar"]
    assert names(ant.callbacks.progress_bar(), host("a")) == ["progress_bar", "a"]  # not a second one


def test_a_trainer_is_immutable_and_its_callers_list_is_its_own():
    callbacks = [host("a")]
    a_trainer = ant.Trainer(LINEAR, optax.sgd(0.1), cross_entropy, callbacks=callbacks, progress_bar=False)
    callbacks.append(host("b"))
    assert [callback.name for callback in a_trainer._events.callbacks] == ["a"]
    with pytest.raises(AttributeError):
        a_trainer.fuse = False  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_epochs": 0}, "num_epochs must be a positive whole number, got 0"),
     ({"num_epochs": 2.5}, "got 2.5"),
     ({"num_epochs": 1, "steps_per_epoch": -1}, "steps_per_epoch must be a positive whole number, got -1")],
)  # fmt: skip
def test_bad_counts(arguments, message):
    a_trainer = trainer()
    with pytest.raises(ValueError, match=message):
        a_trainer.fit(a_trainer.init(batches()[0]), batches(), **arguments)


@pytest.mark.parametrize("seed", [0.5, None, True, "0", jax.random.key(0)], ids=str)
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match="seed must be a whole number, got"):
        trainer().init(batches()[0], seed=seed)


@pytest.mark.parametrize("resume", [True, 3])
def test_resume_is_a_directory(resume):
    a_trainer = trainer()
    with pytest.raises(TypeError, match="resume must be the directory that a checkpoint callback saves into, got"):
        a_trainer.fit(a_trainer.init(batches()[0]), batches(), 1, resume=resume)


class Table:
    """As pandas has them: iteration gives the names of columns."""

    def __init__(self, columns: dict[str, Any]):
        self.columns, self.shape = [*columns], (len(next(iter(columns.values()))), len(columns))
        self._values = np.stack([*columns.values()], axis=1)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self._values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Any:
        return iter(self.columns)


X, Y = data()
TABLE = Table({"a": X[:, 0], "b": X[:, 1]})
ARRAYS: dict[str, Any] = {
    "pair": (X, Y),
    "list": [X, Y],
    "jax": (jnp.asarray(X), jnp.asarray(Y)),
    "mixed": (X, jnp.asarray(Y)),
    "lists": (X.tolist(), Y.tolist()),
    "a list of targets": (X, Y.tolist()),
    "inputs of two": ((X, X), Y),
    "inputs by name": ({"a": X, "b": X}, Y),
    "weights": (X, Y, np.ones(len(X), np.float32)),
    "mapping": {"inputs": X, "targets": Y},
    "table": TABLE,
    "table and column": (TABLE, Y),
}
BARE: dict[str, Any] = {"inputs": X, "inputs on the device": jnp.asarray(X)}


@pytest.mark.parametrize("arrays", [*ARRAYS, *BARE])
def test_arrays_are_no_loader(arrays):
    loader = {**ARRAYS, **BARE}[arrays]
    a_trainer = trainer()
    state = a_trainer.init(batches()[0])
    remedy = r"must be an iterable of batches, got a .*ArrayLoader\(\(X, Y\), batch_size=32\)"
    with pytest.raises(TypeError, match=f"train_loader {remedy}"):
        a_trainer.fit(state, loader, 3)
    with pytest.raises(TypeError, match=f"val_loader {remedy}"):
        a_trainer.fit(state, batches(), 3, loader)
    with pytest.raises(TypeError, match=f"loader {remedy}"):
        a_trainer.evaluate(state, loader)


@pytest.mark.parametrize("arrays", [(X, X), [X, X]])
def test_arrays_of_one_form_may_be_batches_but_no_pairs(arrays):
    a_trainer = trainer()
    with pytest.raises(TypeError, match=r"criterion needs .*, got .*; .* an ArrayLoader\(\(X, Y\), batch_size=32\) in"):
        a_trainer.fit(a_trainer.init(batches()[0]), arrays, 1)


def of_batch(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
    """A loss that reads any batch."""
    del key
    total = sum(jnp.sum(jnp.asarray(leaf, jnp.float32)) for leaf in jax.tree.leaves(batch))
    return params["w"] ** 2 + 0.0 * total, (model_state, {})


BY_LOSS = ant.Trainer(
    (lambda key, x: ({"w": jnp.ones(())}, {}), apply), optax.sgd(0.1), loss_fn=of_batch, progress_bar=False
)


@pytest.mark.parametrize("arrays", ARRAYS)
def test_arrays_that_cannot_be_batches_are_no_loader_of_a_loss_fn_either(arrays):
    with pytest.raises(TypeError, match=r"train_loader must be an iterable of batches, got a .*ArrayLoader\("):
        BY_LOSS.fit(BY_LOSS.init(X), ARRAYS[arrays], 3)


BATCHES: dict[str, tuple[Any, int]] = {
    "rows": (X[:3], 3),
    "rows on the device": (jnp.asarray(X[:3]), 3),
    "two arrays": ((X, X + 1), 2),
    "two of one form, of another precision": ([X, X.astype(np.float64)], 2),
    "a shorter last": ((X, X[:5]), 2),
    "numbers": (range(3), 3),
    "two numbers": ([1.0, 2.0], 2),
    "pairs": (((X, Y), (X, Y)), 2),
    "by name": ([{"a": X, "b": Y}] * 3, 3),
    "two lists": ([[1.0, 2.0], [3.0, 4.0]], 2),
    "none": ([None] * 3, 3),
}


@pytest.mark.parametrize("case", BATCHES)
def test_arrays_that_may_be_batches_are_a_loader(case):
    loader, count = BATCHES[case]
    state, _ = BY_LOSS.fit(BY_LOSS.init(next(iter(loader))), loader, 1)
    assert state.step == count
    assert BY_LOSS.evaluate(state, loader) == {"val_loss": pytest.approx(0.8 ** (2 * count))}


@pytest.mark.parametrize(
    ("loader", "hint"),
    [(ant.ArrayLoader, "make an instance of it"), (lambda: iter(batches()), "call it"), (3, "3"), (None, "None")],
    ids=["a class", "a function", "a number", "None"],
)
def test_what_is_no_iterable_is_no_loader(loader, hint):
    a_trainer = trainer()
    state = a_trainer.init(batches()[0])
    message = f"loader must be an iterable of batches, got .*{hint}"
    with pytest.raises(TypeError, match=f"train_{message}"):
        a_trainer.fit(state, loader, 1)
    with pytest.raises(TypeError, match=message):
        a_trainer.evaluate(state, loader)
    if loader is not None:
        with pytest.raises(TypeError, match=f"val_{message}") as raised:
            a_trainer.fit(state, batches(), 1, loader)
        assert not hasattr(raised.value, "train_state")  # nothing was trained


@pytest.mark.parametrize("directory", [None, 3, b"runs"])
def test_what_is_no_path_is_no_directory_of_checkpoints(directory):
    a_trainer = trainer()
    state = a_trainer.init(batches()[0])
    for call in (
        lambda: a_trainer.restore(directory),
        lambda: a_trainer.restore(directory, fall_back=True),
        lambda: a_trainer.restore_params(directory, state),
        lambda: a_trainer.save(directory, state),
        lambda: a_trainer.checkpointer(directory),
    ):
        with pytest.raises(
            TypeError, match=f"directory must be the path of a directory of checkpoints, got {directory}"
        ):
            call()


def test_a_loader_is_no_batch():
    with pytest.raises(ant.BatchError, match=r"of a loader take one batch, next\(iter\(loader\)\)"):
        trainer().init(ant.ArrayLoader((X, Y), BATCH))


@pytest.mark.parametrize("batch", [{"a": X, 3: Y}, ["text"]], ids=["keys", "text"])
def test_the_first_batch_that_is_none_is_placed(batch):
    start = BY_LOSS.init(X)
    with pytest.raises((TypeError, ant.BatchError)) as caught:
        BY_LOSS.fit(start, [batch], 1)
    assert "in the first batch of train_loader in epoch 0" in caught.value.__notes__


def test_an_error_in_the_optimizers_init_names_the_parameters():
    labels = {"bias": "a", "kernel": "missing"}
    a_trainer = trainer(optimizer=optax.partition({"a": optax.sgd(0.1)}, labels))
    with pytest.raises(ValueError, match="missing") as caught:
        a_trainer.init(batches()[0])
    assert "in the optimizer's init, called with parameters bias: float32[3], kernel" in caught.value.__notes__[-1]


@pytest.mark.parametrize("leaf", [np.arange(3), np.ones(3, bool), jax.random.key(0)], ids=["int", "bool", "key"])
def test_a_parameter_without_a_gradient_is_named(leaf):
    def init(key: Any, inputs: Any) -> Any:
        return {"a": {"b": jnp.asarray(leaf)}, "w": jnp.ones(())}, {}

    a_trainer = trainer(model=(init, apply))
    with pytest.raises(TypeError, match=r"the parameter a/b is .*, which has no gradient; .*, or keep it in the model"):
        a_trainer.init(batches()[0])
    good = trainer()
    state = good.init(batches()[0])
    state = state.replace(params={**state.params, "bias": jnp.arange(CLASSES)})
    with pytest.raises(TypeError, match=r"the parameter bias is int32\[3\], which has no gradient"):
        good.fit(state, batches(), 1)


@pytest.mark.parametrize("stopping", [False, True])
def test_a_step_can_be_a_part_of_a_compiled_function(stopping):
    stop = ant.callbacks.stop_at(1e9, "loss", per="batch")
    a_trainer = trainer(ant.callbacks.gradient_noise(), *([stop] if stopping else []))
    start = a_trainer.init(batches()[0])
    by_hand, compiled = start, start
    step = jax.jit(a_trainer.train_step)
    for batch in batches(3):
        by_hand, expected = a_trainer.train_step(by_hand, batch)
        compiled, logs = step(compiled, batch)
        assert_bit_equal(by_hand, compiled)
        assert {name: float(value) for name, value in logs.items()} == {n: float(v) for n, v in expected.items()}
    assert bool(compiled.stop) is bool(by_hand.stop) is stopping
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches(3))
    scanned, _ = jax.jit(lambda state, batches: jax.lax.scan(a_trainer.train_step, state, batches))(start, stacked)
    assert scanned.step == 3
    assert_bit_equal(a_trainer.fit(compiled, batches(2), 1)[0], a_trainer.fit(by_hand, batches(2), 1)[0])


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "optimizer": ({"optimizer": adam()}, "state.opt_state is not of the form that this trainer's optimizer needs"),
    "window": (
        {"gradient_accumulation_steps": 2},
        "state.accumulator is not of the form that this trainer's gradient_accumulation_steps needs",
    ),
    "precision": ({"precision": "float16"}, "state.loss_scale is not of the form that this trainer's precision needs"),
    "callbacks": ({"callbacks": [ant.callbacks.ema()]}, r"memories of callbacks \['ema'\], and those of this trainer"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_state_of_another_trainer_is_refused(case):
    options, message = OTHERS[case]
    state = trainer(*options.pop("callbacks", []), **options).init(batches()[0])
    for use in ("fit", "evaluate", "predict", "train_step", "grad_step"):
        arguments = {"fit": (batches(), 1), "evaluate": (batches(),), "predict": (batches()[0][0],)}
        with pytest.raises(StateMismatch, match=message):
            getattr(trainer(), use)(state, *arguments.get(use, (batches()[0],)))
    with pytest.raises(TypeError, match="state must be a TrainState, as trainer.init returns it, got 3"):
        trainer().fit(3, batches(), 1)  # pyright: ignore[reportArgumentType]


def test_the_state_of_another_model_is_refused():
    narrow = [(inputs[:, :2], targets) for inputs, targets in batches()]
    a_trainer = trainer()
    state = a_trainer.init(narrow[0])
    with pytest.raises(
        StateMismatch,
        match=r"state.params is not of the form(.|\n)*kernel: expected float32\[4,3\], got float32\[2,3\]",
    ):
        a_trainer.fit(state, batches(), 1)
    with pytest.raises(StateMismatch, match=r"state.params is not of the form(.|\n)*bias: missing"):
        a_trainer.init(batches()[0], params={"kernel": jnp.zeros((4, 3))})


USES: dict[str, Callable[[ant.Trainer, ant.TrainState], Any]] = {
    "fit": lambda a_trainer, state: a_trainer.fit(state, batches(2), 1),
    "train_step": lambda a_trainer, state: a_trainer.train_step(state, batches()[0]),
    "grad_step": lambda a_trainer, state: a_trainer.grad_step(state, batches()[0]),
    "evaluate": lambda a_trainer, state: a_trainer.evaluate(state, batches(2)),
    "predict": lambda a_trainer, state: a_trainer.predict(state, batches()[0][0]),
}
OTHER_PARAMS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "narrow": (
        lambda params: {**params, "kernel": params["kernel"][:2]},
        r"kernel: expected float32\[4,3\], got float32\[2,3\]",
    ),
    "short": (lambda params: {**params, "bias": params["bias"][:1]}, r"bias: expected float32\[3\], got float32\[1\]"),
    "fewer": (lambda params: {"kernel": params["kernel"]}, "bias: missing"),
    "more": (lambda params: {**params, "scale": jnp.ones(3)}, r"scale: unexpected, float32\[3\]"),
}


@pytest.fixture(scope="module")
def used() -> tuple[ant.Trainer, ant.TrainState]:
    """A trainer that has been used in every way with a state of its own."""
    a_trainer = trainer()
    state = a_trainer.init(batches()[0])
    for use in USES.values():
        use(a_trainer, state)
    return a_trainer, state


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", OTHER_PARAMS)
def test_parameters_of_another_model_are_refused_by_every_use_of_a_trainer(kind, use, used):
    (a_trainer, state), (change, message) = used, OTHER_PARAMS[kind]
    with pytest.raises(
        StateMismatch, match=f"state.params is not of the form that this trainer's model(.|\n)*{message}"
    ):
        USES[use](a_trainer, state.replace(params=change(state.params)))


def test_init_takes_parameters_and_a_seed():
    a_trainer = trainer(ant.callbacks.ema())
    one, same, other = (a_trainer.init(batches()[0], seed=seed) for seed in (1, 1, 2))
    assert_bit_equal(one, same)
    assert not np.array_equal(one.params["kernel"], other.params["kernel"])
    given = a_trainer.init(batches()[0], seed=1, params=other.params)
    assert_bit_equal(given, other, "params", "callback_states")
    assert jnp.issubdtype(one.key.dtype, jax.dtypes.prng_key)


def test_init_takes_a_model_state_and_draws_only_what_is_not_given():
    drawn: list[int] = []

    def init(key, inputs):
        def draw():
            drawn.append(1)
            return np.ones((4, 3), np.float32)

        kernel = jax.pure_callback(draw, jax.ShapeDtypeStruct((4, 3), jnp.float32))
        return {"kernel": kernel, "bias": jnp.zeros(3)}, {"mean": jnp.zeros(3)}

    def apply_with_mean(params, model_state, inputs, key):
        return apply(params, {}, inputs, key)[0] + model_state["mean"], model_state

    a_trainer = trainer(model=(init, apply_with_mean))
    own = a_trainer.init(batches()[0])
    assert drawn
    drawn.clear()
    given = a_trainer.init(batches()[0], params=own.params, model_state={"mean": jnp.ones(3)})
    assert_bit_equal(given, own, "params")
    np.testing.assert_array_equal(given.model_state["mean"], 1)
    assert not drawn
    np.testing.assert_array_equal(a_trainer.init(batches()[0], params=own.params).model_state["mean"], 0)
    with pytest.raises(StateMismatch, match=r"state.model_state is not of the form(.|\n)*mean: expected float32\[3\]"):
        a_trainer.init(batches()[0], model_state={"mean": jnp.ones(2)})


def test_evaluate_is_the_mean_over_examples_and_runs_its_hooks():
    log: list[str] = []

    def hook(name: str):
        return lambda trainer, state, logs: log.append(name) or (state, {**logs, "seen": 1})

    callback = host(on_evaluate_begin=hook("begin"), on_evaluate_end=hook("end"))
    for fuse in (True, False):
        a_trainer = trainer(callback, metrics={"accuracy": ant.metrics.accuracy}, fuse=fuse)
        inputs, targets = data(19)
        state = a_trainer.init((inputs, targets))
        logs = a_trainer.evaluate(state, ant.ArrayLoader((inputs, targets), BATCH))
        outputs = a_trainer.predict(state, inputs)
        assert list(logs) == ["seen", "val_loss", "val_accuracy"]
        np.testing.assert_allclose(logs["val_loss"], cross_entropy(outputs, targets).mean(), rtol=1e-6)
        np.testing.assert_allclose(logs["val_accuracy"], (outputs.argmax(-1) == targets).mean(), rtol=1e-6)
        assert all(type(value) in (float, int) for value in logs.values())
    assert log == ["begin", "end"] * 2


def test_predict():
    a_trainer = trainer(precision="bfloat16")
    state = a_trainer.init(batches()[0])
    inputs, _ = data(21)
    outputs = a_trainer.predict(state, inputs, batch_size=8)
    assert (outputs.shape, outputs.dtype) == ((21, CLASSES), jnp.float32)
    np.testing.assert_allclose(outputs, apply(state.params, {}, inputs, None)[0], atol=0.05)
    np.testing.assert_array_equal(outputs, a_trainer.predict(state, inputs))
    with pytest.raises(ValueError, match="predict: inputs has no examples"):
        a_trainer.predict(state, inputs[:0])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_train_step_by_hand_is_fit(accumulate):
    callbacks = [ant.callbacks.clip_by_global_norm(0.1), ant.callbacks.ema(0.9), ant.callbacks.gradient_norm()]
    a_trainer = trainer(*callbacks, optimizer=adam(), gradient_accumulation_steps=accumulate)
    start = a_trainer.init(batches()[0])
    before = leaves_of(start)
    expected, history = a_trainer.fit(start, batches(4), 1)
    state, losses = start, []
    for batch in batches(4):
        state, logs = a_trainer.train_step(state, batch)
        losses.append(logs["loss"])
        assert set(logs) == {"batch_size", "loss", "grad_norm"}
    assert_bit_equal(state, expected)
    assert (state.epoch, state.batch_idx) == (0, 0)  # by hand there are no epochs
    np.testing.assert_allclose(np.mean(losses), history[0]["train_loss"], rtol=1e-6)
    for old, new in zip(before, leaves_of(start), strict=True):
        np.testing.assert_array_equal(old, new)


def test_grad_step_is_the_plain_gradient():
    double = host(on_backward_end=lambda b, t, state, grads, logs: (state, jax.tree.map(lambda g: 2 * g, grads), logs))
    for precision in ("float32", "float16"):
        a_trainer = trainer(double, metrics={"accuracy": ant.metrics.accuracy}, precision=precision)
        state = a_trainer.init(batches()[0])
        grads, logs = a_trainer.grad_step(state, batches()[0])
        expected = jax.grad(lambda p: cross_entropy(apply(p, {}, batches()[0][0], None)[0], batches()[0][1]).mean())(
            state.params
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), grads, expected)
        assert {"loss", "accuracy"} <= set(logs)
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_fit_takes_up_a_state_that_was_trained_by_hand():
    a_trainer = trainer(optimizer=adam())
    state = a_trainer.init(batches()[0])
    for batch in batches(3):
        state, _ = a_trainer.train_step(state, batch)
    state, history = a_trainer.fit(state, batches(2), 2)
    assert (int(state.step), len(history)) == (7, 2)


def test_hooks_by_hand_are_given_the_step():
    publish = ant.Callback(
        name="publish", traced=True, on_batch_begin=lambda b, t, state, logs: (state, {**logs, "b": b})
    )
    a_trainer = trainer(publish)
    state = a_trainer.init(batches()[0])
    for i in range(3):
        state, logs = a_trainer.train_step(state, batches()[0])
        assert int(logs["b"]) == i


def test_by_hand_a_users_own_jit_traces_once():
    traces: list[int] = []

    @jax.jit
    def norm(state: ant.TrainState) -> Any:
        traces.append(1)
        return optax.tree.norm(state.params)

    a_trainer = trainer()
    state = a_trainer.init(batches()[0])
    for batch in batches(4):
        state, _ = a_trainer.train_step(state, batch)
        norm(state)
    assert len(traces) == 1


def test_an_optimizer_may_ask_for_the_loss():
    def scale_by_loss() -> optax.GradientTransformationExtraArgs:
        def update(updates: Any, state: Any, params: Any = None, *, value: Any, **extra: Any) -> Any:
            return jax.tree.map(lambda u: u * value, updates), state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), cast(Any, update))

    a_trainer = trainer(optimizer=optax.chain(scale_by_loss(), optax.sgd(0.1)))
    start = a_trainer.init(batches()[0])
    grads, logs = a_trainer.grad_step(start, batches()[0])
    state, _ = a_trainer.train_step(start, batches()[0])
    expected = jax.tree.map(lambda p, g: p - 0.1 * logs["loss"] * g, start.params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.params, expected)


def test_random_keys_of_a_callback_are_its_own():
    state = trainer().init(batches()[0])
    keys = [state.random_key("a"), state.random_key("b"), state.replace(step=state.step + 1).random_key("a")]
    keys += [jax.random.fold_in(state.key, state.step), state.key]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 5
    assert state.random_key("a") == keys[0]


def test_a_model_that_returns_something_else_is_explained():
    init, _ = LINEAR
    with pytest.raises(TypeError, match=r"the model's init must return \(params, model_state\), got bias: float32"):
        trainer(model=(lambda key, x: init(key, x)[0], apply)).init(batches()[0])
    bad = trainer(model=(init, lambda p, s, x, key: x))
    with pytest.raises(TypeError, match=r"the model's apply must return \(outputs, model_state\), got float32\[8,4\]"):
        bad.fit(bad.init(batches()[0]), batches(), 1)
    with pytest.raises(TypeError, match="criterion needs batches of the form"):
        trainer().init(batches()[0][0])
    with pytest.raises(TypeError) as caught:
        trainer(model=(lambda key, x: x["nothing"], apply), criterion=None, loss_fn=apply).init((np.ones(3),))
    assert any("in the model's init, called with inputs 0: float32[3]" in note for note in caught.value.__notes__)


def test_a_state_is_a_pytree_that_users_may_jit_map_and_copy():
    a_trainer = trainer(ant.callbacks.ema())
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(), 2)
    norm = jax.jit(lambda state: optax.tree.norm(state.params))
    np.testing.assert_allclose(norm(state), optax.tree.norm(state.params))
    mapped = jax.tree.map(lambda leaf: leaf, state)
    assert (mapped.epoch, mapped.history) == (2, state.history)
    assert_bit_equal(copy.deepcopy(state), state)
    assert state.replace(step=state.step + 1).epoch == 2


def test_the_example_batch_may_have_another_size():
    a_trainer = trainer()
    state = a_trainer.init(tuple(part[:1] for part in batches()[0]))
    a_trainer.fit(state, batches(), 1)
    assert state.batch_idx == 0
