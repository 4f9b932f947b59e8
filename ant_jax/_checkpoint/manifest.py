"""Checksums: a checkpoint whose bits have changed is told from one that is sound."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message says why, where, and which one is the last good one."""


class CheckpointCorrupt(CheckpointError):
    """A checkpoint is damaged: what is read is not what was written. The message names the step, and what is damaged.

    Attributes:
        step: whose checkpoint it is.
        reason: what is damaged, in words.
    """

    def __init__(self, directory: Any, step: int, reason: str, sound: str = ""):
        super().__init__(f"the checkpoint of step {step} in {directory} is damaged: {reason}{sound}")
        self.step, self.reason = step, reason


class Damage(ValueError):
    """What was read is not what was written; becomes a ``CheckpointCorrupt`` where the step is known."""


def checksum_of(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes.

    >>> checksum_of(np.zeros(3, np.float32)) == checksum_of(np.zeros(3, np.float32).copy())
    True
    """
    # As bytes: of dtypes such as bfloat16 zlib knows nothing.
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def write_manifest(host: Mapping[str, Any], arrays: Mapping[tuple[str, ...], np.ndarray]) -> str:
    """Write what only the host knows as JSON, with the form and the checksum of every array, and its own checksum.

    Args:
        host: JSON.
        arrays: by their paths.
    """
    rows = [[list(keys), leaf.dtype.name, list(leaf.shape), checksum_of(leaf)] for keys, leaf in arrays.items()]
    content = {**host, "arrays": rows}
    return _text({**content, "crc32": zlib.crc32(_text(content).encode())})


def read_manifest(text: str) -> dict[str, Any]:
    """Read back what ``write_manifest`` wrote.

    Raises:
        Damage: it is something else.
    """
    try:
        content = json.loads(text)
        crc32 = content.pop("crc32")
    except Exception as error:  # not JSON, or not a mapping
        raise Damage(f"its description cannot be read ({error!r:.200})") from error
    if crc32 != zlib.crc32(_text(content).encode()):
        raise Damage("its description is not as it was written")
    return content


def verify(arrays: Mapping[tuple[str, ...], np.ndarray], rows: list[list[Any]]) -> None:
    """Compare arrays with the rows of ``write_manifest``.

    Raises:
        Damage: one is missing, or is not what was written.
    """
    for keys, dtype, shape, crc32 in rows:
        name, leaf = "/".join(keys), arrays.get(tuple(keys))
        if leaf is None:
            raise Damage(f"{name} is missing")
        if leaf.dtype != jnp.dtype(dtype) or list(leaf.shape) != shape or checksum_of(leaf) != crc32:
            raise Damage(f"{name} is not as it was written (its checksum differs)")


def _text(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
