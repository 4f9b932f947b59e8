"""Numbers in the state: read by name, changed by anybody between and inside launches, with nothing compiled again."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from problems import assert_bit_equal, batches, host, standard_promotion, trainer

import ant_jax as ant
from ant_jax import Hyperparam, HyperparamError


library = ant.callbacks


def injected(factory: Any = optax.sgd, **numbers: Any) -> optax.GradientTransformation:
    return standard_promotion(optax.inject_hyperparams(factory)(**numbers))


def started(optimizer: optax.GradientTransformation, *callbacks: ant.Callback) -> ant.TrainState:
    return trainer(*callbacks, optimizer=optimizer).init(batches()[0])


def values(state: ant.TrainState) -> dict[str, float]:
    return {name: float(value) for name, value in state.hyperparams.items()}


EVERYTHING = (
    library.clip_by_global_norm(Hyperparam(1)),
    library.clip_by_value(Hyperparam(0.5)),
    library.adaptive_grad_clip(Hyperparam(0.25), eps=Hyperparam(2.0)),
    library.gradient_noise(Hyperparam(0.0), gamma=Hyperparam(0.5)),
    library.ema(Hyperparam(0.75)),
    library.stop_at(Hyperparam(-1.0), "loss", per="batch"),
    library.from_optax(optax.inject_hyperparams(optax.scale)(step_size=4.0), name="scale"),
)
NAMES = {
    "learning_rate": 0.5,
    "clip_by_global_norm/max_norm": 1.0,
    "clip_by_value/max_delta": 0.5,
    "adaptive_grad_clip/clipping": 0.25,
    "adaptive_grad_clip/eps": 2.0,
    "gradient_noise/eta": 0.0,
    "gradient_noise/gamma": 0.5,
    "ema/decay": 0.75,
    "stop_at/threshold": -1.0,
    "scale/step_size": 4.0,
}


@pytest.fixture(scope="module")
def full() -> ant.Trainer:
    return trainer(*EVERYTHING, library.log_hyperparams(), optimizer=injected(learning_rate=0.5))


def test_every_number_has_its_name_and_takes_another_value(full):
    state = full.init(batches()[0])
    assert values(state) == NAMES
    assert float(state.hyperparams["max_norm"]) == 1  # a callback's without the callback
    assert all(value.dtype == jnp.float32 and not value.weak_type for value in state.hyperparams.values())
    changed = {name: value / 2 + 0.125 for name, value in NAMES.items()}
    assert values(state.with_hyperparams(**changed)) == changed
    assert values(state) == NAMES  # which has not changed
    for name, value in changed.items():
        assert values(state.with_hyperparams(**{name: value})) == NAMES | {name: value}
        assert values(state.with_hyperparams(**{name.split("/")[-1]: value})) == NAMES | {name: value}


@pytest.mark.parametrize("name", ["rate", "norm", "by_global_norm/max_norm", "/max_norm", "adaptive_grad_clip"])
def test_a_part_of_a_name_is_no_name(full, name):
    with pytest.raises(HyperparamError, match=name):
        full.init(batches()[0]).with_hyperparams(**{name: 0.5})


def test_new_values_of_any_kind_hold_from_the_next_batch_on_and_compile_nothing(full, compilations):
    start = full.init(batches()[0])
    after, logs = full.train_step(start, batches()[0])
    assert {name: float(logs[name]) for name in NAMES} == NAMES
    zeros = [0, 0.0, np.float64(0), jnp.float32(0), np.zeros((), np.float32)]
    changes = [{"learning_rate": zero} for zero in zeros]
    changes += [{"max_norm": 1e-3, "step_size": 1.0}, {"decay": 0.0}, {"eta": 1.0}, {"threshold": 1e9}]
    compilations.reset()
    results = [full.train_step(start.with_hyperparams(**change), batches()[0]) for change in changes]
    assert compilations.count == 0

    *still, (clipped, _), (averaged, _), (noisy, _), (stopped, _) = results
    for state, logs in still:
        assert_bit_equal(state, start, "params")
        assert float(logs["learning_rate"]) == 0
    moved = optax.tree.norm(optax.tree.sub(clipped.params, start.params))
    np.testing.assert_allclose(moved, 0.5 * 1e-3, rtol=1e-4)
    assert_bit_equal(averaged, after, "params")
    jax.tree.map(np.testing.assert_array_equal, averaged.callback_states["ema"]["average"], after.params)
    assert np.any(noisy.params["kernel"] != after.params["kernel"])
    assert stopped.stop and not after.stop


@pytest.mark.parametrize("fuse", [True, False])
def test_host_and_traced_hooks_change_them_between_batches_with_nothing_compiled(fuse, compilations):
    def halve(batch_idx: Any, trainer: Any, state: Any, logs: Any) -> Any:
        return state.with_hyperparams(learning_rate=state.hyperparams["learning_rate"] / 2), logs

    def on_epoch_begin(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        return state.with_hyperparams(learning_rate=1.0, max_norm=10.0 ** (epoch + 1)), logs

    def look(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        seen.extend(logs.window["learning_rate"].tolist())
        if batch_idx == 1:
            state = state.with_hyperparams(learning_rate=3.0)
        return state, logs

    seen: list[float] = []
    a_trainer = trainer(
        library.clip_by_global_norm(Hyperparam(1.0)),
        library.log_hyperparams(),  # before it is halved: what the update used
        ant.Callback(name="halve", traced=True, on_batch_end=halve),
        host("host", every=2, on_epoch_begin=on_epoch_begin, on_batch_end=look),
        optimizer=injected(learning_rate=0.5),
        fuse=fuse,
    )
    start = a_trainer.init(batches()[0])
    a_trainer.fit(start, batches(5), 1)
    seen.clear()
    compilations.reset()
    state, history = a_trainer.fit(start, batches(5), 2)
    assert compilations.count == 0
    assert seen == [1.0, 0.5, 3.0, 1.5, 0.75] * 2
    assert history.to_dict()["train_clip_by_global_norm/max_norm"] == [10.0, 100.0]
    assert values(state) == {"learning_rate": 0.375, "clip_by_global_norm/max_norm": 100.0}
    # What they are is part of the state that a run goes on from.
    cut, _ = a_trainer.fit(start, batches(5), 1)
    cut, _ = a_trainer.fit(cut, batches(5), 2)
    assert_bit_equal(cut, state)


def test_they_are_saved_and_restored(full, tmp_path):
    state = full.init(batches()[0]).with_hyperparams(**NAMES | {"learning_rate": 0.125, "ema/decay": 0.9})
    full.save(tmp_path, state)
    restored = full.restore(tmp_path)
    assert values(restored) == values(state)
    assert float(restored.hyperparams["learning_rate"]) == 0.125


def test_two_optimizers_numbers_have_the_names_of_their_places():
    chained = started(optax.chain(injected(learning_rate=1.0), optax.inject_hyperparams(optax.scale)(step_size=2.0)))
    assert values(chained) == {"learning_rate": 1.0, "step_size": 2.0}

    twice = started(optax.chain(injected(learning_rate=1.0), injected(learning_rate=2.0, momentum=0.5)))
    assert values(twice) == {"0/learning_rate": 1.0, "1/learning_rate": 2.0, "momentum": 0.5}
    assert values(twice.with_hyperparams(**{"1/learning_rate": 3.0}))["1/learning_rate"] == 3
    message = r"several hyper-parameters are named 'learning_rate': 0/learning_rate, 1/learning_rate; give the whole"
    for ask in (lambda: twice.hyperparams["learning_rate"], lambda: twice.with_hyperparams(learning_rate=1.0)):
        with pytest.raises(HyperparamError, match=message):
            ask()

    parts: Any = {"bias": injected(learning_rate=1.0), "kernel": injected(learning_rate=2.0)}
    partitioned = started(optax.partition(parts, {"bias": "bias", "kernel": "kernel"}))
    assert sorted(values(partitioned).values()) == [1, 2]
    (name,) = [name for name, value in values(partitioned).items() if value == 2]
    assert name.endswith("/learning_rate") and "kernel" in name
    assert values(partitioned.with_hyperparams(**{name: 5.0}))[name] == 5

    def both(learning_rate: float) -> optax.GradientTransformation:
        return optax.chain(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5), optax.scale(learning_rate))

    nested = started(injected(both, learning_rate=0.25))
    assert values(nested) == {"learning_rate": 0.25, "0/learning_rate": 0.5}
    assert values(nested.with_hyperparams(**{"0/learning_rate": 1.0})) == {"learning_rate": 0.25, "0/learning_rate": 1}


def test_one_update_uses_the_number_of_each_place():
    a_trainer = trainer(
        optimizer=optax.partition(
            {"bias": injected(learning_rate=1.0), "kernel": injected(learning_rate=2.0)},
            {"bias": "bias", "kernel": "kernel"},
        )
    )
    start = a_trainer.init(batches()[0])
    (name,) = [name for name, value in values(start).items() if value == 2]
    grads, _ = a_trainer.grad_step(start, batches()[0])
    state, _ = a_trainer.train_step(start.with_hyperparams(**{name: 0.5}), batches()[0])
    for leaf, rate in (("bias", 1.0), ("kernel", 0.5)):
        np.testing.assert_allclose(state.params[leaf], start.params[leaf] - rate * grads[leaf], rtol=1e-5, atol=1e-7)


def test_a_callbacks_numbers_of_one_name_have_the_names_of_their_places():
    two = optax.chain(*(optax.inject_hyperparams(optax.scale)(step_size=float(size)) for size in (2, 3)))
    state = started(
        optax.sgd(0.1),
        library.from_optax(two, name="two"),
        library.chain(library.clip_by_global_norm(Hyperparam(1.0)), library.ema(Hyperparam(0.5)), name="a:chain"),
        library.ema(Hyperparam(0.25), name="other"),
    )
    expected = {"two/0/step_size": 2, "two/1/step_size": 3, "a:chain/max_norm": 1}
    expected |= {"a:chain/decay": 0.5, "other/decay": 0.25}
    assert values(state) == expected
    changed = state.with_hyperparams(**{"two/1/step_size": 5.0, "a:chain/decay": 0.75, "max_norm": 0.5})
    assert values(changed) == expected | {"two/1/step_size": 5, "a:chain/decay": 0.75, "a:chain/max_norm": 0.5}
    with pytest.raises(HyperparamError, match="several .* named 'decay': a:chain/decay, other/decay"):
        state.with_hyperparams(decay=0.5)


def test_a_host_callbacks_own_number_stays_what_it_is():
    callback = host("own", init=lambda state: {"hyperparams": {"threshold": 0.5}, "count": 3})
    state = started(optax.sgd(0.1), callback).with_hyperparams(threshold=1)
    assert state.callback_states["own"] == {"hyperparams": {"threshold": 1.0}, "count": 3}
    assert type(state.hyperparams["threshold"]) is float


@pytest.mark.parametrize(
    ("optimizer", "name", "message"),
    [
        (
            optax.adam(0.1),
            "learning_rate",
            r"no hyper-parameter 'learning_rate' \(there are: none\)\. .* when it is made with "
            r"optax\.inject_hyperparams\(optax\.adam\)\(learning_rate=0\.001\) instead of "
            r"optax\.adam\(learning_rate=0\.001\), a callback when it is given ant_jax\.Hyperparam\(value\)",
        ),
        (
            injected(learning_rate=1.0),
            "clip_by_global_norm/max_norm",
            r"'clip_by_global_norm/max_norm' \(there are: learning_rate\).*adam\)\(max_norm=0\.001\)",
        ),
        (
            injected(learning_rate=optax.constant_schedule(0.1)),
            "learning_rate",
            r"'learning_rate' follows a schedule, which would set it again at the next update; make the optimizer with "
            r"a number in its place, optax\.inject_hyperparams\(optax\.adam\)\(learning_rate=0\.001\)",
        ),
        (
            injected(learning_rate=1),
            "learning_rate",
            r"'learning_rate' is a whole number, .* and 0\.5 would be rounded",
        ),
    ],
    ids=["not injected", "of a callback", "scheduled", "whole"],
)
def test_what_cannot_be_changed_says_what_to_write(optimizer, name, message):
    state = started(optimizer)
    with pytest.raises(HyperparamError, match=message):
        state.with_hyperparams(**{name: 0.5})


def test_a_scheduled_number_can_be_read():
    a_trainer = trainer(optimizer=injected(learning_rate=optax.linear_schedule(1.0, 0.0, 4)))
    state, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(3), 1)
    assert values(state) == {"learning_rate": 0.5}  # the third update's


def test_a_state_with_a_number_of_another_shape_is_refused():
    a_trainer = trainer(optimizer=injected(learning_rate=1.0))
    state = a_trainer.init(batches()[0]).with_hyperparams(learning_rate=jnp.ones(3))
    with pytest.raises(ant.StateMismatch, match=r"learning_rate: expected float32\[\], got float32\[3\]"):
        a_trainer.fit(state, batches(1), 1)


# --- names that are the user's


NAMED = {"hyperparams": {"scale": jnp.ones(4)}, "average": jnp.ones(4), "swapped": jnp.ones(4), "count": jnp.ones(4)}


def named_apply(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
    kernel = params["hyperparams"]["scale"] * params["average"]
    return inputs @ jnp.stack([kernel, 2 * kernel, 3 * kernel], axis=1), model_state


def named_trainer(*callbacks: ant.Callback, **options: Any) -> ant.Trainer:
    return trainer(*callbacks, model=(lambda key, inputs: (NAMED, {}), named_apply), **options)


def test_parameters_may_have_any_names(tmp_path):
    def made(*more: ant.Callback) -> ant.Trainer:
        chained = library.chain(library.ema(Hyperparam(0.5), name="own"), library.early_stopping(restore_best=True))
        callbacks = [library.ema(0.5, evaluate=True), library.roll_back(), library.chain(chained, name="outer"), *more]
        return named_trainer(*callbacks, optimizer=injected(optax.adam, learning_rate=0.5))

    whole, start = made(), made().init(batches()[0])
    assert set(start.hyperparams) == {"learning_rate", "b1", "b2", "eps", "eps_root", "outer/decay"}
    state, _ = whole.fit(start, batches(2), 3, batches(1))
    saving = made(library.checkpoint(tmp_path))
    saving.fit(saving.init(batches()[0]), batches(2), 2, batches(1))
    resumed, _ = made().fit(start, batches(2), 3, batches(1), resume=tmp_path)
    assert_bit_equal(state, resumed)
    changed = state.with_hyperparams(decay=0.25, learning_rate=0.125)
    assert float(changed.hyperparams["decay"]) == 0.25 and float(changed.hyperparams["learning_rate"]) == 0.125
    assert changed.callback_states["ema"] is state.callback_states["ema"]


@struct.dataclass
class Module:
    """A model whose attribute has the name of optax's."""

    w: Any
    hyperparams: dict[str, Any] = struct.field(pytree_node=False, default_factory=lambda: {"depth": 2})


