"""The seven callbacks that the torch system's page shows for users to write, ported line by line.

What changes in each port is what the table of `docs/guides/torch.md` says: hooks take `state` before `logs` and return
both, configuration is fields of a frozen dataclass, and what was remembered on `self` is memory made by `init`, or,
when it is a resource such as an open file, made in `on_train_begin`. What only looks is an observer, whose hooks return
nothing as in torch; the last class is one that prints at every batch.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from problems import assert_bit_equal, batches, host, trainer

import ant_jax as ant


@dataclasses.dataclass(frozen=True)
class MyCallback(ant.Callback):
    """The basic template."""

    param1: float
    param2: float

    def on_epoch_end(self, epoch, trainer, state, logs):
        return state, {**logs, "sum": self.param1 + self.param2}


@dataclasses.dataclass(frozen=True)
class EarlyStoppingCallback(ant.Callback):
    patience: int = 5
    min_delta: float = 0.001
    monitor: str = "val_loss"

    def init(self, state):
        return {"best_value": float("inf"), "wait": 0}

    def on_epoch_end(self, epoch, trainer, state, logs):
        memory = state.callback_states[self.name]
        current_value = logs.get(self.monitor, None)
        if current_value is None:
            return state, logs
        if current_value < memory["best_value"] - self.min_delta:
            return state.with_callback_state(self.name, {"best_value": float(current_value), "wait": 0}), logs
        wait = memory["wait"] + 1
        if wait >= self.patience:
            print(f"Early stopping triggered at epoch {epoch}")
            state = state.request_stop()
        return state.with_callback_state(self.name, {**memory, "wait": wait}), logs


@dataclasses.dataclass(frozen=True)
class LRSchedulerCallback(ant.Callback):
    scheduler: Any

    def on_epoch_end(self, epoch, trainer, state, logs):
        state = state.with_hyperparams(learning_rate=self.scheduler(epoch + 1))
        current_lr = float(state.hyperparams["learning_rate"])
        print(f"Learning rate: {current_lr:.6f}")
        return state, logs


@dataclasses.dataclass(frozen=True)
class WandbCallback(ant.Callback):
    project_name: str
    run_name: str | None = None

    def on_train_begin(self, trainer, state, logs):
        import wandb

        wandb.init(project=self.project_name, name=self.run_name)
        return state, logs

    def on_epoch_end(self, epoch, trainer, state, logs):
        import wandb

        wandb.log({name: float(value) for name, value in logs.items()}, step=epoch)
        return state, logs

    def on_train_end(self, trainer, state, logs):
        import wandb

        wandb.finish()
        return state, logs


@dataclasses.dataclass(frozen=True)
class TensorBoardCallback(ant.Callback):
    observer = True
    log_dir: str = "runs"

    @functools.cached_property
    def writer(self):
        from torch.utils.tensorboard.writer import SummaryWriter

        return SummaryWriter(self.log_dir)

    def on_epoch_end(self, epoch, trainer, state, logs):
        for key, value in logs.items():
            if np.ndim(value) == 0:
                self.writer.add_scalar(key, float(value), epoch)

    def on_train_end(self, trainer, state, logs):
        self.writer.close()


@dataclasses.dataclass(frozen=True)
class ModelCheckpointCallback(ant.Callback):
    filepath: str = "checkpoint_{epoch}"
    save_best_only: bool = True
    monitor: str = "val_loss"

    def init(self, state):
        return {"best_value": float("inf")}

    def on_checkpoint(
        self, trainer, state, logs
    ):  # after all callbacks' on_epoch_end, so that their memories are in it
        current_value = logs.get(self.monitor, None)
        if current_value is None:
            return state, logs
        if not self.save_best_only or current_value < state.callback_states[self.name]["best_value"]:
            state = state.with_callback_state(self.name, {"best_value": float(current_value)})
            filepath = self.filepath.format(epoch=state.epoch - 1)
            trainer.save(filepath, state)
            print(f"Model saved to {filepath}")
        return state, logs


@dataclasses.dataclass(frozen=True)
class MockCallback(ant.Callback):
    observer = True
    calls: list[Any] = dataclasses.field(default_factory=list)

    def on_epoch_begin(self, epoch, trainer, state, logs):
        self.calls.append(("on_epoch_begin", epoch))

    def on_epoch_end(self, epoch, trainer, state, logs):
        self.calls.append(("on_epoch_end", epoch))


class PrintingCallback(ant.Callback):
    """Not of the page: what most torch programs have, and what the fused loop serves without a launch more."""

    observer = True

    def on_epoch_begin(self, epoch, trainer, state, logs):
        print(f"Epoch {epoch + 1}/{trainer.num_epochs}")

    def on_batch_end(self, batch_idx, trainer, state, logs):
        print(f"  Batch {batch_idx}: loss = {logs['loss'].item():.4f}")


def fit(*callbacks: ant.Callback, epochs: int = 3, **options: Any) -> tuple[ant.TrainState, ant.History]:
    a_trainer = trainer(*callbacks, **options)
    return a_trainer.fit(a_trainer.init(batches()[0]), batches(2), epochs, batches(1))


def test_the_template():
    _, history = fit(MyCallback(1.0, 2.0))
    assert [logs["sum"] for logs in history] == [3.0] * 3


def test_early_stopping_is_the_librarys(capsys):
    values = [3.0, 2.0, 2.5, 2.4, 2.3, 1.0]
    publish = host("publish", on_epoch_end=lambda epoch, trainer, state, logs: (state, {**logs, "v": values[epoch]}))
    ported, _ = fit(publish, EarlyStoppingCallback(patience=2, monitor="v"), epochs=6)
    library, _ = fit(publish, ant.callbacks.early_stopping("v", patience=2, min_delta=0.001), epochs=6)
    assert ported.epoch == library.epoch == 4
    assert "Early stopping triggered at epoch 3" in capsys.readouterr().out


def test_the_learning_rate_scheduler(capsys):
    schedule = optax.exponential_decay(0.5, 1, 0.5)
    injected = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    ported, _ = fit(LRSchedulerCallback(schedule), optimizer=injected)
    library, _ = fit(ant.callbacks.learning_rate_schedule(schedule, per="epoch"), optimizer=injected)
    assert_bit_equal(ported, library, "params")
    assert "Learning rate: 0.250000" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb", "ignore::DeprecationWarning:pydantic")
def test_wandb(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # one that an earlier test has started keeps that test's settings
    fit(WandbCallback("digits", run_name="first"))
    wandb.teardown()  # its own process may still be writing when a run has finished
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.torch
def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, history = fit(TensorBoardCallback(str(tmp_path)))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    read = [event.value for event in events.Scalars("val_loss")]
    np.testing.assert_allclose(read, history.to_dict()["val_loss"], rtol=1e-6)


def test_the_checkpoint_is_restored(tmp_path, capsys):
    a_trainer = trainer(ModelCheckpointCallback(str(tmp_path / "epoch_{epoch}"), save_best_only=False))
    straight, _ = a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 3, batches(1))
    again = trainer(ModelCheckpointCallback(str(tmp_path / "again_{epoch}"), save_best_only=False))
    restored = again.restore(str(tmp_path / "epoch_1"))
    assert restored.epoch == 2
    resumed, _ = again.fit(restored, batches(2), 3, batches(1))
    assert_bit_equal(straight, resumed)
    assert "Model saved to" in capsys.readouterr().out


def test_the_mock():
    callback = MockCallback()
    fit(callback, epochs=1)
    assert ("on_epoch_begin", 0) in callback.calls
    assert ("on_epoch_end", 0) in callback.calls


def test_printing_at_every_batch(capsys):
    fit(PrintingCallback(), epochs=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        *("Epoch 1/2", "  Batch 0", "  Batch 1"),
        *("Epoch 2/2", "  Batch 0", "  Batch 1"),
    ]
    assert all(float(line.split("= ")[1]) > 0 for line in lines if "Batch" in line)


@pytest.mark.torch
def test_all_of_them_at_once_change_no_number(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    plain, _ = fit()
    all_of_them, _ = fit(
        MyCallback(1.0, 2.0),
        EarlyStoppingCallback(),
        WandbCallback("digits"),
        TensorBoardCallback(str(tmp_path / "runs")),
        ModelCheckpointCallback(str(tmp_path / "best_{epoch}")),
        MockCallback(),
        PrintingCallback(),
    )
    assert_bit_equal(plain, all_of_them, "step", "params", "opt_state")
    assert jax.tree.leaves(all_of_them.params)
