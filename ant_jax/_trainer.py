"""The trainer: what a user holds."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from ant_jax._beginning import Beginning
from ant_jax._callback import Callback, checked
from ant_jax._engine import Fuse, Programs
from ant_jax._events import Events
from ant_jax._feed import Loaders
from ant_jax._finite import NonFiniteError
from ant_jax._history import History, to_python
from ant_jax._loop import Loop, evaluate, refuse_other_data
from ant_jax._models import PureModel, applied, initialized, pure_functions
from ant_jax._precision import Precision, precision_of
from ant_jax._resources import Resources
from ant_jax._run import Costs, Run
from ant_jax._state import TrainState, key_of_cycle, refuse_mismatch, strong
from ant_jax._step import STEP_LOGS, LossFn, Step, criterion_loss, general_loss
from ant_jax._summary import summary_of_trainer
from ant_jax._trees import PyTree, describe_tree
from ant_jax.callbacks import progress_bar
from ant_jax.callbacks._printing import print_beside_bars
from ant_jax.data import (
    ArrayLoader,
    canonical,
    inputs_of,
    length_of,
    refuse_arrays,
    refuse_empty,
    refuse_endless,
    refuse_no_iterable,
    refuse_read_once,
)


if TYPE_CHECKING:  # Orbax takes long to import
    from ant_jax._checkpoint import Checkpointer

_logger = logging.getLogger("ant_jax")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trainer:
    """Trains a model: an immutable :class:`TrainState` goes in and comes out.

    A trainer never changes. Threads may share one, and a hook may call ``fit`` of its own; what callbacks write, a run
    at the same time writes elsewhere. It can be copied and, where its parts can be, pickled; what is compiled stays
    behind.

    Args:
        model: a ``flax.linen.Module``, a ``flax.nnx.Module``, or a pair of pure functions ``(init, apply)``; see
            :func:`pure_functions`, which also says how a module is told that it trains.
        optimizer: any optax gradient transformation. Its schedules count updates, not batches. Of ``value``, ``grad``,
            ``value_fn``, ``grad_fn`` and ``obj_fn`` it is given those that its ``update`` takes: the loss that the
            update is to lower, its gradient, and both as functions of the parameters, which an accumulation window of
            several batches does not have.
        criterion: ``criterion(outputs, targets)`` returns the loss of every example, or their mean. Batches are pairs
            ``(inputs, targets)``.
        loss_fn: instead of a criterion, any function
            ``loss_fn(params, model_state, batch, key) -> (loss, (model_state, logs))``; ``loss`` is the mean over the
            batch, ``logs`` a mapping of metrics, and ``key`` is ``None`` in evaluation. Means over an epoch weigh a
            batch by the length of the first axis that all its leaves share; by 1, when they share none.
        metrics: ``{name: metric(outputs, targets)}``, each of one value an example, or their mean.
        callbacks: in the order in which their hooks run.
        gradient_accumulation_steps: batches whose gradients make one update.
        accumulation_mean: ``"examples"``: the update gets the mean gradient over the window's examples, also when the
            epoch ends inside a window. ``"steps"``: the sum of the batches' mean gradients over
            ``gradient_accumulation_steps``, however many there were, which is what torch trainers that divide the loss
            do; it makes the last window's update of an epoch too small.
        max_grad_norm: clip the gradient to this global norm, after ``on_before_update`` and before the optimizer.
        precision: of the model's arithmetic: ``"float32"``, ``"bfloat16"``, ``"float16"`` with a dynamic loss scale
            (then the logs have ``step_skipped`` and ``loss_scale``), or a :class:`Precision`. Parameters, losses and
            gradients are float32.
            With a ``loss_fn`` only the parameters that it is given are in that precision: cast floating-point inputs
            where the model is applied, or it computes with them in float32, which a warning says where all of it does,
            and what it returns to float32, before the loss.
        fuse: whether many steps run in one launch; ``"auto"``: yes, except for convolutions on a CPU, which XLA runs
            slowly inside loops.
        check_batches: whether to look at the numbers of every batch before it is used, and to refuse those that are not
            finite, and labels outside of the model's classes (integer targets, one for each vector of outputs). XLA
            would compute on with them. It costs a pass over the data on the host.
        progress_bar: whether to show one; see :func:`ant_jax.callbacks.progress_bar`.

    Attributes:
        resources: for host hooks: what callbacks have open for the ``fit`` or the ``evaluate`` that is running, which
            closes them when it ends; see :class:`ant_jax._resources.Resources`.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range, a name used twice or a reserved one.

    >>> from flax import linen as nn
    >>> criterion = optax.softmax_cross_entropy_with_integer_labels
    >>> trainer = Trainer(nn.Dense(3), optax.sgd(0.1), criterion, progress_bar=False)
    >>> batch = (jnp.ones((4, 2)), jnp.array([0, 1, 2, 0]))
    >>> state = trainer.init(batch)
    >>> state, history = trainer.fit(state, [batch], num_epochs=2)
    >>> history[1]["train_loss"] < history[0]["train_loss"]
    True
    """

    model: Any
    optimizer: optax.GradientTransformation
    criterion: Callable[[Any, Any], Any] | None = None
    _: dataclasses.KW_ONLY
    loss_fn: LossFn | None = None
    metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None
    callbacks: Sequence[Callback] = ()
    gradient_accumulation_steps: int = 1
    accumulation_mean: Literal["examples", "steps"] = "examples"
    max_grad_norm: float | None = None
    precision: Precision | Literal["float32", "bfloat16", "float16"] = "float32"
    fuse: Fuse = "auto"
    check_batches: bool = False
    progress_bar: bool = True

    resources: Resources = dataclasses.field(init=False, repr=False)
    _model: PureModel = dataclasses.field(init=False, repr=False)
    _step: Step = dataclasses.field(init=False, repr=False)
    _events: Events = dataclasses.field(init=False, repr=False)
    _programs: Programs = dataclasses.field(init=False, repr=False)
    _states: Beginning = dataclasses.field(init=False, repr=False)
    _outputs: Callable[..., Any] = dataclasses.field(init=False, repr=False)
    _gradients: Callable[..., Any] = dataclasses.field(init=False, repr=False)
    _run: Run | None = dataclasses.field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        _check_arguments(self)
        callbacks = checked(self.callbacks)
        if self.progress_bar and not any(callback.name == "progress_bar" for callback in callbacks):
            callbacks += (progress_bar(),)
        events = Events(callbacks, self)
        model, precision = pure_functions(self.model), precision_of(self.precision)
        if self.criterion is not None:
            loss_fn = criterion_loss(model, self.criterion, self.metrics or {}, precision)
        else:
            loss_fn = general_loss(cast(LossFn, self.loss_fn), precision)
        step = Step(
            loss_fn=loss_fn,
            optimizer=self.optimizer,
            events=events,
            accumulation_steps=self.gradient_accumulation_steps,
            accumulation_mean=self.accumulation_mean,
            max_grad_norm=self.max_grad_norm,
            needs_pairs=self.criterion is not None,
            precision=precision,
        )

        def outputs(params: Any, model_state: Any, inputs: Any) -> Any:
            cast = precision.cast_to_compute
            result, _ = applied(model, cast(params), model_state, cast(inputs), None)
            return precision.cast_to_output(result)

        def gradients(state: TrainState, batch: Any) -> tuple[PyTree, dict[str, Any]]:
            _, grads, logs, _ = step.gradients(state.replace(key=key_of_cycle(state.key, state.cycle)), batch)
            return grads, logs

        states = Beginning(self.optimizer, events, self.gradient_accumulation_steps, precision)
        derived = {"_model": model, "_step": step, "_events": events, "_states": states}
        derived |= {"resources": Resources(), "_programs": Programs(step, model, self.fuse)}
        derived |= {"_outputs": jax.jit(outputs), "_gradients": jax.jit(gradients)}
        for attribute, value in derived.items():
            object.__setattr__(self, attribute, value)

    def __copy__(self) -> Trainer:
        """Share all that is compiled."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, resources=Resources())
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Leave what is made of the arguments behind: compiled programs and locks can be neither copied nor pickled."""
        made = {field.name for field in dataclasses.fields(self) if not field.init}
        return {attribute: value for attribute, value in vars(self).items() if attribute not in made}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @property
    def num_epochs(self) -> int:
        """The ``num_epochs`` of the ``fit`` that is running; for host hooks.

        Raises:
            RuntimeError: no ``fit`` is running, or a traced hook asks: the number would be compiled in.
        """
        return self._running("num_epochs").num_epochs

    @property
    def steps_per_epoch(self) -> int | None:
        """Batches in the epoch under way of the ``fit`` that is running, ``None`` if nobody can tell; for host hooks.

        Raises:
            RuntimeError: as for ``num_epochs``.
        """
        return self._running("steps_per_epoch").steps_per_epoch

    @property
    def whole(self) -> bool:
        """Whether a run that went on from the state of this hook would end as this one does; for host hooks.

        So it is in ``on_checkpoint``, and in ``on_exception`` unless the exception came between a step and the end of
        the hooks after it.

        Raises:
            RuntimeError: as for ``num_epochs``.
        """
        return self._running("whole").whole

    @property
    def costs(self) -> Costs:
        """What the ``fit`` that is running has cost so far; for host hooks.

        Raises:
            RuntimeError: as for ``num_epochs``.
        """
        return self._running("costs").costs

    def init(
        self, example_batch: Any, *, seed: int = 0, params: PyTree | None = None, model_state: PyTree | None = None
    ) -> TrainState:
        """Make the state that a run begins with.

        Args:
            example_batch: a batch like those to come; only its structure, shapes and dtypes count, and its number of
                examples is free.
            seed: of the parameters, and of all randomness in training.
            params: parameters to begin with, instead of the model's own initial ones.
            model_state: the same for what the model keeps beside them, such as batch statistics.

        Returns:
            The state, with every callback's memory in it.

        Raises:
            StateMismatch: ``params`` or ``model_state`` do not fit the model.
            TypeError: a parameter is no floating array; a criterion is given, and the batch is no pair.
            ValueError: ``seed`` is no whole number.
        """
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
            raise ValueError(f"seed must be a whole number, got {seed!r}")
        batch = canonical(example_batch)
        self._step.check_batch(batch)
        init_key, key = jax.random.split(jax.random.key(seed))
        params, model_state = _initial(self._model, init_key, inputs_of(batch), params, model_state)
        params = self._step.precision.cast_to_param(jax.tree.map(strong, params))
        return self._states.state(params, jax.tree.map(strong, model_state), key)

    def __repr__(self) -> str:
        fields = [field for field in dataclasses.fields(self) if field.init]
        shown = {field.name: getattr(self, field.name) for field in fields}
        return summary_of_trainer(type(self).__name__, shown, {field.name: field.default for field in fields})

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
        from ant_jax._checkpoint import Checkpointer

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
        from ant_jax._checkpoint import read
        from ant_jax._resume import newest_sound, restored

        if fall_back and step is not None:
            raise ValueError(f"restore: fall_back=True chooses the step; it cannot be step={step!r} at the same time")
        saved = newest_sound(directory) if fall_back else read(directory, step)
        return restored(saved, self._states, like)

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
        from ant_jax._resume import with_params_of

        self._states.check(state)
        if isinstance(only, str):
            raise TypeError(f"restore_params: only must be a sequence of patterns; write only=[{only!r}]")
        return with_params_of(
            state, directory, step, only=tuple(only), source=source, model_state=model_state, cast=cast
        )

    def fit(
        self,
        state: TrainState,
        train_loader: Any,
        num_epochs: int,
        val_loader: Any = None,
        *,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        prefetch: int | None = None,
        resume: str | os.PathLike[str] | None = None,
    ) -> tuple[TrainState, History]:
        """Train until ``num_epochs`` epochs are done; :mod:`ant_jax._loop` shows the loop with its hooks.

        The state that is passed in stays readable, so the run trains a copy of what the caller still refers to, and
        there are two in memory; the ``state`` of ``state, history = trainer.fit(state, ...)`` is referred to until
        ``fit`` returns. A state that the caller does not keep is overwritten in place, and there is one:
        ``state, history = trainer.fit(trainer.init(batch), ...)``, or ``trainer.fit(states.pop(), ...)``.

        If an exception ends the run, callbacks get ``on_exception`` with the state as it is then, and the exception has
        that state as its attribute ``train_state``.

        Ctrl-C and SIGTERM act when the step under way is done, so that the state is whole: then the run ends with a
        ``KeyboardInterrupt``, or with ``SystemExit(143)``, as with any exception, and a ``checkpoint`` callback saves
        it. A second Ctrl-C acts at once. (In the main thread, and unless you handle these signals yourself; where
        ``jax.distributed`` runs, its preemption notice takes the place of SIGTERM.)

        Args:
            state: from ``init``, from an earlier ``fit``, or restored.
            train_loader: any iterable of batches: an :class:`ArrayLoader`, a list, a torch ``DataLoader``, a Grain
                loader, a generator.
            num_epochs: epochs in all, those that the state has done included.
            val_loader: batches to evaluate on at the end of every epoch.
            steps_per_epoch: end an epoch after so many batches, which the loader must have; needed for a loader without
                an end. The next epoch goes on with the batch after them, and a loader that ends is begun anew, in the
                middle of an epoch, too. (An ``ArrayLoader`` has an order for every epoch, of which these are the first
                batches.)
            validation_steps: evaluate on so many batches at most, the first ones of ``val_loader``; needed for one
                without an end. An iterator goes on where the last evaluation left it.
            prefetch: how many batches may be read from ``train_loader`` beyond the one that is trained on. ``None``: as
                many as two launches may want, a few hundred small ones; an iterator without ``get_state`` and
                ``set_state``, such as a generator, is read only to the next batch after which a host callback looks, by
                its ``every``, and on after that look, which may stop the run or change what the iterator gives. (With
                ``gradient_accumulation_steps`` and no ``steps_per_epoch`` it is read one batch further.) With 0 a batch
                is read when all hooks of the one before have run, so that it may depend on what they have seen, as
                on-policy data do, and so that a run that stops loses none; then every step is a launch of its own, for
                which the device waits.
            resume: a directory that a ``checkpoint`` callback saves into. If it has a checkpoint, the run goes on from
                the newest sound one, instead of ``state``; a damaged one is renamed, with a warning. If it has none,
                the run begins with ``state``. So the same command, started again, goes on; of a run that is over, only
            ``on_train_begin`` and ``on_train_end`` come once more. One line says which.

        Where a run goes on inside an epoch, an ``ArrayLoader`` takes up its position; a loader whose iterator has
        ``get_state`` and ``set_state``, as Grain's have, is put where it was (an iterator that is given itself, also
        between epochs); any other iterable is read from its beginning, with a warning, unless it is a list; and what
        can be read only once is refused.

        When a run ends before its loader, an iterator with ``get_state`` and ``set_state`` is put back behind the last
        batch that was trained on. Any other iterator has lost what was read beyond it, which a warning says.

        Returns:
            The state after training, and the logs of all its epochs.

        Raises:
            TypeError: arrays, or anything that is no iterable of batches, in the place of a loader.
            StateMismatch: the state is not one of this trainer's, the checkpoint does not fit it, or the training
                loader has other data than the epoch began with.
            CheckpointCorrupt: all checkpoints to resume from are damaged.
            BatchError: a loader gave no batches, or one that differs from the others, or cannot be put where the run
                goes on.
            CallbackReturnError: a hook returned what it must not.
        """
        self._refuse_no_loader(train_loader, "train_loader")
        if val_loader is not None:
            self._refuse_no_loader(val_loader, "val_loader")
        _check_count("num_epochs", num_epochs)
        if resume is not None and not isinstance(resume, str | os.PathLike):
            raise TypeError(f"resume must be the directory that a checkpoint callback saves into, got {resume!r}")
        for name, count in (("steps_per_epoch", steps_per_epoch), ("validation_steps", validation_steps)):
            if count is not None:
                _check_count(name, count)
        self._check_prefetch(prefetch, train_loader, steps_per_epoch)
        self._states.check(state)
        loaders = Loaders(train_loader, val_loader, steps_per_epoch, validation_steps, prefetch)
        if resume is not None:
            state = self._resumed(resume, state, train_loader)
            if state.stop and state.epoch < num_epochs:
                print_beside_bars(_how_to_go_on(state, resume))
        elif num_epochs <= state.epoch:
            _logger.warning(
                "fit: nothing to do: the state has done %d epochs and num_epochs is %d, which counts from the very "
                "first epoch; give a larger one to train on",
                state.epoch,
                num_epochs,
            )
            return state, state.history
        else:
            state = state.replace(stop=np.bool_(False))
        loop, resources = self._loop(state, num_epochs, loaders)
        del state  # where nothing else refers to it, the run overwrites it instead of a copy
        with resources:
            state = loop.run()
        return state, state.history

    def _refuse_no_loader(self, loader: Any, name: str) -> None:
        refuse_no_iterable(loader, name)
        refuse_arrays(loader, name, self._step.needs_pairs)

    def _check_prefetch(self, prefetch: Any, train_loader: Any, steps_per_epoch: int | None) -> None:
        if prefetch is None:
            return
        if isinstance(prefetch, bool) or not isinstance(prefetch, int | np.integer) or prefetch < 0:
            raise ValueError(f"prefetch must be a whole number from 0 on, or None, got {prefetch!r}")
        known = steps_per_epoch is not None or isinstance(train_loader, ArrayLoader)
        if prefetch == 0 and self.gradient_accumulation_steps > 1 and not known:
            raise ValueError(
                "prefetch=0 with gradient_accumulation_steps needs steps_per_epoch: the last batch of an epoch closes "
                "the accumulation window, and no batch is read to see whether one follows"
            )

    def _loop(self, state: TrainState, num_epochs: int, loaders: Loaders) -> tuple[Loop, Resources]:
        """Make the loop for what is left of a run; of one that is over, for its end, which it may not have come to.

        Returns:
            The loop, and what its callbacks will have open.
        """
        over = state.epoch >= num_epochs or (state.stop and state.batch_idx == 0)
        if over:
            print_beside_bars(f"the run is over after epoch {state.epoch}; nothing is trained")
        epochs = 0 if over else num_epochs - state.epoch
        loaders.refuse_bad_lengths(epochs)
        running, events = copy.copy(self), self._events.of_run()
        run = Run(num_epochs, loaders.steps_per_epoch or length_of(loaders.train), Costs(events.seconds))
        object.__setattr__(running, "_run", run)
        return Loop(running, events, self._programs, state, loaders, run), running.resources

    def _resumed(self, directory: str | os.PathLike[str], state: TrainState, train_loader: Any) -> TrainState:
        from ant_jax._resume import in_words, newest_sound, restored

        try:
            saved = newest_sound(directory)
        except FileNotFoundError:
            print_beside_bars(f"no checkpoint in {os.fspath(directory)}: the run begins")
            return state
        refuse_read_once(train_loader, "train_loader")
        state = restored(saved, self._states, state)
        refuse_other_data(state.on_host(), train_loader)
        print_beside_bars(f"resumed from {in_words(state, saved)} in {os.fspath(directory)}")
        return state

    def evaluate(self, state: TrainState, loader: Any, *, steps: int | None = None) -> dict[str, Any]:
        """Evaluate on all batches of ``loader``, with the evaluation hooks around it.

        Args:
            state: stays as it is.
            loader: any iterable of batches.
            steps: evaluate on the first so many batches at most; needed for a loader without an end.

        Returns:
            ``val_loss``, ``val_<metric>`` and what ``on_evaluate_end`` published: means over examples, as numbers. What
            the hooks make of the state is dropped.

        Raises:
            StateMismatch: the state is not one of this trainer's.
            BatchError: the loader gave no batches, or one that differs from the others.
        """
        self._states.check(state)
        self._refuse_no_loader(loader, "loader")
        if steps is None:
            refuse_endless(loader, "loader", "steps")
        else:
            _check_count("steps", steps)
        # A view of its own, by which callbacks tell it from the evaluations of a run in whose hook it may be.
        view = copy.copy(self)
        with view.resources:
            _, logs = evaluate(view, self._events, self._programs, state, loader, "loader", steps)
        return {name: to_python(value) for name, value in logs.items()}

    def predict(self, state: TrainState, inputs: Any, *, batch_size: int = 256) -> Any:
        """Return the model's outputs, in evaluation mode.

        Args:
            state: whose parameters to use.
            inputs: as in a batch, with any number of examples.
            batch_size: examples to run at a time.

        Returns:
            The outputs for all examples, in float32 if the precision is ``"bfloat16"`` or ``"float16"``.

        Raises:
            ValueError: there are no examples.
            StateMismatch: the state is not one of this trainer's.
        """
        _check_count("batch_size", batch_size)
        self._states.check(state)
        inputs = canonical(inputs, "inputs")
        lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(inputs)}
        if lengths == {(0,)}:
            raise ValueError(f"predict: inputs has no examples: {describe_tree(inputs)}")
        if len(lengths) != 1 or lengths == {()}:
            raise ValueError(f"predict: inputs must be as many examples in each array, got {describe_tree(inputs)}")
        (examples,) = lengths.pop()
        self._programs.check_params(state.params, inputs)

        def outputs_of(rows: slice) -> Any:
            return self._outputs(state.params, state.model_state, jax.tree.map(lambda leaf: leaf[rows], inputs))

        outputs = [outputs_of(slice(start, start + batch_size)) for start in range(0, examples, batch_size)]
        return outputs[0] if len(outputs) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)

    def grad_step(self, state: TrainState, batch: Any) -> tuple[PyTree, dict[str, jax.Array]]:
        """Return the gradient of one batch, before any hook, and its loss and metrics; nothing is updated. Compiled.

        Args:
            state: stays as it is.
            batch: one batch.

        Returns:
            The gradients, unscaled and in float32, and ``{"loss": ..., <metric>: ...}``. That of a complex parameter
            points to where the loss rises, as optimizers expect it: it is the conjugate of ``jax.grad``'s.
        """
        self._states.check(state)
        batch = canonical(batch)
        refuse_empty(batch, "the batch")
        self._step.check_batch(batch)
        self._programs.check_params(state.params, inputs_of(batch))
        return self._gradients(self._states.part(state).state(state.key, cycle=state.cycle), batch)

    def train_step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """Train on one batch: what ``fit`` does for each, with the traced hooks, without host hooks. Compiled.

        By hand there are no epochs: hooks get ``state.step`` as their ``batch_idx``, and the state's ``epoch`` and
        ``batch_idx`` stay as they are. It may be a part of a larger function that is compiled, ``jax.jit`` of a loop
        over several batches; then the state that goes in and what comes out are all arrays.

        Args:
            state: stays readable.
            batch: one batch.

        Returns:
            The state after the step, and the logs of the batch. A window of gradient accumulation closes when it is
            full; nothing closes it earlier, as the end of an epoch does in ``fit``.

        Raises:
            NonFiniteError: under ``jax_debug_nans``, a number is not finite; ``train_state`` is the state before.
        """
        self._states.check(state)
        batch = canonical(batch)
        refuse_empty(batch, "the batch")
        part = self._states.part(state)
        program = self._programs.train(part, state.key, batch)
        key_data = self._programs.key_data_of(state.key)
        try:
            part, cycle, asked, logs = program.step_by_hand(part, key_data, state.cycle, batch)
        except FloatingPointError as error:  # of jax_debug_nans
            if isinstance(state.step, Tracer):  # inside a function of the user's, whose steps have no numbers yet
                raise
            found: Any = NonFiniteError(f"{error}, at step {state.total_steps} by hand")
            found.train_state = state
            raise found from error
        stop = _either(state.stop, asked)
        memories = {**state.callback_states, **part.callback_states}
        return state.replace(**part.fields() | {"callback_states": memories}, stop=stop, cycle=cycle), dict(logs)

    def _running(self, fact: str) -> Run:
        if self._run is None:
            raise RuntimeError(
                f"trainer.{fact} is known only to host hooks, while fit runs; traced hooks cannot have it"
            )
        return self._run


def _how_to_go_on(state: TrainState, directory: str | os.PathLike[str]) -> str:
    """Say that a run was stopped before its last epoch, and how to train on."""
    ends = f"after epoch {state.epoch}" if state.batch_idx == 0 else f"with epoch {state.epoch + 1}, which it is in"
    return (
        f"a callback asked the run to stop, so it ends {ends}; to train on, with more patience for example, leave out "
        f"resume and give fit the state trainer.restore({os.fspath(directory)!r})"
    )


def _initial(
    model: PureModel, key: jax.Array, inputs: PyTree, params: PyTree | None, model_state: PyTree | None
) -> tuple[PyTree, PyTree]:
    """What a model begins with: its own parameters and state, or those that are given, if they fit."""
    given = params, model_state
    if params is None and model_state is None:
        return initialized(model, _called_compiled, key, inputs)
    shapes = initialized(model, jax.eval_shape, key, inputs)
    for name, expected, tree in zip(("params", "model_state"), shapes, given, strict=True):
        if tree is not None:
            refuse_mismatch(name, expected, tree, "this trainer's model", dtypes=False)

    def missing(key: jax.Array, inputs: PyTree) -> list[PyTree | None]:
        pairs = zip(model.init(key, inputs), given, strict=True)
        return [made if tree is None else None for made, tree in pairs]  # what is given is not compiled

    made = jax.jit(missing)(key, inputs)
    return made[0] if params is None else params, made[1] if model_state is None else model_state


def _called_compiled(init: Callable[..., Any], *arguments: Any) -> Any:
    """Call a model's init, compiled unless it only gives arrays that are there: a program would hold them once more."""
    compiled = jax.jit(init)
    return compiled(*arguments) if compiled.trace(*arguments).jaxpr.eqns else init(*arguments)


