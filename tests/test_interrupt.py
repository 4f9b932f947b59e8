"""Ctrl-C never leaves a run without a state."""

import signal
import threading
from typing import Any

import numpy as np
import pytest
from problems import assert_bit_equal, batches, host, leaves_of, trainer

from ant_jax._engine import TrainProgram
from ant_jax._interrupt import LaunchGuard


def test_during_a_launch_it_waits_for_the_launch():
    guard = LaunchGuard()
    done: list[str] = []
    with guard.installed():
        with pytest.raises(KeyboardInterrupt):
            with guard:
                signal.raise_signal(signal.SIGINT)
                done.append("launched")
        with guard:  # it was raised once, and is over
            done.append("again")
    assert done == ["launched", "again"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_outside_a_launch_and_the_second_time_it_comes_at_once():
    guard = LaunchGuard()
    with guard.installed():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            with guard:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                pytest.fail("the second one was held back")


def test_a_handler_of_the_users_stays():
    handler = lambda number, frame: None  # noqa: E731
    before = signal.signal(signal.SIGINT, handler)
    try:
        with LaunchGuard().installed():
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_installed():
    a_trainer = trainer()
    state = a_trainer.init(batches()[0])
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(a_trainer.fit(state, batches(), 1)))
    thread.start()
    thread.join()
    assert_bit_equal(result[0][0], a_trainer.fit(state, batches(), 1)[0])


@pytest.mark.parametrize("fuse", [True, False])
def test_the_state_can_be_read_and_trained_on_afterwards(fuse, monkeypatch):
    pressed_at = 3
    original = TrainProgram.launch
    kept: list[Any] = []

    def launch(self: TrainProgram, live: Any, cursor: Any, count: int) -> Any:
        if cursor.batch_idx == pressed_at:
            give = live.give

            def give_after_ctrl_c(leaves: Any) -> None:  # the moment in which nobody holds the state
                signal.raise_signal(signal.SIGINT)
                give(leaves)

            monkeypatch.setattr(live, "give", give_after_ctrl_c)
        return original(self, live, cursor, count)

    def keep(exception: BaseException, trainer: Any, state: Any, logs: Any) -> Any:
        kept.append(state)
        return state, logs

    idle = host("idle", on_batch_end=lambda b, t, state, logs: (state, logs))
    a_trainer = trainer(host("keep", on_exception=keep), idle, fuse=fuse)
    start = a_trainer.init(batches()[0])
    monkeypatch.setattr(TrainProgram, "launch", launch)
    with pytest.raises(KeyboardInterrupt) as caught:
        a_trainer.fit(start, batches(6), 1)
    monkeypatch.undo()
    (state,) = kept
    assert caught.value.train_state is state  # pyright: ignore[reportAttributeAccessIssue]
    assert all(np.isfinite(leaf).all() for leaf in leaves_of(state))
    assert int(state.step) == pressed_at + 1
