"""Batches of another size: the same examples in the same order, whatever is asked for and wherever the run is cut."""

import itertools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from problems import assert_bit_equal, data, host, trainer

import ant_jax as ant


EXAMPLES = 30


def loader(size: int = 4, **options: Any) -> ant.ArrayLoader:
    return ant.ArrayLoader(data(EXAMPLES), size, **options)


def watcher(seen: list[Any], **hooks: Any) -> ant.Callback:
    """Notes epoch, batch and batch size of every batch."""

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        seen.append((state.epoch, batch_idx, logs["batch_size"]))
        return state, logs

    return host("watcher", on_batch_end=on_batch_end, **hooks)


def sizes_of(seen: list[Any], epoch: int) -> list[int]:
    assert [batch_idx for of, batch_idx, _ in seen if of == epoch] == list(range(sum(of == epoch for of, *_ in seen)))
    return [size for of, _, size in seen if of == epoch]


def fit(*callbacks: ant.Callback, epochs: int = 3, batches: Any = None, state: Any = None, **options: Any) -> Any:
    a_trainer = trainer(*callbacks, **options)
    batches = loader() if batches is None else batches
    return a_trainer.fit(a_trainer.init(data(4)) if state is None else state, batches, epochs)


def by_hand(sizes: list[list[int]], **options: Any) -> Any:
    """Train by `train_step` on batches of these sizes, epoch by epoch."""
    a_trainer = trainer(**options)
    state, inputs = a_trainer.init(data(4)), data(EXAMPLES)
    for epoch, of_epoch in enumerate(sizes):
        order = np.random.default_rng((0, epoch)).permutation(EXAMPLES)
        for start, size in zip(itertools.accumulate([0, *of_epoch]), of_epoch, strict=False):
            rows = order[start : start + size]
            state, _ = a_trainer.train_step(state, jax.tree.map(lambda leaf, rows=rows: leaf[rows], inputs))
    return state


@pytest.mark.parametrize("fuse", [True, False])
def test_per_epoch_it_is_the_loop_by_hand(fuse):
    seen: list[Any] = []
    schedule = ant.callbacks.batch_size_schedule({0: 4, 1: 16, 2: 10})
    state, history = fit(schedule, watcher(seen), fuse=fuse)
    expected = [[4] * 7 + [2], [16, 14], [10] * 3]
    assert [sizes_of(seen, epoch) for epoch in range(3)] == expected
    assert history.to_dict()["batch_size"] == [4, 16, 10]
    assert_bit_equal(state, by_hand(expected), "params", "step")


@pytest.mark.parametrize("per", ["epoch", "batch"])
def test_sizes_may_be_given_in_any_order(per):
    sizes = {0: 4, 1: 16, 2: 10}
    plans = [dict(items) for items in itertools.permutations(sizes.items())]
    runs = [fit(ant.callbacks.batch_size_schedule(plan, per=per)) for plan in (sizes, plans[-1], plans[2])]
    for state, history in runs[1:]:
        assert history.to_dict() == runs[0][1].to_dict()
        assert_bit_equal(state, runs[0][0], "params", "step")


@pytest.mark.parametrize("fuse", [True, False])
def test_per_batch_it_is_the_loop_by_hand_and_needs_no_look(fuse):
    schedule = ant.callbacks.batch_size_schedule({0: 4, 3: 6, 5: 2, 9: 16}, per="batch")
    expected = [[4, 4, 4, 6, 6, 2, 2, 2], [2, 16, 12], [16, 14]]
    state, history = fit(schedule, fuse=fuse)
    assert_bit_equal(state, by_hand(expected), "params", "step")
    assert history.to_dict()["batch_size"] == [2, 16, 16]
    seen: list[Any] = []
    watched, _ = fit(schedule, watcher(seen), fuse=fuse)
    assert [sizes_of(seen, epoch) for epoch in range(3)] == expected
    assert_bit_equal(watched, state, "params")


def test_a_size_that_the_epoch_has_no_batch_left_of_waits_for_the_next():
    seen: list[Any] = []
    schedule = ant.callbacks.batch_size_schedule({0: 4, 5: 16}, per="batch")
    fit(schedule, watcher(seen), batches=loader(drop_last=True), epochs=2)
    assert [sizes_of(seen, epoch) for epoch in range(2)] == [[4] * 7, [16]]


# By the batch of the first epoch in whose `on_batch_end` it is asked for.
WAITING: dict[str, tuple[dict[int, int], list[list[int]]]] = {
    "one": ({4: 16}, [[4] * 7, [16], [16]]),
    "the later of two": ({4: 16, 5: 14}, [[4] * 7, [14] * 2, [14] * 2]),
    "none, after one that fits": ({4: 16, 5: 3}, [[4] * 6 + [3] * 2, [3] * 10, [3] * 10]),
    "one after one that fits": ({4: 3, 5: 16}, [[4] * 5 + [3] * 3, [16], [16]]),
}


