"""Where a loader is, over the epochs of a run."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from ant_jax import BatchError
from ant_jax._data.reader import Reader


class Again:
    """Gives the same numbers whenever it is read."""

    def __init__(self, numbers: int):
        self._numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._numbers))


class Placed:
    """An iterator that can be put at a place."""

    def __init__(self, numbers: int | None):
        self._numbers, self._next, self.puts = numbers, 0, 0

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> int:
        if self._next == self._numbers:
            raise StopIteration
        self._next += 1
        return self._next - 1

    def get_state(self) -> Any:
        return {"next": self._next}

    def set_state(self, state: Any) -> None:
        self.puts += 1
        self._next = state["next"]


class PlacedAgain:
    """Makes such an iterator whenever it is read."""

    def __init__(self, numbers: int):
        self._numbers = numbers

    def __iter__(self) -> Any:
        return Placed(self._numbers)


class Resetting(Again):
    """An iterator that begins anew when it is asked for its iterator."""

    def __iter__(self) -> Any:
        self._left = super().__iter__()
        return self

    def __next__(self) -> int:
        return next(self._left)


def read(reader: Reader, epoch: int, count: int, done: int = 0) -> list[int]:
    return list(itertools.islice(reader.batches(epoch, done), count - done))


ENDLESS = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
OF_TEN = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
LIMITED = {
    "list": (lambda: list(range(10)), OF_TEN),
    "iterable": (lambda: Again(10), OF_TEN),
    "with a state": (lambda: PlacedAgain(10), OF_TEN),
    "resetting": (lambda: Resetting(10), OF_TEN),
    "endless iterable": (lambda: Again(10**9), ENDLESS),
    "endless iterator": (lambda: iter(Again(10**9)), ENDLESS),
    "endless iterator with a state": (lambda: Placed(None), ENDLESS),
}


@pytest.mark.parametrize("make", [value[0] for value in LIMITED.values()], ids=LIMITED)
def test_with_a_limit_an_epoch_goes_on_where_the_last_has_ended(make):
    expected = next(numbers for its, numbers in LIMITED.values() if its is make)
    reader = Reader(make(), "loader", limit=4)
    assert [read(reader, epoch, 4) for epoch in range(3)] == expected


@pytest.mark.parametrize("make", [lambda: [0, 1, 2], lambda: Again(3), lambda: PlacedAgain(3), lambda: Resetting(3)])
def test_without_a_limit_every_epoch_is_the_whole_loader(make):
    reader = Reader(make(), "loader")
    assert [list(reader.batches(epoch, 0)) for epoch in range(3)] == 3 * [[0, 1, 2]]


RESUMABLE = [name for name in LIMITED if name not in ("resetting", "endless iterator")]


@pytest.mark.parametrize("name", RESUMABLE)
@pytest.mark.parametrize(("epoch", "done"), [(epoch, done) for epoch in range(3) for done in range(4)])
def test_a_reader_goes_on_from_every_place(name, epoch, done):
    make, expected = LIMITED[name]
    first = Reader(make(), "loader", limit=4)
    for earlier in range(epoch):
        read(first, earlier, 4)
    read(first, epoch, done)
    place = first.place()
    again = Reader(make(), "loader", limit=4, place=place)
    assert read(again, epoch, 4, done) == expected[epoch][done:]
    assert [read(again, later, 4) for later in range(epoch + 1, 3)] == expected[epoch + 1 :]


def test_without_a_place_the_batches_of_all_epochs_are_left_out():
    reader = Reader(Again(10), "loader", limit=4)  # as for a state that a hook has kept
    assert read(reader, 2, 4, done=1) == [9, 0, 1]


def test_a_place_holds_for_the_first_epoch_only_and_iterators_are_put_once():
    endless = Placed(None)
    reader = Reader(endless, "loader", 4, ({"next": 5}, 2))  # a state, and batches that were read since
    assert [read(reader, epoch, 4) for epoch in range(2)] == [[7, 8, 9, 10], [11, 12, 13, 14]]
    assert endless.puts == 1


def test_an_epoch_must_not_be_longer_than_the_loader():
    assert read(Reader(Again(3), "loader", limit=4), 0, 4) == [0, 1, 2]
    dry = Reader(iter(Again(6)), "loader", limit=4)
    assert [read(dry, epoch, 4) for epoch in range(2)] == [[0, 1, 2, 3], [4, 5]]


def test_what_can_be_read_only_once_cannot_be_put_anywhere():
    with pytest.raises(BatchError, match="loader is a range_iterator, which can be read only once and cannot be put"):
        Reader(iter(Again(9)), "loader", limit=4).batches(1, 2)
    with pytest.raises(TypeError, match="loader must be an iterable of batches, got 3"):
        Reader(3, "loader")


def test_that_it_began_anew_is_known_of_the_batch_after_that():
    reader = Reader(Again(3), "loader", limit=2)
    read(reader, 0, 2)
    batches = reader.batches(1, 0)
    assert [(next(batches), reader.begun_anew) for _ in range(3)] == [(2, False), (0, True), (1, False)]


@pytest.mark.parametrize("used", [0, 3, 5])
def test_an_iterator_is_put_back_behind_what_was_used(used):
    loader = Placed(9)
    reader = Reader(loader, "loader")
    batches, places = reader.batches(0, 0), []
    for _ in range(5):
        places.append(reader.place())
        next(batches)
    places.append(reader.place())
    reader.put_back(used, places[used])
    assert next(loader) == used
    assert loader.puts == (used < 5)


def test_what_cannot_be_put_back_is_lost_and_that_is_said(caplog):
    for loader in ([1, 2, 3], Again(3)):  # begun anew by what reads them next
        reader = Reader(loader, "loader")
        read(reader, 0, 3)
        reader.put_back(1, reader.place())
    assert not caplog.text
    reader = Reader(iter(Again(9)), "loader", limit=8)
    read(reader, 0, 5)
    reader.put_back(5, reader.place())
    assert not caplog.text
    reader.put_back(2, reader.place())
    assert "loader has given 3 batches that were not used, and cannot be put back" in caplog.text
