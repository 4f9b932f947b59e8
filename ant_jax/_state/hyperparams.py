"""Hyper-parameters that live in the state, so that changing one compiles nothing.

optax's ``inject_hyperparams`` keeps them in a state with a mapping ``hyperparams``; a callback's memory may be a dict
with a mapping of that name, too. Here they are found, by name, and replaced. Anywhere else, in the parameters that a
memory has for instance, the name is the user's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ant_jax._state.memories import Memories
from ant_jax._trees import PyTree


class HyperparamError(LookupError):
    """There is no hyper-parameter of a name, or it cannot be changed; the message says what to write."""


@dataclasses.dataclass(frozen=True)
class Hyperparam:
    """Marks a number that a callback is given as one to keep in the state, where it can be changed while training.

    ``clip_by_global_norm(1.0)`` compiles the number in; with ``clip_by_global_norm(Hyperparam(1.0))`` it is
    ``state.hyperparams["clip_by_global_norm/max_norm"]``, and ``state.with_hyperparams(max_norm=0.5)`` changes it
    without compiling anything.

    Args:
        value: to begin with.

    >>> Hyperparam(1.0)
    Hyperparam(value=1.0)
    """

    value: float


class Hyperparams(dict[str, Any]):
    """Hyper-parameters by their names; a name that is not there raises HyperparamError, which says what to write."""

    def __missing__(self, name: str) -> Any:
        return self[_resolved(name, self)]


def read(opt_state: PyTree, callback_states: Mapping[str, Any]) -> Hyperparams:
    """Return every hyper-parameter by its name, as ``TrainState.hyperparams`` describes."""
    return Hyperparams({name: place.value for name, place in _places(opt_state, callback_states).items()})


def changeable(opt_state: PyTree, callback_states: Mapping[str, Any]) -> dict[str, Any]:
    """Return, as plain Python, every hyper-parameter that no schedule sets."""
    places = _places(opt_state, callback_states)
    return {name: np.asarray(place.value).tolist() for name, place in places.items() if not place.scheduled}


def carried(opt_state: PyTree, like: PyTree) -> PyTree:
    """Return an optimizer state with the hyper-parameters of another one, but for those that a schedule sets."""
    replaced = {(place.path, place.name): place.value for place in _walk(like, "") if not place.scheduled}
    return _rewritten(opt_state, (), replaced) if replaced else opt_state


def carried_in_memory(memory: Any, like: Any) -> Any:
    """The same for a callback's memory."""
    replaced = {(place.path, place.name): place.value for place in _walk_memory(like, "") if not place.scheduled}
    return _rewritten_memory(memory, (), replaced) if replaced else memory


def written(
    opt_state: PyTree, callback_states: Mapping[str, Any], values: Mapping[str, Any], like: Callable[[Any, Any], Any]
) -> tuple[PyTree, dict[str, Any]]:
    """Replace hyper-parameters.

    Args:
        opt_state: where they are.
        callback_states: where they are, too.
        values: new ones by name.
        like: ``like(new, old)`` gives a new value the dtype and the place of the old one, and no weak type.

    Returns:
        Both, with the new values in them.

    Raises:
        HyperparamError: as ``TrainState.with_hyperparams`` says.
    """
    places = _places(opt_state, callback_states)
    replaced: dict[str, dict[tuple[_Path, str], Any]] = {}
    for name, value in values.items():
        place = places[_resolved(name, places)]
        example = f"optax.inject_hyperparams(optax.adam)({place.name}=0.001)"
        if _is_whole(place.value) and not _is_whole(value):
            raise HyperparamError(
                f"the hyper-parameter {name!r} is a whole number, since it was made with one, and {value!r} would be "
                f"rounded; write it with a point where it is made, {example}"
            )
        if place.scheduled:
            raise HyperparamError(
                f"the hyper-parameter {name!r} follows a schedule, which would set it again at the next update; make "
                f"the optimizer with a number in its place, {example}, and give the schedule to "
                f"ant_jax.callbacks.learning_rate_schedule"
            )
        replaced.setdefault(place.owner, {})[place.path, place.name] = like(value, place.value)
    optax_state = _rewritten(opt_state, (), replaced.pop("", {}))
    changed = {owner: _rewritten_memory(callback_states[owner], (), new) for owner, new in replaced.items()}
    return optax_state, {**callback_states, **changed}


def _is_whole(value: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(value), jnp.integer)


_Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a hyper-parameter is.

    Attributes:
        owner: the callback in whose memory it is; ``""``: it is in the optimizer's state.
        path: of the node that has it.
        name: its name there.
        value: what it is now.
        scheduled: whether a schedule sets it at every update.
    """

    owner: str
    path: _Path
    name: str
    value: Any
    scheduled: bool


def _places(opt_state: PyTree, callback_states: Mapping[str, Any]) -> dict[str, _Place]:
    found: dict[str, _Place] = {}
    walks = [_walk(opt_state, "")] + [_walk_memory(memory, name) for name, memory in callback_states.items()]
    for places in map(list, walks):
        names = [place.name for place in places]
        for place in places:
            within = () if names.count(place.name) == 1 else place.path
            found["/".join(part for part in (place.owner, *within, place.name) if part)] = place
    return found


def _resolved(name: str, places: Mapping[str, Any]) -> str:
    candidates = [name] if name in places else [full for full in places if full.endswith(f"/{name}")]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise HyperparamError(
            f"several hyper-parameters are named {name!r}: {', '.join(candidates)}; give the whole name, "
            f"state.with_hyperparams(**{{{candidates[0]!r}: ...}})"
        )
    argument = f"{name.rpartition('/')[2]}=0.001"
    raise HyperparamError(
        f"the state has no hyper-parameter {name!r} (there are: {', '.join(places) or 'none'}). An optimizer keeps its "
        f"numbers in the state when it is made with optax.inject_hyperparams(optax.adam)({argument}) instead of "
        f"optax.adam({argument}), a callback when it is given ant_jax.Hyperparam(value) instead of value"
    )


_INJECTED = optax.InjectStatefulHyperparamsState


def _injected(node: Any) -> bool:
    return isinstance(node, _INJECTED)


def _walk(tree: PyTree, owner: str, path: _Path = ()) -> Iterator[_Place]:
    """Return the places in an optimizer's state."""
    found = optax.tree_utils.tree_get_all_with_path(tree, _INJECTED.__name__, lambda keys, node: _injected(node))
    for keys, node in found:
        here, scheduled = (*path, *_names_of(keys)), node.hyperparams_states
        yield from (_Place(owner, here, name, value, name in scheduled) for name, value in node.hyperparams.items())


def _names_of(keys: Any) -> Iterator[str]:
    """Return the names of a path's entries, without those of the states in between that optax makes."""
    for key in keys:
        if not isinstance(key, optax.tree_utils.NamedTupleKey):
            yield jax.tree_util.keystr((key,), simple=True)
        elif (key.tuple_name, key.name) != (_INJECTED.__name__, "inner_state"):
            yield key.name


def _walk_memory(memory: Any, owner: str, path: _Path = ()) -> Iterator[_Place]:
    """Return the places in a callback's memory."""
    if isinstance(memory, Memories):
        for name, inner in memory.items():
            yield from _walk_memory(inner, owner, (*path, name))
    elif _has_own(memory):
        values = memory["hyperparams"].items()
        yield from (_Place(owner, path, name, value, scheduled=False) for name, value in values)
        yield from _walk(_beside(memory), owner, path)
    else:
        yield from _walk(memory, owner, path)


def _has_own(memory: Any) -> bool:
    return isinstance(memory, dict) and isinstance(memory.get("hyperparams"), Mapping)


def _beside(memory: Mapping[str, Any]) -> dict[str, Any]:
    """What a memory with hyper-parameters has beside them."""
    return {name: part for name, part in memory.items() if name != "hyperparams"}


_Replaced = Mapping[tuple[_Path, str], Any]  # by the place's path and name


# Not `optax.tree_utils.tree_set`, because it changes nothing, and does not say so, where a mapping above the
# hyper-parameter has a key of the same name (`optax.named_chain(("learning_rate", ...))`): it does not look into the
# custom nodes, tuples and named tuples in there. It also turns such a mapping into a plain dict, which is another
# structure if it was an OrderedDict.
def _rewritten(tree: PyTree, path: _Path, replaced: _Replaced) -> PyTree:
    def rewrite(keys: Any, node: Any) -> Any:
        if not _injected(node):
            return node
        here = (*path, *(jax.tree_util.keystr((key,), simple=True) for key in keys))
        inner_state = _rewritten(node.inner_state, here, replaced)
        return node._replace(hyperparams=_changed(node.hyperparams, here, replaced), inner_state=inner_state)

    return jax.tree_util.tree_map_with_path(rewrite, tree, is_leaf=_injected)


def _rewritten_memory(memory: Any, path: _Path, replaced: _Replaced) -> Any:
    if isinstance(memory, Memories):
        return Memories({n: _rewritten_memory(inner, (*path, n), replaced) for n, inner in memory.items()})
    if _has_own(memory):
        own = _changed(memory["hyperparams"], path, replaced)
        return {**_rewritten(_beside(memory), path, replaced), "hyperparams": own}
    return _rewritten(memory, path, replaced)


def _changed(hyperparams: Mapping[str, Any], path: _Path, replaced: _Replaced) -> dict[str, Any]:
    return {name: replaced.get((path, name), value) for name, value in hyperparams.items()}
