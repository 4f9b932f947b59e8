"""The history reads late, prints well, and draws."""

import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import History


def test_it_is_a_sequence_of_plain_logs():
    history = History([{"train_loss": jnp.float32(0.5), "v": jnp.arange(2)}]).appended({"train_loss": 0.25})
    assert history[-1] == {"train_loss": 0.25}
    assert type(history[0]["train_loss"]) is float
    np.testing.assert_array_equal(history[0]["v"], [0, 1])
    assert len(history[:1]) == 1 and isinstance(history[:1], History)
    assert [logs["train_loss"] for logs in history] == [0.5, 0.25]


def test_equality_is_by_value_and_nan_equals_nan():
    assert History([{"a": jnp.float32(jnp.nan)}]) == History([{"a": float("nan")}])
    assert History([{"a": 1}]) != History([{"b": 1}])
    assert History([{"a": 1}]) != History([{"a": 2}])
    assert History() != 3
    assert hash(History([{"a": 1}])) == hash(History([{"a": 1}]))


def test_no_one_can_change_it():
    history = History([{"a": 1}])
    history[0]["a"] = 2
    assert history[0] == {"a": 1}
    assert len(history) == 1 and len(history.appended({"a": 2})) == 2


def test_plot():
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("agg")
    history = History([{"a": 1.0, "b": 2.0, "v": np.zeros(3)}, {"a": 0.5, "b": 1.0, "v": np.zeros(3)}])
    ax = history.plot()
    assert [line.get_label() for line in ax.lines] == ["a", "b"]
    history.plot("a", ax=ax)
    assert len(ax.lines) == 3
    with pytest.raises(KeyError, match="no scalar named 'c'; there are a, b"):
        history.plot("c")
    pyplot.close("all")


def test_any_name_can_be_drawn():
    from matplotlib.figure import Figure

    names = ["$", "a$b$", "$\\frac$", "\n", "", "_"]
    figure = Figure()
    History([dict.fromkeys(names, 1.0)]).plot(ax=figure.subplots())
    figure.draw_without_rendering()


def test_repr_of_arrays_and_of_nothing():
    assert repr(History()) == "epoch"
    assert repr(History([{"v": np.zeros(3)}])) == "epoch           v\n    0  float64[3]"


def test_an_array_that_a_hook_uses_again_is_kept_as_it_was():
    array = np.zeros(2)
    history = History().appended({"array": array})
    array[:] = 1
    assert history.appended({"array": array}).to_dict()["array"][0].tolist() == [0, 0]
