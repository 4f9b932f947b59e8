"""The trainer: what a user holds."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import jax
import numpy as np
import optax

from ant_jax._data.batches import inputs_of, to_batch
from ant_jax._data.epoch_batches import Loaders
from ant_jax._data.loaders import length_of, refuse_arrays, refuse_endless, refuse_no_iterable, refuse_read_once
from ant_jax._engine.compile_cache import CompileCache
from ant_jax._engine.programs import Fuse
from ant_jax._engine.state_spec import StateSpec
from ant_jax._hooks.callback import Callback, check_callbacks
from ant_jax._hooks.callback_list import CallbackList
from ant_jax._loop.evaluation import evaluate
from ant_jax._loop.loop import Loop, refuse_other_data
from ant_jax._loop.run_info import Costs, RunInfo
from ant_jax._models.pure_model import PureModel, apply_model, pure_functions
from ant_jax._resources import Resources
from ant_jax._state.history import History, to_python
from ant_jax._state.leaves import key_of_cycle, strong
from ant_jax._state.summary import summary_of_trainer
from ant_jax._state.train_state import TrainState
from ant_jax._step.losses import criterion_loss, general_loss
from ant_jax._step.precision import Precision, precision_of
from ant_jax._step.step import LossFn, Step
from ant_jax._trainer.arguments import check_arguments, check_count, check_prefetch
from ant_jax._trainer.by_hand import ByHand
from ant_jax._trainer.initial import how_to_go_on, initial_variables
from ant_jax._trainer.running import Running
from ant_jax._trainer.saving import Saving
from ant_jax._trees import PyTree
from ant_jax.callbacks import progress_bar
from ant_jax.callbacks._printing import print_beside_bars


_logger = logging.getLogger("ant_jax")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trainer(Running, Saving, ByHand):
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

    >>> import jax.numpy as jnp
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
    _events: CallbackList = dataclasses.field(init=False, repr=False)
    _programs: CompileCache = dataclasses.field(init=False, repr=False)
    _states: StateSpec = dataclasses.field(init=False, repr=False)
    _outputs: Callable[..., Any] = dataclasses.field(init=False, repr=False)
    _gradients: Callable[..., Any] = dataclasses.field(init=False, repr=False)
    _run: RunInfo | None = dataclasses.field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        check_arguments(self)
        callbacks = check_callbacks(self.callbacks)
        if self.progress_bar and not any(callback.name == "progress_bar" for callback in callbacks):
            callbacks += (progress_bar(),)
        events = CallbackList(callbacks, self)
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
            result, _ = apply_model(model, cast(params), model_state, cast(inputs), None)
            return precision.cast_to_output(result)

        def gradients(state: TrainState, batch: Any) -> tuple[PyTree, dict[str, Any]]:
            _, grads, logs, _ = step.gradients(state.replace(key=key_of_cycle(state.key, state.cycle)), batch)
            return grads, logs

        states = StateSpec(self.optimizer, events, self.gradient_accumulation_steps, precision)
        derived = {"_model": model, "_step": step, "_events": events, "_states": states}
        derived |= {"resources": Resources(), "_programs": CompileCache(step, model, self.fuse)}
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
        batch = to_batch(example_batch)
        self._step.check_batch(batch)
        init_key, key = jax.random.split(jax.random.key(seed))
        params, model_state = initial_variables(self._model, init_key, inputs_of(batch), params, model_state)
        params = self._step.precision.cast_to_param(jax.tree.map(strong, params))
        return self._states.state(params, jax.tree.map(strong, model_state), key)

    def __repr__(self) -> str:
        fields = [field for field in dataclasses.fields(self) if field.init]
        shown = {field.name: getattr(self, field.name) for field in fields}
        return summary_of_trainer(type(self).__name__, shown, {field.name: field.default for field in fields})

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
        """Train until ``num_epochs`` epochs are done; :mod:`ant_jax._loop.loop` shows the loop with its hooks.

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
        check_count("num_epochs", num_epochs)
        if resume is not None and not isinstance(resume, str | os.PathLike):
            raise TypeError(f"resume must be the directory that a checkpoint callback saves into, got {resume!r}")
        for name, count in (("steps_per_epoch", steps_per_epoch), ("validation_steps", validation_steps)):
            if count is not None:
                check_count(name, count)
        check_prefetch(prefetch, train_loader, steps_per_epoch, self.gradient_accumulation_steps)
        self._states.check(state)
        loaders = Loaders(train_loader, val_loader, steps_per_epoch, validation_steps, prefetch)
        if resume is not None:
            state = self._resumed(resume, state, train_loader)
            if state.stop and state.epoch < num_epochs:
                print_beside_bars(how_to_go_on(state, resume))
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
        run = RunInfo(num_epochs, loaders.steps_per_epoch or length_of(loaders.train), Costs(events.seconds))
        object.__setattr__(running, "_run", run)
        return Loop(running, events, self._programs, state, loaders, run), running.resources

    def _resumed(self, directory: str | os.PathLike[str], state: TrainState, train_loader: Any) -> TrainState:
        from ant_jax._checkpoint.resume import find_newest_sound, in_words, restore_state

        try:
            saved = find_newest_sound(directory)
        except FileNotFoundError:
            print_beside_bars(f"no checkpoint in {os.fspath(directory)}: the run begins")
            return state
        refuse_read_once(train_loader, "train_loader")
        state = restore_state(saved, self._states, state)
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
            check_count("steps", steps)
        # A view of its own, by which callbacks tell it from the evaluations of a run in whose hook it may be.
        view = copy.copy(self)
        with view.resources:
            _, logs = evaluate(view, self._events, self._programs, state, loader, "loader", steps)
        return {name: to_python(value) for name, value in logs.items()}