@pytest.mark.parametrize("case", WAITING)
def test_a_size_that_is_asked_for_once_waits_for_the_next_epoch_wherever_the_run_is_cut(case, tmp_path):
    sizes, expected = WAITING[case]
    kept: list[ant.TrainState] = []

    def ask(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        asks = state.epoch == 0 and batch_idx in sizes
        return state.request_batch_size(sizes[batch_idx]) if asks else state, logs

    def keep(trainer: Any, state: Any, logs: Any) -> Any:
        if (state.epoch, state.batch_idx) in ((0, 6), (1, 0)):
            kept.append(state)
        return state, logs

    seen: list[Any] = []
    asking, batches = host("asks", on_batch_end=ask, on_checkpoint=keep), loader(drop_last=True)
    a_trainer = trainer(watcher(seen), asking)
    whole, _ = a_trainer.fit(a_trainer.init(data(4)), batches, 3)
    assert [sizes_of(seen, epoch) for epoch in range(3)] == expected
    assert_bit_equal(whole, by_hand(expected), "params", "step")
    for number, state in enumerate(kept[:]):
        a_trainer.save(tmp_path / str(number), state)
        again, _ = a_trainer.fit(a_trainer.restore(tmp_path / str(number)), batches, 3)
        assert_bit_equal(again, whole)


@pytest.mark.parametrize("hook", ["on_train_begin", "on_epoch_begin", "on_batch_begin", "on_batch_end", "on_epoch_end"])
def test_a_request_holds_from_the_next_batch_on(hook):
    seen: list[Any] = []

    def ask(*arguments: Any) -> Any:
        *lead, _, state, logs = arguments
        due = {"on_batch_begin": lead == [2], "on_batch_end": lead == [2], "on_epoch_end": lead == [0]}
        return state.request_batch_size(10) if due.get(hook, state.epoch == 0) else state, logs

    hooks: Any = {hook: ask}
    fit(watcher(seen), host("asks", **hooks), epochs=2)
    first = {"on_batch_begin": [4, 4, 10, 10, 2], "on_batch_end": [4, 4, 4, 10, 8], "on_epoch_end": [4] * 7 + [2]}
    assert sizes_of(seen, 0) == first.get(hook, [10, 10, 10])
    assert sizes_of(seen, 1) == [10] * 3


@pytest.mark.parametrize("cut", range(1, 6))
def test_a_run_cut_anywhere_goes_on_bit_for_bit(cut, tmp_path):
    """With accumulation, momentum and looks, killed after any batch of the epoch in which the size changes."""

    def failing(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        if (state.epoch, batch_idx) == (1, cut):
            raise InterruptedError
        return state, logs

    options: dict[str, Any] = {"optimizer": optax.sgd(0.1, momentum=0.9), "gradient_accumulation_steps": 3}
    schedule = ant.callbacks.batch_size_schedule({0: 4, 11: 3, 12: 6}, per="batch")
    whole, whole_history = fit(schedule, host(), **options)
    with pytest.raises(InterruptedError) as caught:
        fit(schedule, host(on_batch_end=failing), **options)
    state = caught.value.train_state  # pyright: ignore[reportAttributeAccessIssue]
    a_trainer = trainer(schedule, host(), **options)
    a_trainer.save(tmp_path, state)
    again, history = fit(schedule, host(), state=a_trainer.restore(tmp_path), **options)
    assert_bit_equal(again, whole)
    assert history == whole_history


def test_every_size_is_compiled_once(compilations):
    a_trainer = trainer(ant.callbacks.batch_size_schedule({0: 5, 2: 10, 4: 5, 6: 10}))
    state, _ = a_trainer.fit(a_trainer.init(data(4)), loader(), 3)
    compilations.reset()
    a_trainer.fit(state, loader(), 8)
    assert compilations.count == 0


def test_hooks_know_the_length_of_the_epoch():
    lengths: list[Any] = []

    def on_batch_end(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        lengths.append(trainer.steps_per_epoch)
        return state, logs

    fit(
        ant.callbacks.batch_size_schedule({0: 10, 1: 15, 4: 6}, per="batch"),
        host(on_batch_end=on_batch_end),
        epochs=2,
    )
    assert lengths == [3, 3, 3, 2, 4, 4, 4]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "sizes must be a mapping {epoch: batch size} that has 0, got {}"),
        ({1: 8}, "that has 0, got {1: 8}"),
        (8, "that has 0, got 8"),
        ({0: 0}, r"sizes\[0\] must be a whole number of examples, at least 1, got 0"),
        ({0: 8, 2.5: 4}, "the epoch from which 4 holds must be a whole number, at least 0, got 2.5"),
        ({0: 8, -1: 4}, "at least 0, got -1"),
    ],
)
def test_refuses_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        ant.callbacks.batch_size_schedule(sizes)


def test_refuses_what_has_no_meaning():
    per: Any = "step"
    with pytest.raises(ValueError, match="per must be 'epoch' or 'batch', got 'step'"):
        ant.callbacks.batch_size_schedule({0: 8}, per=per)
    with pytest.raises(ant.BatchError, match="asked for batches of 8 examples, and train_loader is a list"):
        fit(ant.callbacks.batch_size_schedule({0: 8}), batches=[data(4)])
    state = trainer().init(data(4))
    bad: list[Any] = [0, 2.5, True]
    for size in bad:
        with pytest.raises(ValueError, match=f"batch_size must be a positive whole number, got {size}"):
            state.request_batch_size(size)
    with pytest.raises(ValueError, match="from_batch=-1 is past; the next batch is 0"):
        state.request_batch_size(8, from_batch=-1)
    with pytest.raises(ValueError, match="30 examples make no batch of 31 when drop_last=True"):
        fit(ant.callbacks.batch_size_schedule({0: 31}), batches=loader(drop_last=True))
