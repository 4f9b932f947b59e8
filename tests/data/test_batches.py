"""Loaders of every kind, and what is said of a bad one."""

import contextlib
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import BATCH, assert_bit_equal, batches, data, host, trainer

import ant_jax as ant
from ant_jax import ArrayLoader, BatchError
from ant_jax._data.batches import to_batch
from ant_jax._data.epoch_batches import EpochBatches
from ant_jax._data.prefetcher import Prefetcher


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("rows", [None, 2])
def test_what_is_trained_on_shares_no_memory_with_the_arrays_of_a_loader(shuffle, rows):
    arrays = np.arange(10.0, dtype=np.float32), np.arange(10, dtype=np.int32)
    loader = ArrayLoader(arrays, batch_size=4, shuffle=shuffle)
    for chunk in EpochBatches(loader, "loader").chunks(rows, 10.0):
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
            EpochBatches(loader, "loader", 2, start, 8 * start)
        return
    for rows in (1, 2, 3, 100, None):
        feed = EpochBatches(loader, "loader", 2, start, 8 * start)
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
        (np.zeros(3), {"seed": 0.5}, "seed must be a whole number from 0 on, got 0.5"),
        (np.zeros(3), {"shuffle": "no"}, "shuffle must be True or False, got 'no'"),
        (np.zeros(3), {"drop_last": 1}, "drop_last must be True or False, got 1"),
        (
            np.zeros(3),
            {"batch_size": np.zeros(3)},
            r"several arrays go into one tuple, ArrayLoader\(\(X, Y\), batch_size",
        ),
        ([0.0] * 20, {}, "0: Python float, .*, and 12 more; make arrays of lists with np.asarray"),
    ],
)
def test_array_loader_refuses(arrays, options, message):
    with pytest.raises(ValueError, match=message):
        ArrayLoader(arrays, **{"batch_size": 2, **options})


def test_a_batch_size_may_be_numpys():
    options: dict[str, Any] = {"batch_size": np.int64(2), "seed": np.int32(1), "shuffle": np.bool_(True)}
    loader = ArrayLoader(np.zeros(4), **options)
    assert len(loader) == 2 and type(loader.batch_size) is int


@pytest.mark.torch
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
    inputs, targets = to_batch((np.ones(2, np.float64), np.array([1, 2**31 - 1], np.int64)))
    assert (inputs.dtype, targets.dtype) == (np.float32, np.int32)
    with pytest.raises(BatchError, match=re.escape("1099511627781 in an int64 leaf does not fit int32")):
        to_batch((np.ones(2), np.array([2**40 + 5])))
    with pytest.raises(BatchError, match=re.escape("4294967301 in an uint64 leaf does not fit uint32")):
        to_batch((np.ones(2), np.array([7, 2**32 + 5], np.uint64)))
    assert to_batch(np.array([2**32 - 1], np.uint64)).dtype == np.uint32


def test_ahead_raises_when_the_item_is_asked_for():
    def items() -> Any:
        yield 1
        raise OSError("late")

    ahead = Prefetcher(items(), lambda item: 10 * item, contextlib.nullcontext)
    assert next(iterator := iter(ahead)) == 10
    ahead.fetch()
    ahead.fetch()
    with pytest.raises(OSError, match="late"):
        next(iterator)


def test_a_slow_loader_is_not_waited_for_until_the_chunk_is_full():
    feed = EpochBatches(batches(6), "loader")
    assert [chunk.filled for chunk in feed.chunks(4, seconds=-1.0)] == [1] * 6


def test_a_loader_with_another_batch_size_describes_itself():
    loader = ArrayLoader(np.arange(6), batch_size=2)
    assert loader.description["batch_size"] == 2
    assert loader.with_batch_size(3).description == {**loader.description, "batch_size": 3}


# --- how much is read


class Stream:
    """An iterator that counts what it gives, and cannot be put anywhere; without a ``count`` it has no end."""

    def __init__(self, count: int | None = None) -> None:
        self.given, self._count = 0, count

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        if self.given == self._count:
            raise StopIteration
        self.given += 1
        return batches(12)[(self.given - 1) % 12]


class Placed(Stream):
    """One that can."""

    def get_state(self) -> int:
        return self.given

    def set_state(self, state: int) -> None:
        self.given = state


class Endless:
    """An iterable without an end, which gives the same batches whenever it is read."""

    def __iter__(self) -> Any:
        return itertools.cycle(batches(12))


def batch_means(state: ant.TrainState, loader: Any, *arguments: Any, **options: Any) -> list[float]:
    """The batches that a run has trained on, by their means."""
    seen: list[float] = []
    a_trainer = trainer(host(on_batch_end=lambda b, t, s, logs: (s, seen.append(float(logs["mean"])) or logs)), **TOLD)
    a_trainer.fit(state, loader, *arguments, **options)
    return seen


