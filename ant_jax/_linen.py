"""A flax.linen module as a pair of pure functions."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
from flax import linen

from ant_jax._modes import TRUE_IN_EVALUATION, TRUE_IN_TRAINING, Active, flags_in, modes_of
from ant_jax._trees import PyTree, differences, in_lines, replaced


def from_linen(
    model: linen.Module, train: Mapping[str, Any] | None, evaluate: Mapping[str, Any] | None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Make ``init`` and ``apply`` of a module; arguments as those of ``pure_functions``."""
    said = train is not None or evaluate is not None
    fields = set() if said else _flag_fields(model)
    modes = modes_of(
        model, _children, train, evaluate,
        wrappers=1,  # linen's own
        skip=lambda parameter: parameter.default is None and getattr(model, parameter.name, None) is not None,
    )  # fmt: skip
    trained, evaluated = _with_fields(model, fields, True), _with_fields(model, fields, False)

    def init(key: chex.PRNGKey, inputs: Any) -> tuple[PyTree, PyTree]:
        variables = dict(modes.call(functools.partial(evaluated.init, key, inputs), train=False))
        return variables.pop("params", {}), variables

    def trained_once(variables: Mapping[str, Any], inputs: Any, rngs: dict[str, Any]) -> tuple[Any, Any, Active]:
        mutable = [name for name in variables if name != "params"]
        function = functools.partial(trained.apply, variables, inputs, rngs=rngs, mutable=mutable)
        watch = _Watch()
        with linen.intercept_methods(watch):
            outputs, updates = modes.call(function, train=True)
        return outputs, updates, watch.active(variables, updates)

    def apply(params: PyTree, model_state: Any, inputs: Any, key: chex.PRNGKey | None) -> tuple[PyTree, PyTree]:
        variables = {"params": params, **model_state}
        if key is None:
            return modes.call(functools.partial(evaluated.apply, variables, inputs), train=False), model_state
        # Linen takes the streams that are not given, "dropout" for one, from "params".
        outputs, updates, active = trained_once(variables, inputs, {"params": key})
        if active.dropout is False:  # it may ask for the stream: deterministic=not self.has_rng("dropout")
            streams = {"params": key, "dropout": jax.random.fold_in(key, zlib.crc32(b"dropout"))}
            again = trained_once(variables, inputs, streams)
            outputs, updates, active = again if again[2].dropout else (outputs, updates, active)
        modes.check(active)
        _refuse_growth(model_state, updates)
        return outputs, {**model_state, **updates}

    return init, apply


def _flag_fields(model: linen.Module) -> set[str]:
    names = {field.name for field in dataclasses.fields(model)} & {*TRUE_IN_TRAINING, *TRUE_IN_EVALUATION}
    return {name for name in names if isinstance(getattr(model, name), bool)}


def _with_fields(model: linen.Module, fields: set[str], train: bool) -> linen.Module:
    values: dict[str, Any] = flags_in(fields, train)
    return model.clone(**values) if values else model


def _children(module: Any) -> list[Any]:
    values = [getattr(module, field.name) for field in dataclasses.fields(module) if field.name != "parent"]
    return [value for value in values if isinstance(value, linen.Module) and callable(value)]


class _Watch:
    """Looks at the layers that are called, whether they behave as in training."""

    def __init__(self) -> None:
        self._dropout: list[bool] = []
        self._statistics: list[bool] = []

    def __call__(self, function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        fields = vars(module)  # and not getattr, which would set a module up
        rate = fields.get("rate", fields.get("dropout_rate"))
        if context.method_name == "__call__":
            if isinstance(rate, int | float) and rate > 0:
                self._look(self._dropout, module, "deterministic", args, kwargs)
            self._look(self._statistics, module, "use_running_average", args, kwargs)
        return function(*args, **kwargs)

    def _look(self, seen: list[bool], module: Any, flag: str, args: Any, kwargs: Any) -> None:
        parameters = inspect.signature(type(module).__call__).parameters
        if flag not in parameters or flag not in vars(module):
            return
        by_position = dict(zip(list(parameters)[1:], args, strict=False))
        value = {**by_position, **kwargs}.get(flag)
        seen.append(not (getattr(module, flag) if value is None else value))

    def active(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> Active:
        moved = None
        if "batch_stats" in before:
            # Through a transform statistics come out as other values also where they are the same.
            moved = replaced(before["batch_stats"], after.get("batch_stats")) and any(self._statistics or [True])
        return Active(any(self._dropout) if self._dropout else None, moved)


def _refuse_growth(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raise if a collection has got other entries, as one has that is sown into."""
    for name, collection in after.items():
        lines = differences(before[name], collection, dtypes=False)
        if lines:
            raise TypeError(
                f"self.sow, or another write, gives the model's collection {name!r} another form in a step:"
                f"{in_lines(lines)}\n"
                f"No criterion reads what is sown. Sow into 'intermediates', which is not kept; or give the Trainer a "
                f"loss_fn that applies the module without {name!r} among its variables, with mutable=[{name!r}], and "
                f"uses what it returns"
            )
