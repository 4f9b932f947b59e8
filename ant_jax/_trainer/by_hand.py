"""One step, one gradient, one prediction: for loops of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ant_jax._data.batches import inputs_of, refuse_empty, to_batch
from ant_jax._engine.compile_cache import CompileCache
from ant_jax._engine.state_spec import StateSpec
from ant_jax._finite import NonFiniteError
from ant_jax._models.pure_model import PureModel
from ant_jax._state.train_state import TrainState
from ant_jax._step.step import Step
from ant_jax._trainer.arguments import check_count
from ant_jax._trees import PyTree, describe_tree


class ByHand:
    """The methods of a trainer for a loop by hand."""

    _model: PureModel
    _step: Step
    _states: StateSpec
    _programs: CompileCache
    _outputs: Callable[..., Any]
    _gradients: Callable[..., Any]

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
        check_count("batch_size", batch_size)
        self._states.check(state)
        inputs = to_batch(inputs, "inputs")
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
        batch = to_batch(batch)
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
        batch = to_batch(batch)
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


def _either(stop: np.bool_ | jax.Array, asked: jax.Array | None) -> np.bool_ | jax.Array:
    """Whether the run was or is asked to end; an array inside a function of the user's that is compiled."""
    if asked is None and not isinstance(stop, Tracer):
        return np.bool_(stop)
    asked = jnp.logical_or(stop, False if asked is None else asked)
    return asked if isinstance(asked, Tracer) else np.bool_(asked)
