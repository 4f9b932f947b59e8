"""Any model as a pair of pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from ant_jax._trees import PyTree, describe_tree


class PureModel(NamedTuple):
    """A model as two pure functions.

    Attributes:
        init: ``init(key, inputs) -> (params, model_state)``.
        apply: ``apply(params, model_state, inputs, key) -> (outputs, model_state)``. With a ``key``, the model trains
            (dropout draws from it, batch norm takes the batch's statistics and updates its own); with ``None``, it is
            evaluated.
    """

    init: Callable[[jax.Array, Any], tuple[PyTree, PyTree]]
    apply: Callable[[PyTree, PyTree, Any, jax.Array | None], tuple[PyTree, PyTree]]


def pure_functions(
    model: Any, *, train: Mapping[str, Any] | None = None, evaluate: Mapping[str, Any] | None = None
) -> PureModel:
    """Turn a model into a pair of pure functions.

    A Flax module is told its mode by the arguments of its ``__call__`` that have a usual name: ``train``, ``training``,
    ``is_training``, ``is_train``, ``enable_dropout`` and ``update_stats`` are True in training, ``deterministic``,
    ``use_running_average``, ``eval``, ``is_eval``, ``eval_mode``, ``evaluating`` and ``inference`` in evaluation. They
    are found through transforms (``nn.remat``), and through ``**kwargs`` where a module has one module inside. A model
    that has dropout, or batch statistics, which do nothing in training is refused where an argument that was left at
    its default may be the reason.

    Args:
        model: one of

            - a ``flax.linen.Module``. Fields of it that have one of these names, and hold a bool, are set as well;
              those of modules in its fields in evaluation, and in training where they are at their defaults. All its
              random streams (``make_rng``) are there in training, none in evaluation.
            - a ``flax.nnx.Module``, with its parameters already made, which a seed given to ``Trainer.init`` does not
              change. ``nnx.Param`` is trained (a Variable type of your own can subclass it), the rest is model state.
              It trains in the mode that it is handed over in, so that a part of it that is in ``eval()`` stays
              in it, and is evaluated in ``eval()``. Its random streams restart from the step's key at every step; in
              evaluation they are those that the module has. What it writes to a ``Param`` in its call is kept.
            - a pair ``(init, apply)`` with the signatures of :class:`PureModel`, returned as it is. It covers Equinox,
              Haiku and plain JAX.
        train: the keyword arguments of a Flax module's call in training, in place of those that its names tell; ``{}``
            for a model that is as it should be without any.
        evaluate: the same in evaluation.

    Returns:
        The pair.

    Raises:
        TypeError: the model is none of these, or a pair with ``train`` or ``evaluate``.

    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> model = pure_functions(nn.Dense(2))
    >>> params, model_state = model.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> outputs, _ = model.apply(params, model_state, jnp.ones((5, 3)), None)
    >>> outputs.shape
    (5, 2)
    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, inputs, mode):
    ...         return nn.Dropout(0.5, deterministic=mode == "test")(inputs)
    >>> model = pure_functions(Net(), train={"mode": "fit"}, evaluate={"mode": "test"})
    >>> model.apply({}, {}, jnp.ones(3), None)[0]
    Array([1., 1., 1.], dtype=float32)
    """
    # Flax's two front ends are heavy to import and users have imported theirs already, to make the model.
    from flax import linen, nnx

    from ant_jax._models.linen import from_linen
    from ant_jax._models.nnx import from_nnx

    if isinstance(model, linen.Module):
        return PureModel(*from_linen(model, train, evaluate))
    if isinstance(model, nnx.Module):
        return PureModel(*from_nnx(model, train, evaluate))
    if isinstance(model, tuple) and len(model) == 2 and all(map(callable, model)):
        if train is not None or evaluate is not None:
            raise TypeError("train and evaluate are arguments of a Flax module's call; a pair's apply has its key")
        return PureModel(*model)
    hint = "; make an instance of it" if isinstance(model, type) else ""
    raise TypeError(
        f"model must be a flax.linen.Module, a flax.nnx.Module or a pair of functions "
        f"(init(key, inputs) -> (params, model_state), apply(params, model_state, inputs, key) -> "
        f"(outputs, model_state)), got {model!r}{hint}"
    )


def init_model(model: PureModel, call: Callable[..., Any], key: jax.Array, inputs: PyTree) -> tuple[PyTree, PyTree]:
    """Return ``call(model.init, key, inputs)``; explain what fails, and what is not of the form it should be."""
    try:
        result = call(model.init, key, inputs)
    except Exception as error:
        error.add_note(
            f"in the model's init, called with inputs {describe_tree(inputs)}. A model's inputs are the first of a "
            f"pair (inputs, targets), or else the whole batch; to read a batch in another way give the Trainer a pair "
            f"of functions (init, apply), see ant_jax.pure_functions, which also takes arguments of the model's own "
            f"that say whether it trains"
        )
        raise
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"the model's init must return (params, model_state), got {describe_tree(result)}")
    return result


def apply_model(
    model: PureModel, params: PyTree, model_state: PyTree, inputs: PyTree, key: jax.Array | None
) -> tuple[PyTree, PyTree]:
    """Return ``model.apply(params, model_state, inputs, key)``; explain as ``init_model`` does."""
    try:
        result = model.apply(params, model_state, inputs, key)
    except Exception as error:
        error.add_note(f"in the model, called with inputs {describe_tree(inputs)}")
        raise
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"the model's apply must return (outputs, model_state), got {describe_tree(result)}")
    return result
