"""What is encoded for JSON comes back as it was, to the bit, or is refused."""

import json
import math
import struct
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ant_jax._state.encoding import decode, encode


def through_json(value: Any) -> Any:
    return decode(json.loads(json.dumps(encode(value, "it"), allow_nan=False)))


VALUES = [
    None, True, False, b"", b"a\xff", 0, -1, 2**63, -(2**70), 10**5000, "", "é", "\ud800", [], (), {}, [1, [2, (3,)]],
    {"a": 1, 2: "b", None: 3, (4, "c"): {}, 1.5: []}, {"tuple": [1], "dict": 2, "array": "x", "int": "0x1"}, 1 - 2j,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_plain_values(value):
    got = through_json(value)
    assert got == value
    assert type(got) is type(value)


NANS = [struct.unpack(">d", bytes.fromhex(bits))[0] for bits in ("7ff8000000000001", "fff8000000000000")]


@pytest.mark.parametrize("value", [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, *NANS])
def test_floats_to_the_bit(value):
    assert struct.pack(">d", through_json(value)) == struct.pack(">d", value)
    assert struct.pack(">d", through_json(complex(0.5, value)).imag) == struct.pack(">d", value)


ARRAYS: list[Any] = [
    np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.zeros((0, 3), np.int8),
    np.array(2, np.uint16), np.arange(3, dtype=">f4"), np.array(["ab", "c"]), np.array(["2026-01-02"], "M8[D]"),
    np.array([1 + 2j]), np.array([1.5], ml_dtypes.bfloat16), jnp.ones(2, jnp.float8_e4m3fn), jnp.ones(3, jnp.int4),
    jnp.float32(0.1), np.float32(0.1), np.float64(0.1), np.int64(3), np.bool_(True), ml_dtypes.bfloat16(1.5),
]  # fmt: skip


@pytest.mark.parametrize("value", ARRAYS, ids=lambda value: f"{type(value).__name__}-{value.dtype}")
def test_arrays_and_their_kinds(value):
    got = through_json(value)
    assert type(got) is type(value)
    assert (got.dtype, got.shape) == (value.dtype, value.shape)
    assert np.asarray(got).tobytes() == np.asarray(value).tobytes()


def test_numbers_of_numpy_stay_keys_and_arrays_stay_writable():
    got = through_json({np.int64(3): np.zeros(2)})
    got[np.int64(3)][0] = 1.0
    assert got[3].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_random_keys(impl):
    key = jax.random.split(jax.random.key(3, impl=impl), 2)
    got = through_json(key)
    assert got.dtype == key.dtype
    assert (jax.random.key_data(got) == jax.random.key_data(key)).all()


REFUSED: dict[str, Any] = {
    "function": print,
    "set": {1},
    "a number of another type": type("Count", (int,), {})(1),
    "Python objects": np.array([object()]),
    "records": np.zeros(2, [("a", "i4")]),
    "masked": np.ma.masked_array([1.0], [True]),
}


@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED)
def test_what_would_not_come_back_is_refused_by_its_place(value):
    with pytest.raises(TypeError, match=r"the memory\['a'\]\[1\] is .* which cannot be saved"):
        encode({"a": [0, value]}, "the memory")


def test_a_key_that_cannot_be_saved_is_refused_by_its_place():
    with pytest.raises(TypeError, match=r"a key of the memory\['a'\] is frozenset"):
        encode({"a": {frozenset(): 1}}, "the memory")
