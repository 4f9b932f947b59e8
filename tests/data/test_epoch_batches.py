"""Batches cut into chunks: which are read when, and which are refused."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ant_jax import ArrayLoader, BatchError
from ant_jax._data.epoch_batches import Chunk, EpochBatches, Loaders
from ant_jax._data.reader import Reader


def batch(number: int, examples: int = 2) -> np.ndarray:
    return np.full((examples, 1), number, np.float32)


def numbers(chunk: Chunk) -> list[int]:
    return [int(row[0, 0]) for row in chunk.batches[: chunk.filled]]


class Counted:
    """Counts what is read of it."""

    def __init__(self, count: int):
        self.count, self.given = count, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for number in range(self.count):
            self.given += 1
            yield batch(number)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_shorter_batch_where_the_loader_ends_is_no_reason_to_end_an_epoch(rows):
    loader = [batch(0), batch(1), batch(2, examples=1)]
    reader = Reader(loader, "loader", limit=2)
    seen, sizes, lasts = [], [], []
    for epoch in range(3):  # the second begins with the shorter one
        for chunk in EpochBatches(loader, "loader", epoch, limit=2, reader=reader).chunks(rows, 10.0):
            seen += numbers(chunk)
            sizes += chunk.filled * [chunk.examples]
            lasts.append(chunk.last)
    assert seen == [0, 1, 2, 0, 1, 2]
    assert sizes == [2, 2, 1, 2, 2, 1]
    assert sum(lasts) == 3


def test_a_shorter_batch_elsewhere_is_refused():
    loader = [batch(0), batch(1, examples=1), batch(2), batch(3)]
    for limit in (None, 4):
        with pytest.raises(BatchError, match="batch 1 of epoch 0 has 1 examples and the first had 2"):
            list(EpochBatches(loader, "loader", limit=limit).chunks(3, 10.0))
        with pytest.raises(BatchError, match="batch 1 of epoch 0 has 1 examples and the first had 2"):
            list(EpochBatches(loader, "loader", limit=limit).chunks(1, 10.0, peek=False))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("peek", [True, False])
def test_a_batch_of_no_examples_is_refused_by_name(place, peek):
    loader: list[Any] = [{"x": batch(i), "y": batch(i)[:, 0]} for i in range(3)]
    loader[place] = {"x": np.zeros((0, 1), np.float32), "y": np.zeros(0, np.float32)}
    message = rf"loader, batch {place} of epoch 0 has no examples: x: float32\[0,1\], y: float32\[0\]. Leave it out"
    with pytest.raises(BatchError, match=message):
        list(EpochBatches(loader, "loader").chunks(1, 10.0, peek=peek))


def test_an_axis_without_elements_is_no_batch_without_examples():
    graph = {"nodes": batch(1, examples=3), "edges": np.zeros((0, 2), np.int32), "size": np.float32(3)}
    (chunk,) = EpochBatches([graph], "loader").chunks(None, 10.0)
    assert chunk.batches["edges"].shape == (0, 2)
    with pytest.raises(BatchError, match="batch 0 of epoch 0 has no examples: edges"):
        EpochBatches([{**graph, "nodes": batch(1, examples=0)}], "loader")


@pytest.mark.parametrize("rows", [None, 1])
def test_without_peeking_a_batch_is_read_when_it_is_asked_for(rows):
    loader = Counted(3)
    given = [
        (chunk.filled, chunk.last, loader.given)
        for chunk in EpochBatches(loader, "loader").chunks(rows, 9.0, peek=False)
    ]
    assert given == [(1, None, 1), (1, None, 2), (1, None, 3)]
    limited = Counted(9)
    feed = EpochBatches(limited, "loader", limit=3)
    given = [(chunk.last, limited.given) for chunk in feed.chunks(rows, 9.0, peek=False)]
    assert given == [(False, 1), (False, 2), (True, 3)]


def test_a_loader_that_fails_without_peeking_has_its_note():
    def failing() -> Iterator[np.ndarray]:
        yield batch(0)
        raise OSError("disk")

    chunks = EpochBatches(failing(), "loader").chunks(1, 9.0, peek=False)
    next(chunks)
    with pytest.raises(OSError, match="disk") as raised:
        next(chunks)
    assert raised.value.__notes__ == ["in loader, after 1 batches of epoch 0"]


@pytest.mark.parametrize("loader", [[batch(i) for i in range(3)], ArrayLoader(np.zeros((3, 1)), 1), Counted(3)])
def test_a_loader_that_may_end_before_the_limit(loader):
    assert sum(chunk.filled for chunk in EpochBatches(loader, "loader", limit=5, may_end=True).chunks(2, 9.0)) == 3
    assert sum(chunk.filled for chunk in EpochBatches(loader, "loader", limit=2, may_end=True).chunks(2, 9.0)) == 2
    with pytest.raises(BatchError, match="ended after 3 batches of epoch 0, before steps_per_epoch=5"):
        list(EpochBatches(loader, "loader", limit=5).chunks(2, 9.0))


class Sized(Counted):
    def __init__(self, count: int, length: Any):
        super().__init__(count)
        self._length = length

    def __len__(self) -> int:
        if isinstance(self._length, BaseException):
            raise self._length
        return self._length


LENGTHS = [NotImplementedError(), TypeError("no"), AttributeError("x"), RuntimeError("y"), -1, 2.5, 2**70, 0, 2, 9]


@pytest.mark.parametrize("length", LENGTHS, ids=repr)
def test_whatever_a_loader_says_of_its_length_all_its_batches_come(length):
    loader = Sized(5, length)
    Loaders(loader, loader).refuse_bad_lengths(3)
    feed = EpochBatches(loader, "loader")
    assert feed.length == (length if length in (0, 2, 9) else None)
    chunks = list(feed.chunks(2, 9.0))
    assert [number for chunk in chunks for number in numbers(chunk)] == [0, 1, 2, 3, 4]
    assert [chunk.last for chunk in chunks] == [False, False, True]


def test_an_exception_of_the_body_is_not_hidden_by_an_iterator_that_cannot_be_put_back():
    class Stuck(Counted):
        def __iter__(self) -> Any:
            return self

        def __next__(self) -> np.ndarray:
            self.given += 1
            return batch(self.given)

        def get_state(self) -> int:
            return self.given

        def set_state(self, state: int) -> None:
            raise OSError("stuck")

    feed = EpochBatches(Stuck(9), "loader")
    with pytest.raises(RuntimeError, match="on purpose") as raised, feed.putting_back(lambda: (0, feed.place)):
        raise RuntimeError("on purpose")
    assert raised.value.__notes__ == ["loader could not be put back where the run has ended: OSError('stuck')"]
    with pytest.raises(OSError, match="stuck"), feed.putting_back(lambda: (0, feed.place)):
        pass
