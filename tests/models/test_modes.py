"""Every way in which a Flax module is told whether it trains."""

import enum
import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import errors, linen as nn, nnx

import ant_jax as ant


FEATURES = 4


@pytest.fixture(autouse=True)
def standard_promotion() -> Iterator[None]:
    # Flax's own layers promote dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def inputs() -> Any:
    return jnp.asarray(np.random.default_rng(0).normal(3, 2, (16, FEATURES)), jnp.float32)


class Mode(enum.Enum):
    TEST, FIT = 0, 1


def layers(x: Any, train: bool) -> Any:
    return nn.Dropout(0.5, deterministic=not train)(nn.BatchNorm(use_running_average=not train)(x))


# The usual names, and whether they are true in training.
USUAL = {
    "train": True, "training": True, "is_training": True, "is_train": True, "enable_dropout": True,
    "deterministic": False, "use_running_average": False, "eval": False, "inference": False,
}  # fmt: skip


def linen_with(signature: str, train: str, decorator: Any = None) -> type[nn.Module]:
    """A linen module whose call has another signature; ``train`` is what it makes of it."""
    namespace: dict[str, Any] = {"layers": layers, "Mode": Mode}
    exec(f"def __call__(self, x, {signature}): return layers(x, {train})", namespace)
    call = nn.compact(namespace["__call__"])
    return type(
        "Net", (nn.Module,), {"__call__": call if decorator is None else decorator(call), "__module__": __name__}
    )


def nnx_with(signature: str, train: str) -> Any:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm, self.dropout = nnx.BatchNorm(FEATURES, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
            self.scale = nnx.Param(jnp.ones(FEATURES))

    namespace: dict[str, Any] = {"Mode": Mode}
    exec(
        f"def __call__(self, x, {signature}):\n"
        f"    train = {train}\n"
        f"    x = self.norm(x, use_running_average=not train)\n"
        f"    return self.scale * self.dropout(x, deterministic=not train)",
        namespace,
    )
    Net.__call__ = namespace["__call__"]
    return Net(nnx.Rngs(0))


def behaviour(model: Any, **said: Any) -> tuple[bool, bool, bool]:
    """Whether statistics move and dropout draws in training, and whether evaluation does neither."""
    pure = ant.pure_functions(model, **said)
    params, kept = pure.init(jax.random.key(0), inputs())
    one, two = (pure.apply(params, kept, inputs(), jax.random.key(i)) for i in (1, 2))
    moved = any(np.any(a != b) for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(one[1]), strict=True))
    evaluated = [pure.apply(params, kept, inputs(), None) for _ in range(2)]
    same = np.array_equal(evaluated[0][0], evaluated[1][0]) and not np.any(evaluated[0][0] == 0)
    return moved, not np.array_equal(one[0], two[0]), same and evaluated[0][1] is kept


ACTIVE = (True, True, True)


def test_a_flag_may_be_given_by_position_alone():
    for signature in ("train, /", "train=False, /", "mask=None, train=False, /"):
        assert behaviour(linen_with(signature, "train")()) == ACTIVE
        assert behaviour(nnx_with(signature, "train")) == ACTIVE
    said: dict[str, Any] = {"train": {"phase": "fit"}, "evaluate": {"phase": "test"}}
    assert behaviour(nnx_with("phase='test', /", "phase == 'fit'"), **said) == ACTIVE


@pytest.mark.parametrize("flag", USUAL)
def test_flags_of_the_usual_names_are_known(flag):
    train = flag if USUAL[flag] else f"not {flag}"
    for default in (f"={not USUAL[flag]}", ""):
        assert behaviour(linen_with(f"{flag}{default}", train)()) == ACTIVE
        assert behaviour(linen_with(f"*, {flag}{default}", train)()) == ACTIVE
        assert behaviour(nnx_with(f"{flag}{default}", train)) == ACTIVE
    assert behaviour(linen_with(f"mask=None, {flag}=None", train if USUAL[flag] else f"{flag} is False")()) == ACTIVE


remat = functools.partial(nn.remat, static_argnums=(2,))
by_number = functools.partial(nn.jit, static_argnums=(2,))
by_name = functools.partial(nn.jit, static_argnames=("train",))


@pytest.mark.parametrize("transform", [remat, by_number, by_name], ids=["remat", "jit by number", "jit by name"])
def test_flags_are_given_as_transforms_take_them(transform):
    assert behaviour(transform(linen_with("train=False", "train"))()) == ACTIVE
    if transform is not by_number:  # as a decorator, linen's own jit numbers arguments otherwise than JAX
        assert behaviour(linen_with("train=False", "train", transform)()) == ACTIVE
        assert behaviour(linen_with("train", "train", transform)()) == ACTIVE


class Wrapper(nn.Module):
    net: nn.Module

    def __call__(self, *args, **kwargs):
        return self.net(*args, **kwargs)


