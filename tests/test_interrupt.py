"""Ctrl-C never leaves a run without a state."""

import signal
import threading
from typing import Any

import numpy as np
import pytest
from problems import assert_bit_equal, batches, host, leaves_of, trainer

from ant_jax._engine import TrainProgram
from ant_jax._interrupt import Interrupts


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_waits_for_a_whole_state_and_a_second_one_does_not(number, error, capfd):
    interrupts = Interrupts()
    before = signal.getsignal(number)
    with interrupts.installed():
        interrupts.check()
        signal.raise_signal(number)
        with pytest.raises(error) as raised:
            interrupts.check()
        with pytest.raises(error):
            signal.raise_signal(number)
    assert getattr(raised.value, "code", 143) == 143
    assert signal.getsignal(number) is before
    assert f"{number.name}: the run ends after this step; once more ends it at once" in capfd.readouterr().err
    with interrupts.installed():  # the next run knows nothing of it
        interrupts.check()


def test_a_handler_of_the_users_stays():
    handler = lambda number, frame: None  # noqa: E731
    before = signal.signal(signal.SIGINT, handler)
    try:
        with Interrupts().installed():
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