def told(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
    return jnp.mean(params["kernel"] ** 2), (model_state, {"mean": jnp.mean(batch[0])})


TOLD: dict[str, Any] = {"criterion": None, "loss_fn": told}


@pytest.mark.parametrize("make", [Endless, Stream, Placed, lambda: batches(12)])
def test_epochs_of_steps_per_epoch_go_on_where_the_last_has_ended(make):
    state = trainer(**TOLD).init(batches(1)[0])
    means = batch_means(state, make(), 3, steps_per_epoch=5)
    expected = [float(np.mean(batch[0])) for batch in (2 * batches(12))[:15]]
    np.testing.assert_allclose(means, expected, rtol=1e-5)


def test_an_array_loader_gives_the_first_batches_of_every_epochs_own_order():
    loader = ArrayLoader(data(9 * BATCH), BATCH, seed=2)
    state = trainer(**TOLD).init(batches(1)[0])
    means = batch_means(state, loader, 2, steps_per_epoch=4)
    expected = [float(np.mean(b[0])) for epoch in range(2) for b in itertools.islice(loader.batches(epoch), 4)]
    np.testing.assert_allclose(means, expected, rtol=1e-5)


def stopping_at(batch_idx: int) -> ant.Callback:
    return host("stop", on_batch_end=lambda b, t, state, logs: (state.request_stop(when=b == batch_idx), logs))


@pytest.mark.parametrize("fuse", [True, False])
def test_after_a_stop_an_iterator_goes_on_at_the_next_batch(fuse, caplog):
    a_trainer, stream = trainer(stopping_at(4), fuse=fuse), Placed()
    state, _ = a_trainer.fit(a_trainer.init(batches(1)[0]), stream, 1, steps_per_epoch=100)
    assert (int(state.step), stream.given) == (5, 5)
    assert not caplog.text
    for prefetch in (0, None):
        stream = Stream()
        a_trainer.fit(a_trainer.init(batches(1)[0]), stream, 1, steps_per_epoch=100, prefetch=prefetch)
        assert stream.given == 5
    assert not caplog.text
    a_trainer.fit(a_trainer.init(batches(1)[0]), stream, 1, steps_per_epoch=100, prefetch=3)
    assert f"train_loader has given {stream.given - 10} batches that were not used" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_an_iterator_goes_on_at_the_next_batch(error):
    def fail(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        if batch_idx == 2:
            raise error
        return state, logs

    for hook, used in (("on_batch_begin", 2), ("on_batch_end", 3), ("on_evaluate_end", 4)):
        arguments: dict[str, Any] = {hook: fail if hook != "on_evaluate_end" else lambda *_: fail(2, *_)}
        a_trainer, stream = trainer(host(**arguments)), Placed()
        with pytest.raises(error):
            a_trainer.fit(a_trainer.init(batches(1)[0]), stream, 1, batches(1), steps_per_epoch=4)
        assert stream.given == used


def test_an_iterator_is_read_only_as_far_as_an_evaluation_goes_and_put_back_where_that_fails():
    a_trainer, stream = trainer(), Placed()
    state = a_trainer.init(batches(1)[0])
    a_trainer.evaluate(state, stream, steps=5)
    assert stream.given == 5
    a_trainer.evaluate(state, stream, steps=2)
    assert stream.given == 7

    def broken() -> Any:
        yield from batches(2)
        raise OSError("disk")

    class Failing(Placed):
        def __next__(self) -> Any:
            if self.given == 9:
                raise OSError("disk")
            return super().__next__()

    failing = Failing()
    failing.given = 3
    with pytest.raises(OSError, match="disk"):
        a_trainer.evaluate(state, failing)
    assert failing.given == 3
    with pytest.raises(OSError, match="disk") as raised:
        a_trainer.evaluate(state, broken())
    assert raised.value.__notes__ == ["in loader, after 2 batches of epoch 0"]


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("prefetch", [0, 1, 2, 3, 5])
def test_no_more_batches_are_read_ahead_than_may_be(fuse, prefetch):
    ahead: list[int] = []
    stream = Stream()

    def note(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        ahead.append(stream.given - (batch_idx + 1))
        return state, logs

    a_trainer = trainer(host(on_batch_begin=note, on_batch_end=note), fuse=fuse)
    state = a_trainer.init(batches(1)[0])
    end, _ = a_trainer.fit(state, stream, 1, steps_per_epoch=30, prefetch=prefetch)
    assert 0 <= min(ahead) and max(ahead) <= prefetch
    assert_bit_equal(end, a_trainer.fit(state, Stream(), 1, steps_per_epoch=30)[0])


def borders(*intervals: int, end: int) -> list[int]:
    return sorted({done for every in intervals for done in range(every, end, every)} | {end})


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("limit", [None, 23])
@pytest.mark.parametrize("intervals", [(1,), (5,), (3, 5), (100,)])
def test_what_can_be_read_only_once_is_read_to_the_next_look(fuse, limit, intervals):
    read: list[int] = []
    stream = Stream(limit or 23)

    def note(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        read.append(stream.given)
        return state, logs

    looks = [host(f"look_{every}", every=every, on_batch_end=note) for every in intervals]
    a_trainer = trainer(*looks, fuse=fuse)
    state = a_trainer.init(batches(1)[0])
    end, _ = a_trainer.fit(state, stream, 1, steps_per_epoch=limit)
    assert sorted(set(read)) == borders(*intervals, end=23)
    assert_bit_equal(end, a_trainer.fit(state, Stream(23), 1, steps_per_epoch=limit, prefetch=50)[0])


@pytest.mark.parametrize("fuse", [True, False])
def test_a_stop_inside_an_accumulation_window_reads_to_its_end(fuse):
    stop = host(every=5, on_batch_end=lambda b, t, state, logs: (state.request_stop(), logs))
    a_trainer = trainer(stop, fuse=fuse, gradient_accumulation_steps=4)
    for limit, given in ((100, 8), (None, 9)):  # without a limit, the last batch is known by the one after it
        stream = Stream()
        end, _ = a_trainer.fit(a_trainer.init(batches(1)[0]), stream, 1, steps_per_epoch=limit)
        assert (int(end.step), stream.given) == (8, given)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("limit", [None, 8])
@pytest.mark.parametrize("prefetch", [None, 0])
def test_batches_may_depend_on_the_run(fuse, limit, prefetch):
    seen: list[int] = []
    now = {"step": 0}

    def on_policy() -> Any:
        while limit or len(seen) < 8:
            seen.append(now["step"])
            yield batches(1)[0]

    def publish(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        now["step"] = int(state.step)
        return state, logs

    a_trainer = trainer(host(on_batch_end=publish), fuse=fuse)
    a_trainer.fit(a_trainer.init(batches(1)[0]), on_policy(), 1, steps_per_epoch=limit, prefetch=prefetch)
    assert seen == list(range(8))


@pytest.mark.parametrize("loader", [lambda: iter(batches(7)), lambda: ArrayLoader(data(7 * BATCH), BATCH)])
def test_with_prefetch_0_hooks_come_as_ever(loader):
    events: list[list[Any]] = []

    def noting(name: str) -> Any:
        def hook(*arguments: Any) -> Any:
            *lead, _, state, logs = arguments
            size = len(logs.window["loss"]) if name == "on_batch_end" else None
            events[-1].append((name, *lead, size))
            return state, {**logs, "seen": 1.0} if name == "on_batch_end" else logs

        return hook

    names = ("on_batch_begin", "on_batch_end", "on_checkpoint", "on_epoch_end")
    a_trainer = trainer(host(every=3, **{name: noting(name) for name in names}))
    state = a_trainer.init(batches(1)[0])
    results = []
    for prefetch in (None, 0):
        events.append([])
        results.append(a_trainer.fit(state, loader(), 1, prefetch=prefetch))
    assert events[0] == events[1]
    assert_bit_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_prefetch_is_checked():
    for bad in (-1, True, 1.5):
        with pytest.raises(ValueError, match=f"prefetch must be a whole number from 0 on, or None, got {bad}"):
            fit(batches(), prefetch=bad)
    accumulating = trainer(gradient_accumulation_steps=2)
    state = accumulating.init(batches(1)[0])
    with pytest.raises(ValueError, match="prefetch=0 with gradient_accumulation_steps needs steps_per_epoch"):
        accumulating.fit(state, iter(batches()), 1, prefetch=0)
    end, _ = accumulating.fit(state, iter(batches()), 1, prefetch=0, steps_per_epoch=5)
    assert_bit_equal(end, accumulating.fit(state, batches(), 1)[0])


# --- loaders without an end, or without examples


def test_an_evaluation_has_an_end():
    a_trainer = trainer()
    state = a_trainer.init(batches(1)[0])
    expected = a_trainer.evaluate(state, batches(12)[:5])
    assert a_trainer.evaluate(state, Endless(), steps=5) == expected
    assert a_trainer.evaluate(state, batches(12)[:5], steps=9) == expected
    loader = ArrayLoader(data(12 * BATCH), BATCH, shuffle=False)
    assert a_trainer.evaluate(state, loader, steps=5) == expected
    end, history = a_trainer.fit(state, Endless(), 2, Endless(), steps_per_epoch=3, validation_steps=5)
    # Every evaluation begins at the beginning.
    assert history[1]["val_loss"] == a_trainer.evaluate(end, batches(12)[:5])["val_loss"]
    _, streamed = a_trainer.fit(
        state, Endless(), 2, itertools.cycle(batches(12)), steps_per_epoch=3, validation_steps=5
    )
    assert streamed[0] == history[0]
    assert streamed[1]["val_loss"] == a_trainer.evaluate(end, batches(12)[5:10])["val_loss"]


def test_a_loader_that_says_that_it_has_no_end_is_not_evaluated_for_ever():
    import grain

    repeating = grain.MapDataset.source(batches(2)).repeat()
    a_trainer = trainer()
    state = a_trainer.init(batches(1)[0])
    for endless in (repeating, itertools.cycle(batches(2)), itertools.repeat(batches(1)[0])):
        with pytest.raises(BatchError, match="val_loader has no end, .* give validation_steps=, its batches"):
            a_trainer.fit(state, batches(), 1, endless)
        with pytest.raises(BatchError, match="loader has no end, .* give steps=, its batches"):
            a_trainer.evaluate(state, endless)
        assert list(a_trainer.evaluate(state, endless, steps=3)) == ["val_loss"]
    assert list(a_trainer.evaluate(state, itertools.repeat(batches(1)[0], 3))) == ["val_loss"]
    assert int(a_trainer.fit(state, repeating, 2, steps_per_epoch=3)[0].step) == 6
    for name in ("steps", "validation_steps"):
        with pytest.raises(ValueError, match=f"{name} must be a positive whole number, got 0"):
            a_trainer.evaluate(state, [], steps=0) if name == "steps" else fit(batches(), validation_steps=0)


def test_a_long_evaluation_on_a_loader_without_a_length_is_worth_a_line(monkeypatch, caplog):
    monkeypatch.setattr("ant_jax._loop.evaluation.LONG_SECONDS", -1.0)
    a_trainer = trainer()
    state = a_trainer.init(batches(1)[0])
    a_trainer.evaluate(state, batches(3))
    assert not caplog.text
    a_trainer.fit(state, batches(3), 3, Again(3))
    assert caplog.text.count("the evaluation on val_loader has taken") == 1  # it has ended once, and so it ends
    assert "s and 3 batches, and the loader cannot tell how many will come" in caplog.text


class Again:
    """A loader that cannot tell its length."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Any:
        return iter(batches(self.count))


def test_a_length_that_cannot_be_told_is_none():
    expected, history = fit(batches(3), 2, batches(3))
    state, its_history = fit(Again(3), 2, Again(3))
    assert_bit_equal(state, expected)
    assert its_history == history


class Growing(Again):
    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        yield from batches(self.count)
        self.count += 1


@pytest.mark.parametrize(("first", "val_loader"), [(5, Growing(2)), (5, Again(2)), (260, Growing(300))])
def test_a_length_that_varies_compiles_nothing_after_the_first_epoch(first, val_loader, compilations):
    counts: list[int] = []

    def count(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        counts.append(compilations.count)
        return state, logs

    a_trainer = trainer(host(on_epoch_end=count))
    a_trainer.fit(a_trainer.init(batches(1)[0]), Growing(first), 6, val_loader)
    assert counts[1:] == 5 * counts[:1]


def test_a_batch_of_no_examples_is_refused_wherever_it_comes():
    (x, y), whole = batches(1)[0], batches(2)
    empty = x[:0], y[:0]
    message = r"batch 2 of epoch 0 has no examples: 0: float32\[0,4\], 1: int32\[0\]. Leave it out of the loader"
    with pytest.raises(BatchError, match=f"train_loader, {message}"):
        fit([*whole, empty])
    with pytest.raises(BatchError, match=f"train_loader, {message}"):
        fit([*whole, empty, *whole])
    with pytest.raises(BatchError, match=f"val_loader, {message}"):
        fit(whole, 1, [*whole, empty])
    with pytest.raises(BatchError, match="train_loader, batch 0 of epoch 0 has no examples"):
        fit([empty, *whole])
    a_trainer = trainer()
    state = a_trainer.init(empty)  # of which only the form counts
    with pytest.raises(BatchError, match=f"loader, {message}"):
        a_trainer.evaluate(state, [*whole, empty])
    for step in (a_trainer.train_step, a_trainer.grad_step):
        with pytest.raises(BatchError, match="the batch has no examples"):
            step(state, empty)
    with pytest.raises(ValueError, match="predict: inputs has no examples"):
        a_trainer.predict(state, x[:0])


def test_no_seed_has_the_orders_of_another_one():
    orders = [
        tuple(np.concatenate(list(ant.ArrayLoader(np.arange(50), 10, seed=seed).batches(epoch))).tolist())
        for seed in range(4)
        for epoch in range(4)
    ]
    assert len(set(orders)) == 16
