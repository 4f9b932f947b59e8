"""Every factory of `ant_jax.callbacks` is held to the same promises, by the tool that users have for their own."""

import dataclasses
import inspect
import io
import itertools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import optax
import pytest
from problems import BATCH, batches, data, standard_promotion, trainer

import ant_jax as ant
from ant_jax import Hyperparam, testing
from ant_jax._engine.launch_size import LaunchSizer
from ant_jax._engine.programs import TrainProgram
from ant_jax._hooks import callback_list as _events
from ant_jax._hooks.callback_list import CallbackList


adam = standard_promotion(optax.inject_hyperparams(optax.adam)(learning_rate=0.01))


def stopped_clock() -> float:
    return 0.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to call a factory.

    Attributes:
        make: makes the callback; what it writes goes into the directory.
        options: of the trainer that it needs.
        twice: whether two runs from one state end in the same one.
        looks: the batches between the looks of a host callback at batches; ``None`` when it has none of its own.
    """

    make: Callable[[pathlib.Path], ant.Callback]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    looks: int | None = None
    twice: bool = True


library = ant.callbacks
injected = {"optimizer": adam}
CASES: dict[str, Case] = {
    "adaptive_grad_clip": Case(lambda path: library.adaptive_grad_clip(Hyperparam(0.01))),
    "batch_size_schedule": Case(lambda path: library.batch_size_schedule({0: 2 * BATCH})),
    "batch_size_schedule per batch": Case(
        lambda path: library.batch_size_schedule({0: BATCH, 2: 2 * BATCH}, per="batch"), looks=20
    ),
    "centralize": Case(lambda path: library.centralize()),
    "chain": Case(lambda path: library.chain(library.zero_nans(), library.gradient_noise(0.01))),
    "chain on the host": Case(
        lambda path: library.chain(
            library.json_log(path / "a.json", every=3), library.csv_log(path / "b.csv", every=3)
        ),
        looks=3,
    ),
    "checkpoint": Case(lambda path: library.checkpoint(path / "checkpoints", keep=1, monitor="val_loss"), twice=False),
    "checkpoint every": Case(lambda path: library.checkpoint(path / "checkpoints", every=4), looks=4, twice=False),
    "clip_by_global_norm": Case(lambda path: library.clip_by_global_norm(0.1)),
    "clip_by_global_norm, changing": Case(lambda path: library.clip_by_global_norm(Hyperparam(0.1))),
    "clip_by_value": Case(lambda path: library.clip_by_value(0.1)),
    "csv_log": Case(lambda path: library.csv_log(path / "log.csv")),
    "csv_log every": Case(lambda path: library.csv_log(path / "log.csv", every=3), looks=3),
    "early_stopping": Case(lambda path: library.early_stopping("val_loss", patience=1)),
    "early_stopping, restoring": Case(lambda path: library.early_stopping("train_loss", restore_best=True)),
    "ema": Case(lambda path: library.ema(0.9, evaluate=True)),
    "ema, changing": Case(lambda path: library.ema(Hyperparam(0.9))),
    "every": Case(lambda path: library.every(library.gradient_noise(0.01), batches=2)),
    "every on the host": Case(
        lambda path: library.every(library.json_log(path / "a.json", every=1), batches=4), looks=4
    ),
    "every epochs": Case(lambda path: library.every(library.swa(0), epochs=2)),
    "freeze": Case(lambda path: library.freeze("*bias*")),
    "from_optax": Case(lambda path: library.from_optax(optax.scale(0.5))),
    "gradient_noise": Case(lambda path: library.gradient_noise(0.01)),
    "gradient_norm": Case(lambda path: library.gradient_norm()),
    "gradient_statistics": Case(lambda path: library.gradient_statistics(histograms=True)),
    "json_log": Case(lambda path: library.json_log(path / "log.json")),
    "json_log every": Case(lambda path: library.json_log(path / "log.json", every=3), looks=3),
    "learning_rate_schedule": Case(
        lambda path: library.learning_rate_schedule(optax.linear_schedule(0.1, 0, 9)), injected
    ),
    "learning_rate_schedule per epoch": Case(
        lambda path: library.learning_rate_schedule(lambda epoch: 0.1 / (1 + epoch), per="epoch"), injected
    ),
    "log_hyperparams": Case(lambda path: library.log_hyperparams("learning_rate"), injected),
    "log_progress": Case(lambda path: library.log_progress(2, printer=str, clock=stopped_clock)),
    "log_to": Case(lambda path: library.log_to(ant.writers.JSONLinesWriter(path / "a.json"), every=4), looks=4),
    "memory": Case(lambda path: library.memory(reader=lambda device: {"bytes_in_use": 1, "peak_bytes_in_use": 2})),
    "mlflow": Case(lambda path: library.mlflow(tracking_uri=f"{path.parent}/mlflow", every=4), looks=4, twice=False),
    "plot_history": Case(lambda path: library.plot_history(path / "history.png")),
    "profile": Case(lambda path: library.profile(path / "traces", start=0, steps=2, epoch=1), looks=20),
    "profile_steps": Case(lambda path: library.profile_steps(printer=str, clock=stopped_clock)),
    "profile_steps every": Case(lambda path: library.profile_steps(every=5, printer=str, clock=stopped_clock), looks=5),
    "progress_bar": Case(lambda path: library.progress_bar(file=io.StringIO(), clock=stopped_clock)),
    "reduce_on_plateau": Case(lambda path: library.reduce_on_plateau("train_loss", patience=0), injected),
    "roll_back": Case(lambda path: library.roll_back(every=3)),
    "skip_nonfinite": Case(lambda path: library.skip_nonfinite()),
    "stop_at": Case(lambda path: library.stop_at(1.0, "loss", per="batch")),
    "stop_at per epoch": Case(lambda path: library.stop_at(Hyperparam(1.0), "train_loss")),
    "swa": Case(lambda path: library.swa(1, evaluate=True)),
    "tensorboard": Case(lambda path: library.tensorboard(path / "events", every=4), looks=4),
    "terminate_on_nan": Case(lambda path: library.terminate_on_nan()),
    "throughput": Case(lambda path: library.throughput(peak_flops=1e12, clock=stopped_clock)),
    "time_limit": Case(lambda path: library.time_limit(1.0, clock=stopped_clock)),
    "tolerate": Case(lambda path: library.tolerate(library.csv_log(path / "log.csv"))),
    "wandb": Case(lambda path: library.wandb("digits", every=4), looks=4, twice=False),
    "when": Case(lambda path: library.when(lambda state, logs: state.step < 3, library.centralize())),
    "zero_nans": Case(lambda path: library.zero_nans()),
}


def test_every_factory_has_its_case():
    factories = {name for name, item in vars(library).items() if inspect.isfunction(item) and not name.startswith("_")}
    assert {name.split()[0].rstrip(",") for name in CASES} == factories


@pytest.fixture
def offline(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("offline")
def test_it_keeps_every_promise(name, tmp_path):
    case, runs = CASES[name], itertools.count()

    def make() -> ant.Callback:
        directory = tmp_path / str(next(runs))
        directory.mkdir()
        return case.make(directory)

    testing.check_callback(make, twice=case.twice, **case.options)


COMBINATORS = {"chain", "every", "tolerate", "when"}  # named like what they combine
DEFAULTS = [name for name in CASES if name.isidentifier() and name not in COMBINATORS]
# The optimizer's, of the callback that changed it last.
SHARED = {"learning_rate", "train_learning_rate"}


def published_by(
    monkeypatch: pytest.MonkeyPatch, callbacks: list[ant.Callback]
) -> tuple[dict[str, set[str]], ant.History]:
    """Train an epoch; return each log with the callbacks that have published it, and the history."""
    published: dict[str, set[str]] = {}

    def noted(callback: ant.Callback, name: str, function: Any, lead: Any, trainer: Any, given: Any, *rest: Any) -> Any:
        result = call(callback, name, function, lead, trainer, given, *rest)
        for log, value in result[-1].items():
            if log not in given[-1] or value is not given[-1][log]:
                published.setdefault(log, set()).add(callback.name)
        return result

    call = _events._call
    with monkeypatch.context() as patch:
        patch.setattr(_events, "_call", noted)
        a_trainer = trainer(*callbacks, **injected)
        loader = ant.ArrayLoader(data(2 * BATCH), BATCH)
        _, history = a_trainer.fit(a_trainer.init(batches()[0]), loader, 1, batches(1))
    return published, history


def made(name: str, path: pathlib.Path) -> ant.Callback:
    # Not the case of swa, which evaluates its average, as that of ema does.
    return library.swa(1) if name == "swa" else CASES[name].make(path)


@pytest.mark.usefixtures("offline")
def test_all_go_together_and_any_two_have_names_and_logs_of_their_own(tmp_path, monkeypatch):
    callbacks = {name: made(name, tmp_path) for name in DEFAULTS}
    assert len({callback.name for callback in callbacks.values()}) == len(callbacks)
    published, history = published_by(monkeypatch, [*callbacks.values()])
    assert {log for log, owners in published.items() if len(owners) > 1} <= SHARED
    assert "train_grad_norm" in history[0] and "train_gradient_statistics/update_norm" in history[0]

    publishing = set().union(*published.values())
    alone: dict[str, set[str]] = {}
    for name in DEFAULTS:
        if callbacks[name].name in publishing:
            alone[name] = set(published_by(monkeypatch, [made(name, tmp_path)])[0]) - SHARED
    clashing = {pair for pair in itertools.permutations(alone, 2) if alone[pair[0]] & alone[pair[1]]}
    assert clashing == set(itertools.permutations(("gradient_norm", "gradient_statistics")))
    for pair in clashing:  # then one of the two publishes under other names
        together, _ = published_by(monkeypatch, [made(name, tmp_path) for name in pair])
        assert all(len(owners) == 1 for owners in together.values())
        assert len(together) == sum(len(alone[name]) for name in pair)


@dataclasses.dataclass
class Costs:
    """What one run has cost: launches of the train program, and visits of a callback to the batches."""

    launches: int = 0
    visits: int = 0


def costs_of(monkeypatch: pytest.MonkeyPatch, *callbacks: ant.Callback, **options: Any) -> Costs:
    """Train two epochs of 20 batches, with as many steps a launch as the callbacks allow."""
    costs, launch, visit = Costs(), TrainProgram.launch, CallbackList.batch_hook

    def counted_launch(*arguments: Any) -> Any:
        costs.launches += 1
        return launch(*arguments)

    def counted_visit(self: Any, callback: Any, name: str, *arguments: Any, **named: Any) -> Any:
        costs.visits += name == "on_batch_end"
        return visit(self, callback, name, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(TrainProgram, "launch", counted_launch)
        patch.setattr(CallbackList, "batch_hook", counted_visit)
        patch.setattr(LaunchSizer, "steps", property(lambda pace: 10**6, lambda pace, steps: None), raising=False)
        a_trainer = trainer(*callbacks, **options)
        loader = ant.ArrayLoader(data(20 * BATCH), BATCH)
        a_trainer.fit(a_trainer.init(batches()[0]), loader, 2, batches(1))
    return costs


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("offline")
def test_it_costs_no_launch_and_no_visit_more_than_its_looks(name, tmp_path, monkeypatch):
    case = CASES[name]
    bare = costs_of(monkeypatch, **case.options).launches
    callback = case.make(tmp_path)
    costs = costs_of(monkeypatch, callback, **case.options)
    if case.looks is None:  # traced, or looking when the host has control anyhow
        assert costs.launches <= bare
        assert callback.every is None or not costs.visits
    else:
        looks = 2 * math.ceil(20 / case.looks)
        assert costs.launches <= bare + looks
        assert costs.visits <= looks
