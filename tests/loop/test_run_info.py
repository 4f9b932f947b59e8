"""What host hooks may know of the run."""

import logging
import threading
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import optax
import pytest
from problems import Clock, batches, host, trainer

import ant_jax as ant
from ant_jax._hooks import callback_list as _events
from ant_jax._loop import run_info as _run


def dense(features: int = 64) -> tuple[Any, Any]:
    def init(key: Any, inputs: Any) -> Any:
        return {"kernel": np.zeros((features, features), np.float32)}, {}

    def apply(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
        return inputs @ params["kernel"], model_state

    return init, apply


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that costs are counted in: it stands still but where a test moves it."""
    moved = Clock()
    for module in (_run, _events):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=moved))
    return moved


class Taking:
    """A loader that takes a second for every batch."""

    def __init__(self, clock: Clock, count: int):
        self._clock, self._count = clock, count

    def __iter__(self) -> Iterator[Any]:
        for batch in batches(self._count):
            self._clock.now += 1.0
            yield batch

    def __len__(self) -> int:
        return self._count


def costs_of_epochs(seen: list[Any]) -> ant.Callback:
    """Writes down what the run has cost by the end of each epoch."""

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        costs = trainer.costs
        seen.append((costs.flops_per_example, costs.data_seconds, costs.hook_seconds))
        return state, logs

    return host("look", on_epoch_end=on_epoch_end)


@pytest.mark.parametrize("fuse", [True, False])
def test_xla_counts_the_products_of_matrices(fuse):
    """A forward and a backward product, and what an element takes is little beside them."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(40, 64)).astype(np.float32)
    loader = ant.ArrayLoader((inputs, inputs), 16)
    options: Any = {"model": dense(), "criterion": lambda x, y: optax.l2_loss(x, y).mean(axis=-1), "fuse": fuse}
    seen: list[Any] = []
    a_trainer = trainer(costs_of_epochs(seen), **options)
    a_trainer.fit(a_trainer.init(next(iter(loader))), loader, 2)
    for flops, _, _ in seen:
        assert 1 < flops / (2 * 2 * 64 * 64) < 1.1


@pytest.mark.parametrize("fuse", [True, False])
def test_what_the_loader_and_the_hooks_of_a_run_take_is_counted(fuse, clock):
    seen: list[Any] = []
    slow = clock.passing(on_epoch_begin=10.0, on_batch_end=100.0)
    a_trainer = trainer(slow, costs_of_epochs(seen), fuse=fuse)
    start = a_trainer.init(batches()[0])
    for _ in range(2):  # a run counts from its beginning, also with a trainer that has run before
        seen.clear()
        a_trainer.fit(start, Taking(clock, 3), 2)
        assert [data_seconds for _, data_seconds, _ in seen] == [3.0, 6.0]
        assert [hooks for _, _, hooks in seen] == [{"passing": 310.0, "look": 0.0}, {"passing": 620.0, "look": 0.0}]


def test_outside_a_run_nothing_is_known():
    with pytest.raises(RuntimeError, match=r"trainer\.costs is known only to host hooks, while fit runs"):
        _ = trainer().costs


class Heard(logging.Handler):
    """What the package says, and a bounded wait until it has said so much."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self._more = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._more:
            self.said.append(record.getMessage())
            self._more.notify_all()

    def wait_for(self, count: int) -> None:
        with self._more:
            assert self._more.wait_for(lambda: len(self.said) >= count, timeout=60)


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler, logger = Heard(), logging.getLogger("ant_jax")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def test_a_loader_that_gives_nothing_for_long_is_named_and_again_when_it_takes_twice_as_long(clock, heard, monkeypatch):
    monkeypatch.setattr(_run, "SLOW_SECONDS", 0.05)  # how often the loader is looked at goes by a clock of its own
    looks = threading.Semaphore(0)
    monkeypatch.setattr(_run.time, "perf_counter", lambda: (looks.release(), clock.now)[1])

    def look_on() -> None:
        while looks.acquire(blocking=False):
            pass
        for _ in range(3):
            assert looks.acquire(timeout=60)

    def slow() -> Iterator[Any]:
        for i, batch in enumerate(batches(4)):
            waits = {2: ((40, 1), (39, 1), (2, 2)), 3: ((0, 2), (50, 3))}
            for seconds, said in waits.get(i, ()):
                clock.now += seconds
                heard.wait_for(said)
                look_on()
            yield batch

    def take_long(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        clock.now += 1000
        while looks.acquire(blocking=False):
            pass
        assert not looks.acquire(timeout=0.05)  # a hook's time is not the loader's
        return state, logs

    a_trainer = trainer(host("long", on_batch_end=take_long), fuse=False)
    a_trainer.fit(a_trainer.init(batches()[0]), slow(), 1)
    assert heard.said == [f"train_loader has given nothing for {n} s; the run waits for it" for n in (40, 81, 50)]
    a_trainer.fit(a_trainer.init(batches()[0]), batches(4), 1)
    assert len(heard.said) == 3
