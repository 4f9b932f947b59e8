"""Loaders of every kind, and what is said of a bad one."""

import contextlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import BATCH, assert_bit_equal, batches, data, host, trainer

from ant_jax import ArrayLoader, BatchError
from ant_jax._feed import Ahead, Feed
from ant_jax.data import canonical


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("rows", [None, 2])
def test_what_is_trained_on_shares_no_memory_with_the_arrays_of_a_loader(shuffle, rows):
    arrays = np.arange(10.0, dtype=np.float32), np.arange(10, dtype=np.int32)
    loader = ArrayLoader(arrays, batch_size=4, shuffle=shuffle)
    for chunk in Feed(loader, "loader").chunks(rows, 10.0):
        for array, leaf in zip(arrays, chunk.batches, strict=True):
            assert not np.shares_memory(array, leaf)


def test_array_loader_shuffles_by_seed_and_epoch():
    loader = ArrayLoader({"x": np.arange(10), "y": -np.arange(10)}, 4, seed=3)
    epochs = [np.concatenate([batch["x"] for batch in loader.batches(epoch)]) for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0].tolist() != epochs[1].tolist()
    again = ArrayLoader({"x": np.arange(10), "y": -np.arange(10)}, 4, seed=3)
    np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in again]), epochs[0])
    other = ArrayLoader({"x": np.arange(10), "y": -np.arange(10)}, 4, seed=4)
    assert np.concatenate([batch["x"] for batch in other]).tolist() != epochs[0].tolist()
    assert all((batch["x"] == -batch["y"]).all() for batch in loader)


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("start", range(4))
def test_array_loader_chunks_are_its_batches(drop_last, start):
    loader = ArrayLoader(data(30), 8, seed=1, drop_last=drop_last)
    expected = list(loader.batches(epoch=2, position=8 * start))
    if not expected:
        with pytest.raises(BatchError, match="gave no batches in epoch 2 after the 3 that are done"):
            Feed(loader, "loader", 2, start, 8 * start)
        return
    for rows in (1, 2, 3, 100, None):
        feed = Feed(loader, "loader", 2, start, 8 * start)
        np.testing.assert_array_equal(feed.first[0], expected[0][0])
        chunks = list(feed.chunks(rows, 10.0))
        assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert sum(chunk.filled for chunk in chunks) == len(expected)
        unstacked = [
            jax.tree.map(lambda leaf, row=row, stacked=rows is not None: leaf[row] if stacked else leaf, chunk.batches)
            for chunk in chunks
            for row in range(chunk.filled)
        ]
        for mine, its in zip(unstacked, expected, strict=True):
            jax.tree.map(np.testing.assert_array_equal, mine, its)


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ((np.zeros(3), np.zeros(4)), {}, r"share the length of their first axis, got 0: float64\[3\], 1: float64\[4\]"),
        ((), {}, "got none"),
        (np.float32(1), {}, r"arrays: float32\[\]"),
        (np.zeros(0), {}, "0 examples make no batch of 2"),
        (np.zeros(1), {"drop_last": True}, "1 examples make no batch of 2 when drop_last=True"),
        (np.zeros(3), {"batch_size": 0}, "batch_size must be a positive whole number, got 0"),
        (np.zeros(3), {"batch_size": 2.0}, "got 2.0"),
        (np.zeros(3), {"seed": -1}, "seed must be a whole number from 0 on, got -1"),
    ],
)
def test_array_loader_refuses(arrays, options, message):
    with pytest.raises(ValueError, match=message):
        ArrayLoader(arrays, **{"batch_size": 2, **options})


def test_all_loaders_train_alike():
    import grain
    import torch
    import torch.utils.data as torch_data

    inputs, targets = data(5 * BATCH + 3)
    a_trainer = trainer()
    start = a_trainer.init((inputs, targets))
    dataset = torch_data.TensorDataset(torch.tensor(inputs), torch.tensor(targets, dtype=torch.int64))
    source = [(inputs[i], targets[i]) for i in range(len(inputs))]
    plain = list(ArrayLoader((inputs, targets), BATCH, shuffle=False))
    loaders = {
        "ArrayLoader": ArrayLoader((inputs, targets), BATCH, shuffle=False),
        "list": plain,
        "torch": torch_data.DataLoader(dataset, BATCH),
        "grain": grain.MapDataset.source(source).batch(BATCH),
        "jax arrays": [jax.tree.map(jnp.asarray, batch) for batch in plain],
        "lists": [[batch[0].tolist(), batch[1].tolist()] for batch in plain],
    }
    expected, history = a_trainer.fit(start, plain, 2, plain)
    for name, loader in loaders.items():
        if name == "lists":
            continue
        state, its_history = a_trainer.fit(start, loader, 2, loader)
        assert_bit_equal(state, expected)
        assert its_history == history, name


def test_a_loader_may_reuse_its_buffers():
    def reusing() -> Any:
        buffer = np.zeros((BATCH, 4), np.float32), np.zeros(BATCH, np.int32)
        for batch in batches():
            for to, of in zip(buffer, batch, strict=True):
                to[:] = of
            yield buffer

    for fuse in (True, False):
        a_trainer = trainer(fuse=fuse)
        start = a_trainer.init(batches()[0])
        state, _ = a_trainer.fit(start, reusing(), 1)
        expected, _ = a_trainer.fit(start, batches(), 1)
        assert_bit_equal(state, expected)


