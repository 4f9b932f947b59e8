"""The compiled programs of a trainer."""

from __future__ import annotations

import threading
from typing import Any

import jax
from jax.core import Tracer

from ant_jax._data.batch_checks import classes_of
from ant_jax._data.batches import inputs_of
from ant_jax._engine.buffers import DeviceState
from ant_jax._engine.programs import EvaluationProgram, Fuse, TrainProgram, signature_of
from ant_jax._models.pure_model import PureModel, apply_model, init_model
from ant_jax._state.leaves import refuse_mismatch
from ant_jax._state.train_state import TrainState
from ant_jax._step.step import Step
from ant_jax._trees import PyTree


class CompileCache:
    """The compiled programs of a trainer, one for each form of state and batch that it has met.

    Several threads may use them at the same time; each program is made once.

    Args:
        step: what to compile.
        model: whose parameters states must have.
        fuse: as for ``TrainProgram``.
    """

    def __init__(self, step: Step, model: PureModel, fuse: Fuse):
        self._step, self._model = step, model
        self._fuse: Fuse = fuse
        self._making = threading.RLock()
        self._fitting: set[Any] = set()
        self._key: tuple[Any, Any] = (None, None)
        self._train: dict[tuple[Fuse, Any], TrainProgram] = {}
        self._evaluation: dict[Any, EvaluationProgram] = {}

    def train(
        self, part: DeviceState, key: jax.Array, batch: PyTree, decided: tuple[str, bool] | None = None
    ) -> TrainProgram:
        """Return the train program for this state and batch; traced when it is a new one, compiled when first run.

        Args:
            part: of the state.
            key: the state's.
            batch: one like those to come.
            decided: the backend, and whether the run's steps were fused there; ``fuse="auto"`` stays with that.
        """
        part = part._replace(log_sums=None)
        fuse = self._fuse
        if fuse == "auto" and decided is not None and decided[0] == jax.default_backend():
            fuse = decided[1]
        form = fuse, signature_of((part, key, batch))
        with self._making:
            if form not in self._train:
                self._step.check_batch(batch)
                self.check_params(part.params, inputs_of(batch))
                program = TrainProgram(self._step, part, key, batch, fuse)
                self._train[form] = self._train.setdefault((program.fused, form[1]), program)
            return self._train[form]

    def classes_of(self, params: PyTree, model_state: PyTree, batch: PyTree) -> int | None:
        """How many classes the targets of a batch choose from; ``None`` when they are no labels, or it is no pair."""
        if not self._step.needs_pairs:
            return None

        def outputs(params: Any, model_state: Any, inputs: Any) -> Any:
            return apply_model(self._model, params, model_state, inputs, None)[0]

        return classes_of(jax.eval_shape(outputs, params, model_state, batch[0]), batch)

    def evaluation(self, state: TrainState, batch: PyTree) -> EvaluationProgram:
        """Return the evaluation program, in the same way."""
        key = signature_of((state.params, state.model_state, batch))
        with self._making:
            if key not in self._evaluation:
                self._step.check_batch(batch)
                self.check_params(state.params, inputs_of(batch))
                program = EvaluationProgram(self._step, state.params, state.model_state, batch, self._fuse)
                self._evaluation[key] = program
            return self._evaluation[key]

    def key_data_of(self, key: jax.Array) -> jax.Array:
        """Return a key as plain numbers; those of the last key are kept, since a run has but one."""
        if isinstance(key, Tracer):  # of a function of the user's, which it must not outlive
            return jax.random.key_data(key)
        known, data = self._key  # read once, since another thread may replace it
        if key is not known:
            data = jax.random.key_data(key)
            self._key = key, data
        return data

    def check_params(self, params: PyTree, inputs: PyTree) -> None:
        """Raise StateMismatch unless the model could have made these parameters for these inputs."""
        form = signature_of((params, inputs))
        if form not in self._fitting:
            expected, _ = init_model(self._model, jax.eval_shape, jax.eval_shape(jax.random.key, 0), inputs)
            refuse_mismatch("params", expected, params, "this trainer's model, for these inputs,", dtypes=False)
            self._fitting.add(form)
