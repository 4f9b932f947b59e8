"""How Orbax stores a checkpoint: its manager, what it keeps, and the manifest beside the arrays."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import future

from ant_jax._checkpoint.manifest import read_manifest, write_manifest
from ant_jax._checkpoint.snapshot import Path
from ant_jax._finite import NonFiniteError, first_nonfinite


# How long checksums wait for a save to return. It takes milliseconds; who waits longer loses nothing but a little time.
HAND_OVER_SECONDS = 1.0


# The fields of a state where neither a NaN nor an infinity may be; an optimizer may well start from an infinity.
_FINITE = ("params", "model_state", "accumulator")


class _Manager(ocp.CheckpointManager):
    """Does not ask JAX for its preemption notice: the loop does, and its count must be the only one that JAX sees."""

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


class _Retention:
    """Orbax's ``PreservationPolicy``: which steps stay is ours to say, for Orbax ranks what is not finite anywhere."""

    def __init__(self, kept: Any):
        self._kept = kept

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        kept = self._kept([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


class _SealHandler(ocp.AsyncCheckpointHandler):
    """Writes the ``host`` item; checksums are computed in Orbax's background thread."""

    async def async_save(self, directory: Any, args: _SealArgs) -> list[Any]:
        write = self._write(directory, args)
        return [future.CommitFutureAwaitingContractedSignals(write, name="ant_jax_seal")]

    def save(self, directory: Any, args: _SealArgs) -> None:
        asyncio.run(self._write(directory, args))

    def restore(self, directory: Any, args: Any = None) -> dict[str, Any]:
        del args
        return read_manifest((directory / "metadata").read_text())

    async def _write(self, directory: Any, args: _SealArgs) -> None:
        # Not while the training thread still hands the state over: checksums would take the processor from it.
        args.handed_over.wait(HAND_OVER_SECONDS)
        arrays = {keys: np.asarray(leaf) for keys, leaf in args.arrays.items()}
        if not args.allow_nonfinite:
            _refuse_nonfinite(arrays, args.step)
        (directory / "metadata").write_text(write_manifest(args.host, arrays))


@ocp.args.register_with_handler(_SealHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _SealArgs(ocp.args.CheckpointArgs):
    step: int
    host: Mapping[str, Any]
    arrays: Mapping[Path, Any]
    allow_nonfinite: bool
    handed_over: threading.Event


def _refuse_nonfinite(arrays: Mapping[Path, np.ndarray], step: int) -> None:
    parts = {"/".join(keys): leaf for keys, leaf in arrays.items() if keys[0] in _FINITE}
    optimizer = {"/".join(keys): leaf for keys, leaf in arrays.items() if keys[0] == "opt_state"}
    bad = first_nonfinite(parts) or first_nonfinite(optimizer, infinities=False)
    if bad is not None:
        raise NonFiniteError(
            f"the state of step {step} was not saved: {bad} is not finite. skip_nonfinite, roll_back and "
            f"terminate_on_nan keep such numbers out; allow_nonfinite=True saves them"
        )
