"""One writer of one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ant_jax._background import Queue, is_borne
from ant_jax.writers._writer import Start, Writer


class Record(NamedTuple):
    """What is written of one place in a run, by the methods of a writer."""

    scalars: Mapping[str, Any] = {}
    histograms: Mapping[str, Any] = {}
    images: Mapping[str, Any] = {}
    texts: Mapping[str, str] = {}


def record_of(logs: Mapping[str, Any]) -> Record:
    """Sort numbers and arrays by the methods that write them: scalars and histograms."""
    scalars = {name: value for name, value in logs.items() if np.ndim(value) == 0}
    return Record(scalars, {name: value for name, value in logs.items() if name not in scalars})


def _kept(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """The values as they are now: a hook may use an array of numpy again before the background has read it."""
    return {name: np.array(value) if isinstance(value, np.ndarray) else value for name, value in (values or {}).items()}


class RunWriter:
    """A writer while a run goes on, its queue, and the place in the run.

    The place is counted on the host, so that no record waits for the device.

    Args:
        writer: not opened.
        state: of the run as it begins.
        run_id: the tracker's run that goes on, if there is one.
        unwritten: how many of the last batches have no record yet.

    Attributes:
        writer: opened.
    """

    def __init__(self, writer: Writer, state: Any, run_id: str | None = None, unwritten: int = 0):
        self._queue = Queue()
        self._find(state)
        step = self.step(state.batch_idx, state) - unwritten
        self.writer = writer.open(Start(state.epoch, step, run_id, is_borne()))
        if not isinstance(self.writer, Writer):
            raise TypeError(f"{type(writer).__name__}.open must return the writer of the run, got {self.writer!r}")

    def submit(self, read: Callable[[], Record], epoch: int, step: int) -> None:
        """Write in the background what ``read`` returns there.

        ``read`` must not refer to a state, because the trainer would have to copy it instead of donating it.
        """
        self._queue.submit(self._write, read, epoch, step)

    def step(self, batch_idx: int, state: Any) -> int:
        """Return the batches trained on since the state was made, when ``batch_idx`` of this epoch are done."""
        if state.epoch != self._epoch:  # the hooks of an epoch were left out, as `every` does: the device knows
            self._find(state)
        return self._before + batch_idx

    def end_epoch(self, state: Any) -> int:
        """Count the epoch's batches; returns the step."""
        self._before = self.step(state.batch_idx, state)
        self._epoch += 1
        return self._before

    def end(self, error: BaseException | None = None) -> None:
        """Wait for what is still to be written, and close; ``error`` is what ended the run, if anything did."""
        try:
            self._queue.drain()
        except BaseException as failure:
            error = error or failure
            raise
        finally:
            self.writer.close(error)

    def _find(self, state: Any) -> None:
        self._epoch, self._before = state.epoch, state.total_steps - state.batch_idx  # batches before this epoch

    def _write(self, read: Callable[[], Record], epoch: int, step: int) -> None:
        record = read()
        if record.scalars:
            self.writer.write_scalars(step, record.scalars, epoch=epoch)
        if record.histograms:
            self.writer.write_histograms(step, record.histograms, epoch=epoch)
        if record.images:
            self.writer.write_images(step, record.images, epoch=epoch)
        if record.texts:
            self.writer.write_texts(step, record.texts, epoch=epoch)
        self.writer.flush()


def write(
    trainer: Any,
    state: Any,
    *,
    scalars: Mapping[str, Any] | None = None,
    histograms: Mapping[str, Any] | None = None,
    images: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write values that are no logs with every writer of the run; for a host hook of your own.

    The values go to the writers of all ``log_to`` callbacks, in the background, at the step and the epoch of the state.
    A writer leaves out the kinds that its destination does not have. Unlike logs they are not in the history. To write
    in ``on_train_begin``, list the callback after the ``log_to``, which opens its writer there. ::

        def on_epoch_end(epoch, trainer, state, logs):
            ant_jax.writers.write(trainer, state, images={"digit": image}, texts={"said": "seven"})
            return state, logs

    Args:
        trainer: as the hook is given it.
        state: as the hook is given it.
        scalars: numbers by name.
        histograms: arrays of any shape by name, of which writers show the distribution.
        images: by name, arrays uint8[height, width, channels] with 1, 3 or 4 channels.
        texts: strings by name.

    Raises:
        ValueError: an image has another dtype or shape, or a scalar is no number.
    """
    for name, image in (images or {}).items():
        dtype, shape = getattr(image, "dtype", None), np.shape(image)
        if dtype != np.uint8 or len(shape) != 3 or shape[2] not in (1, 3, 4):
            raise ValueError(
                f"writers.write: image {name!r} must be uint8[height, width, channels] with 1, 3 or 4 channels, got "
                f"{dtype or type(image).__name__}{list(shape)}"
            )
    for name, value in (scalars or {}).items():
        if isinstance(value, str) or np.ndim(value) != 0:
            raise ValueError(f"writers.write: scalar {name!r} must be one number, got {value!r:.80}")
    scalars, histograms, images = (_kept(values) for values in (scalars, histograms, images))
    texts = dict(texts or {})

    def read() -> Record:
        numbers = {name: np.asarray(value).item() for name, value in scalars.items()}
        arrays, pictures = ({name: np.asarray(value) for name, value in part.items()} for part in (histograms, images))
        return Record(numbers, arrays, pictures, texts)

    for run in trainer.resources.of_type(RunWriter):
        run.submit(read, state.epoch, run.step(state.batch_idx, state))
