"""Prove that a run which is killed anywhere goes on bit for bit."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable
from typing import Any

from ant_jax._data.epoch_batches import Loaders
from ant_jax._hooks.callback import Callback
from ant_jax._state.train_state import TrainState
from ant_jax._trainer.trainer import Trainer
from ant_jax.testing._compare import difference


class ResumeFault(AssertionError):
    """A run that goes on ends otherwise than one that was not interrupted; the message names step and leaf."""


def check_resume(
    trainer: Trainer,
    train_loader: Any,
    num_epochs: int = 2,
    val_loader: Any = None,
    *,
    state: TrainState | None = None,
    steps: Iterable[int] | None = None,
    steps_per_epoch: int | None = None,
) -> None:
    """Check that a run ends with the same bits wherever it is cut, saved, restored and gone on with.

    Trains once without a cut, saving at every step; then restores each of these checkpoints, goes on to the end, and
    compares parameters, optimizer, key, the memories of all callbacks, and the history. So it costs about half as many
    runs as there are steps: give it few.

    Args:
        trainer: whose callbacks must not save into a directory themselves: leave ``checkpoint`` out.
        train_loader: as for ``fit``; it is read many times.
        num_epochs: as for ``fit``.
        val_loader: as for ``fit``.
        state: to begin with; ``None``: ``trainer.init`` on the first batch.
        steps: where to cut; ``None``: after every step.
        steps_per_epoch: as for ``fit``.

    Raises:
        ResumeFault: a run that went on ended otherwise; the message names the first step, and the first leaf.
        ValueError: the run has no such step.

    >>> from ant_jax import testing
    >>> tiny = testing.problem()
    >>> check_resume(tiny.trainer, tiny.train_loader, val_loader=tiny.val_loader, steps=[3, 5, 8])
    """
    if state is None:
        state = trainer.init(next(iter(train_loader)))
    with tempfile.TemporaryDirectory() as directory:
        with trainer.checkpointer(directory, allow_nonfinite=True) as checkpointer:
            probing = dataclasses.replace(trainer, callbacks=(*trainer.callbacks, _probe(checkpointer)))
            whole, _ = probing.fit(state, train_loader, num_epochs, val_loader, steps_per_epoch=steps_per_epoch)
            saved = checkpointer.steps
        for step in saved if steps is None else steps:
            if step not in saved:
                raise ValueError(f"check_resume: the run has no step {step!r}; its steps are {saved[0]} to {saved[-1]}")
            restored = trainer.restore(directory, step, like=state)
            place = f"step {step} (epoch {restored.epoch}, batch {restored.batch_idx})"
            loop, resources = trainer._loop(restored, num_epochs, Loaders(train_loader, val_loader, steps_per_epoch))
            with resources:
                end = loop.run()
            differs = difference(whole, end)
            if differs:
                raise ResumeFault(
                    f"a run that goes on from {place} ends otherwise than one that was not interrupted: {differs}. "
                    f"What a callback must remember belongs in state.callback_states, and a loader must give the same "
                    f"batches every time it is read"
                )


def _probe(checkpointer: Any) -> Callback:
    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        del batch_idx, trainer
        return state, logs

    def on_checkpoint(trainer: Any, state: Any, logs: Any) -> Any:
        del trainer
        if state.total_steps != checkpointer.latest_step:
            checkpointer.save(state)
        return state, logs

    return Callback(name="check_resume", on_batch_end=on_batch_end, on_checkpoint=on_checkpoint)
