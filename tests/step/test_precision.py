"""A precision is one object; a string names one, and another may come from outside of the package."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import CLASSES, LINEAR, apply, assert_bit_equal, batches, trainer

import ant_jax as ant
from ant_jax._step.precision import PRECISIONS, precision_of


SEEN: dict[str, Any] = {}


def noting(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
    SEEN["model"] = {"inputs": inputs.dtype, **{name: leaf.dtype for name, leaf in params.items()}}
    kernel, bias = params["kernel"], params["bias"].astype(params["kernel"].dtype)
    return apply({"kernel": kernel, "bias": bias}, model_state, inputs, key)


def criterion(outputs: Any, targets: Any) -> Any:
    SEEN["outputs"] = outputs.dtype
    losses = 0.5 * jnp.sum((outputs - jax.nn.one_hot(targets, CLASSES, dtype=outputs.dtype)) ** 2, axis=-1)
    return losses.astype(jnp.float32)


def trained(precision: Any) -> tuple[ant.Trainer, ant.TrainState]:
    SEEN.clear()
    a_trainer = trainer(model=(LINEAR[0], noting), criterion=criterion, precision=precision)
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(3), 2)
    return a_trainer, state


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_string_names_a_precision(name):
    named, given = trained(name)[1], trained(dataclasses.replace(PRECISIONS[name]))[1]
    assert_bit_equal(named, given)
    assert precision_of(name) == dataclasses.replace(PRECISIONS[name])


@pytest.mark.parametrize("output", ["float32", "bfloat16", None])
def test_a_model_that_computes_in_bfloat16_with_outputs_of_another_dtype(output):
    a_trainer, state = trained(ant.Precision(compute_dtype="bfloat16", output_dtype=output))
    assert set(SEEN["model"].values()) == {jnp.dtype("bfloat16")}
    assert SEEN["outputs"] == jnp.dtype(output or "float32")
    assert a_trainer.predict(state, batches()[0][0]).dtype == jnp.dtype(output or "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


@dataclasses.dataclass(frozen=True, repr=False)
class BiasInFull(ant.Precision):
    """From outside: leaves the bias in float32."""

    def cast_to_compute(self, tree: Any) -> Any:
        low = super().cast_to_compute(tree)
        return {**low, "bias": tree["bias"]} if isinstance(tree, dict) else low


def test_a_precision_from_outside():
    precision = BiasInFull(compute_dtype=jnp.bfloat16, output_dtype=jnp.float32)
    trained(precision)
    low, full = jnp.dtype("bfloat16"), jnp.dtype("float32")
    assert SEEN == {"model": {"inputs": low, "kernel": low, "bias": full}, "outputs": full}
    assert repr(precision).startswith("BiasInFull(param_dtype=None, compute_dtype='bfloat16'")


def test_parameters_of_another_dtype_train_and_are_saved(tmp_path):
    a_trainer, state = trained(ant.Precision(param_dtype="bfloat16", compute_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    assert not np.array_equal(state.params["kernel"], a_trainer.init(batches()[0]).params["kernel"])
    a_trainer.save(tmp_path, state)
    assert_bit_equal(a_trainer.restore(tmp_path), state)


def test_any_precision_may_scale_the_loss():
    precision = ant.Precision(compute_dtype="bfloat16", loss_scale_dtype="float32")
    a_trainer = trainer(precision=precision)
    state, logs = a_trainer.train_step(a_trainer.init(batches()[0]), batches()[0])
    assert logs["loss_scale"] == 2.0**16 and logs["step_skipped"] == 0.0
    plain = trainer(precision="bfloat16")
    expected, _ = plain.train_step(plain.init(batches()[0]), batches()[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2), state.params, expected.params)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ant.Precision)])
@pytest.mark.parametrize("bad", ["int32", "float33", 3, complex])
def test_what_is_no_floating_dtype_is_refused(field, bad):
    with pytest.raises(ValueError, match=f"Precision: {field} must be a floating dtype or None, got "):
        ant.Precision(**{field: bad})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_loss_scale_that_does_not_fit_is_refused(dtype):
    with pytest.raises(ValueError, match=f"at least, because a scale of 65536 does not fit into {dtype}"):
        ant.Precision(compute_dtype="float16", loss_scale_dtype=dtype)