def _either(stop: np.bool_ | jax.Array, asked: jax.Array | None) -> np.bool_ | jax.Array:
    """Whether the run was or is asked to end; an array inside a function of the user's that is compiled."""
    if asked is None and not isinstance(stop, Tracer):
        return np.bool_(stop)
    asked = jnp.logical_or(stop, False if asked is None else asked)
    return asked if isinstance(asked, Tracer) else np.bool_(asked)


def _check_arguments(trainer: Trainer) -> None:
    if (trainer.criterion is None) == (trainer.loss_fn is None):
        raise TypeError("give the Trainer either criterion(outputs, targets) or loss_fn, and not both")
    for name in ("criterion", "loss_fn"):
        function = getattr(trainer, name)
        if function is not None:
            _check_function(name, "a function", function)
    if not isinstance(trainer.optimizer, optax.GradientTransformation):
        hint = "; call it, as in optax.adam(1e-3)" if callable(trainer.optimizer) else ""
        raise TypeError(f"optimizer must be an optax.GradientTransformation, got {trainer.optimizer!r}{hint}")
    if trainer.metrics and trainer.loss_fn is not None:
        raise TypeError("metrics need a criterion; with a loss_fn, return them in its logs")
    if not isinstance(trainer.metrics, Mapping | None):
        raise TypeError(f"metrics must be a mapping {{name: metric(outputs, targets)}}, got {trainer.metrics!r}")
    for name, metric in (trainer.metrics or {}).items():
        if not isinstance(name, str):
            raise TypeError(f"a metric's name must be a string, got {name!r}")
        if name in STEP_LOGS:
            raise ValueError(f"a metric cannot be named {name!r}: the trainer logs its own value of that name")
        _check_function(f"metric {name!r}", "a function metric(outputs, targets)", metric)
    _check_count("gradient_accumulation_steps", trainer.gradient_accumulation_steps)
    precision_of(trainer.precision)
    if trainer.max_grad_norm is not None and not _is_positive(trainer.max_grad_norm):
        raise ValueError(f"max_grad_norm must be positive or None, got {trainer.max_grad_norm!r}")
    for name, allowed in (
        ("accumulation_mean", ("examples", "steps")),
        ("fuse", ("auto", True, False)),
        ("check_batches", (True, False)),
        ("progress_bar", (True, False)),
    ):
        if getattr(trainer, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {getattr(trainer, name)!r}")


def _check_function(name: str, what: str, function: Any) -> None:
    if not callable(function):
        raise TypeError(f"{name} must be {what}, got {function!r}")
    if isinstance(function, type):
        raise TypeError(f"{name} must be {what}, got {function!r}; make an instance of it")


def _is_positive(value: Any) -> bool:
    return not isinstance(value, bool) and np.ndim(value) == 0 and isinstance(value, SupportsFloat) and float(value) > 0


def _check_count(name: str, count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
        raise ValueError(f"{name} must be a positive whole number, got {count!r:.200}")
