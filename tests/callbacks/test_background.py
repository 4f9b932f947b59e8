"""The queue keeps the order, has a bound, and returns failures to whom they belong."""

import threading

import pytest

from ant_jax.callbacks._background import MOST_WAITING, Writer


def test_tasks_of_all_writers_run_in_their_order():
    done: list[int] = []
    writers = [Writer(), Writer()]
    for i in range(100):
        writers[i % 2].submit(done.append, i)
    for writer in writers:
        writer.drain()
    assert done == list(range(100))


def test_a_failure_belongs_to_its_writer_and_the_others_go_on():
    good, bad, done = Writer(), Writer(), []
    bad.submit(lambda: 1 / 0)
    bad.submit(done.append, "bad")
    good.submit(done.append, "good")
    good.drain()
    assert done == ["bad", "good"]
    with pytest.raises(ZeroDivisionError):
        bad.drain()
    bad.drain()  # told once


def test_the_next_submit_tells_of_a_failure():
    writer, ran = Writer(), threading.Event()
    writer.submit(lambda: 1 / 0)
    other = Writer()
    other.submit(ran.set)
    other.drain()
    with pytest.raises(ZeroDivisionError):
        writer.submit(print)


def test_the_queue_is_bounded():
    gate, writer = threading.Event(), Writer()
    writer.submit(gate.wait)
    for _ in range(MOST_WAITING - 1):
        writer.submit(int)
    blocked = threading.Thread(target=lambda: Writer().submit(int))
    blocked.start()
    blocked.join(0.05)
    assert blocked.is_alive()
    gate.set()
    blocked.join()
    writer.drain()
