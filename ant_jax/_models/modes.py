"""How a Flax module is told whether it trains or is evaluated."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


# The usual names of flags that are true in training, and of those that are true in evaluation.
TRUE_IN_TRAINING = ("train", "training", "is_training", "is_train", "enable_dropout", "update_stats")
TRUE_IN_EVALUATION = (
    "deterministic", "use_running_average", "eval", "is_eval", "eval_mode", "evaluating", "inference"
)  # fmt: skip


class Active(NamedTuple):
    """Whether the layers of a kind behave in training as they do in training.

    Attributes:
        dropout: ``None`` when the model has none.
        statistics: the same for batch statistics.
    """

    dropout: bool | None
    statistics: bool | None


@dataclasses.dataclass(frozen=True)
class Modes:
    """The arguments of a module's call in both modes.

    Attributes:
        name: of the module's class, for messages.
        train: keyword arguments in training.
        evaluate: keyword arguments in evaluation.
        undecided: arguments that are left at their defaults, and could be flags, as they read in a signature.
        parameters: of the call, after the inputs, if some may have to be given by position, as where it is wrapped by
            a lifted transform; ``None`` if not.
    """

    name: str
    train: Mapping[str, Any]
    evaluate: Mapping[str, Any]
    undecided: tuple[str, ...] = ()
    parameters: tuple[inspect.Parameter, ...] | None = None

    def call(self, function: Callable[..., Any], train: bool) -> Any:
        """Call ``function``, which has been given everything but the arguments of the mode.

        A transform may take static arguments by position alone (``nn.remat``), or by keyword alone (``nn.jit`` with
        ``static_argnames``), which only trying can tell.
        """
        arguments = self.train if train else self.evaluate
        positions = None if self.parameters is None else _by_position(self.parameters, arguments)
        if not positions:
            return function(**arguments)
        try:
            return function(*positions)
        except Exception as error:
            by_position = error
        try:
            return function(**arguments)
        except Exception:
            raise by_position from None

    def check(self, active: Active) -> None:
        """Complain if a model does not do in training what it has layers for, and an argument may be the reason.

        Raises:
            TypeError: it has not been told at all that it trains.
        """
        idle = [
            words for value, words in zip(active, ("no dropout draws", "no batch statistics move"), strict=True)
            if value is False
        ]  # fmt: skip
        if not idle or not self.undecided:
            return
        named = [argument.split("=")[0] for argument in self.undecided if not argument.startswith("*")]
        first = named[0] if named else "train"
        message = (
            f"in training {' and '.join(idle)} in {self.name}, and its __call__ has arguments that are left at their "
            f"defaults: {', '.join(self.undecided)}. If one of them says whether it trains, give the Trainer "
            f"ant_jax.pure_functions(model, train={{{first!r}: ...}}, evaluate={{{first!r}: ...}}) in place of the "
            f"model; if it is meant so, ant_jax.pure_functions(model, train={dict(self.train)!r}, "
            f"evaluate={dict(self.evaluate)!r})"
        )
        if not self.train:
            raise TypeError(message)
        warnings.warn(message, stacklevel=2)


def modes_of(
    module: Any,
    children: Callable[[Any], list[Any]],
    train: Mapping[str, Any] | None,
    evaluate: Mapping[str, Any] | None,
    *,
    wrappers: int = 0,
    skip: Callable[[inspect.Parameter], bool],
) -> Modes:
    """Find out which arguments tell a module its mode.

    Args:
        module: whose ``__call__`` it is.
        children: returns the modules inside a module, as far as they are known.
        train: the arguments as the user has said them; then nothing is found out.
        evaluate: the same.
        wrappers: around the ``__call__`` of every module of its kind.
        skip: tells whether a flag is left at its default.
    """
    name, parameters = type(module).__name__, _parameters_of(module)
    wrapped = _wrappers_of(type(module).__call__) > wrappers
    positional = any(parameter.kind is parameter.POSITIONAL_ONLY for parameter in parameters)
    by_position = tuple(parameters) if wrapped or positional else None
    if train is not None or evaluate is not None:
        return Modes(name, train or {}, evaluate or {}, (), by_position)
    reached = list(_reached(module, children))
    flags = {parameter.name for parameter in reached if _is_flag(parameter) and not skip(parameter)}
    undecided = [
        parameter for parameter in parameters if parameter.name not in flags and _may_be_flag(parameter, flags)
    ]
    return Modes(name, flags_in(flags, True), flags_in(flags, False), tuple(map(_as_written, undecided)), by_position)


def flags_in(names: set[str], train: bool) -> dict[str, bool]:
    """Return the values that flags of the usual names have in a mode."""
    return {name: (name in TRUE_IN_TRAINING) == train for name in sorted(names)}


def _wrappers_of(function: Any) -> int:
    count = 0
    while hasattr(function, "__wrapped__"):
        function, count = function.__wrapped__, count + 1
    return count


def _parameters_of(module: Any) -> list[inspect.Parameter]:
    """The parameters of a module's call after the inputs."""
    if not callable(module):  # a loss_fn may use its other methods
        return []
    parameters = list(inspect.signature(type(module).__call__).parameters.values())[1:]  # without self
    lead = 1 if parameters and parameters[0].kind in (parameters[0].POSITIONAL_ONLY, _ANYHOW) else 0
    return parameters[lead:]


_ANYHOW = inspect.Parameter.POSITIONAL_OR_KEYWORD


def _reached(module: Any, children: Callable[[Any], list[Any]]) -> Iterator[inspect.Parameter]:
    """The parameters that a keyword argument can reach: the module's, and through ``**kwargs`` its only child's."""
    parameters = _parameters_of(module)
    yield from parameters
    inside = children(module)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters) and len(inside) == 1:
        yield from _reached(inside[0], children)


def _is_flag(parameter: inspect.Parameter) -> bool:
    single = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    usual = parameter.name in (*TRUE_IN_TRAINING, *TRUE_IN_EVALUATION)
    return single and usual and (parameter.default in (None, parameter.empty) or isinstance(parameter.default, bool))


def _may_be_flag(parameter: inspect.Parameter, flags: set[str]) -> bool:
    """Whether an argument that is left at its default may be the one that says whether the model trains."""
    if isinstance(parameter.default, bool | enum.Enum):
        return True
    varied = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    boolean = _is_flag(parameter) or "bool" in str(parameter.annotation)  # and not a mask
    told = isinstance(parameter.default, str | int) or (parameter.default is None and boolean)
    return not flags and (varied or told)


def _as_written(parameter: inspect.Parameter) -> str:
    return str(parameter.replace(annotation=parameter.empty))


def _by_position(parameters: tuple[inspect.Parameter, ...], arguments: Mapping[str, Any]) -> list[Any] | None:
    """The arguments by position, those between at their defaults; ``None`` where that cannot be."""
    names = [parameter.name for parameter in parameters]
    if not arguments or not set(arguments) <= set(names):
        return None
    leading = parameters[: 1 + max(map(names.index, arguments))]
    values = [arguments.get(parameter.name, parameter.default) for parameter in leading]
    fits = all(parameter.kind in (_ANYHOW, parameter.POSITIONAL_ONLY) for parameter in leading)
    return values if fits and inspect.Parameter.empty not in values else None
