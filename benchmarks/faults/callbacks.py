"""Every shipped callback, and pairs of them: a run that is saved and goes on ends as one that was not."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import ant_jax as ant
from ant_jax._state.history import History
from ant_jax.testing._compare import difference
from ant_jax.testing._problem import problem
from benchmarks.faults.trials import Bench, Row, expect


EPOCHS, PAIRS = 3, 100
# Where runs are saved: after so many steps of epochs of 5, inside the first, and at the end of the second.
SAVED_AT = (3, 10)
# What a trainer cannot have together: two averages that take the parameters' place in evaluation, two traces at once.
APART = ({"ema", "swa"}, {"profile", "profile_steps"})
MEASURES = ("examples_per_second", "mfu")


def rows(bench: Bench) -> Iterator[Row]:
    sys.path.append(str(pathlib.Path(__file__).parents[2] / "tests"))
    from test_conformance import CASES  # how to call every factory stands there

    os.environ.update(WANDB_MODE="offline", WANDB_DIR=str(bench.root), WANDB_SILENT="true")
    os.environ.update(MLFLOW_ALLOW_FILE_STORE="true")
    trials = bench.trials("every shipped callback: saved inside and between epochs", len(CASES))
    for name in list(CASES)[: bench.count(len(CASES))]:
        with trials.one(name) as directory, quiet():
            check(directory, [CASES[name]])
    yield trials.row()
    names = {case: CASES[case].make(bench.root).name for case in CASES}
    possible = [pair for pair in itertools.combinations(CASES, 2) if fit_together(*(names[case] for case in pair))]
    order = bench.rng("pairs").permutation(len(possible))
    trials = bench.trials("pairs of callbacks", PAIRS)
    for number in order[: bench.count(PAIRS)]:
        one, other = possible[number]
        with trials.one(f"{one} and {other}") as directory, quiet():
            check(directory, [CASES[one], CASES[other]])
    yield trials.row(possible=len(possible))


def fit_together(one: str, other: str) -> bool:
    return one != other and not any({one, other} <= apart for apart in APART)


def check(directory: pathlib.Path, cases: list[Any]) -> None:
    """Train with callbacks, and again from what was saved on the way, with new ones each time."""
    numbers = itertools.count()
    options = {name: value for case in cases for name, value in case.options.items()}

    def run(*more: ant.Callback, resume: pathlib.Path | None = None) -> ant.TrainState:
        place = directory / str(next(numbers))
        place.mkdir()
        tiny = problem(*(case.make(place) for case in cases), *more, **options)
        return tiny.trainer.fit(tiny.state, tiny.train_loader, EPOCHS, tiny.val_loader, resume=resume)[0]

    saved: list[pathlib.Path] = []
    whole = run(saving(directory, saved))
    expect(saved or whole.stop and int(whole.step) <= SAVED_AT[0], "nothing was saved")
    for place in saved:
        goes_on = run(saving(directory, []), resume=place)
        differs = difference(without_measures(whole), without_measures(goes_on))
        expect(not differs, f"going on from {place.name}: {differs}")


def without_measures(state: ant.TrainState) -> ant.TrainState:
    """The state without what was measured of the process: it is a fact of the process, and not of the run."""
    history = [{name: value for name, value in row.items() if name not in MEASURES} for row in state.history]
    return state.replace(host=state.on_host()._replace(history=History(history)))


def saving(directory: pathlib.Path, saved: list[pathlib.Path]) -> ant.Callback:
    """Saves the states of some steps, each into a directory of its own, which it notes."""
    done: set[int] = set()

    def on_checkpoint(trainer: Any, state: Any, logs: Any) -> Any:
        step = int(state.step)
        at_epoch_end = state.batch_idx == 0 and state.epoch == 2
        if (step == SAVED_AT[0] or at_epoch_end) and not state.stop and step not in done:
            done.add(step)
            place = directory / f"saved-{step}"
            if not place.exists():
                trainer.save(place, state)
                saved.append(place)
        return state, logs

    return ant.Callback(
        name="saving", every=1, on_batch_end=lambda i, t, state, logs: (state, logs), on_checkpoint=on_checkpoint
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
