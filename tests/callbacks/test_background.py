"""The queue keeps the order, has a bound, and returns failures to whom they belong."""

import signal
import threading

import pytest

from ant_jax.callbacks._background import MOST_WAITING, Writer, replacing


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
    writer, ran, done = Writer(), threading.Event(), []
    writer.submit(lambda: 1 / 0)
    other = Writer()
    other.submit(ran.set)
    other.drain()
    with pytest.raises(ZeroDivisionError):
        writer.submit(done.append, "next")
    writer.drain()
    assert done == ["next"]  # it is not lost with the one that failed


def test_a_task_replaces_the_one_before_it_that_has_not_begun():
    gate, writer, done = threading.Event(), Writer(), []
    Writer().submit(gate.wait)
    for i in range(2 * MOST_WAITING):
        writer.replace(done.append, i)
    gate.set()
    writer.drain()
    assert done == [2 * MOST_WAITING - 1]


def test_ctrl_c_gives_up_what_has_not_begun():
    gate, writer, done = threading.Event(), Writer(), []
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


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as beside:
        beside.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as beside:
        beside.write_text("half of the ne")
        assert 1 / 0
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


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
