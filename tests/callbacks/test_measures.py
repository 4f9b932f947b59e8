"""Throughput and memory."""

import math
from typing import Any

import jax
import pytest
from problems import BATCH, Clock, batches, data, host, trainer

import ant_jax as ant
from ant_jax.callbacks._measures import _peak_flops_of


pytestmark = pytest.mark.usefixtures("nothing_compiles")


def fit(*callbacks: ant.Callback, loader: Any = None, state: Any = None, epochs: int = 2, **options: Any) -> Any:
    a_trainer = trainer(*callbacks, **options)
    return a_trainer.fit(state or a_trainer.init(batches()[0]), loader or batches(5), epochs, batches(1))


def test_examples_a_second_are_those_of_the_batches_without_the_evaluation():
    clock = Clock()
    passing = clock.passing(on_epoch_begin=0.5, on_batch_end=0.25, on_evaluate_begin=7.0, on_evaluate_end=9.0)
    _, history = fit(ant.callbacks.throughput(clock=clock), passing)
    assert history.to_dict()["examples_per_second"] == [5 * BATCH / 1.75] * 2
    assert "mfu" not in history[0]  # nobody knows the peak of this CPU


def test_without_an_evaluation_and_from_inside_an_epoch():
    clock = Clock()
    kept: list[Any] = []

    def keep(trainer: Any, state: Any, logs: Any) -> Any:
        kept.append(state)
        return state, logs

    meter = ant.callbacks.throughput(clock=clock)
    one = trainer(
        meter, clock.passing(on_batch_end=0.5), host("keep", on_batch_end=lambda i, *rest: rest[1:], on_checkpoint=keep)
    )
    _, history = one.fit(one.init(batches()[0]), batches(4), 1)
    assert history[0]["examples_per_second"] == 2 * BATCH
    _, history = one.fit(kept[1], batches(4), 1)
    assert history[0]["examples_per_second"] == 2 * BATCH


def test_what_misses_the_beginning_of_the_run_measures_the_epochs_that_it_sees_begin():
    clock = Clock()
    meter = ant.callbacks.throughput(clock=clock)
    passing = clock.passing(on_epoch_begin=7.0, on_batch_end=0.5)
    late = ant.callbacks.when(lambda state, logs: state.epoch >= 1, meter)
    _, history = fit(passing, late, epochs=3)
    assert [logs.get("examples_per_second") for logs in history] == [None, 2 * BATCH, 2 * BATCH]
    ends = ant.callbacks.when(lambda state, logs: state.epoch < 1 or "train_loss" in logs, meter)
    _, history = fit(passing, ends, epochs=2)
    assert [logs.get("examples_per_second") for logs in history] == [2 * BATCH, None]  # and not the first one's again


def test_utilisation_is_operations_over_the_peak():
    clock, flops = Clock(), []

    def on_epoch_end(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        flops.append(trainer.costs.flops_per_example)
        return state, logs

    meter = ant.callbacks.throughput(peak_flops=1e6, clock=clock)
    _, history = fit(meter, clock.passing(on_batch_end=1.0), host("flops", on_epoch_end=on_epoch_end))
    assert history[0]["mfu"] == pytest.approx(BATCH * flops[0] / 1e6)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", 65e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v4", 275e12),
        ("cpu", None),
        ("NVIDIA L400", None),
    ],
)
def test_the_peak_of_a_device_is_found_by_its_kind(kind, peak):
    assert _peak_flops_of(kind) == peak


def test_what_listens_to_the_compiler_is_gone_after_every_way_out():
    from ant_jax.callbacks._compile_time import CompileTime

    def failing(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(ant.callbacks.throughput(), ant.callbacks.profile_steps(printer=str), host(on_epoch_end=failing))
    fit(ant.callbacks.throughput(), ant.callbacks.profile_steps(printer=str))
    from jax._src import monitoring

    listeners = monitoring.get_event_duration_listeners()
    assert not any(isinstance(getattr(listener, "__self__", None), CompileTime) for listener in listeners)


def test_the_fullest_device_counts():
    assert jax.local_device_count() > 1

    def reader(device: Any) -> dict[str, int]:
        return {"bytes_in_use": (1 + device.id) * 2**30, "peak_bytes_in_use": 2**33}

    _, history = fit(ant.callbacks.memory(reader=reader))
    assert history[0]["memory"] == jax.local_device_count()
    assert history[0]["memory_peak"] == 8.0


def test_on_a_cpu_it_is_the_arrays_that_are_alive_and_the_peak_of_the_process():
    _, before = fit(ant.callbacks.memory(), epochs=1)
    big = jax.device_put(data(4096)[0])
    _, after = fit(ant.callbacks.memory(), epochs=1)
    assert after[0]["memory"] - before[0]["memory"] >= big.nbytes / 2**30
    assert after[0]["memory_peak"] > after[0]["memory"] > 0


@pytest.mark.parametrize("peak_flops", [0, -1.0, math.nan, "fast", True])
def test_refuses_a_peak_that_is_none(peak_flops):
    with pytest.raises(ValueError, match=r"throughput: peak_flops must be a finite number above 0, got"):
        ant.callbacks.throughput(peak_flops=peak_flops)
