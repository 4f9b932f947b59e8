"""The reference job, in this process or in one of its own: ``python -m benchmarks.faults.job '{"directory": ...}'``.

A job in its own process prints where it is (see ``PLACES``), what ``fit`` prints, and in the end its state's digest.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import signal
import sys
import time
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

import ant_jax as ant
from ant_jax.testing._compare import bytes_of, describe_state


BATCH, FEATURES = 16, 32
# Where a job that marks its way says that it is; after "compiling" the first step is traced and compiled.
PLACES = ("compiling", "stepping", "hook", "saving", "evaluating")


class MLP(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train: bool = False):
        for _ in range(2):
            x = nn.Dropout(0.1, deterministic=not train)(nn.relu(nn.Dense(self.width)(x)))
        return nn.Dense(10)(x)


@dataclasses.dataclass(frozen=True)
class Job:
    """A run of a small network with dropout, a schedule, and callbacks that remember and draw random numbers.

    Attributes:
        directory: to save into and to resume from; ``None``: neither.
        width: of the network; 64 make a state of 0.1 MB, 1000 one of 17 MB, 2200 one of 80 MB.
        epochs: in all.
        batches: in an epoch.
        every: batches between saves; ``None``: only at the ends of epochs.
        keep: checkpoints.
        monitor: whether to keep the best epoch, too.
        accumulation: batches in an update.
        fuse: of the trainer.
        marks: whether to print where the run is, and to dwell there for a moment.
        leave: how to leave, right after a save has begun in the second epoch: ``"exit"``, ``"error"``, ``"interrupt"``;
            ``""``: not before the end.
        watch: whether to print what memory, threads and files the process has, now and then.
    """

    directory: str | None = None
    width: int = 64
    epochs: int = 4
    batches: int = 20
    every: int | None = 5
    keep: int = 3
    monitor: bool = False
    accumulation: int = 1
    fuse: Any = True
    marks: bool = False
    leave: str = ""
    watch: bool = False

    def trainer(self, *more: ant.Callback) -> ant.Trainer:
        """A new trainer, with ``more`` callbacks after the job's own."""
        callbacks = [
            ant.callbacks.ema(0.99),
            ant.callbacks.gradient_noise(0.001),
            ant.callbacks.early_stopping("val_loss", patience=1000),
            best_so_far(),
        ]
        if self.directory is not None:
            monitor = "val_loss" if self.monitor else None
            callbacks.append(
                ant.callbacks.checkpoint(self.directory, every=self.every, keep=self.keep, monitor=monitor)
            )
        callbacks += [*([marking()] if self.marks else []), *([leaving(self.leave)] if self.leave else [])]
        callbacks += [watching()] if self.watch else []
        schedule = optax.cosine_decay_schedule(1e-3, 2000)  # the same for a run of more epochs
        return ant.Trainer(
            MLP(self.width),
            optax.adamw(schedule),
            optax.softmax_cross_entropy_with_integer_labels,
            callbacks=[*callbacks, *more],
            gradient_accumulation_steps=self.accumulation,
            max_grad_norm=1.0,
            fuse=self.fuse,
            progress_bar=False,
        )

    def run(self, trainer: ant.Trainer | None = None, state: ant.TrainState | None = None) -> ant.TrainState:
        """Begin, or go on from what the directory has, and train to the end.

        Args:
            trainer: a trainer of this job; ``None``: a new one.
            state: to begin with; ``None``: the one that every run of the job begins with.
        """
        trainer = trainer or self.trainer()
        state = state or trainer.init(tuple(leaf[:1] for leaf in data(1)))
        return trainer.fit(state, loader(self.batches), self.epochs, held_out(), resume=self.directory)[0]


@functools.cache
def data(batches: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    examples = batches * BATCH
    inputs = rng.normal(size=(examples, FEATURES)).astype(np.float32)
    return inputs, rng.integers(0, 10, examples).astype(np.int32)


def loader(batches: int) -> ant.ArrayLoader:
    return ant.ArrayLoader(data(batches), BATCH)


def held_out() -> ant.ArrayLoader:
    return ant.ArrayLoader(data(4, seed=1), BATCH, shuffle=False)


def digest(state: ant.TrainState) -> str:
    """SHA-256 of all that a run ends with, the key, memories and history included."""
    parts = describe_state(state) | {"key": bytes_of(state.key)}
    position = state.epoch, state.batch_idx, bool(state.stop), repr(list(state.history))
    return hashlib.sha256(repr((sorted(parts.items()), position)).encode()).hexdigest()


def best_so_far() -> ant.Callback:
    """Remembers, on the host, the best training loss and where it was."""

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        memory, loss = state.callback_states["best_so_far"], float(logs["train_loss"])
        if loss < memory["loss"]:
            state = state.with_callback_state("best_so_far", {"loss": loss, "epoch": epoch})
        return state, logs

    return ant.Callback(
        name="best_so_far", init=lambda state: {"loss": float("inf"), "epoch": None}, on_epoch_end=on_epoch_end
    )


def say(*words: Any) -> None:
    print(*words, flush=True)


def marking() -> ant.Callback:
    """Prints where the run is, and dwells there, so that a signal finds it there."""

    def at(place: str, seconds: float) -> Any:
        def hook(*arguments: Any) -> Any:
            say("at", place)
            time.sleep(seconds)
            return arguments[-2:]

        return hook

    return ant.Callback(
        name="marking",
        every=5,
        on_epoch_begin=at("compiling", 0),
        on_batch_begin=at("stepping", 0),
        on_batch_end=at("hook", 0.02),
        on_checkpoint=at("saving", 0),
        on_evaluate_begin=at("evaluating", 0),
    )


def leaving(how: str) -> ant.Callback:
    """Leaves in ``on_checkpoint``, when the checkpoint callback has begun to save."""
    errors = {"exit": SystemExit(3), "error": RuntimeError("on purpose"), "interrupt": KeyboardInterrupt()}

    def on_checkpoint(trainer: Any, state: Any, logs: Any) -> Any:
        if state.epoch == 1 and state.batch_idx == 0:
            say("leaving at", int(state.step))
            raise errors[how]
        return state, logs

    return ant.Callback(name="leaving", on_checkpoint=on_checkpoint)


def watching() -> ant.Callback:
    """Prints, once an epoch, what the process holds."""

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        say("holds", json.dumps({"step": int(state.step), **held()}))
        return state, logs

    return ant.Callback(name="watching", on_epoch_end=on_epoch_end)


def held() -> dict[str, int]:
    """Resident memory in kB, threads and open files of this process."""
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    return {
        "rss": int(status["VmRSS"].split()[0]),
        "threads": int(status["Threads"]),
        "files": len(os.listdir("/proc/self/fd")),
    }


def main() -> None:
    # A process that a shell has started in its background ignores Ctrl-C, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    job = Job(**json.loads(sys.argv[1]))
    say("at begin")
    state = job.run()
    say("step", int(state.step))
    say("digest", digest(state))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