class Raising:
    """A loader that fails in the middle of every epoch."""

    def __iter__(self) -> Any:
        yield from batches(3)
        raise OSError("disk")


def test_an_exception_of_the_loader_comes_after_the_batches_before_it():
    done: list[int] = []

    def note(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        done.append(int(state.step))
        return state, logs

    a_trainer = trainer(host(on_batch_end=note))
    with pytest.raises(OSError, match="disk") as caught:
        a_trainer.fit(a_trainer.init(batches()[0]), Raising(), 1)
    assert done == [1, 2, 3]
    assert caught.value.__notes__[0] == "in train_loader, after 3 batches of epoch 0"


def fit(loader: Any, epochs: int = 1, val_loader: Any = None, **options: Any) -> Any:
    a_trainer = trainer()
    return a_trainer.fit(a_trainer.init(batches()[0]), loader, epochs, val_loader, **options)


def test_empty_loaders():
    with pytest.raises(BatchError, match="train_loader gave no batches in epoch 0; it is empty"):
        fit([])
    with pytest.raises(BatchError, match="val_loader gave no batches in epoch 0; it is empty"):
        fit(batches(), 1, [])
    for loader in (iter(batches()), (batch for batch in batches())):  # it can be told beforehand
        message = "which can be read only once, and there are 2 epochs to go. Pass an iterable"
        with pytest.raises(BatchError, match=f"train_loader is a .*, {message}"):
            fit(loader, 2)
        with pytest.raises(BatchError, match=f"val_loader is a .*, {message}"):
            fit(batches(), 2, loader)

    class Once:
        """An iterator of a kind that may start again, for all that can be told."""

        def __init__(self):
            self.batches = iter(batches())

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            return next(self.batches)

    message = "train_loader gave no batches in epoch 1: it is an iterator that has been read to its end"
    with pytest.raises(BatchError, match=message) as caught:
        fit(Once(), 2)
    assert int(caught.value.train_state.step) == 5  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError, match="train_loader must be an iterable of batches, got 3"):
        fit(3)


def test_batches_of_another_form():
    (x, y), *rest = batches(4)
    cases = [
        ((x, y, y), "another structure, shape or dtype than the first"),
        ((x[:, :2], y), r"0: expected float32\[8,4\], got float32\[8,2\]"),
        ((x, y.astype(np.float32)), r"1: expected int32\[8\], got float32\[8\]"),
        ((x[:5], y[:5]), "batch 2 of epoch 0 has 5 examples and the first had 8; only the last batch"),
        ((np.concatenate([x, x]), np.concatenate([y, y])), r"got float32\[16,4\]"),
    ]
    for bad, message in cases:
        with pytest.raises(BatchError, match=message):
            fit([(x, y), rest[0], bad, rest[1]])
    with pytest.raises(BatchError, match="a batch is a pytree of numeric arrays; it holds a str"):
        fit([(x, "text")])


def test_steps_per_epoch_of_a_stream_without_an_end():
    def endless() -> Any:
        while True:
            yield from batches(3)

    stream = endless()
    state, history = fit(stream, 3, steps_per_epoch=2)
    assert (int(state.step), len(history)) == (6, 3)
    # An epoch takes no batch too many: the next one begins where the last has ended.
    np.testing.assert_array_equal(next(stream)[0], batches(3)[0][0])
    straight, _ = fit([*batches(3), *batches(3)], 1)
    assert_bit_equal(state, straight, "params")
    limited, _ = fit(ArrayLoader(data(9 * BATCH), BATCH, shuffle=False), 1, steps_per_epoch=2)
    assert int(limited.step) == 2
    for loader in (batches(3), ArrayLoader(data(3 * BATCH), BATCH)):
        with pytest.raises(BatchError, match="train_loader has 3 batches, fewer than steps_per_epoch=4"):
            fit(loader, 1, steps_per_epoch=4)
    with pytest.raises(BatchError, match="ended after 3 batches of epoch 0, before steps_per_epoch=4"):
        fit(iter(batches(3)), 1, steps_per_epoch=4)


def test_64_bit_numbers_become_32_bit_or_are_refused():
    inputs, targets = canonical((np.ones(2, np.float64), np.array([1, 2**31 - 1], np.int64)))
    assert (inputs.dtype, targets.dtype) == (np.float32, np.int32)
    with pytest.raises(BatchError, match=re.escape("1099511627781 in an int64 leaf does not fit int32")):
        canonical((np.ones(2), np.array([2**40 + 5])))


def test_ahead_raises_when_the_item_is_asked_for():
    def items() -> Any:
        yield 1
        raise OSError("late")

    ahead = Ahead(items(), lambda item: 10 * item, contextlib.nullcontext)
    assert next(iterator := iter(ahead)) == 10
    ahead.fetch()
    ahead.fetch()
    with pytest.raises(OSError, match="late"):
        next(iterator)


def test_a_slow_loader_is_not_waited_for_until_the_chunk_is_full():
    feed = Feed(batches(6), "loader")
    assert [chunk.filled for chunk in feed.chunks(4, seconds=-1.0)] == [1] * 6


def test_a_loader_with_another_batch_size_describes_itself():
    loader = ArrayLoader(np.arange(6), batch_size=2)
    assert loader.description["batch_size"] == 2
    assert loader.with_batch_size(3).description == {**loader.description, "batch_size": 3}
