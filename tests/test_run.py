"""What host hooks may know of the run."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import optax
import pytest
from problems import batches, host, trainer

import ant_jax as ant


def dense(features: int = 64) -> tuple[Any, Any]:
    def init(key: Any, inputs: Any) -> Any:
        return {"kernel": np.zeros((features, features), np.float32)}, {}

    def apply(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
        return inputs @ params["kernel"], model_state

    return init, apply


def costs_at_the_end(loader: Any, *, epochs: int = 2, **options: Any) -> list[Any]:
    seen: list[Any] = []

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        costs = trainer.costs
        seen.append((costs.flops_per_example, costs.data_seconds, costs.hook_seconds))
        return state, logs

    slow = host("slow", on_epoch_begin=lambda epoch, trainer, state, logs: (time.sleep(0.02), (state, logs))[1])
    a_trainer = trainer(slow, host("look", on_epoch_end=on_epoch_end), **options)
    a_trainer.fit(a_trainer.init(next(iter(loader))), loader, epochs)
    return seen


@pytest.mark.parametrize("fuse", [True, False])
def test_xla_counts_the_products_of_matrices(fuse):
    """A forward and a backward product, and what an element takes is little beside them."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(40, 64)).astype(np.float32)
    loader = ant.ArrayLoader((inputs, inputs), 16)
    options: Any = {"model": dense(), "criterion": lambda x, y: optax.l2_loss(x, y).mean(axis=-1), "fuse": fuse}
    for flops, _, _ in costs_at_the_end(loader, **options):
        assert 1 < flops / (2 * 2 * 64 * 64) < 1.1


@pytest.mark.parametrize("fuse", [True, False])
def test_what_the_loader_and_the_hooks_take_is_counted(fuse):
    class Slow:
        def __iter__(self) -> Any:
            for batch in batches(3):
                time.sleep(0.01)
                yield batch

        def __len__(self) -> int:
            return 3

    (_, _, first), (_, data_seconds, hooks) = costs_at_the_end(Slow(), fuse=fuse)
    assert data_seconds >= 0.06
    assert 0.02 <= first["slow"] < hooks["slow"] and hooks["slow"] >= 0.04
    assert list(hooks) == ["slow", "look"]


def test_a_run_counts_its_own_costs():
    (*_, (_, _, hooks)) = costs_at_the_end(batches(2), epochs=3)
    (*_, (_, _, again)) = costs_at_the_end(batches(2), epochs=1)
    assert again["slow"] < hooks["slow"]


def test_outside_a_run_nothing_is_known():
    with pytest.raises(RuntimeError, match=r"trainer\.costs is known only to host hooks, while fit runs"):
        _ = trainer().costs


def test_a_loader_that_gives_nothing_for_long_is_named(monkeypatch, caplog):
    monkeypatch.setattr("ant_jax._run.SLOW_SECONDS", 0.1)

    def slow() -> Iterator[Any]:
        for i, batch in enumerate(batches(4)):
            time.sleep(0.4 if i == 2 else 0.0)
            yield batch

    a_trainer = trainer()
    a_trainer.fit(a_trainer.init(batches()[0]), slow(), 1)
    assert "train_loader has given nothing for 0 s; the run waits for it" in caplog.text
    caplog.clear()
    a_trainer.fit(a_trainer.init(batches()[0]), batches(4), 1)
    assert not caplog.text
