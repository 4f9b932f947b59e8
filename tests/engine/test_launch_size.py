"""The length of launches, and how far the host is ahead, against a device that is a clock."""

from typing import Any

import pytest

from ant_jax._engine import launch_size as _pace
from ant_jax._engine.launch_size import LAUNCH_SECONDS, MAX_IN_FLIGHT, LaunchSizer


class Device:
    """A clock, and launches that run one after the other, each step in so many seconds."""

    def __init__(self, step_seconds: float):
        self.step_seconds, self.now, self.done_at = step_seconds, 0.0, 0.0

    def perf_counter(self) -> float:
        return self.now

    def launch(self, steps: int) -> Any:
        self.done_at = max(self.done_at, self.now) + steps * self.step_seconds
        return Log(self, self.done_at)


class Log:
    def __init__(self, device: Device, done_at: float):
        self._device, self._done_at = device, done_at

    def block_until_ready(self) -> None:
        self._device.now = max(self._device.now, self._done_at)


def train(pace: LaunchSizer, device: Device, launches: int, most: int = 10**9, host_seconds: float = 1e-5) -> list[int]:
    """Launch as often as that, no more than ``most`` steps at once; returns the steps of each launch."""
    lengths = []
    for _ in range(launches):
        device.now += host_seconds
        lengths.append(min(pace.steps, most))
        pace.launched(lengths[-1], device.launch(lengths[-1]))
        bound = (MAX_IN_FLIGHT + 1) * 1.1 * max(LAUNCH_SECONDS, device.step_seconds)
        assert device.done_at - device.now <= bound  # the host is no more than some groups ahead
    return lengths


@pytest.fixture(params=[_pace.OTHER_GROUPS, _pace.GROUPS["cpu"]], ids=["long groups", "short groups"])
def groups(request, monkeypatch) -> tuple[float, int]:
    monkeypatch.setattr(_pace, "GROUPS", {})
    monkeypatch.setattr(_pace, "OTHER_GROUPS", request.param)
    return request.param


@pytest.fixture(params=[1e-5, 1e-3, 1e-2, 1.0], ids=lambda seconds: f"steps of {seconds} s")
def device(request, groups, monkeypatch) -> Device:
    made = Device(request.param)
    monkeypatch.setattr(_pace, "time", made)
    return made


def test_launches_grow_by_doubling_until_they_take_as_long_as_they_should(device):
    lengths = train(LaunchSizer(0), device, 200)
    assert all(1 <= later <= 2 * sooner for sooner, later in zip(lengths, lengths[1:], strict=False))
    wanted = max(1, LAUNCH_SECONDS / device.step_seconds)
    assert max(lengths) <= 1.1 * wanted
    assert lengths[-1] >= wanted / 2


def test_an_evaluation_between_epochs_makes_launches_no_longer_than_they_should_be(device):
    pace = LaunchSizer(0)
    wanted = max(1, LAUNCH_SECONDS / device.step_seconds)
    train(pace, device, 200)
    for _ in range(20):
        device.now = device.done_at + 100 * LAUNCH_SECONDS
        assert max(train(pace, device, 4)) <= 1.1 * wanted
    assert train(pace, device, 200)[-1] >= wanted / 2


def test_short_epochs_reach_launches_of_all_their_steps(device):
    lengths = train(LaunchSizer(0), device, 200, most=10)
    assert lengths[-1] >= min(10, max(1, LAUNCH_SECONDS / device.step_seconds)) / 2


def test_a_group_of_launches_is_complete_when_it_has_so_many_bytes(device, groups):
    pace = LaunchSizer(step_bytes=groups[1] // 4)
    for _ in range(100):
        pace.launched(1, device.launch(1))
        assert device.done_at - device.now <= (MAX_IN_FLIGHT + 1) * 4 * device.step_seconds * 1.001


def test_a_run_does_not_wait_for_the_launches_of_one_that_failed(device):
    class Failed:
        def block_until_ready(self) -> None:
            raise RuntimeError("the device has lost it")

    pace = LaunchSizer(0)
    pace.launched(1, Failed())  # type: ignore[arg-type]
    pace = pace.of_next_run()
    train(pace, device, 10)


def test_a_slow_moment_halves_launches_and_no_more(groups, monkeypatch):
    device = Device(1e-5)
    monkeypatch.setattr(_pace, "time", device)
    pace = LaunchSizer(0)
    before = train(pace, device, 200)[-1]
    device.done_at += 1000 * LAUNCH_SECONDS  # something else has the device
    pace.launched(before, device.launch(before))
    for _ in range(3):
        steps = pace.steps
        pace.launched(pace.steps, device.launch(pace.steps))
        assert steps // 2 <= pace.steps
    assert before // 16 <= pace.steps < before


def test_so_many_groups_are_under_way_before_one_is_waited_for_and_a_run_begins_with_none(groups, monkeypatch):
    device = Device(1.0)
    monkeypatch.setattr(_pace, "time", device)
    pace = LaunchSizer(step_bytes=groups[1] // 4)  # a group is complete at four steps
    pace.steps = 10**6
    for _ in range(2):
        begun = device.now
        for launched in range(1, 4 * (MAX_IN_FLIGHT + 1) + 1):
            pace.launched(1, device.launch(1))
            assert (device.now > begun) == (launched == 4 * (MAX_IN_FLIGHT + 1))
        pace.steps = 10**6
        device.now = device.done_at
        pace.launched(1, device.launch(1))
        pace = pace.of_next_run()
        device.now = device.done_at
