"""Save and restore states."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from ant_jax._engine.state_spec import StateSpec
from ant_jax._hooks.callback_list import CallbackList
from ant_jax._models.pure_model import PureModel
from ant_jax._state.train_state import TrainState


if TYPE_CHECKING:  # Orbax takes long to import
    from ant_jax._checkpoint.checkpointer import Checkpointer


class Saving:
    """The methods of a trainer that save and restore."""

    _events: CallbackList
    _states: StateSpec
    _model: PureModel

    def checkpointer(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int | None = None,
        keep_best: int = 0,
        mode: Literal["min", "max"] | None = None,
        allow_nonfinite: bool = False,
    ) -> Checkpointer:
        """Open a directory to save states into, in the background; for loops of your own, and for callbacks.

        Args:
            directory: where to; it is made. It is locked until the checkpointer is closed or the process ends.
            keep: how many of the newest checkpoints to keep; ``None``: all.
            keep_best: how many of the best to keep beside them.
            mode: whether a smaller (``"min"``) or a larger (``"max"``) metric is better; ``None``: no metrics.
            allow_nonfinite: whether to save parameters that are NaN or infinite, too, which is refused otherwise.

        Returns:
            A context manager with ``save(state, metric=None)``, ``poll()``, ``wait()``, ``close()``, ``steps``,
            ``latest_step`` and ``best_step``.

        Raises:
            NotADirectoryError: ``directory``, or what it is in, is a file.
            OSError: it cannot be written to.
            CheckpointError: something else is saving into it; the message says which process.
        """
        from ant_jax._checkpoint.checkpointer import Checkpointer

        return Checkpointer(
            directory,
            self._events.device_names,
            keep=keep,
            keep_best=keep_best,
            mode=mode,
            allow_nonfinite=allow_nonfinite,
        )

    def save(self, directory: str | os.PathLike[str], state: TrainState, *, allow_nonfinite: bool = False) -> None:
        """Save a state; it is on disk when this returns.

        Args:
            directory: which keeps all that is saved into it, each state under its step.
            state: to save.
            allow_nonfinite: whether to save parameters that are NaN or infinite, too.

        Raises:
            StateMismatch: the state is not one of this trainer's.
            TypeError: a callback's memory cannot be saved.
            FileExistsError: the directory has a checkpoint of that step, or of a later one.
            CheckpointError: it could not be written, or a run is saving into the directory.
            NonFiniteError: the parameters are not finite.
        """
        self._states.check(state)
        with self.checkpointer(directory, allow_nonfinite=allow_nonfinite) as checkpointer:
            checkpointer.save(state)

    def restore(
        self,
        directory: str | os.PathLike[str],
        step: int | None = None,
        *,
        like: TrainState | None = None,
        fall_back: bool = False,
    ) -> TrainState:
        """Restore a state; ``fit`` goes on from it, bit for bit.

        All that is read is compared with its checksums, so a damaged checkpoint never gives a wrong number.

        Args:
            directory: that was saved into.
            step: of the state; ``None``: the newest there is.
            like: a state of this trainer, for parameters in containers other than dict, list and tuple, which a file
                cannot describe (Equinox modules, flax.struct dataclasses). Arrays of it that are committed to devices
                also say where the restored ones go. Without it, whether the parameters are the model's is known only
                when it first sees a batch.
            fall_back: whether to take the newest sound checkpoint where the newest is damaged; damaged ones are renamed
                to ``step_<N>.corrupt``, with a warning. Not together with ``step``.

        Returns:
            The state as it was saved. A callback that the checkpoint does not know starts afresh, and one that this
            trainer does not have is left out; both are named in a warning (logger ``ant_jax``). A hyper-parameter that
            the code has changed since the run began is as it is in the code, which a warning says, too.

        Raises:
            FileNotFoundError: there is no such checkpoint; the message says which there are.
            CheckpointCorrupt: it is damaged, or with ``fall_back`` all are.
            StateMismatch: the checkpoint does not fit this trainer; the message names every leaf that differs.
        """
        from ant_jax._checkpoint.reading import read
        from ant_jax._checkpoint.resume import find_newest_sound, restore_state

        if fall_back and step is not None:
            raise ValueError(f"restore: fall_back=True chooses the step; it cannot be step={step!r} at the same time")
        saved = find_newest_sound(directory) if fall_back else read(directory, step)
        return restore_state(saved, self._states, like)

    def restore_params(
        self,
        directory: str | os.PathLike[str],
        state: TrainState,
        step: int | None = None,
        *,
        only: Sequence[str] = ("*",),
        source: str | None = None,
        model_state: bool = False,
        cast: bool = False,
    ) -> TrainState:
        """Take over parameters of another run, to train on from them: the rest of the state stays as it is.

        Args:
            directory: a directory of checkpoints that ``ant_jax`` saved, or any that Orbax wrote: a checkpoint of a
                tree, or a ``CheckpointManager``'s directory of steps.
            state: of this trainer, usually a fresh one.
            step: of the checkpoint; ``None``: the newest.
            only: patterns of the parameters to take over, as ``"encoder/*"``; all that match must be in the checkpoint.
            source: where in the checkpoint the parameters are, as ``"model/params"``; ``None``: under ``params``, or at
                the root if there is no such entry.
            model_state: whether to take over the model state, too (such as batch statistics), which is looked for under
                ``model_state``, or beside the parameters.
            cast: whether parameters of another dtype are converted, rather than refused.

        Returns:
            The state with these parameters.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            CheckpointCorrupt: it is damaged.
            StateMismatch: a parameter is missing, or of another shape or dtype; the message names each.
            ValueError: a pattern matches no parameter of the state.
        """
        from ant_jax._checkpoint.resume import with_params_of

        self._states.check(state)
        if isinstance(only, str):
            raise TypeError(f"restore_params: only must be a sequence of patterns; write only=[{only!r}]")
        return with_params_of(
            state, directory, step, only=tuple(only), source=source, model_state=model_state, cast=cast
        )
