"""A flax.linen module as a pair of pure functions."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import errors, linen

from ant_jax._models.modes import TRUE_IN_EVALUATION, TRUE_IN_TRAINING, Active, flags_in, modes_of
from ant_jax._trees import PyTree, differences, in_lines, replaced


def from_linen(
    model: linen.Module, train: Mapping[str, Any] | None, evaluate: Mapping[str, Any] | None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Make ``init`` and ``apply`` of a module; arguments as those of ``pure_functions``."""
    modes = modes_of(
        model, _children, train, evaluate,
        wrappers=1,  # linen's own
        skip=lambda parameter: parameter.default is None and getattr(model, parameter.name, None) is not None,
    )  # fmt: skip
    said = train is not None or evaluate is not None
    trained, evaluated = (model, model) if said else (_in_mode(model, True), _in_mode(model, False))

    def init(key: jax.Array, inputs: Any) -> tuple[PyTree, PyTree]:
        variables = dict(modes.call(functools.partial(evaluated.init, key, inputs), train=False))
        return variables.pop("params", {}), variables

    def trained_once(variables: Mapping[str, Any], inputs: Any, rngs: dict[str, Any]) -> tuple[Any, Any, Active]:
        mutable = [name for name in variables if name != "params"]
        function = functools.partial(trained.apply, variables, inputs, rngs=rngs, mutable=mutable)
        watch = _Watch()
        with linen.intercept_methods(watch):
            outputs, updates = modes.call(function, train=True)
        return outputs, updates, watch.active(variables, updates)

    def apply(params: PyTree, model_state: Any, inputs: Any, key: jax.Array | None) -> tuple[PyTree, PyTree]:
        variables = {"params": params, **model_state}
        if key is None:
            with _evaluation_explained():
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


def _in_mode(model: linen.Module, train: bool) -> linen.Module:
    """Set the flags in the fields of a module and of the modules inside it.

    Those inside that are not at their defaults stay in training as they are: it may be meant so.
    """
    made: dict[int, linen.Module] = {}  # a module that is shared stays shared

    def changed(value: Any) -> Any:
        if not isinstance(value, linen.Module):
            return value
        if id(value) not in made:
            fields = [field for field in dataclasses.fields(value) if field.init and field.name != "parent"]
            values = {field.name: getattr(value, field.name) for field in fields}
            flags = {
                field.name
                for field in fields
                if field.name in (*TRUE_IN_TRAINING, *TRUE_IN_EVALUATION)
                and isinstance(values[field.name], bool)
                and (value is model or not train or values[field.name] == field.default)
            }
            new = {**{name: jax.tree.map(changed, inner) for name, inner in values.items()}, **flags_in(flags, train)}
            new = {name: inner for name, inner in new.items() if replaced(values[name], inner)}
            made[id(value)] = value.clone(**new) if new else value
        return made[id(value)]

    return changed(model)


@contextlib.contextmanager
def _evaluation_explained() -> Iterator[None]:
    """Add the remedy to flax's errors about what a module does in evaluation."""
    try:
        yield
    except errors.InvalidRngError as error:
        error.add_note(
            "in evaluation, in which there is no random key: let the model draw only where it is told that it trains, "
            "or give the Trainer a pair of functions (init, apply) whose apply has a key of its own for evaluation"
        )
        raise
    except errors.ModifyScopeVariableError as error:
        error.add_note(
            "in evaluation, in which a model's variables stay as they are: let the model write them only where it is "
            "told that it trains, as by nn.BatchNorm(use_running_average=not train)"
        )
        raise


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
