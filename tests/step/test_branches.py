"""Parts of compiled code that run, or do not, as a traced condition says."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax._logs.logs import Logs
from ant_jax._logs.packing import entries_of, pack
from ant_jax._step.branches import run_if


TREE = {"a": jnp.float32(1), "b": jnp.arange(3)}


def branch(due: bool, function: Any, logs: Any) -> tuple[Any, dict[str, Any], dict[str, bool]]:
    """What compiled code gets: the tree, the logs, and which are present."""

    @jax.jit
    def compiled(due: Any, tree: Any, values: Any) -> Any:
        given = Logs(values)
        tree, after = run_if(due, lambda: function(tree, given), tree, given)
        assert isinstance(after, Logs)
        return tree, dict(after), dict(after.present)

    tree, values, present = jax.tree.map(np.asarray, compiled(due, TREE, logs))
    return tree, values, {name: bool(there) for name, there in present.items()}


@pytest.mark.parametrize("due", [True, False])
def test_it_runs_where_it_is_due_and_leaves_all_as_it_was_where_not(due):
    def function(tree: Any, logs: Any) -> Any:
        return {**tree, "a": tree["a"] + 1}, {**logs, "float": 2 * tree["a"], "int": jnp.int32(7), "loss": logs["loss"]}

    tree, logs, present = branch(due, function, {"loss": jnp.float32(5)})
    assert tree["a"] == (2 if due else 1) and tree["b"].tolist() == [0, 1, 2]
    assert present == {"float": due, "int": due}  # what was there before is there always
    assert logs["loss"] == 5
    if due:
        assert logs["float"] == 2 and logs["int"] == 7
    else:
        assert np.isnan(logs["float"]) and logs["int"] == 0  # an integer cannot be NaN


@pytest.mark.parametrize("due", [True, False])
def test_any_kind_of_number_may_be_published(due):
    def function(tree: Any, logs: Any) -> Any:
        numbers = {"i": 1, "f": 0.5, "b": True, "bf": jnp.bfloat16(2), "v": jnp.ones(3), "n": np.float32(3)}
        return tree, {**logs, **numbers}

    _, logs, present = branch(due, function, {})
    assert set(present.values()) == {due} and len(present) == 6
    assert logs["v"].shape == (3,) and logs["b"].dtype == bool and logs["bf"].dtype == jnp.bfloat16
    expected = [1, 0.5, True, 3] if due else [0, np.nan, False, np.nan]
    np.testing.assert_array_equal([logs["i"], logs["f"], logs["b"], logs["n"]], expected)


@pytest.mark.parametrize("due", [True, False])
def test_a_log_that_was_there_keeps_its_value_and_its_presence(due):
    def function(tree: Any, logs: Any) -> Any:
        return tree, {**logs, "loss": logs["loss"] * 2, "count": 2.5}  # an int until then

    _, logs, present = branch(due, function, {"loss": jnp.float32(5), "count": 1})
    assert logs["loss"] == (10 if due else 5) and logs["count"] == (2.5 if due else 1)
    assert present == {}  # what is always there needs no condition


@pytest.mark.parametrize(("outer", "inner"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_branch_in_a_branch_publishes_where_both_are_due(outer, inner):
    def nested(tree: Any, logs: Any) -> Any:
        return run_if(jnp.bool_(inner), lambda: (tree, {**logs, "x": tree["a"]}), tree, logs)

    def again(tree: Any, logs: Any) -> Any:
        tree, logs = nested(tree, logs)
        return tree, logs.changed_to({**logs, "y": tree["a"]})

    _, logs, present = branch(outer, again, {})
    assert present == {"x": outer and inner, "y": outer}
    assert np.isnan(logs["x"]) != (outer and inner)


def test_what_one_branch_leaves_out_another_may_publish():
    @jax.jit
    def compiled(first: Any, second: Any) -> Any:
        tree, logs = {}, Logs({})
        for due, value in ((first, 1.0), (second, 2.0)):
            given = logs
            tree, logs = run_if(due, lambda: (tree, {**given, "x": jnp.float32(value)}), tree, given)  # noqa: B023
        return logs["x"], logs.present["x"]

    for first, second, expected in ((0, 0, None), (1, 0, 1), (0, 1, 2), (1, 1, 2)):
        value, present = compiled(bool(first), bool(second))
        assert bool(present) == (expected is not None)
        assert expected is None or value == expected


@pytest.mark.parametrize("due", [True, False])
def test_entries_of_a_vector_are_logs_as_any_and_stay_one_vector(due):
    vector = jnp.arange(3.0)
    names = ("b", "c", "d")

    @jax.jit
    def compiled(due: Any, tree: Any) -> Any:
        given = Logs({"loss": tree["a"]})

        def function() -> Any:
            return tree, Logs({**given, **entries_of({names: vector})}, vectors={names: vector})

        _, logs = run_if(due, function, tree, given)
        assert list(logs.vectors) == [names] and all(logs.present[name] is due for name in names)
        changed = logs.changed_to({**logs, "c": logs["loss"]})
        assert not changed.vectors and changed.present.keys() == {"b", "d"}
        return dict(logs), pack(logs, vectors=logs.vectors), pack(logs)

    logs, packed, of_scalars = compiled(due, TREE)
    expected = [1, 0, 1, 2] if due else [1, np.nan, np.nan, np.nan]
    np.testing.assert_array_equal([logs[name] for name in ("loss", *names)], expected)
    np.testing.assert_array_equal(packed.scalars, expected)
    assert packed.names == of_scalars.names == ("loss", *names)
    np.testing.assert_array_equal(packed.scalars, of_scalars.scalars)


def test_a_log_between_the_entries_of_a_vector_keeps_its_place():
    names = ("b", "d")
    logs = {"loss": jnp.float32(9), "c": jnp.float32(7), **entries_of({names: jnp.arange(2.0)})}
    packed = pack(logs, vectors={names: jnp.arange(2.0)})
    assert dict(zip(packed.names, packed.scalars.tolist(), strict=True)) == {"loss": 9, "b": 0, "c": 7, "d": 1}


def test_what_it_does_not_touch_comes_out_as_the_same_object():
    """So a hook that cannot stop the run, left out at times, does not make the host ask whether it has."""

    @jax.jit
    def compiled(due: Any, tree: Any) -> Any:
        after, _ = run_if(due, lambda: ({**tree, "a": tree["a"] + 1}, Logs({})), tree, Logs({}))
        assert after["b"] is tree["b"] and after["a"] is not tree["a"]
        return after

    compiled(True, TREE)
