"""A flax.nnx module as a pair of pure functions."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ant_jax._models.model_state import WRITTEN_PARAMS, without_written
from ant_jax._models.modes import TRUE_IN_EVALUATION, TRUE_IN_TRAINING, Active, Modes, flags_in, modes_of
from ant_jax._trees import PyTree, replaced


_FLAGS = {*TRUE_IN_TRAINING, *TRUE_IN_EVALUATION}
# What a step changes, in the order of `nnx.split`.
_PARTS = nnx.Param, nnx.RngState


def from_nnx(
    model: nnx.Module, train: Mapping[str, Any] | None, evaluate: Mapping[str, Any] | None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Make ``init`` and ``apply`` of a module; arguments as those of ``pure_functions``."""
    # A flag that is None by default leaves it to the attributes of the modules.
    modes = modes_of(model, _children, train, evaluate, skip=lambda parameter: parameter.default is None)
    training, evaluated = _in_training(model), _in_evaluation(model)
    if train is None and evaluate is None:
        _warn_of_evaluation(training, modes)
    definitions = {True: nnx.split(training, *_PARTS, ...)[0], False: nnx.split(evaluated, *_PARTS, ...)[0]}
    _, template, rng_state, rest_template = nnx.split(evaluated, *_PARTS, ...)
    restarted = _restart_of(rng_state)

    def init(key: jax.Array, inputs: Any) -> tuple[PyTree, PyTree]:
        del key, inputs  # The module made its parameters itself.
        return _plain(template), _plain(rest_template)

    def apply(params: PyTree, model_state: PyTree, inputs: Any, key: jax.Array | None) -> tuple[PyTree, PyTree]:
        kept, _ = without_written(model_state)  # in a loop by hand the parameters have moved on since
        streams = _copied(rng_state) if key is None else restarted(key)
        states = _filled(template, params), streams, _filled(rest_template, kept)
        module = nnx.merge(definitions[key is not None], *states)
        if key is None:
            return modes.call(functools.partial(module, inputs), train=False), model_state
        counts, statistics = _values(module, nnx.RngCount), _values(module, nnx.BatchStat)
        outputs = modes.call(functools.partial(module, inputs), train=True)
        if modes.undecided:
            modes.check(_active(training, module, counts, statistics))
        after, _, rest = map(_plain, nnx.state(module, *_PARTS, nnx.Not(nnx.Intermediate)))
        return outputs, {**rest, WRITTEN_PARAMS: after} if replaced(params, after) else rest

    return init, apply


def _children(module: Any) -> list[Any]:
    return [child for _, child in nnx.iter_children(module) if callable(child)]


def _modules_of(module: nnx.Module) -> list[tuple[str, nnx.Module]]:
    return [("/".join(map(str, path)), inner) for path, inner in nnx.iter_modules(module)]


def _copy_of(model: nnx.Module) -> nnx.Module:
    copy = nnx.clone(model)
    nnx.pop(copy, nnx.Intermediate)
    return copy


def _in_training(model: nnx.Module) -> nnx.Module:
    """A copy in the mode that the module is in, and in training where that is left open."""
    copy = _copy_of(model)
    for _, module in _modules_of(copy):
        for name in ("deterministic", "use_running_average"):
            if getattr(module, name, False) is None:
                setattr(module, name, False)
    return copy


def _in_evaluation(model: nnx.Module) -> nnx.Module:
    copy = _copy_of(model)
    copy.eval()
    for _, module in _modules_of(copy):
        for name, value in flags_in(_flags_of(module), train=False).items():
            setattr(module, name, value)
    return copy


def _flags_of(module: nnx.Module) -> set[str]:
    return {name for name in _FLAGS & vars(module).keys() if isinstance(getattr(module, name), bool)}


def _warn_of_evaluation(training: nnx.Module, modes: Modes) -> None:
    """Say so if everything that has a mode is in evaluation, as after ``model.eval()``."""
    flags = [(path, module, name) for path, module in _modules_of(training) for name in sorted(_flags_of(module))]
    if flags and all(getattr(module, name) == flags_in({name}, False)[name] for _, module, name in flags):
        path, module, name = flags[0]
        warnings.warn(
            f"every layer of the model that has a mode is in evaluation ({path or type(module).__name__}: {name}="
            f"{getattr(module, name)}) and is trained in it: no dropout, and statistics that do not move. Call "
            f"model.train() before it is given to the Trainer; if it is meant so, give the Trainer "
            f"ant_jax.pure_functions(model, train={dict(modes.train)!r}, evaluate={dict(modes.evaluate)!r})",
            stacklevel=6,
        )


def _values(module: nnx.Module, kind: type[nnx.Variable[Any]]) -> Any:
    return _plain(nnx.state(module, kind))


def _active(training: nnx.Module, module: nnx.Module, counts: PyTree, statistics: PyTree) -> Active:
    """Whether the layers that are in training mode have drawn, and have moved their statistics."""
    modules = [inner for _, inner in _modules_of(training)]
    drops = any(
        getattr(inner, "deterministic", None) is False
        and (getattr(inner, "rate", 0) or getattr(inner, "dropout_rate", 0))
        for inner in modules
    )
    averages = any(getattr(inner, "use_running_average", None) is False for inner in modules)
    return Active(
        replaced(counts, _values(module, nnx.RngCount)) if drops else None,
        replaced(statistics, _values(module, nnx.BatchStat)) if averages else None,
    )


def _copied(state: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf, state)  # nnx fills states in place, and counts draws in them


def _plain(state: Any) -> PyTree:
    """A state as a dict, with names where a module has tuples for keys: ``kernel.u``, as in SpectralNorm."""

    def named(entry: Any) -> Any:
        return {_name(key): named(inner) for key, inner in entry.items()} if isinstance(entry, dict) else entry

    return named(nnx.to_pure_dict(state))


def _name(key: Any) -> Any:
    return ".".join(map(str, key)) if isinstance(key, tuple) else key


def _filled(state: Any, values: PyTree) -> Any:
    def keyed(entry: Any, value: Any) -> Any:
        if not isinstance(entry, dict):
            return value
        return {key: keyed(inner, value[_name(key)]) for key, inner in entry.items()}

    state = _copied(state)
    nnx.replace_by_pure_dict(state, keyed(nnx.to_pure_dict(state), values))
    return state


def _restart_of(rng_state: Any) -> Callable[[jax.Array], Any]:
    """Make the function that starts every random stream from a key of its own, derived from one, and counts from zero.

    Streams that are split or forked have many keys in an array; those that are the same there stay the same.
    """
    leaves, treedef = jax.tree.flatten(rng_state)
    patterns = [_pattern_of(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else None for leaf in leaves]

    def restarted(key: jax.Array) -> Any:
        def begun(position: int) -> Any:
            pattern = patterns[position]
            if pattern is None:
                return jnp.zeros_like(leaves[position])
            new = jax.random.fold_in(key, position)
            return jax.random.split(new, pattern.max(initial=0) + 1)[pattern] if pattern.shape else new

        return jax.tree.unflatten(treedef, map(begun, range(len(leaves))))

    return restarted


def _pattern_of(keys: Any) -> np.ndarray:
    """Number the keys in an array, the same number for the same key."""
    data = np.asarray(jax.random.key_data(keys)).reshape(keys.size, -1)
    return np.unique(data, axis=0, return_inverse=True)[1].reshape(keys.shape)
