"""TensorBoard's event files."""

from __future__ import annotations

import copy
import io
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np

from ant_jax._arguments import check_path, require
from ant_jax.writers._names import UniqueNames, in_utf8
from ant_jax.writers._paths import Claim
from ant_jax.writers._values import binned, real_scalars
from ant_jax.writers._writer import Start, Writer


class TensorBoardWriter(Writer):
    """Write TensorBoard event files, with neither TensorFlow nor torch: scalars, histograms, images, texts.

    The horizontal axis is the batches trained on. A run that goes on makes TensorBoard drop the steps that it does
    again. While another run of the process writes into the directory, the run writes into one beside it, ``digits-2``
    for ``digits``, and logs a warning (logger ``ant_jax``).

    Args:
        directory: of the event files; it is made.

    Raises:
        ImportError: the package ``tensorboard`` is not installed (the extra ``tensorboard``).
        ValueError: ``directory`` is not a path.

    >>> TensorBoardWriter("runs/digits")
    TensorBoardWriter('runs/digits')
    """

    def __init__(self, directory: str | os.PathLike[str]):
        require("tensorboard", "tensorboard", "tensorboard")
        check_path("TensorBoardWriter", "directory", directory)
        self._directory = os.fspath(directory)
        self._events: Any = None
        self._claim: Claim | None = None
        self._names = UniqueNames(in_utf8)

    def __repr__(self) -> str:
        return f"TensorBoardWriter({self._directory!r})"

    def open(self, start: Start) -> Self:
        """Begin an event file."""
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        opened = copy.copy(self)
        opened._names = UniqueNames(in_utf8)
        opened._claim = Claim("TensorBoardWriter", self._directory)
        try:
            opened._events = EventFileWriter(opened._claim.path)
        except BaseException:
            opened._claim.release()
            raise
        if start.step:  # makes TensorBoard drop the later steps that were written before the run was killed
            session = _message(event_pb2, "SessionLog")
            opened._add(step=start.step + 1, session_log=session(status=session.START))
        return opened

    def write_scalars(self, step: int, scalars: Mapping[str, Any], *, epoch: int) -> None:
        """Write numbers; complex ones are left out."""
        del epoch
        named = self._names.rename(real_scalars(scalars))
        self._write(step, ({"tag": tag, "simple_value": value} for tag, value in named.items()))

    def write_histograms(self, step: int, arrays: Mapping[str, Any], *, epoch: int) -> None:
        """Write the distributions of real arrays."""
        del epoch
        real = {name: _histogram(name, array) for name, array in arrays.items() if not np.iscomplexobj(array)}
        self._write(step, ({"tag": tag, "histo": value} for tag, value in self._names.rename(real).items()))

    def write_images(self, step: int, images: Mapping[str, Any], *, epoch: int) -> None:
        """Write images, as PNG."""
        del epoch
        self._write(step, ({"tag": tag, "image": _png(i)} for tag, i in self._names.rename(images).items()))

    def write_texts(self, step: int, texts: Mapping[str, str], *, epoch: int) -> None:
        """Write texts, which TensorBoard shows as Markdown."""
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        del epoch
        metadata = create_summary_metadata(None, None)
        named = self._names.rename({name: make_tensor_proto([text.encode()]) for name, text in texts.items()})
        self._write(step, ({"tag": tag, "tensor": value, "metadata": metadata} for tag, value in named.items()))

    def flush(self) -> None:
        """Write what is in memory to the file."""
        self._events.flush()

    def close(self, error: BaseException | None) -> None:
        """Close the file, and let other runs have the directory."""
        del error
        try:
            self._events.close()
        finally:
            if self._claim is not None:
                self._claim.release()

    def _write(self, step: int, values: Iterable[dict[str, Any]]) -> None:
        from tensorboard.compat.proto import summary_pb2

        summary = _message(summary_pb2, "Summary")
        self._add(step=step, summary=summary(value=[summary.Value(**fields) for fields in values]))

    def _add(self, **fields: Any) -> None:
        from tensorboard.compat.proto import event_pb2

        self._events.add_event(_message(event_pb2, "Event")(wall_time=time.time(), **fields))


def _message(module: Any, name: str) -> Any:
    """Return a class that protobuf makes when its module is imported."""
    return getattr(module, name)


def _histogram(name: str, array: Any) -> Any:
    from tensorboard.compat.proto import summary_pb2

    counts, edges = binned(name, array)
    middles = (edges[1:] + edges[:-1]) / 2
    return _message(summary_pb2, "HistogramProto")(
        min=edges[0],
        max=edges[-1],
        num=counts.sum(),
        sum=(counts * middles).sum(),
        sum_squares=(counts * middles**2).sum(),
        bucket_limit=edges[1:],
        bucket=counts,
    )


def _png(image: Any) -> Any:
    from PIL import Image
    from tensorboard.compat.proto import summary_pb2

    image, encoded = np.asarray(image), io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(encoded, format="PNG")
    height, width, channels = image.shape
    fields = {"height": height, "width": width, "colorspace": channels}
    return _message(summary_pb2, "Summary").Image(encoded_image_string=encoded.getvalue(), **fields)
