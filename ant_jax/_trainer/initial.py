"""What a run begins with."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax

from ant_jax._models.pure_model import PureModel, init_model
from ant_jax._state.leaves import refuse_mismatch
from ant_jax._state.train_state import TrainState
from ant_jax._trees import PyTree


def initial_variables(
    model: PureModel, key: jax.Array, inputs: PyTree, params: PyTree | None, model_state: PyTree | None
) -> tuple[PyTree, PyTree]:
    """What a model begins with: its own parameters and state, or those that are given, if they fit."""
    given = params, model_state
    if params is None and model_state is None:
        return init_model(model, _called_compiled, key, inputs)
    shapes = init_model(model, jax.eval_shape, key, inputs)
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


def how_to_go_on(state: TrainState, directory: str | os.PathLike[str]) -> str:
    """Say that a run was stopped before its last epoch, and how to train on."""
    ends = f"after epoch {state.epoch}" if state.batch_idx == 0 else f"with epoch {state.epoch + 1}, which it is in"
    return (
        f"a callback asked the run to stop, so it ends {ends}; to train on, with more patience for example, leave out "
        f"resume and give fit the state trainer.restore({os.fspath(directory)!r})"
    )
