from typing import Any

import jax
import pytest

from ant_jax import _pace
from ant_jax._pace import LAUNCH_SECONDS, MAX_IN_FLIGHT, Pace


class Device:
    """A clock, and launches that run one after the other, each step in so many seconds."""

    def __init__(self, step_seconds: float):
        self.step_seconds, self.now, self.done_at = step_seconds, 0.0, 0.0
        self.waits = 0

    def perf_counter(self) -> float:
        return self.now

    def launch(self, steps: int) -> Any:
        self.done_at = max(self.done_at, self.now) + steps * self.step_seconds
        return Log(self, self.done_at)


class Log:
    def __init__(self, device: Device, done_at: float):
        self._device, self._done_at = device, done_at

    def block_until_ready(self) -> None:
        self._device.waits += self._done_at > self._device.now
        self._device.now = max(self._device.now, self._done_at)


def train(pace: Pace, device: Device, launches: int, most: int = 10**9, host_seconds: float = 1e-5) -> list[int]:
    """Launch as often as that, no more than ``most`` steps at once; returns the steps of each launch."""
    lengths = []
    for _ in range(launches):
        device.now += host_seconds
        lengths.append(min(pace.steps, most))
        pace.launched(lengths[-1], device.launch(lengths[-1]))
    return lengths


@pytest.fixture(params=[1e-5, 1e-3, 1.0])
def device(request, monkeypatch) -> Device:
    made = Device(request.param)
    monkeypatch.setattr(_pace, "time", made)
    return made


def test_launches_grow_by_doubling_until_they_take_as_long_as_they_should(device):
    lengths = train(Pace(0), device, 100)
    assert all(1 <= later <= 2 * sooner for sooner, later in zip(lengths, lengths[1:], strict=False))
    wanted = max(1, LAUNCH_SECONDS / device.step_seconds)
    assert wanted / 2 <= lengths[-1] <= 1.5 * wanted


def test_an_evaluation_between_epochs_makes_launches_no_longer_than_they_should_be(device):
    pace = Pace(0)
    wanted = max(1, LAUNCH_SECONDS / device.step_seconds)
    train(pace, device, 100)
    for _ in range(20):
        device.now = device.done_at + 100 * LAUNCH_SECONDS
        lengths = train(pace, device, 4)
        assert max(lengths) <= 1.5 * wanted
    assert train(pace, device, 100)[-1] >= wanted / 2


def test_short_epochs_reach_launches_of_all_their_steps(device):
    lengths = train(Pace(0), device, 200, most=10)
    assert lengths[-1] == min(10, max(1, int(LAUNCH_SECONDS / device.step_seconds)))


def test_the_host_is_no_more_than_some_groups_ahead(device):
    pace = Pace(0)
    train(pace, device, 100)
    group = max(pace.steps, 1) * device.step_seconds * 2
    assert device.done_at - device.now <= (MAX_IN_FLIGHT + 1) * group


def test_a_group_of_launches_is_bounded_in_the_memory_of_its_batches(device):
    most = _pace.GROUP_BYTES["cpu"] if jax.default_backend() == "cpu" else _pace.MAX_GROUP_BYTES
    pace = Pace(step_bytes=most // 4)
    for launch in range(100):
        pace.launched(4, device.launch(4))
        assert device.done_at - device.now <= MAX_IN_FLIGHT * 4 * device.step_seconds * 1.001 or launch < MAX_IN_FLIGHT
