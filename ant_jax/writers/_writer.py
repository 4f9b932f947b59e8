"""The protocol of writers."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self


class Start(NamedTuple):
    """Where a run begins to write.

    Attributes:
        epoch: the next epoch to end, from 0. Of this and later epochs the run writes the rows again.
        step: batches trained on so far; 0: the run is new. Of later batches the run writes the rows again.
        run_id: the tracker's run that goes on; ``None``: a new one.
        tolerated: whether ``tolerate`` handles failures, so that a server that is down should fail soon.
    """

    epoch: int
    step: int
    run_id: str | None = None
    tolerated: bool = False


class Writer(abc.ABC):
    """Where the numbers of a run go; :func:`ant_jax.callbacks.log_to` feeds it.

    A subclass defines ``write_scalars``, and overrides the rest where the destination has it::

        class Printing(ant_jax.writers.Writer):
            def write_scalars(self, step, scalars, *, epoch):
                print(epoch, step, scalars)

        log = ant_jax.callbacks.log_to(Printing(), every=100)

    ``open`` and ``close`` run in hooks. The other methods run between them, one at a time, in a background thread. An
    exception in any of them fails the run, from a hook of the callback, unless the callback is in ``tolerate``.

    Attributes:
        has_runs: whether the destination keeps runs under ids, as trackers do. The state then remembers ``run_id``.
        run_id: the id, of an open writer with ``has_runs``.
    """

    has_runs: ClassVar[bool] = False
    run_id: str | None = None

    def open(self, start: Start) -> Self:
        """Return the writer of one run.

        The default returns ``self``. A writer with anything open returns a new object, because several runs of one
        trainer may go on at the same time.

        Args:
            start: where the run begins, or goes on.
        """
        del start
        return self

    @abc.abstractmethod
    def write_scalars(self, step: int, scalars: Mapping[str, Any], *, epoch: int) -> None:
        """Write numbers: floats, ints, bools or complex.

        Args:
            step: batches trained on since the state was made.
            scalars: by name; any string can be a name.
            epoch: that they belong to, from 0.
        """

    def write_histograms(self, step: int, arrays: Mapping[str, Any], *, epoch: int) -> None:
        """Write numpy arrays of numbers, as their distribution or as they are; the default leaves them out.

        :func:`ant_jax.writers.binned` bins one.
        """
        del step, arrays, epoch

    def write_images(self, step: int, images: Mapping[str, Any], *, epoch: int) -> None:
        """Write images, uint8[height, width, channels] with 1, 3 or 4 channels; the default leaves them out."""
        del step, images, epoch

    def write_texts(self, step: int, texts: Mapping[str, str], *, epoch: int) -> None:
        """Write texts; the default leaves them out."""
        del step, texts, epoch

    def flush(self) -> None:
        """Make what has been written durable; called when a record of one or more writes is complete."""
        return

    def close(self, error: BaseException | None) -> None:
        """End.

        Args:
            error: what ended the run; ``None``: it came to its end.
        """
        del error
