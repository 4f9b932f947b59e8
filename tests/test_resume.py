"""A run that is cut anywhere goes on, and ends as if it had not been; what is damaged gives no number."""

import dataclasses
import itertools
import logging
import pathlib
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState as FlaxTrainState
from problems import BATCH, adam, assert_bit_equal, batches, data, host, standard_promotion, trainer

import ant_jax as ant
from ant_jax import testing
from ant_jax._checkpoint.manifest import Damage, read_manifest
from ant_jax._checkpoint.reading import read_arrays, steps_in


library = ant.callbacks


def plateau() -> optax.GradientTransformation:
    return standard_promotion(optax.inject_hyperparams(optax.adam)(learning_rate=0.01))


def window_means(name: str, every: int | None) -> ant.Callback:
    """Remembers and publishes what it has seen in its windows, as a float of the host."""

    def init(state: Any) -> Any:
        return {"seen": 0.0, "opened": 0}

    def on_epoch_begin(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        memory = state.callback_states[name]
        return state.with_callback_state(name, {**memory, "opened": memory["opened"] + 1}), {**logs, f"{name}_e": 1.5}

    def on_batch_begin(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        return state, {**logs, f"{name}_from": float(batch_idx)}

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        memory = state.callback_states[name]
        seen = memory["seen"] + float(np.sum(logs.window["loss"], dtype=np.float64))
        return state.with_callback_state(name, {**memory, "seen": seen}), logs

    hooks = {"on_epoch_begin": on_epoch_begin, "on_batch_begin": on_batch_begin, "on_batch_end": on_batch_end}
    return host(name, every=every, init=init, **hooks)


@pytest.mark.parametrize(
    "options",
    [
        {"fuse": True},
        {"fuse": False, "gradient_accumulation_steps": 3},
        {"gradient_accumulation_steps": 3, "precision": "float16"},
    ],
    ids=["fused", "unfused, accumulating", "accumulating in float16"],
)
def test_a_run_goes_on_from_every_step(options):
    callbacks = [
        library.learning_rate_schedule(lambda epoch: 0.1 / (1 + epoch), per="epoch"), library.gradient_noise(0.01),
        library.reduce_on_plateau("train_loss", patience=0, factor=0.5, name="plateau"), library.ema(0.9),
        window_means("threes", 3), window_means("sevens", 7), library.roll_back(every=4),
    ]  # fmt: skip
    a_trainer = trainer(*callbacks, optimizer=plateau(), **options)
    loader = ant.ArrayLoader(data(6 * BATCH + 3), BATCH)
    testing.check_resume(a_trainer, loader, 2, batches(2))


def test_check_resume_names_the_step_and_the_leaf_of_a_run_that_does_not():
    seen: list[int] = []

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        seen.append(batch_idx)
        return state.replace(params={**state.params, "bias": state.params["bias"] + len(seen)}), logs

    a_trainer = trainer(host("counts", on_batch_end=on_batch_end))
    with pytest.raises(testing.ResumeFault, match=r"from step 2 \(epoch 0, batch 2\) .*: state.params/bias differs"):
        testing.check_resume(a_trainer, batches(3), 1, steps=[2])
    with pytest.raises(ValueError, match="the run has no step 9; its steps are 1 to 3"):
        testing.check_resume(trainer(), batches(3), 1, steps=[9])


# --- loaders


def grain_dataset() -> Any:
    inputs, targets = data(7 * BATCH)
    source = grain.MapDataset.source(list(range(7 * BATCH))).shuffle(seed=3)
    return source.map(lambda i: (inputs[i], targets[i])).batch(BATCH, drop_remainder=True)


class Endless:
    """An iterator without an end that counts how often it is put somewhere."""

    def __init__(self) -> None:
        self._iterator, self.puts = iter(grain_dataset().repeat().to_iter_dataset()), 0

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return next(self._iterator)

    def get_state(self) -> Any:
        return self._iterator.get_state()

    def set_state(self, state: Any) -> None:
        self.puts += 1
        self._iterator.set_state(state)


@pytest.mark.parametrize("fuse", [True, False])
def test_a_loader_with_a_state_is_put_where_it_was(fuse):
    testing.check_resume(trainer(fuse=fuse), grain_dataset().to_iter_dataset(), 2, steps=[1, 3, 7, 9])
    endless = Endless()
    state = trainer().init(batches(1)[0])
    a_trainer = trainer(fuse=fuse)
    whole, history = a_trainer.fit(state, endless, 3, steps_per_epoch=5)
    # The iterator is somewhere else by now; what a run saves puts it back.
    steps: dict[int, ant.TrainState] = {}

    def keep(trainer: Any, state: Any, logs: Any) -> Any:
        steps[int(state.step)] = state
        return state, logs

    identity = lambda i, trainer, state, logs: (state, logs)  # noqa: E731
    keeping = trainer(host("keep", every=2, on_batch_end=identity, on_checkpoint=keep), fuse=fuse)
    keeping.fit(state, Endless(), 3, steps_per_epoch=5)
    assert sorted(steps) == [2, 4, 5, 7, 9, 10, 12, 14, 15]
    for i, step in enumerate((2, 5, 9, 10)):
        end, again = a_trainer.fit(steps[step], endless, 3, steps_per_epoch=5)
        assert_bit_equal(end, whole)
        assert again == history
        assert endless.puts == i + 1  # where the run goes on, and not at every epoch


class Cycling:
    """An iterable without an end that can only be read from its beginning."""

    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(batches(7))


LIMITED = {
    "list": lambda: [*batches(6), *batches(1, batch=3)],  # whose shorter last batch comes in the middle of epochs
    "iterable": Cycling,
    "grain": lambda: grain_dataset().repeat().to_iter_dataset(),
    "array": lambda: ant.ArrayLoader(data(7 * BATCH), BATCH),
}


@pytest.mark.parametrize(("name", "fuse"), [*((name, True) for name in LIMITED), ("list", False)])
def test_epochs_of_steps_per_epoch_go_on_inside_and_between_them(name, fuse):
    loader, looking = LIMITED[name](), window_means("threes", 3)
    a_trainer = trainer(looking, fuse=fuse, gradient_accumulation_steps=2)
    start = a_trainer.init(batches(1)[0])
    steps = None if name == "list" and fuse else [1, 4, 7]
    testing.check_resume(a_trainer, loader, 3, state=start, steps_per_epoch=4, steps=steps)
    whole, history = a_trainer.fit(start, loader, 3, steps_per_epoch=4)
    half, _ = a_trainer.fit(start, loader, 2, steps_per_epoch=4)
    state, again = a_trainer.fit(half, loader, 3, steps_per_epoch=4)
    assert_bit_equal(state, whole)
    assert again == history


def test_between_epochs_other_data_are_read_from_their_beginning():
    a_trainer = trainer()
    start, _ = a_trainer.fit(a_trainer.init(batches(1)[0]), batches(5), 1, steps_per_epoch=3)
    other = batches(6, seed=1)
    state, _ = a_trainer.fit(start, other, 2, steps_per_epoch=3)
    assert_bit_equal(state, a_trainer.fit(start, other[:3], 2)[0])


@pytest.mark.parametrize("limit", [None, 4])
def test_a_run_that_reads_nothing_ahead_goes_on_from_every_place(limit):
    states: dict[int, ant.TrainState] = {}

    def keep(trainer: Any, state: Any, logs: Any) -> Any:
        states[int(state.step)] = state
        return state, logs

    identity = lambda i, trainer, state, logs: (state, logs)  # noqa: E731
    keeping = host("keep", on_batch_end=identity, on_checkpoint=keep)
    a_trainer = trainer(window_means("threes", 3), keeping)
    start = a_trainer.init(batches(1)[0])
    options: dict[str, Any] = {"steps_per_epoch": limit, "prefetch": 0}
    whole, history = a_trainer.fit(start, Reiterable(), 3, **options)
    assert sorted(states) == list(range(1, 13))
    for step in (1, 3, 4, 6, 8):
        end, again = a_trainer.fit(states[step], Reiterable(), 3, **options)
        assert_bit_equal(end, whole)
        assert again == history


class Reusing:
    """An iterator whose state is one object that it changes."""

    def __init__(self) -> None:
        self._state = {"next": 0}

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        self._state["next"] += 1
        return batches(12)[(self._state["next"] - 1) % 12]

    def get_state(self) -> Any:
        return self._state

    def set_state(self, state: Any) -> None:
        self._state["next"] = state["next"]


def test_an_iterator_may_give_the_state_that_it_goes_on_with():
    a_trainer = trainer()
    testing.check_resume(a_trainer, Reusing(), 2, state=a_trainer.init(batches(1)[0]), steps_per_epoch=5)


class Shrinking(Reusing):
    """One whose length is what is left of it."""

    def __len__(self) -> int:
        return 12 - self._state["next"]


def test_between_epochs_an_iterator_is_put_back_whatever_it_says_of_its_length():
    a_trainer = trainer()
    start = a_trainer.init(batches(1)[0])
    half, _ = a_trainer.fit(start, Shrinking(), 1, steps_per_epoch=5)
    state, _ = a_trainer.fit(half, Shrinking(), 2, steps_per_epoch=5)
    assert_bit_equal(state, a_trainer.fit(start, batches(12)[:10], 1)[0], "params")


def test_fewer_steps_per_epoch_than_are_done_are_refused():
    def fail(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        raise RuntimeError("on purpose")

    a_trainer = trainer(host("fail", every=4, on_batch_end=fail))
    with pytest.raises(RuntimeError, match="on purpose") as raised:
        a_trainer.fit(a_trainer.init(batches(1)[0]), batches(6), 1)
    with pytest.raises(ant.BatchError, match="4 batches of epoch 0 are done, more than steps_per_epoch=3"):
        trainer().fit(raised.value.train_state, batches(6), 1, steps_per_epoch=3)  # type: ignore[attr-defined]


class Reiterable:
    """Neither a list nor a loader that can be put at a position."""

    def __iter__(self) -> Iterator[Any]:
        return iter(batches(4))


def resuming_inside(directory: Any, loader: Any) -> Any:
    def fail(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        if int(state.step) == 3:
            raise RuntimeError("on purpose")
        return state, logs

    failing = trainer(library.checkpoint(directory, every=2), host("fail", on_batch_end=fail))
    with pytest.raises(RuntimeError, match="on purpose"):
        failing.fit(failing.init(batches(1)[0]), batches(4), 1)
    mended = trainer(library.checkpoint(directory, every=2))
    return mended.fit(mended.init(batches(1)[0]), loader, 1, resume=directory)


def test_other_loaders_are_read_from_their_beginning_and_that_is_said(tmp_path, caplog, capsys):
    whole, history = trainer().fit(trainer().init(batches(1)[0]), batches(4), 1)
    end, again = resuming_inside(tmp_path / "a", Reiterable())
    assert_bit_equal(end, whole)
    assert again == history
    assert "train_loader cannot be put at a position: its first 2 batches of epoch 0 are read" in caplog.text
    assert "resumed from step 2, epoch 0, batch 2; saved 20" in capsys.readouterr().out
    caplog.clear()
    resuming_inside(tmp_path / "b", batches(4))
    assert not caplog.text


def test_what_can_be_read_only_once_is_refused(tmp_path):
    with pytest.raises(ant.BatchError, match="train_loader is a list_iterator, which can be read only once and cannot"):
        resuming_inside(tmp_path, iter(batches(4)))


def test_other_data_are_refused_inside_an_epoch_and_when_resuming(tmp_path):
    with pytest.raises(ant.StateMismatch, match="batch 2 of epoch 0, and train_loader has other data .*(.|\n)*: exp"):
        resuming_inside(tmp_path, batches(5))
    loader = ant.ArrayLoader(data(4 * BATCH), BATCH)
    others = {
        "seed": ant.ArrayLoader(data(4 * BATCH), BATCH, seed=1),
        "examples": ant.ArrayLoader(data(5 * BATCH), BATCH),
        "crc32": ant.ArrayLoader(data(4 * BATCH, seed=1), BATCH),
        "batch_size": ant.ArrayLoader(data(4 * BATCH), BATCH // 2),
    }
    a_trainer = trainer(library.checkpoint(tmp_path / "array"))
    state = a_trainer.init(batches(1)[0])
    end, _ = a_trainer.fit(state, loader, 1)
    for what, other in others.items():
        with pytest.raises(ant.StateMismatch, match=f"\n  {what}: expected"):
            a_trainer.fit(state, other, 2, resume=tmp_path / "array")
    a_trainer.fit(end, others["crc32"], 2)  # by hand, and between epochs, one may


class Broken:
    """Gives so many batches, and fails."""

    def __init__(self, batches_before: int):
        self.left = batches_before

    def __iter__(self) -> Iterator[Any]:
        for batch in batches(4):
            if not self.left:
                raise OSError("the disk is gone")
            self.left -= 1
            yield batch


@pytest.mark.parametrize("good", [1, 3, 4, 6])
def test_a_loader_that_fails_leaves_the_last_whole_step(good, tmp_path):
    a_trainer = trainer(window_means("threes", 3), library.checkpoint(tmp_path), gradient_accumulation_steps=3)
    start = a_trainer.init(batches(1)[0])
    with pytest.raises(OSError, match="the disk is gone") as raised:
        a_trainer.fit(start, Broken(good), 2)
    if good % 4:
        assert f"in train_loader, after {good % 4} batches of epoch {good // 4}" in raised.value.__notes__
    assert steps_in(tmp_path)[-1] == good
    end, history = a_trainer.fit(start, batches(4), 2, resume=tmp_path)
    whole = dataclasses.replace(a_trainer, callbacks=[window_means("threes", 3)])
    expected, again = whole.fit(whole.init(batches(1)[0]), batches(4), 2)
    assert_bit_equal(end, expected)
    assert history == again


# --- the same command again


def test_the_same_command_begins_goes_on_and_is_over(tmp_path, capsys):
    def command(num_epochs: int, *more: ant.Callback) -> ant.TrainState:
        a_trainer = trainer(library.checkpoint(tmp_path / "run"), *more)
        state = a_trainer.init(batches(1)[0])
        return a_trainer.fit(state, ant.ArrayLoader(data(), BATCH), num_epochs, resume=tmp_path / "run")[0]

    whole, _ = trainer().fit(trainer().init(batches(1)[0]), ant.ArrayLoader(data(), BATCH), 3)
    command(1)
    assert f"no checkpoint in {tmp_path / 'run'}: the run begins" in capsys.readouterr().out
    assert_bit_equal(command(3), whole)
    assert "resumed from step 5, epoch 1, batch 0; saved" in capsys.readouterr().out
    assert_bit_equal(command(3), whole)
    assert "resumed from step 15, epoch 3, batch 0" in capsys.readouterr().out


def test_a_run_that_stopped_by_itself_is_over_too(tmp_path, capsys):
    def command() -> ant.TrainState:
        a_trainer = trainer(library.stop_at(1e9, "train_loss"), library.checkpoint(tmp_path))
        return a_trainer.fit(a_trainer.init(batches(1)[0]), batches(3), 5, resume=tmp_path)[0]

    first = command()
    assert first.epoch == 1 and first.stop
    assert_bit_equal(command(), first)
    said = capsys.readouterr().out
    assert "the run is over after epoch 1; nothing is trained" in said
    assert "a callback asked the run to stop, so it ends after epoch 1; to train on, with more patience for" in said


def test_a_run_that_was_stopped_trains_on_as_it_is_told_as_if_it_had_not_been(tmp_path, capsys):
    def made(patience: int, *more: ant.Callback) -> ant.Trainer:
        return trainer(library.early_stopping("train_loss", patience=patience), *more, optimizer=optax.sgd(0.0))

    first = made(1, library.checkpoint(tmp_path))
    start, loader = first.init(batches(1)[0]), ant.ArrayLoader(data(), BATCH)
    state, _ = first.fit(start, loader, 9)
    patient = made(3, library.checkpoint(tmp_path))
    again, _ = patient.fit(start, loader, 9, resume=tmp_path)
    assert state.epoch == again.epoch < 5
    assert f"leave out resume and give fit the state trainer.restore({str(tmp_path)!r})" in capsys.readouterr().out
    end, history = patient.fit(patient.restore(tmp_path), loader, 9)
    expected, whole = made(3).fit(start, loader, 9)
    assert_bit_equal(end, expected)
    assert history == whole and end.epoch > again.epoch
    resumed, _ = patient.fit(start, loader, 9, resume=tmp_path)  # what was trained on is what the directory holds now
    assert resumed.epoch == end.epoch


def test_a_run_that_ends_with_its_window_says_so_when_it_goes_on(tmp_path, capsys):
    stop = library.stop_at(1e9, "loss", per="batch")
    a_trainer = trainer(stop, library.checkpoint(tmp_path, every=1, keep=9), gradient_accumulation_steps=2)
    start = a_trainer.init(batches(1)[0])
    end, _ = a_trainer.fit(start, batches(5), 2)
    shutil.rmtree(tmp_path / f"step_{int(end.step)}")
    again, _ = a_trainer.fit(start, batches(5), 2, resume=tmp_path)
    assert_bit_equal(again, end)
    assert "so it ends with epoch 1, which it is in; to train on" in capsys.readouterr().out


def test_numbers_that_the_code_has_changed_win_over_those_of_the_file(tmp_path, caplog):
    def made(rate: float, norm: float) -> ant.Trainer:
        optimizer = standard_promotion(optax.inject_hyperparams(optax.sgd)(learning_rate=rate))
        clip = library.clip_by_global_norm(ant.Hyperparam(norm))
        return trainer(clip, library.reduce_on_plateau("train_loss", patience=0, factor=0.5), optimizer=optimizer)

    first = made(0.5, 2.0)
    state, _ = first.fit(first.init(batches(1)[0]).with_hyperparams(max_norm=1.0), [batches(1)[0]], 2)
    state = state.with_hyperparams(learning_rate=0.125)
    first.save(tmp_path, state)
    same = made(0.5, 2.0).restore(tmp_path)
    assert_bit_equal(same, state)
    assert not caplog.text
    other = made(0.25, 2.0).restore(tmp_path)
    assert {name: float(value) for name, value in other.hyperparams.items()} == {
        "learning_rate": 0.25,
        "clip_by_global_norm/max_norm": 1.0,
    }
    assert "learning_rate is 0.25 in the code by now, where the run began with 0.5; that replaces" in caplog.text
    caplog.clear()
    made(0.25, 2.0).save(tmp_path / "again", other)
    assert_bit_equal(made(0.25, 2.0).restore(tmp_path / "again"), other)
    assert not caplog.text


def test_the_decision_to_fuse_is_kept(tmp_path, monkeypatch):
    a_trainer = trainer()
    state, _ = a_trainer.fit(a_trainer.init(batches(1)[0]), batches(2), 1)
    assert state.on_host().fused == ("cpu", True)
    a_trainer.save(tmp_path, state)
    monkeypatch.setattr("ant_jax._engine.programs.slow_in_loops", lambda jaxpr: True)  # as another version might decide
    decided = lambda a_trainer, state: a_trainer.fit(state, batches(2), 2)[0].on_host().fused  # noqa: E731
    other = trainer()
    assert decided(other, other.init(batches(1)[0])) == ("cpu", False)
    assert decided(trainer(), trainer().restore(tmp_path)) == ("cpu", True)
    assert decided(trainer(fuse=False), trainer().restore(tmp_path)) == ("cpu", False)


# --- damage


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, dict[int, ant.TrainState]]:
    """Three checkpoints, and what is in them."""
    directory = tmp_path_factory.mktemp("saved")
    states = {}
    a_trainer = trainer(library.ema(0.9), optimizer=adam())
    state = a_trainer.init(batches(1)[0])
    with a_trainer.checkpointer(directory) as checkpointer:
        for _ in range(3):
            state, _ = a_trainer.fit(state, batches(2), state.epoch + 1)
            checkpointer.save(state)
            states[int(state.step)] = state
    return directory, states


def harm(path: pathlib.Path, how: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
        return
    if how == "truncate":
        content = content[: rng.randrange(max(len(content), 1))]
    elif content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8) if how == "bit" else 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("seed", range(24))
def test_damage_never_gives_a_wrong_number(seed, saved, tmp_path, caplog):
    directory, states = saved
    run = tmp_path / "run"
    shutil.copytree(directory, run)
    rng = random.Random(seed)
    newest = max(states)
    files = sorted(path for path in (run / f"step_{newest}").rglob("*") if path.is_file())
    harm(rng.choice(files), rng.choice(["bit", "byte", "truncate", "delete"]), rng)
    a_trainer = trainer(library.ema(0.9), library.checkpoint(run), optimizer=adam())
    restored = a_trainer.restore(run, fall_back=True)
    assert int(restored.step) in sorted(states)[-2:]
    assert_bit_equal(restored, states[int(restored.step)])
    assert restored.history == states[int(restored.step)].history
    set_aside = (run / f"step_{newest}.corrupt").exists()
    assert set_aside == (int(restored.step) != newest) == ("is damaged" in caplog.text)
    end, _ = a_trainer.fit(restored, batches(2), 4)  # saving works afterwards
    assert_bit_equal(a_trainer.restore(run), end)


def flip_a_value(path: pathlib.Path) -> None:
    """Change what Orbax does not notice: the values of an array that is not tiny."""
    largest = max((path / "arrays").rglob("*"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def test_a_damaged_checkpoint_is_an_error_unless_told_and_all_damaged_always(tmp_path):
    a_trainer = trainer(model=linear(width=999))
    state = a_trainer.init(batches(1)[0])
    for _ in range(3):
        state, _ = a_trainer.train_step(state, batches(1)[0])
        a_trainer.save(tmp_path, state)
    flip_a_value(tmp_path / "step_3")
    arrays = read_arrays(tmp_path / "step_3" / "arrays")  # Orbax takes the wrong number for a right one
    assert not np.array_equal(arrays["params", "kernel"], state.params["kernel"])
    with pytest.raises(ant.CheckpointCorrupt, match="step 3 in .* is damaged: params/kernel is not as it w") as raised:
        a_trainer.restore(tmp_path)
    assert raised.value.step == 3
    assert "the other checkpoints there are of steps 1, 2" in str(raised.value)
    assert steps_in(tmp_path) == [1, 2, 3]  # looking changes nothing
    (tmp_path / "step_2" / "host" / "metadata").write_text("{}")
    shutil.rmtree(tmp_path / "step_1" / "arrays")
    with pytest.raises(ant.CheckpointCorrupt, match="There is no sound one to go on from; to begin afresh, choose"):
        a_trainer.fit(a_trainer.init(batches(1)[0]), batches(2), 4, resume=tmp_path)
    assert steps_in(tmp_path) == [1, 2, 3]
    with pytest.raises(ValueError, match="restore: fall_back=True chooses the step"):
        a_trainer.restore(tmp_path, 2, fall_back=True)


def test_all_damaged_ones_after_the_newest_sound_one_are_set_aside(saved, tmp_path, caplog):
    directory, states = saved
    run = tmp_path / "run"
    shutil.copytree(directory, run)
    first, *later = sorted(states)
    for step in later:
        (run / f"step_{step}" / "host" / "metadata").write_text("{}")
    a_trainer = trainer(library.ema(0.9), library.checkpoint(run, keep=9), optimizer=adam())
    state = a_trainer.init(batches(1)[0])
    a_trainer.fit(state, batches(2), 3, resume=run)
    assert steps_in(run) == sorted(states)  # written anew
    assert sorted(path.name for path in run.glob("*.corrupt")) == [f"step_{step}.corrupt" for step in later]
    assert_bit_equal(a_trainer.restore(run, first), states[first])
    assert_bit_equal(a_trainer.restore(run), states[later[-1]])


def test_junk_is_no_checkpoint_and_in_nobodys_way(tmp_path, caplog):
    for name in ("999", "step_", "step_x", "step_07", "step_5.corrupt", "2026-11-25"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_777").write_text("a file")
    (tmp_path / ".DS_Store").write_text("")
    a_trainer = trainer(library.checkpoint(tmp_path))
    state = a_trainer.init(batches(1)[0])
    a_trainer.fit(state, batches(2), 2, resume=tmp_path)
    assert steps_in(tmp_path) == [2, 4]
    assert "step_777 is no checkpoint; it is renamed to step_777.corrupt" in caplog.text
    (tmp_path / "step_888").mkdir()  # what is left of one
    a_trainer.fit(state, batches(2), 3, resume=tmp_path)
    assert "step 888 in" in caplog.text and "renamed to step_888.corrupt, and step 4 is taken instead" in caplog.text
    assert steps_in(tmp_path) == [2, 4, 6]
    assert {"step_777.corrupt", "step_07.corrupt", "999", "step_x"} <= {path.name for path in tmp_path.iterdir()}


# --- what does not fit


def linear(features: str = "kernel", width: int = 3, dtype: Any = jnp.float32) -> Any:
    def init(key: Any, inputs: Any) -> Any:
        return {features: jax.random.normal(key, (4, width), dtype), "bias": jnp.zeros(width)}, {}

    def apply(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
        outputs = inputs @ params[features].astype(jnp.float32)
        return outputs + jnp.broadcast_to(params["bias"], outputs.shape), model_state

    return init, apply


def with_model_state() -> Any:
    init, apply = linear()
    return (lambda key, inputs: (init(key, inputs)[0], {"mean": jnp.zeros(3)})), apply


MISMATCHES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "renamed": ({}, {"model": linear("weight")}, "params/kernel: unexpected, float32.4,3.(.|\n)*weight: missing"),
    "shape": ({}, {"model": linear(width=5)}, r"params/kernel: expected float32\[4,5\], got float32\[4,3\]"),
    "dtype": ({}, {"model": linear(dtype=jnp.bfloat16)}, r"params/kernel: expected bfloat16\[4,3\], got float32"),
    "more": ({}, {"model": with_model_state()}, r"model_state/mean: missing, expected float32\[3\]"),
    "less": ({"model": with_model_state()}, {}, r"model_state/mean: unexpected, float32\[3\]"),
    "optimizer": ({}, {"optimizer": adam()}, "opt_state/0/count: missing"),
    "another optimizer": ({"optimizer": adam()}, {}, "opt_state/0/mu/kernel: unexpected"),
    "accumulation": ({}, {"gradient_accumulation_steps": 2}, "accumulator/examples: missing"),
    "no accumulation": ({"gradient_accumulation_steps": 2}, {}, "accumulator/examples: unexpected"),
    "precision": ({}, {"precision": "float16"}, "loss_scale/scale: missing"),
    "memory": (
        {"callbacks": [library.roll_back(name="a")]}, {"callbacks": [library.ema(name="a")]},
        "callback_states/a/average/bias: missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISMATCHES)
def test_what_does_not_fit_is_named_by_its_path(kind, tmp_path):
    saving, restoring, message = MISMATCHES[kind]
    options = {"model": linear()}
    first = dataclasses.replace(trainer(**options), **saving)
    state, _ = first.fit(first.init(batches(1)[0]), batches(2), 1)
    first.save(tmp_path, state)
    second = dataclasses.replace(trainer(**options), **restoring)
    with pytest.raises(ant.StateMismatch, match=rf"nothing was restored(.|\n)*{message}"):
        second.fit(second.init(batches(1)[0]), batches(2), 2, resume=tmp_path)


def test_a_key_of_another_kind_is_named(tmp_path):
    a_trainer = trainer()
    state = a_trainer.init(batches(1)[0])
    a_trainer.save(tmp_path, state.replace(key=jax.random.key(0, impl="rbg")))
    with pytest.raises(ant.StateMismatch, match="key: expected a random key of kind .*fry.*, got rbg"):
        a_trainer.fit(state, batches(2), 1, resume=tmp_path)


# --- parameters of another run


class Net(nn.Module):
    """With batch statistics."""

    classes: int = 3

    @nn.compact
    def __call__(self, inputs: Any, train: bool = False) -> Any:
        hidden = nn.Dense(8, name="body")(inputs)
        return nn.Dense(self.classes, name="head")(nn.BatchNorm(use_running_average=not train, name="norm")(hidden))


def net(classes: int = 3, **options: Any) -> ant.Trainer:
    return trainer(model=Net(classes), **options)


@pytest.fixture(scope="module")
def trained() -> ant.TrainState:
    a_trainer = net()
    return a_trainer.fit(a_trainer.init(batches(1)[0]), batches(3), 1)[0]


def leaf(tree: Any, *path: str) -> np.ndarray:
    for key in path:
        tree = tree[key]
    return np.asarray(tree)


def test_parameters_are_taken_over_by_their_paths(trained, tmp_path):
    net().save(tmp_path, trained)
    other = net(5)
    fresh = other.init(batches(1)[0], seed=1)
    state = other.restore_params(tmp_path, fresh, only=["body/*", "norm/*"], model_state=True)
    assert np.array_equal(leaf(state.params, "body", "kernel"), leaf(trained.params, "body", "kernel"))
    assert np.array_equal(leaf(state.params, "head", "kernel"), leaf(fresh.params, "head", "kernel"))
    assert_bit_equal(state, trained, "model_state")
    assert_bit_equal(state, fresh, "step", "opt_state")
    other.fit(state, batches(3), 1)
    with pytest.raises(ant.StateMismatch, match=r"head/kernel: expected float32\[8,5\], got float32\[8,3\]"):
        other.restore_params(tmp_path, fresh)
    with pytest.raises(ValueError, match=r"only='bodi/\*' matches none of the params: body/bias"):
        other.restore_params(tmp_path, fresh, only=["bodi/*"])
    with pytest.raises(TypeError, match=r"write only=\['body/\*'\]"):
        other.restore_params(tmp_path, fresh, only="body/*")
    with pytest.raises(FileNotFoundError, match="has no checkpoint of step 7; the steps there are: 3"):
        other.restore_params(tmp_path, fresh, 7)


def variables_of(state: ant.TrainState) -> Any:
    return {"params": state.params, **state.model_state}


@pytest.mark.parametrize("kind", ["variables", "params", "TrainState", "manager", "manager with items"])
def test_parameters_that_plain_orbax_saved_in_a_loop_by_hand(kind, trained, tmp_path):
    path = tmp_path / "there"
    source = None
    if kind.startswith("manager"):
        with ocp.CheckpointManager(path) as manager:
            for step in (3, 12):
                tree = ocp.args.StandardSave(variables_of(trained))
                manager.save(step, args=ocp.args.Composite(model=tree) if kind.endswith("items") else tree)
    else:
        made = FlaxTrainState.create(apply_fn=Net().apply, params=variables_of(trained), tx=optax.sgd(0.1))
        tree = {"variables": variables_of(trained), "params": trained.params, "TrainState": made}[kind]
        source = "params/params" if kind == "TrainState" else None
        with ocp.StandardCheckpointer() as saver:
            saver.save(path, tree)
    fresh = net().init(batches(1)[0], seed=1)
    with_statistics = kind != "params"
    state = net().restore_params(path, fresh, source=source, model_state=with_statistics)
    assert_bit_equal(state, trained, "params", *(["model_state"] if with_statistics else []))


def test_another_dtype_is_converted_only_when_asked_and_a_place_that_is_not_there_is_named(trained, tmp_path):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), trained.params)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "half", {"params": half})
    fresh = net().init(batches(1)[0], seed=1)
    with pytest.raises(ant.StateMismatch, match=r"body/bias: expected float32\[8\], got bfloat16\[8\]"):
        net().restore_params(tmp_path / "half", fresh)
    state = net().restore_params(tmp_path / "half", fresh, cast=True)
    assert state.params["body"]["kernel"].dtype == jnp.float32
    assert np.array_equal(leaf(state.params, "head", "kernel"), np.asarray(half["head"]["kernel"], np.float32))
    with pytest.raises(ant.StateMismatch, match="has nothing under source='ema/params'; there are: params"):
        net().restore_params(tmp_path / "half", fresh, source="ema/params")
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        net().restore_params(tmp_path / "nowhere", fresh)


# --- numbers gone bad


def test_a_checkpoint_holds_no_parameter_that_is_not_finite_unless_asked_for(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)  # Orbax shows what ends a save
    a_trainer = trainer()
    good = a_trainer.init(batches(1)[0])
    bad = good.replace(step=good.step + 1, params={**good.params, "bias": good.params["bias"].at[1].set(jnp.nan)})
    a_trainer.save(tmp_path, good)
    with pytest.raises(ant.NonFiniteError, match="step 1 was not saved: params/bias is not finite.*is of step 0"):
        a_trainer.save(tmp_path, bad)
    assert [path.name for path in tmp_path.glob("step*")] == ["step_0"]
    a_trainer.save(tmp_path, bad, allow_nonfinite=True)
    assert np.isnan(a_trainer.restore(tmp_path).params["bias"]).sum() == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nor_any_model_state_or_open_window(value, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    pair = (
        lambda key, inputs: ({"w": jnp.ones(3)}, {"mean": jnp.zeros(2), "seen": jnp.int32(0)}),
        lambda params, model_state, inputs, key: (inputs[:, :3] * params["w"], model_state),
    )
    a_trainer = trainer(model=pair, gradient_accumulation_steps=2)
    good = a_trainer.init(batches(1)[0])
    assert good.accumulator is not None
    window = dataclasses.replace(good.accumulator, grads={"w": jnp.array([0.0, value, 0.0])})
    spoilt = {
        "model_state/mean": good.replace(model_state={**good.model_state, "mean": jnp.array([value, 0.0])}),
        "accumulator/grads/w": good.replace(accumulator=window),
    }
    for place, state in spoilt.items():
        with pytest.raises(ant.NonFiniteError, match=f"step 0 was not saved: {place} is not finite"):
            a_trainer.save(tmp_path, state)
    assert not list(tmp_path.glob("step*"))


def test_a_run_whose_parameters_are_not_finite_ends_at_the_next_save(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    a_trainer = trainer(library.checkpoint(tmp_path), optimizer=optax.sgd(1e38))
    with pytest.raises(ant.NonFiniteError, match="was not saved: params/"):
        a_trainer.fit(a_trainer.init(batches(1)[0]), [(1e4 * x, y) for x, y in batches(3)], 9)
    assert not steps_in(tmp_path)


def test_going_back_leaves_hyperparameters_as_they_are():
    def change(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        return (state.with_hyperparams(learning_rate=0.125) if batch_idx == 2 else state), logs

    a_trainer = trainer(library.roll_back(), host("change", on_batch_end=change), optimizer=plateau())
    start = a_trainer.init(batches(1)[0])
    loader = batches(6)
    loader[4] = (loader[4][0] * np.float32("nan"), loader[4][1])
    state, history = a_trainer.fit(start, loader, 1)
    assert history[0]["roll_backs"] == 1
    assert float(state.hyperparams["learning_rate"]) == 0.125
    assert set(state.hyperparams) == set(start.hyperparams) and not any(
        "roll_back" in name for name in start.hyperparams
    )
    with pytest.raises(ant.NonFiniteError, match="once more after the run had gone back 3 times"):
        a_trainer.fit(start, [loader[4]] * 5, 1)


# --- saving that fails


def test_a_save_that_fails_is_named_and_the_next_one_works(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL)
    full = [False]
    from ant_jax._checkpoint import storage

    write = storage._SealHandler._write

    async def failing(self: Any, directory: Any, args: Any) -> None:
        if full[0]:
            raise OSError(28, "No space left on device")
        await write(self, directory, args)

    monkeypatch.setattr(storage._SealHandler, "_write", failing)
    a_trainer = trainer()
    state = a_trainer.init(batches(1)[0])
    with a_trainer.checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(state)
        checkpointer.wait()
        for _ in range(2):
            full[0] = True
            state, _ = a_trainer.train_step(state, batches(1)[0])
            checkpointer.save(state)
            with pytest.raises(ant.CheckpointError, match=r"no space is left .*MiB are free.; the last good one is"):
                checkpointer.wait()
            assert [path.name for path in tmp_path.glob("step*")] == ["step_0"] == [f"step_{checkpointer.latest_step}"]
        full[0] = False
        checkpointer.save(state)
    assert steps_in(tmp_path) == [2]


def test_a_run_may_go_on_without_checkpoints_that_fail(tmp_path, monkeypatch, caplog):
    from ant_jax._checkpoint import storage

    async def failing(self: Any, directory: Any, args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage._SealHandler, "_write", failing)
    a_trainer = trainer(library.tolerate(library.checkpoint(tmp_path, every=1), failures=2))
    state, _ = a_trainer.fit(a_trainer.init(batches(1)[0]), batches(4), 2)
    assert state.epoch == 2
    assert "no space is left on the device" in caplog.text
    assert not steps_in(tmp_path)


def test_what_cannot_be_read_just_now_is_not_called_damaged(tmp_path, monkeypatch):
    from ant_jax._checkpoint import reading

    a_trainer = trainer()
    state = a_trainer.init(batches(1)[0])
    a_trainer.save(tmp_path, state)

    def failing(path: Any, restore_args: Any = None) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(reading, "read_arrays", failing)
    with pytest.raises(OSError, match="Input/output error"):
        a_trainer.restore(tmp_path, fall_back=True)
    assert steps_in(tmp_path) == [0]


def test_a_child_process_does_not_keep_the_directory(tmp_path):
    a_trainer = trainer()
    state = a_trainer.init(batches(1)[0])
    with a_trainer.checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state)
        sleeper = subprocess.Popen(["sleep", "30"], pass_fds=[checkpointer._lock._file.fileno()])
    try:
        a_trainer.checkpointer(tmp_path).close()
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_directory_that_vanishes_is_noticed(tmp_path):
    run = tmp_path / "run"

    def vanish(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        if epoch == 1:
            run.rename(tmp_path / "elsewhere")
        return state, logs

    a_trainer = trainer(library.checkpoint(run), host("vanish", on_epoch_end=vanish))
    with pytest.raises(ant.CheckpointError, match="has been removed or replaced since|could not be written into .*run"):
        a_trainer.fit(a_trainer.init(batches(1)[0]), batches(2), 3)


def test_what_cannot_be_saved_into_is_named_before_anything_is_trained(tmp_path):
    (tmp_path / "file").write_text("")
    a_trainer = trainer()
    state = a_trainer.init(batches(1)[0])
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="cannot save into .*file is no directory"):
            dataclasses.replace(a_trainer, callbacks=[library.checkpoint(path)]).fit(state, batches(1), 1)
    with pytest.raises(OSError):
        dataclasses.replace(a_trainer, callbacks=[library.checkpoint("/proc/here")]).fit(state, batches(1), 1)


def test_seconds(tmp_path):
    now = [0.0]

    def pass_time(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        now[0] += 1.0
        return state, logs

    saving = library.checkpoint(tmp_path, every_seconds=2.5, every_epochs=None, keep=9, clock=lambda: now[0])
    a_trainer = trainer(host("time", on_batch_end=pass_time), saving, fuse=False)
    a_trainer.fit(a_trainer.init(batches(1)[0]), batches(8), 1)
    assert steps_in(tmp_path)[-1] == 8 and set(steps_in(tmp_path)) - {8} <= set(range(3, 8))
    with pytest.raises(ValueError, match="give either every=2 batches or every_seconds=1.0, not both"):
        library.checkpoint(tmp_path, every=2, every_seconds=1.0)


def test_other_targets_alone_are_other_data(tmp_path):
    inputs, targets = data(4 * BATCH)
    loader, others = ant.ArrayLoader((inputs, targets), BATCH), ant.ArrayLoader((inputs, (targets + 1) % 3), BATCH)

    def fail(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        if int(state.step) == 3:
            raise RuntimeError("on purpose")
        return state, logs

    failing = trainer(library.checkpoint(tmp_path, every=2), host("fail", on_batch_end=fail))
    start = failing.init(batches(1)[0])
    with pytest.raises(RuntimeError, match="on purpose") as caught:
        failing.fit(start, loader, 1)
    a_trainer = trainer()
    for state, options in ((getattr(caught.value, "train_state"), {}), (start, {"resume": tmp_path})):  # noqa: B009
        with pytest.raises(ant.StateMismatch, match=r"train_loader has other data(.|\n)*\n  crc32: expected"):
            a_trainer.fit(state, others, 1, **options)
        same = ant.ArrayLoader((inputs.copy(), targets.copy()), BATCH)
        assert a_trainer.fit(state, same, 1, **options)[0].epoch == 1


def test_any_changed_digit_of_a_description_is_noticed_and_named(tmp_path):
    a_trainer = trainer(library.ema(0.9))
    state, _ = a_trainer.fit(a_trainer.init(batches(1)[0]), batches(2), 1)
    a_trainer.save(tmp_path, state)
    written = tmp_path / "step_2" / "host" / "metadata"
    text = written.read_text()
    digits = [i for i, character in enumerate(text) if character.isdecimal()]

    def changed(at: int) -> str:
        return text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]

    unnoticed = 0
    for at in digits:
        try:
            assert read_manifest(changed(at)) == read_manifest(text)  # a float's last digit may not count
            unnoticed += 1
        except Damage as damage:
            assert re.match("its description (is not as it was written|cannot be read)", str(damage))
    assert unnoticed <= 1 < len(digits)
    epoch = text.index('["epoch",1]') + len('["epoch",')
    written.write_text(changed(epoch))
    with pytest.raises(ant.CheckpointCorrupt, match="step 2 in .* is damaged: its description is not as it was wr"):
        a_trainer.restore(tmp_path)
    written.write_text(text)
    assert_bit_equal(a_trainer.restore(tmp_path), state)


@pytest.mark.parametrize("items", [True, False])
def test_of_the_steps_that_orbax_saved_the_newest_is_taken_or_the_one_that_is_asked_for(items, trained, tmp_path):
    trees = {step: jax.tree.map(lambda leaf, n=step: leaf + n, variables_of(trained)) for step in (3, 12, 9)}
    with ocp.CheckpointManager(tmp_path) as manager:
        for step in sorted(trees):
            tree = ocp.args.StandardSave(trees[step])
            manager.save(step, args=ocp.args.Composite(model=tree) if items else tree)
    fresh = net().init(batches(1)[0], seed=1)
    for asked, step in ((None, 12), (3, 3), (9, 9)):
        state = net().restore_params(tmp_path, fresh, asked, model_state=True)
        assert_bit_equal(state, trained.replace(params=trees[step]["params"]), "params")
        expected = {name: tree for name, tree in trees[step].items() if name != "params"}
        assert_bit_equal(state, trained.replace(model_state=expected), "model_state")
    with pytest.raises(FileNotFoundError, match="has no checkpoint of step 4 that Orbax could read; steps there: 3, 9"):
        net().restore_params(tmp_path, fresh, 4)
