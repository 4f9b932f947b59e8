"""The facts of a run that is under way, for host hooks."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Iterator, Mapping

from ant_jax._engine.programs import TrainProgram


_logger = logging.getLogger("ant_jax")

# A loader that gives nothing for so long is worth a line.
SLOW_SECONDS = 30.0


class Costs:
    """What a run has cost so far; host hooks read it as ``trainer.costs``.

    Args:
        hook_seconds: of the run, counted on by what calls the hooks.

    Attributes:
        data_seconds: that the host has spent in the training loader, and in handing its batches to the device. Some of
            it passes while the device computes.
    """

    def __init__(self, hook_seconds: Mapping[str, float]):
        self.data_seconds = 0.0
        self._hook_seconds = hook_seconds
        self._program: TrainProgram | None = None
        self._waiting_since: float | None = None

    @property
    def hook_seconds(self) -> dict[str, float]:
        """How long each callback's hooks have taken on the host, by the callback's name."""
        return dict(self._hook_seconds)

    @property
    def flops_per_example(self) -> float | None:
        """Floating-point operations of a step for each of its examples, by XLA's own count.

        Forward, backward, hooks and optimizer. XLA counts the body of a loop, such as a ``scan`` over layers, once.
        ``None`` before the first batch, and where XLA does not tell. The first time it takes as long as lowering the
        step does.
        """
        return None if self._program is None else self._program.flops_per_example

    @contextlib.contextmanager
    def told_when_slow(self) -> Iterator[None]:
        """Say so (logger ``ant_jax``) when the training loader gives nothing for long, while the body runs.

        Said again when it has taken twice as long.
        """
        over = threading.Event()

        def watch() -> None:
            patience = SLOW_SECONDS
            while not over.wait(SLOW_SECONDS / 10):
                began = self._waiting_since
                waited = 0.0 if began is None else time.perf_counter() - began
                if waited > patience:
                    _logger.warning("train_loader has given nothing for %.0f s; the run waits for it", waited)
                    patience = 2 * waited
                elif waited <= SLOW_SECONDS:  # it is another batch that is waited for
                    patience = SLOW_SECONDS

        watching = threading.Thread(target=watch, name="ant_jax-slow-loader", daemon=True)
        watching.start()
        try:
            yield
        finally:
            over.set()
            watching.join()

    def runs(self, program: TrainProgram) -> None:
        """Note the program that runs from now on."""
        self._program = program

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time of the body as ``data_seconds``."""
        self._waiting_since = began = time.perf_counter()
        try:
            yield
        finally:
            self._waiting_since = None
            self.data_seconds += time.perf_counter() - began


@dataclasses.dataclass
class RunInfo:
    """One call of ``fit``, as host hooks may know it.

    Attributes:
        num_epochs: in all.
        steps_per_epoch: batches in the epoch under way; ``None`` if nobody can tell.
        costs: so far.
        whole: whether a run that went on from the state as it is would end as this one does.
    """

    num_epochs: int
    steps_per_epoch: int | None
    costs: Costs
    whole: bool = False