def test_an_attribute_of_the_parameters_may_be_called_hyperparams():
    model = (
        lambda key, inputs: (Module(jnp.ones((4, 3))), {}),
        lambda params, rest, inputs, key: (inputs @ params.w, rest),
    )
    a_trainer = trainer(library.ema(0.5), model=model, optimizer=injected(optax.adam, learning_rate=0.5))
    state = a_trainer.init(batches()[0]).with_hyperparams(learning_rate=0.25)
    assert float(a_trainer.fit(state, batches(1), 1)[0].hyperparams["learning_rate"]) == 0.25


def test_the_memory_of_a_chain_on_the_host_is_saved_with_its_numbers(tmp_path):
    own = host("own", init=lambda state: {"hyperparams": {"threshold": 0.5}})
    a_trainer = trainer(library.chain(own, library.time_limit(1e6)))
    state = a_trainer.init(batches()[0]).with_hyperparams(threshold=0.25)
    a_trainer.save(tmp_path, state)
    assert a_trainer.restore(tmp_path).hyperparams == {"chain/threshold": 0.25}


def test_a_mapping_in_the_optimizer_may_have_a_key_of_the_same_name():
    parts = ("learning_rate", injected(learning_rate=0.5)), ("step_size", optax.inject_hyperparams(optax.scale)(2.0))
    state = started(standard_promotion(optax.named_chain(*parts)))
    assert values(state) == {"learning_rate": 0.5, "step_size": 2.0}
    changed = state.with_hyperparams(learning_rate=0.25, step_size=4.0)
    assert values(changed) == {"learning_rate": 0.25, "step_size": 4.0}
    assert jax.tree.structure(changed.opt_state) == jax.tree.structure(state.opt_state)


def test_numbers_of_an_optimizer_inside_of_another_one_have_the_names_of_their_places():
    def outer(learning_rate: Any) -> optax.GradientTransformation:
        inner = optax.chain(injected(learning_rate=0.5), optax.inject_hyperparams(optax.scale)(step_size=2.0))
        return optax.chain(inner, optax.scale(learning_rate))

    state = started(injected(outer, learning_rate=1.0))
    assert values(state) == {"learning_rate": 1.0, "0/0/learning_rate": 0.5, "step_size": 2.0}
    changed = state.with_hyperparams(**{"0/0/learning_rate": 0.25, "step_size": 4.0})
    assert values(changed) == {"learning_rate": 1.0, "0/0/learning_rate": 0.25, "step_size": 4.0}