class Hidden(nn.Module):
    @nn.compact
    def __call__(self, *args, **kwargs):
        return linen_with("is_training=False", "is_training")()(*args, **kwargs)


class NnxWrapper(nnx.Module):
    def __init__(self, net: Any):
        self.net = net

    def __call__(self, *args, **kwargs):
        return self.net(*args, **kwargs)


def test_flags_are_found_through_wrappers_and_said_where_they_cannot_be():
    assert behaviour(Wrapper(linen_with("is_training=False", "is_training")())) == ACTIVE
    assert behaviour(Wrapper(Wrapper(linen_with("is_training", "is_training")()))) == ACTIVE
    assert behaviour(NnxWrapper(nnx_with("is_train=False", "is_train"))) == ACTIVE
    with pytest.raises(TypeError, match=r"in Hidden.*\*args, \*\*kwargs.*ant_jax.pure_functions\(model, train="):
        behaviour(Hidden())
    assert behaviour(Hidden(), train={"is_training": True}, evaluate={}) == ACTIVE


class Field(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        return layers(x, self.train)


class Asks(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=not self.is_mutable_collection("batch_stats"))(x)
        return nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x)


class Switched(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm, self.dropout = nnx.BatchNorm(FEATURES, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.is_training = True

    def __call__(self, x):
        off = not self.is_training
        return self.dropout(self.norm(x, use_running_average=off), deterministic=off)


def test_a_module_may_have_its_mode_in_a_field_or_ask_for_it():
    assert behaviour(Field()) == behaviour(Field(train=True)) == ACTIVE
    assert behaviour(Asks()) == ACTIVE
    assert behaviour(Switched(nnx.Rngs(0))) == ACTIVE


class Twice(nn.Module):
    nets: Sequence[nn.Module]

    @nn.compact
    def __call__(self, x):
        for net in self.nets:
            x = net(x)
        return x


class OnByDefault(Field):
    train: bool = True


def test_flags_in_fields_of_modules_inside_are_set():
    assert behaviour(Twice([Field()])) == behaviour(Twice([Twice([OnByDefault()])])) == ACTIVE
    assert behaviour(Twice([Field(train=True)])) == ACTIVE
    # What is set otherwise than by default stays so in training.
    assert behaviour(Twice([OnByDefault(train=False)])) == (False, False, True)
    training = nn.BatchNorm(use_running_average=False), nn.Dropout(0.5, deterministic=False)
    assert behaviour(Twice(training)) == ACTIVE
    frozen = nn.BatchNorm(use_running_average=True), nn.Dropout(0.5, deterministic=False)
    assert behaviour(Twice(frozen)) == (False, True, True)


def test_a_module_that_is_in_two_fields_stays_one():
    shared = Field()
    pure = ant.pure_functions(Twice([shared, shared]))
    assert len(pure.init(jax.random.key(0), inputs())[1]["batch_stats"]) == 1


class Draws(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(x)


class Moves(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(x)


@pytest.mark.parametrize("model", [Draws(), Moves()], ids=["draws", "moves"])
def test_a_linen_module_that_trains_in_evaluation_is_told_how_not_to(model):
    with pytest.raises(errors.FlaxError) as caught:
        behaviour(model)
    assert any("told that it trains" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("make", [lambda *net: linen_with(*net)(), nnx_with], ids=["linen", "nnx"])
def test_an_unknown_flag_is_noticed_and_can_be_said(make):
    cases = {
        "learn=False": ({"learn": True}, "learn"),
        "mode='test'": ({"mode": "fit"}, "mode == 'fit'"),
        "mode=0": ({"mode": 1}, "mode == 1"),
        "mode=<Mode.TEST: 0>": ({"mode": Mode.FIT}, "mode is Mode.FIT"),
    }
    for signature, (said, train) in cases.items():
        model = make(signature.replace("<Mode.TEST: 0>", "Mode.TEST"), train)
        with pytest.raises(TypeError, match=f"(?s)no dropout draws and no batch statistics move in Net.*{signature}"):
            behaviour(model)
        assert behaviour(model, train=said) == ACTIVE
    # Of two flags one is known; the other is in doubt.
    model = make("train=False, learn=False", "train and learn")
    with pytest.warns(UserWarning, match="left at their defaults: learn=False"):
        behaviour(model)
    assert behaviour(model, train={"train": True, "learn": True}) == ACTIVE


class Unsaid(nn.Module):
    @nn.compact
    def __call__(self, x, learn=False):
        return layers(nn.Dense(1)(x), learn)


def test_an_unknown_flag_stops_a_run_before_anything_is_compiled(compilations):
    batch = (inputs(), jnp.zeros((16, FEATURES)))
    for model in (Unsaid(), nnx_with("learn=False", "learn")):
        trainer = ant.Trainer(model, optax.sgd(0.1), lambda o, t: (o**2).mean(-1), progress_bar=False)
        state = trainer.init(batch)
        compilations.reset()
        with pytest.raises(TypeError, match="left at their defaults: learn=False"):
            trainer.fit(state, [batch], 1)
        with pytest.raises(TypeError, match="left at their defaults: learn=False"):
            trainer.train_step(state, batch)
        assert compilations.count == 0


class Frozen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=True)(x)
        return nn.Dropout(0.5, deterministic=not train)(x)


class AllFrozen(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None, train=False):
        return nn.BatchNorm(use_running_average=True)(x)


def test_what_is_frozen_on_purpose_makes_no_noise():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert behaviour(Frozen()) == (False, True, True)
        assert behaviour(AllFrozen()) == (False, False, True)
        assert behaviour(linen_with("return_all=False", "False")(), train={}) == (False, False, True)


class Backbone(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.backbone = nnx.BatchNorm(FEATURES, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(FEATURES, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.backbone(x)))


def test_a_part_of_an_nnx_module_that_is_in_eval_stays_in_it():
    model = Backbone(nnx.Rngs(0))
    model.train()
    model.backbone.eval()
    pure = ant.pure_functions(model)
    params, kept = pure.init(jax.random.key(0), inputs())
    _, new = pure.apply(params, kept, inputs(), jax.random.key(1))
    assert new["backbone"]["mean"] is kept["backbone"]["mean"]
    assert np.all(new["norm"]["mean"] != kept["norm"]["mean"])
    assert behaviour(model) == ACTIVE


def test_an_nnx_module_that_is_wholly_in_eval_is_trained_in_it_and_says_so():
    model = Backbone(nnx.Rngs(0))
    model.eval()
    with pytest.warns(UserWarning, match=r"every layer .* is in evaluation \(backbone: use_running_average=True\)"):
        assert behaviour(model) == (False, False, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert behaviour(model, train={}, evaluate={}) == (False, False, True)
        model.train()
        assert behaviour(model) == ACTIVE
    model = nnx_with("train=False", "train")
    model.eval()
    # The remedy keeps the flags that are known.
    said = r"train=\{'train': True\}, evaluate=\{'train': False\}"
    with pytest.warns(UserWarning, match=f"pure_functions\\(model, {said}\\)"):
        behaviour(model)


def test_a_flag_of_an_nnx_call_that_is_none_leaves_the_mode_to_the_layers():
    model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    assert behaviour(model) == (False, True, True)


def test_a_mask_is_no_flag_and_what_is_called_by_another_method_needs_none():
    class Masked(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm = nnx.BatchNorm(FEATURES, rngs=rngs)

        def __call__(self, x, mask=None):
            return self.norm(x, use_running_average=True, mask=mask)

    class Encoder(nnx.Module):
        def encode(self, x: Any) -> Any:
            return x

    assert behaviour(Masked(nnx.Rngs(0))) == (False, False, True)
    assert ant.pure_functions(Encoder()).init(jax.random.key(0), inputs()) == ({}, {})


def test_pairs_have_no_flags():
    with pytest.raises(TypeError, match="train and evaluate are arguments of a Flax module's call"):
        ant.pure_functions((lambda key, x: ({}, {}), lambda p, s, x, key: (x, s)), train={})


def test_streams_that_are_alike_stay_alike_and_others_differ():
    rngs = nnx.Rngs(0)

    class Streams(nnx.Module):
        def __init__(self) -> None:
            self.split, self.same, self.one = rngs.split(3), rngs.broadcast(3), rngs.fork()

        def __call__(self, x):
            return jax.random.key_data(self.split.default.key[...]), jax.random.key_data(self.same.default.key[...])

    pure = ant.pure_functions(Streams())
    (split, same), _ = pure.apply({}, {}, None, jax.random.key(3))
    assert len(np.unique(split, axis=0)) == 3
    assert len(np.unique(same, axis=0)) == 1
    (other, _), _ = pure.apply({}, {}, None, jax.random.key(4))
    assert not np.any(np.all(other[:, None] == split[None], axis=-1))


def test_every_stream_and_every_layer_draws_its_own_numbers():
    rngs = nnx.Rngs(params=0, dropout=1)

    class Two(nnx.Module):
        def __init__(self) -> None:
            self.first, self.second = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
            self.streams = nnx.Rngs(one=0, other=0)

        def __call__(self, x):
            drawn = jax.random.normal(self.streams.one(), (4,)), jax.random.normal(self.streams.other(), (4,))
            return self.first(x), self.second(x), *drawn

    first, second, one, other = ant.pure_functions(Two()).apply({}, {}, jnp.ones(64), jax.random.key(3))[0]
    assert np.any(first != second) and np.any(first == 0) and np.any(second == 0)
    assert not np.any(one == other)
