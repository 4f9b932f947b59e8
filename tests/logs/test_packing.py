"""Logs in few arrays, and out of them again."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax._logs import packing as _packing
from ant_jax._logs.logs import Logs, join_logs
from ant_jax._logs.packing import FEW, GROUP, pack, unpack
from ant_jax._state.history import History


SOMETIMES = "there", "lacking", "vector", "number"


def some(count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """So many logs, the last four of which not every batch has, and the weights of these."""
    logs = {f"log{i}": jnp.float32(i) for i in range(count - len(SOMETIMES) - 1)} | {"loss": jnp.float32(-1)}
    logs |= {"there": jnp.float32(5), "lacking": jnp.float32(6), "vector": jnp.ones(2), "number": jnp.int32(7)}
    weights = {name: jnp.int32(8 if name == "there" else 0) for name in SOMETIMES}
    return logs, weights


def equal(got: Any, expected: Any) -> bool:
    return got.keys() == expected.keys() and all(np.array_equal(got[k], expected[k], equal_nan=True) for k in got)


@pytest.mark.parametrize("row", [None, 1])
@pytest.mark.parametrize("count", [10, FEW + 20])
def test_what_a_batch_lacks_is_nan_among_few_logs_and_among_many(count, row):
    assert GROUP < FEW + 20
    logs, weights = some(count)
    packed = jax.jit(lambda: pack(logs, weights, SOMETIMES))()
    few = packed.few()
    if row is not None:
        packed = jax.tree.map(lambda leaf: jnp.stack([jnp.full_like(leaf, 9), leaf]), packed)
    expected = logs | {"batch_size": 8, "lacking": np.float32(np.nan), "vector": np.full(2, np.nan), "number": 0}
    got = unpack(few, packed, row, {"batch_size": 8})
    assert len(got) == len(expected) and all(name in got for name in expected) and "other" not in got
    assert equal(got.on_host(), expected)
    with jax.debug_nans(True):
        assert equal({name: np.asarray(value) for name, value in got.items()}, expected)
    assert equal(got.on_host(), expected)  # now of what has been read


def test_many_logs_are_joined_renamed_and_kept_in_a_history_without_being_read(monkeypatch):
    logs, _ = some(FEW + 20)
    packed = jax.jit(pack)(logs)
    with monkeypatch.context() as patched:
        patched.setattr(_packing, "_entry", None)  # what takes a log out of the packed ones
        renamed = unpack(packed.few(), packed).selected({f"train_{name}": name for name in logs})
        closing = Logs(join_logs({"opening": 1}, renamed, Logs(Logs({"train_log3": 2}))))
        history = History().appended(closing)
        epoch = history[0]
    expected = {"opening": 1} | {f"train_{name}": value for name, value in logs.items()} | {"train_log3": 2}
    assert list(epoch) == list(closing) == list(expected)
    assert equal(epoch, expected) and equal(closing, expected)
    assert isinstance(epoch["train_log20"], float)
