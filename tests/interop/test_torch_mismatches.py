"""What does not fit is refused as a whole, and the message says what to do."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import ant_jax as ant
from ant_jax.interop.torch import from_state_dict, to_state_dict


def zeros(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A state_dict: ``fc1__weight`` is ``fc1.weight``."""
    return {key.replace("__", "."): np.zeros(shape, np.float32) for key, shape in shapes.items()}


def module(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


LINEAR = zeros(fc__weight=(3, 2), fc__bias=(3,))
DENSE = {"fc": module(kernel=(2, 3), bias=(3,))}


def message(error: type[Exception], *arguments: Any, **options: Any) -> str:
    """The message of the error that both directions raise; they differ in their own name alone."""
    state_dict, *trees = arguments
    with pytest.raises(error) as caught:
        from_state_dict(state_dict, *trees, **options)
    with pytest.raises(error) as back:
        to_state_dict(*trees, like=state_dict, **options)
    text = str(caught.value)
    swapped = str(back.value).replace("to_state_dict", "from_state_dict").replace("like[", "state_dict[")
    assert swapped.replace(": like must", ": state_dict must").replace("of like", "of state_dict") == text
    return text


def test_modules_left_over_are_side_by_side_and_names_are_proposed():
    weights = zeros(a__weight=(4, 1, 3, 3), b__weight=(2, 2), c__weight=(2, 2), d__weight=(9, 9))
    kernels = {"Conv_0": (3, 3, 1, 4), "Dense_2": (2, 2), "Dense_10": (2, 2), "Dense_0": (5, 7)}
    params = {name: module(kernel=shape) for name, shape in kernels.items()}
    text = message(ant.StateMismatch, weights, params)
    assert text.splitlines()[1:6] == [
        "torch modules left over | JAX modules left over",
        "a: weight (4, 1, 3, 3)  | Conv_0: kernel (3, 3, 1, 4)",
        "b: weight (2, 2)        | Dense_0: kernel (5, 7)",
        "c: weight (2, 2)        | Dense_2: kernel (2, 2)",
        "d: weight (9, 9)        | Dense_10: kernel (2, 2)",
    ]
    proposed = text[text.index("names={\n") :].removeprefix("names=")
    assert "'b': 'Dense_2',  # or Dense_10" in proposed and "#" not in proposed.splitlines()[1]
    assert eval(proposed) == {"a": "Conv_0", "b": "Dense_2", "c": "Dense_10"}


def test_the_proposal_is_one_that_works():
    weights = zeros(a__0__weight=(4, 1, 3), a__0__bias=(4,), a__1__weight=(4,), a__1__running_mean=(4,))
    weights |= zeros(a__1__running_var=(4,), up__weight=(3, 4, 5), head__weight=(5, 4))
    params = {"Conv_0": module(kernel=(3, 1, 4), bias=(4,)), "BatchNorm_0": module(scale=(4,))}
    params |= {"Up": module(kernel=(5, 3, 4)), "Dense_0": module(kernel=(4, 5))}
    model_state = {"batch_stats": {"BatchNorm_0": module(mean=(4,), var=(4,))}}
    text = message(ant.StateMismatch, weights, params, model_state)
    names = eval(text[text.index("names={\n") :].removeprefix("names="))
    from_state_dict(weights, params, model_state, names=names, transpose_kernel={"up": False})


def test_nothing_is_proposed_where_nothing_fits():
    text = message(ant.StateMismatch, zeros(a__weight=(4, 3)), {"b": module(kernel=(4, 3))})
    assert "names={\n" not in text and "a: weight (4, 3)" in text and "b: kernel (4, 3)" in text


@pytest.mark.parametrize(
    ("weights", "params", "expected"),
    [
        (LINEAR, {"fc": module(kernel=(2, 3))}, "fc.bias (3,): fc in JAX has nothing for it; it has kernel (2, 3)"),
        (
            zeros(fc__weight=(3, 2)),
            DENSE,
            "fc/bias (3,): fc in torch has nothing for it; it has weight (3, 2)",
        ),
        (
            LINEAR,
            {"fc": module(kernel=(3, 2), bias=(3,))},
            "fc.weight -> fc/kernel: torch's (out, in) = (3, 2) is (in, out) = (2, 3) in JAX, where the leaf "
            "has (3, 2)",
        ),
        (
            LINEAR,
            {"fc": module(kernel=(2, 3), bias=(4,))},
            "fc.bias -> fc/bias: torch has (3,), JAX (4,); 'bias' is taken over as it is",
        ),
        (
            zeros(conv__weight=(4, 2, 3, 3)),
            {"conv": module(kernel=(3, 3, 2, 5))},
            "torch's (out, in/groups, *spatial) = (4, 2, 3, 3) is (*spatial, in/groups, out) = (3, 3, 2, 4) in JAX, "
            "where the leaf has (3, 3, 2, 5)",
        ),
        (
            zeros(conv__weight=(4, 2, 3, 3)),
            {"conv": module(kernel=(3, 3, 4, 2))},
            "it would fit a ConvTranspose with transpose_kernel=False",
        ),
        (
            zeros(fc__weight=(8, 12)),
            {"fc": module(kernel=(2, 2, 3, 8))},  # a Linear of patches: their order is not known
            "(in, out) = (12, 8) in JAX, where the leaf has (2, 2, 3, 8)",
        ),
        (zeros(a__weight=(2,)), {"a": module(scale=(2,), w=(2,))}, "a/w (2,): a in torch has nothing for it"),
        (
            {"fc.weight": np.zeros((3, 2), int)},
            {"fc": module(kernel=(2, 3))},
            "fc.weight -> fc/kernel: torch's numbers are integer, JAX's floating",
        ),
        (zeros(bn__weight=(2,), bn__running_mean=(2,)), {"bn": module(scale=(2,))}, "give model_state, too"),
        (zeros(**{"rnn__weight_ih_l0_reverse": (4, 2)}), DENSE, "recurrent layers (LSTM, GRU, RNN) are not converted"),
        (zeros(rnn__bias_hh=(4,)), DENSE, "recurrent layers (LSTM, GRU, RNN) are not converted"),
        (zeros(a__bias_k=(1, 1, 4)), DENSE, "MultiheadAttention with add_bias_kv=True is not converted"),
        (zeros(fc__weight_g=(3, 1), fc__weight_v=(3, 2)), DENSE, "weight norm and spectral norm are not converted"),
        (zeros(fc__parametrizations__weight__original0=(3, 1)), DENSE, "parametrize.remove_parametrizations"),
    ],
)
def test_each_difference_is_named(weights, params, expected):
    assert expected in message(ant.StateMismatch, weights, params)


def test_all_differences_are_in_one_message():
    weights = {**LINEAR, **zeros(a__weight=(2, 2), rnn__weight_hh_l1=(4, 4))}
    params = {"fc": module(kernel=(3, 2)), "a": module(kernel=(3, 2)), "z": module(scale=(7,))}
    text = message(ant.StateMismatch, weights, params)
    for part in (
        "fc.weight -> fc/kernel",
        "a.weight -> a/kernel",
        "fc.bias (3,)",
        "rnn: weight_hh_l1",
        "z: scale (7,)",
    ):
        assert part in text


def test_a_longer_name_wins_and_a_name_holds_for_all_below_it():
    weights = zeros(
        module__blocks__0__a__weight=(1,), module__blocks__0__b__weight=(2,), module__blocks__1__a__weight=(3,)
    )
    params = {
        "layers_0": {"a": module(scale=(1,))},
        "other": {"b": module(scale=(2,))},
        "layers_1": {"a": module(w=(3,))},
    }
    from_state_dict(weights, params, names={"module.blocks": "layers", "module.blocks.0.b": ("other", "b")})
    assert "blocks.0.b: weight (2,)" in message(ant.StateMismatch, weights, params, names={"module.blocks": "layers"})


def test_the_root_takes_a_prefix_away():
    wrapped = {f"module.{key}": value for key, value in LINEAR.items()}
    from_state_dict(wrapped, DENSE, names={"module": ""})
    from_state_dict(LINEAR, {"net": DENSE}, names={"": "net"})


def test_what_is_named_none_is_left_out_and_stays_as_like_has_it():
    weights = {**LINEAR, "mask": np.ones(2), "head.weight": np.ones((2, 2))}
    names = {"mask": None, "head": None}
    from_state_dict(weights, DENSE, names=names)
    back = to_state_dict(DENSE, like=weights, names=names)
    assert list(back) == list(weights) and back["mask"] is weights["mask"]
    assert back["head.weight"] is weights["head.weight"]


def test_two_parameters_do_not_go_to_one_leaf():
    weights = zeros(a__weight=(2, 2), b__weight=(2, 2))
    text = message(ant.StateMismatch, weights, {"a": module(w=(2, 2))}, names={"b": "a"})
    assert "b.weight -> a/w: a.weight goes there, too" in text


def test_leaves_that_no_path_tells_apart_are_refused():
    both = {"a_0": module(w=(2, 2)), "a": {"0": module(w=(2, 2))}}
    text = message(ValueError, LINEAR, both)
    assert text == "a/0/w and a_0/w cannot be told apart by a path; rename one of them"


CNN = zeros(conv__weight=(4, 1, 3, 3), conv__bias=(4,), fc1__weight=(5, 24), fc2__weight=(5, 5))
JAX_CNN = {
    "conv": module(kernel=(3, 3, 1, 4), bias=(4,)),
    "fc1": module(kernel=(24, 5)),
    "fc2": module(kernel=(5, 5)),
}


def test_a_flatten_that_is_forgotten_is_refused():
    text = message(ant.StateMismatch, CNN, JAX_CNN)
    assert "fc1.weight: its 24 inputs are 6 for each of the 4 channels of conv" in text and "fc2" not in text
    assert "flattened={'fc1': (4, H, W)}" in text and "flattened={'fc1': None}" in text
    for flattened in ({"fc1": (4, 2, 3)}, {"fc1": (4, 6)}, {"fc1": None}, {"": None}):
        from_state_dict(CNN, JAX_CNN, flattened=flattened)


def test_a_flatten_is_seen_after_a_transposed_convolution():
    weights = zeros(up__weight=(3, 4, 2, 2), fc__weight=(5, 16))
    params = {"up": module(kernel=(2, 2, 3, 4)), "fc": module(kernel=(16, 5))}
    text = message(ant.StateMismatch, weights, params, transpose_kernel={"up": False})
    assert "the 4 channels of up" in text


@pytest.mark.parametrize("inputs", [4, 6, 2])
def test_no_flatten_is_seen_where_there_can_be_none(inputs):
    weights = zeros(conv__weight=(4, 1, 3, 3), fc__weight=(5, inputs))
    from_state_dict(weights, {"conv": module(kernel=(3, 3, 1, 4)), "fc": module(kernel=(inputs, 5))})


def conv_and(**linears: tuple[int, int]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A convolution with 4 channels and then Linears, each ``(out, in)``, on both sides."""
    weights = zeros(conv__weight=(4, 1, 3, 3), **{f"{name}__weight": shape for name, shape in linears.items()})
    params = {name: module(kernel=shape[::-1]) for name, shape in linears.items()}
    return weights, {"conv": module(kernel=(3, 3, 1, 4)), **params}


@pytest.mark.parametrize("outputs", [5, 24, 48])  # those of the first head say nothing of the second's inputs
def test_two_heads_on_one_flatten_must_both_be_named(outputs):
    heads = conv_and(mean=(outputs, 24), variance=(outputs, 24))
    text = message(ant.StateMismatch, *heads)
    assert "mean.weight: its 24 inputs" in text and "variance.weight: its 24 inputs" in text
    text = message(ant.StateMismatch, *heads, flattened={"mean": (4, 2, 3)})
    assert "mean.weight" not in text and "variance.weight: its 24 inputs" in text
    params, _ = from_state_dict(*heads, flattened={"mean": (4, 2, 3), "variance": (4, 2, 3)})
    assert params["variance"]["kernel"].shape == (24, outputs)
    from_state_dict(*heads, flattened={"": None})


def test_heads_may_flatten_different_sizes():
    text = message(ant.StateMismatch, *conv_and(policy=(5, 24), value=(1, 16)), flattened={"policy": (4, 2, 3)})
    assert "value.weight: its 16 inputs are 4 for each" in text


def test_a_squeeze_and_excite_block_does_not_hide_the_classifier():
    text = message(ant.StateMismatch, *conv_and(squeeze=(2, 4), excite=(4, 2), classifier=(5, 24)))
    assert "classifier.weight: its 24 inputs" in text and "squeeze" not in text and "excite" not in text


@pytest.mark.parametrize(
    "linears",
    [
        {"fc1": (16, 24), "fc2": (8, 16), "fc3": (5, 8)},  # an MLP on what is flattened
        {"fc1": (16, 24), "policy": (8, 16), "value": (1, 16)},  # with two heads
        {"fc1": (16, 24), "decode": (4, 8)},  # half of the outputs are means, half variances
        {"fc1": (16, 4), "fc2": (8, 16), "value": (1, 16), "fc3": (5, 8)},  # on means over the pixels
        {"qkv": (24, 4), "out": (4, 8), "gated": (32, 4), "down": (4, 16)},  # a transformer of patches
    ],
)
def test_what_other_linears_give_is_no_flatten(linears):
    weights, params = conv_and(**linears)
    from_state_dict(weights, params, flattened={"fc1": (4, 2, 3)} if linears.get("fc1") == (16, 24) else None)


@pytest.mark.parametrize(
    ("flattened", "expected"),
    [
        ((2, 3, 4), "flattened=(2, 3, 4) must be as torch has it, (C, H, W), and conv before it has 4 channels"),
        ((4, 2, 2), "flattened=(4, 2, 2) makes 16 inputs, and torch's (out, in) = (5, 24)"),
    ],
)
def test_a_wrong_flattened_shape_is_refused(flattened, expected):
    assert expected in message(ant.StateMismatch, CNN, JAX_CNN, flattened={"fc1": flattened})


def test_flattened_is_for_linear_layers():
    text = message(ant.StateMismatch, CNN, JAX_CNN, flattened={"conv": (2, 2), "fc1": None})
    assert "flattened is for the weight of a Linear, and this is 'kernel' of shape (4, 1, 3, 3)" in text


def test_a_norm_of_what_is_flattened_is_refused():
    weights = zeros(conv__weight=(4, 1, 3, 3), norm__weight=(24,), fc1__weight=(5, 24))
    params = {"conv": module(kernel=(3, 3, 1, 4)), "norm": module(scale=(24,)), "fc1": module(kernel=(24, 5))}
    text = message(ant.StateMismatch, weights, params, flattened={"fc1": (4, 2, 3)})
    assert "norm.weight: it seems to normalize what is flattened" in text
    from_state_dict(weights, params, flattened={"fc1": None})


def test_a_norm_of_what_a_head_gives_is_no_norm_of_what_is_flattened():
    weights, params = conv_and(policy=(24, 24))
    weights |= zeros(norm__weight=(24,), value__weight=(1, 24))
    params |= {"norm": module(scale=(24,)), "value": module(kernel=(24, 1))}
    from_state_dict(weights, params, flattened={"policy": (4, 2, 3), "value": (4, 2, 3)})


def test_a_transposed_convolution_must_be_declared_where_its_name_shows_it():
    weights, params = zeros(up__weight=(2, 2, 3, 3)), {"ConvTranspose_0": module(kernel=(3, 3, 2, 2))}
    text = message(ant.StateMismatch, weights, params, names={"up": "ConvTranspose_0"})
    assert "ConvTranspose_0 is a ConvTranspose; say with transpose_kernel={'up': False}" in text
    from_state_dict(weights, {"up": params["ConvTranspose_0"]})  # no other name shows it
    for flag in (True, False):
        from_state_dict(weights, params, names={"up": "ConvTranspose_0"}, transpose_kernel={"up": flag})


def test_transpose_kernel_must_fit():
    weights, params = zeros(up__weight=(2, 4, 3)), {"up": module(kernel=(3, 2, 4))}
    text = message(ant.StateMismatch, weights, params, transpose_kernel={"up": True})
    assert "(in, out, *spatial) = (2, 4, 3) is (*spatial, out, in) = (3, 4, 2)" in text
    assert "it would fit a ConvTranspose with transpose_kernel=False" in text
    text = message(ant.StateMismatch, weights, params)
    assert "it would fit a ConvTranspose with transpose_kernel=False" in text
    text = message(ant.StateMismatch, LINEAR, DENSE, transpose_kernel={"fc": False})
    assert "transpose_kernel is for kernels of convolutions, and this is 'kernel' of shape (3, 2)" in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"names": {"fc2": "fc"}}, "names: 'fc2' is not in the torch model; its modules: 'fc'"),
        ({"names": {"fc": "Dense_9"}}, "names['fc'] = 'Dense_9' is not in the JAX model; its modules: 'fc'"),
        ({"flattened": {"f": (1, 2)}}, "flattened: 'f' is not in the torch model; its modules: 'fc'"),
        ({"flattened": {"": (1, 2)}}, "flattened: '' is not in the torch model; its modules: 'fc'"),
        ({"transpose_kernel": {"f": True}}, "transpose_kernel: 'f' is not in the torch model; its modules: 'fc'"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(options, expected):
    assert message(ValueError, LINEAR, DENSE, **options) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"names": ["fc"]}, "names must be a mapping from paths of torch modules, got ['fc']"),
        ({"names": {1: "fc"}}, "names must be a mapping from paths of torch modules, got {1: 'fc'}"),
        ({"names": {"fc": 3}}, "names['fc'] must be a path such as 'Block_0/fc1', a tuple of keys or None, got 3"),
        ({"flattened": {"fc": 2}}, "flattened['fc'] must be what torch flattens, (channels, *spatial)"),
        ({"flattened": {"fc": (2.0, 1)}}, "or None where nothing is flattened; got (2.0, 1)"),
        ({"flattened": {"fc": (2, 0)}}, "or None where nothing is flattened; got (2, 0)"),
        ({"transpose_kernel": {"fc": 1}}, "transpose_kernel['fc'] must be what flax's ConvTranspose has there, a bool"),
    ],
)
def test_arguments_of_other_types_are_refused(options, expected):
    assert expected in message(TypeError, LINEAR, DENSE, **options)


@pytest.mark.parametrize(
    ("weights", "params", "expected"),
    [
        (torch.nn.Linear(1, 1), DENSE, "state_dict must be model.state_dict(), got Linear"),
        ({1: np.ones(2)}, DENSE, "the keys of state_dict must be names, got 1"),
        (
            {"state_dict": LINEAR},
            DENSE,
            "state_dict['state_dict'] must be a tensor, got dict; is the state_dict inside it?",
        ),
        ({"epoch": 3}, DENSE, "state_dict['epoch'] must be a tensor, got int; leave it out"),
        (LINEAR, {"fc": {"kernel": "text"}}, "params must be a pytree of arrays, and fc/kernel is str"),
        (LINEAR, np.ones(2), "params must be a pytree with names, dicts or lists, and is an array"),
    ],
)
def test_models_of_other_types_are_refused(weights, params, expected):
    assert expected in message(TypeError, weights, params)


def test_shapes_are_no_values_to_give_to_torch():
    shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    with pytest.raises(TypeError, match=re.escape("to_state_dict: fc/kernel must be an array, and is only a shape")):
        to_state_dict({"fc": {"kernel": shape}}, like=zeros(fc__weight=(3, 2)))


def test_weights_that_are_tied_in_torch_must_be_equal_in_jax():
    weight = torch.zeros(2, 2)
    like = {"a.weight": weight, "b.weight": weight.detach()}
    params = {"a": {"embedding": np.eye(2)}, "b": {"kernel": np.eye(2)}}
    assert torch.equal(to_state_dict(params, like=like)["b.weight"], torch.eye(2))
    params["b"]["kernel"] = np.ones((2, 2))
    with pytest.raises(ant.StateMismatch, match="a.weight and b.weight share their memory in torch, and differ in JAX"):
        to_state_dict(params, like=like)


@pytest.mark.parametrize("names", [None, {"b": None}])
def test_of_weights_that_are_tied_in_torch_all_get_the_value(names):
    weight = torch.zeros(2, 2)
    like = {"b.weight": weight.detach(), "a.weight": weight}
    back = to_state_dict({"a": {"embedding": np.eye(2)}}, like=like, names=names)
    assert list(back) == ["b.weight", "a.weight"] and all(torch.equal(value, torch.eye(2)) for value in back.values())


def test_of_many_modules_a_message_lists_the_first():
    weights = zeros(**{f"fc{number:02}__weight": (2, 2) for number in range(25)})
    text = message(ValueError, weights, DENSE, names={"x": "fc"})
    assert text.endswith("'fc18', 'fc19', and 5 more")
