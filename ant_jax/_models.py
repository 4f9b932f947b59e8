"""Any model as a pair of pure functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from ant_jax._trees import PyTree, describe_tree


class PureModel(NamedTuple):
    """A model as two pure functions.

    Attributes:
        init: ``init(key, inputs) -> (params, model_state)``.
        apply: ``apply(params, model_state, inputs, key) -> (outputs, model_state)``. With a ``key``, the model trains
            (dropout draws from it, batch norm takes the batch's statistics and updates its own); with ``None``, it is
            evaluated.
    """

    init: Callable[[chex.PRNGKey, Any], tuple[PyTree, PyTree]]
    apply: Callable[[PyTree, PyTree, Any, chex.PRNGKey | None], tuple[PyTree, PyTree]]


def pure_functions(model: Any) -> PureModel:
    """Turn a model into a pair of pure functions.

    Args:
        model: one of

            - a ``flax.linen.Module``. If its ``__call__`` has a parameter named ``train`` or ``training``, it is passed
              True in training; one named ``deterministic``, True in evaluation. All its random streams
              (``make_rng``) are there in training.
            - a ``flax.nnx.Module``, with its parameters already made, which a seed given to ``Trainer.init`` does not
              change. ``nnx.Param`` is trained, the rest is model state; random streams restart from the step's key at
              every step.
            - a pair ``(init, apply)`` with the signatures of :class:`PureModel`, returned as it is. It covers Equinox,
              Haiku and plain JAX.

    Returns:
        The pair.

    Raises:
        TypeError: the model is none of these.

    >>> from flax import linen as nn
    >>> model = pure_functions(nn.Dense(2))
    >>> params, model_state = model.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> outputs, _ = model.apply(params, model_state, jnp.ones((5, 3)), None)
    >>> outputs.shape
    (5, 2)
    """
    # Flax's two front ends are heavy to import and users have imported theirs already, to make the model.
    from flax import linen, nnx

    if isinstance(model, linen.Module):
        return _from_linen(model)
    if isinstance(model, nnx.Module):
        return _from_nnx(model)
    if isinstance(model, tuple) and len(model) == 2 and all(map(callable, model)):
        return PureModel(*model)
    hint = "; make an instance of it" if isinstance(model, type) else ""
    raise TypeError(
        f"model must be a flax.linen.Module, a flax.nnx.Module or a pair of functions "
        f"(init(key, inputs) -> (params, model_state), apply(params, model_state, inputs, key) -> "
        f"(outputs, model_state)), got {model!r}{hint}"
    )


def initialized(model: PureModel, call: Callable[..., Any], key: chex.PRNGKey, inputs: PyTree) -> tuple[PyTree, PyTree]:
    """Return ``call(model.init, key, inputs)``; explain what fails, and what is not of the form it should be."""
    try:
        result = call(model.init, key, inputs)
    except Exception as error:
        error.add_note(
            f"in the model's init, called with inputs {describe_tree(inputs)}. A model's inputs are the first of a "
            f"pair (inputs, targets), or else the whole batch; to read a batch in another way give the Trainer a pair "
            f"of functions (init, apply), see ant_jax.pure_functions"
        )
        raise
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"the model's init must return (params, model_state), got {describe_tree(result)}")
    return result


def applied(
    model: PureModel, params: PyTree, model_state: PyTree, inputs: PyTree, key: chex.PRNGKey | None
) -> tuple[PyTree, PyTree]:
    """Return ``model.apply(params, model_state, inputs, key)``; explain as ``initialized`` does."""
    try:
        result = model.apply(params, model_state, inputs, key)
    except Exception as error:
        error.add_note(f"in the model, called with inputs {describe_tree(inputs)}")
        raise
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"the model's apply must return (outputs, model_state), got {describe_tree(result)}")
    return result


def _from_linen(model: Any) -> PureModel:
    parameters = inspect.signature(type(model).__call__).parameters

    def mode(train: bool) -> dict[str, bool]:
        flags = {"train": train, "training": train, "deterministic": not train}
        return {name: value for name, value in flags.items() if name in parameters}

    def init(key: chex.PRNGKey, inputs: Any) -> tuple[PyTree, PyTree]:
        variables = dict(model.init(key, inputs, **mode(train=False)))
        return variables.pop("params", {}), variables

    def apply(params: PyTree, model_state: Any, inputs: Any, key: chex.PRNGKey | None) -> tuple[PyTree, PyTree]:
        variables = {"params": params, **model_state}
        if key is None:
            return model.apply(variables, inputs, **mode(train=False)), model_state
        rngs = {"params": key}  # linen takes the streams that are not given, "dropout" for one, from this one
        outputs, updates = model.apply(variables, inputs, rngs=rngs, mutable=list(model_state), **mode(train=True))
        return outputs, {**model_state, **updates}

    return PureModel(init, apply)


def _from_nnx(model: Any) -> PureModel:
    from flax import nnx

    def split(train: bool) -> tuple[Any, ...]:
        copy = nnx.clone(model)
        copy.train() if train else copy.eval()
        return nnx.split(copy, nnx.Param, nnx.RngState, ...)

    definitions = {train: split(train)[0] for train in (True, False)}
    _, template, rng_state, rest_template = split(train=False)

    def filled(state: Any, values: Any) -> Any:
        state = jax.tree.map(lambda leaf: leaf, state)  # a copy: nnx fills states in place
        nnx.replace_by_pure_dict(state, values)
        return state

    def init(key: chex.PRNGKey, inputs: Any) -> tuple[PyTree, PyTree]:
        del key, inputs  # The module made its parameters itself.
        return nnx.to_pure_dict(template), nnx.to_pure_dict(rest_template)

    def apply(params: PyTree, model_state: PyTree, inputs: Any, key: chex.PRNGKey | None) -> tuple[PyTree, PyTree]:
        streams = rng_state if key is None else _restarted(rng_state, key)
        module = nnx.merge(
            definitions[key is not None], filled(template, params), streams, filled(rest_template, model_state)
        )
        outputs = module(inputs)
        if key is None:
            return outputs, model_state
        return outputs, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.Any(nnx.Param, nnx.RngState))))

    return PureModel(init, apply)


def _restarted(rng_state: Any, key: chex.PRNGKey) -> Any:
    """Start every random stream from a key of its own, derived from ``key``, and its counter from zero."""
    leaves, treedef = jax.tree.flatten(rng_state)
    restarted = [
        jax.random.fold_in(key, position) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros_like(leaf)
        for position, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, restarted)
