"""A queue keeps the order, has a bound, holds up no other, and returns failures to whom they belong."""

import signal
import threading

import pytest

from ant_jax._background import MOST_WAITING, Queue, bearing


def boom() -> None:
    raise OSError("down")


def test_tasks_of_a_writer_run_in_their_order():
    done: list[int] = []
    writer = Queue()
    for i in range(100):
        writer.submit(done.append, i)
    writer.drain()
    assert done == list(range(100))


def test_a_writer_holds_up_no_other():
    gate, slow, quick, done = threading.Event(), Queue(), Queue(), []
    for task in [gate.wait] + [int] * (MOST_WAITING - 1):  # there is no room for more
        slow.submit(task)
    quick.submit(done.append, 1)
    quick.drain()
    assert done == [1]
    gate.set()
    slow.drain()


def test_a_thread_ends_when_its_writer_is_drained():
    before, writers = threading.active_count(), [Queue() for _ in range(5)]
    for _ in range(3):
        for writer in writers:
            writer.submit(int)
        for writer in writers:
            writer.drain()
        assert threading.active_count() == before


def test_who_bears_failures_is_told_of_every_one():
    gate, writer, told = threading.Event(), Queue(), []

    def bear(error: Exception) -> bool:
        told.append(error)
        return True

    for task in (gate.wait, boom, boom, boom):
        writer.submit(task)
    gate.set()
    with bearing(bear):
        writer.drain()
    assert len(told) == 3
    writer.submit(boom)
    with pytest.raises(OSError, match="down"):  # outside, they are raised as ever
        writer.drain()


@pytest.mark.parametrize("by", ["submit", "drain"])
def test_what_has_not_begun_is_left_out_when_who_bears_failures_gives_up(by, monkeypatch):
    told, done = [], []
    begins, running, given_up, writer = threading.Event(), threading.Event(), threading.Event(), Queue()
    give_up = writer._give_up
    monkeypatch.setattr(writer, "_give_up", lambda: (give_up(), given_up.set()))

    def run() -> None:
        running.set()
        given_up.wait()
        done.append("running")

    def bear(error: Exception) -> bool:
        told.append(error)
        return len(told) < 2

    for task in (begins.wait, boom, boom, run):
        writer.submit(task)
    writer.submit(done.append, "waiting")
    begins.set()
    running.wait()
    with bearing(bear):
        if by == "submit":
            writer.submit(done.append, "after")
        writer.drain()
    assert done == ["running"]
    assert len(told) == 2


def test_a_failure_belongs_to_its_writer_and_the_others_go_on():
    gate, good, bad, done = threading.Event(), Queue(), Queue(), []
    bad.submit(lambda: gate.wait() / 0)
    bad.submit(done.append, "bad")
    gate.set()
    good.submit(done.append, "good")
    good.drain()
    assert "good" in done
    with pytest.raises(ZeroDivisionError):
        bad.drain()
    bad.drain()  # told once
    assert "bad" in done


def test_the_next_submit_tells_of_a_failure():
    gate, writer, ran, done = threading.Event(), Queue(), threading.Event(), []
    writer.submit(lambda: gate.wait() / 0)
    writer.submit(ran.set)
    gate.set()
    ran.wait()
    with pytest.raises(ZeroDivisionError):
        writer.submit(done.append, "next")
    writer.drain()
    assert done == ["next"]  # it is not lost with the one that failed


def test_a_task_replaces_the_one_before_it_that_has_not_begun():
    gate, writer, done = threading.Event(), Queue(), []
    writer.submit(gate.wait)
    writer.submit(done.append, -1)
    for i in range(2 * MOST_WAITING):
        writer.replace(done.append, i)
    gate.set()
    writer.drain()
    assert done == [2 * MOST_WAITING - 1]


def test_ctrl_c_gives_up_what_has_not_begun():
    gate, writer, done = threading.Event(), Queue(), []
    writer.submit(gate.wait)
    writer.submit(done.append, 1)
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        writer.drain()
    gate.set()
    writer.submit(done.append, 2)
    writer.drain()
    assert done == [2]


def test_the_queue_is_bounded():
    gate, writer = threading.Event(), Queue()
    writer.submit(gate.wait)
    for _ in range(MOST_WAITING - 1):
        writer.submit(int)
    blocked = threading.Thread(target=writer.submit, args=(int,))
    blocked.start()
    blocked.join(0.05)
    assert blocked.is_alive()
    gate.set()
    blocked.join()
    writer.drain()
