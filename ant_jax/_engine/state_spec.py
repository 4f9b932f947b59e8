"""The state that a run begins with, and the check whether a state could be one of a trainer's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ant_jax._engine.buffers import DeviceState, device_state
from ant_jax._engine.programs import signature_of
from ant_jax._hooks.callback_list import CallbackList, initial_memories
from ant_jax._state import hyperparams as _hyperparams
from ant_jax._state.host_fields import HostFields, StateMismatch
from ant_jax._state.leaves import refuse_mismatch, strong
from ant_jax._state.train_state import Accumulator, TrainState
from ant_jax._step.precision import Precision
from ant_jax._trees import PyTree, describe, describe_tree, named_leaves


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """Makes the states of one trainer, and knows them again.

    Attributes:
        optimizer: whose state they have.
        events: whose callbacks' memories they have.
        accumulation_steps: batches in a window; with more than one, states have room for its gradients.
        precision: whose loss scale they have.
    """

    optimizer: optax.GradientTransformation
    events: CallbackList
    accumulation_steps: int
    precision: Precision
    _known: set[Any] = dataclasses.field(init=False, repr=False, default_factory=set)

    def state(self, params: PyTree, model_state: PyTree, key: jax.Array) -> TrainState:
        """Make the state that a run begins with."""
        state = self.without_memories(params, model_state, key)
        state = state.replace(callback_states=initial_memories(self.events.callbacks, state))
        self._known.add(self._form(state))
        return self.noting_hyperparams(state, _hyperparams.changeable(state.opt_state, state.callback_states))

    def noting_hyperparams(self, state: TrainState, values: Mapping[str, Any]) -> TrainState:
        """Note in a state the hyper-parameters that the code has."""
        return state.replace(host=state.on_host()._replace(hyperparams=values))

    def hyperparams(self, state: TrainState) -> dict[str, Any]:
        """The hyper-parameters that the code gives a run that begins with the parameters of ``state``."""
        memories = initial_memories(self.events.callbacks, state.replace(callback_states={}))
        if not _hyperparams.changeable(state.opt_state, {}):
            return _hyperparams.changeable((), memories)
        return _hyperparams.changeable(self.optimizer.init(state.params), memories)

    def without_memories(self, params: PyTree, model_state: PyTree, key: jax.Array) -> TrainState:
        """The same, but for what callbacks remember."""
        _refuse_untrainable(params)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            model_state=model_state,
            opt_state=jax.tree.map(strong, self._optimizer_state(params)),
            key=key,
            accumulator=self._empty_window(params),
            loss_scale=self.precision.initial_loss_scale(),
            callback_states={},
            stop=np.bool_(False),
            host=HostFields(device_names=self.events.device_names),
            cycle=jnp.zeros((), jnp.int32),
        )

    def _optimizer_state(self, params: PyTree) -> Any:
        try:
            return self.optimizer.init(params)
        except Exception as error:
            error.add_note(f"in the optimizer's init, called with parameters {describe_tree(params)}")
            raise

    def part(self, state: TrainState) -> DeviceState:
        """Return what a step needs of a state, but for the sums of an epoch."""
        return device_state(state, self.events.device_names)

    def check(self, state: Any) -> None:
        """Raise unless this trainer could have made the state; each form of state is looked at once."""
        if not isinstance(state, TrainState):
            raise TypeError(f"state must be a TrainState, as trainer.init returns it, got {state!r:.200}")
        form = self._form(state)
        if form in self._known:
            return
        _refuse_untrainable(state.params)
        optimizer_state = jax.eval_shape(self.optimizer.init, state.params)
        refuse_mismatch("opt_state", optimizer_state, state.opt_state, "this trainer's optimizer")
        window = jax.eval_shape(self._empty_window, state.params)
        refuse_mismatch("accumulator", window, state.accumulator, "this trainer's gradient_accumulation_steps")
        refuse_mismatch("loss_scale", self.precision.initial_loss_scale(), state.loss_scale, "this trainer's precision")
        memories = initial_memories(self.events.callbacks, state.replace(callback_states={}))
        if state.host is None:  # in compiled code of the user's, which host callbacks' memories pass by unseen
            memories = {name: memory for name, memory in memories.items() if name in self.events.device_names}
        if memories.keys() != state.callback_states.keys():
            raise StateMismatch(
                f"the state has the memories of callbacks {sorted(state.callback_states)}, and those of this trainer "
                f"with a memory are {sorted(memories)}; make a state with this trainer's init, "
                f"trainer.init(example_batch, params=state.params) to keep the parameters"
            )
        for name in self.events.device_names & memories.keys():
            what = f"callback_states[{name!r}]"
            refuse_mismatch(what, memories[name], state.callback_states[name], "this trainer's callback")
        self._known.add(form)

    def _form(self, state: TrainState) -> Any:
        return signature_of(self.part(state)), frozenset(state.callback_states)

    def _empty_window(self, params: PyTree) -> Accumulator | None:
        if self.accumulation_steps == 1:
            return None
        zeros = jax.tree.map(lambda param: jnp.zeros(param.shape, jnp.promote_types(param.dtype, jnp.float32)), params)
        return Accumulator(zeros, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros((), float))


def _refuse_untrainable(params: PyTree) -> None:
    """Raise TypeError for a parameter that has no gradient."""
    for path, leaf in named_leaves(params).items():
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"the parameter {path or 'of the model'} is {describe(leaf)}, which has no gradient; parameters are "
                f"what is trained. Make it floating, astype(jnp.float32), or keep it in the model state"
            )
