"""Ctrl-C and SIGTERM end a run where it could go on, and so do kills, for what is saved is whole."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import optax
import pytest
from problems import BATCH, assert_bit_equal, batches, data, host, leaves_of, trainer

import ant_jax as ant
from ant_jax._checkpoint.reading import steps_in
from ant_jax._checkpoint.storage import _Manager
from ant_jax._engine.programs import TrainProgram
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


@pytest.mark.parametrize(("first", "second", "error"), [
    (signal.SIGINT, signal.SIGTERM, SystemExit), (signal.SIGTERM, signal.SIGINT, KeyboardInterrupt),
])  # fmt: skip
def test_another_signal_after_the_first_does_not_wait_either(first, second, error):
    interrupts = Interrupts()
    with interrupts.installed():
        signal.raise_signal(first)
        with pytest.raises(error):
            signal.raise_signal(second)


@pytest.mark.parametrize("there", [False, True])
def test_a_signal_is_noted_without_a_standard_error_to_say_so(there, monkeypatch, tmp_path):
    stream = (tmp_path / "log").open("w") if there else None
    if stream is not None:
        os.close(stream.fileno())  # by something that does not tell Python
    monkeypatch.setattr(sys, "__stderr__", stream)
    interrupts = Interrupts()
    with interrupts.installed():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    if stream is not None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            stream.close()


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


class Pressed:
    """Presses Ctrl-C at one moment of a run."""

    def __init__(self, moment: str, time: int):
        self._moment, self._left = moment, time

    def now(self, moment: str) -> None:
        if moment == self._moment:
            self._left -= 1
            if self._left == 0:
                signal.raise_signal(signal.SIGINT)

    def callback(self) -> ant.Callback:
        def hook_of(name: str) -> Any:
            def hook(*arguments: Any) -> Any:
                self.now(name)
                return arguments[-2:]

            return hook

        names = ("on_train_begin", "on_epoch_begin", "on_batch_begin", "on_batch_end", "on_evaluate_begin")
        names += ("on_evaluate_end", "on_epoch_end", "on_checkpoint", "on_train_end")
        return host("pressed", **{name: hook_of(name) for name in names})


class Listed:
    """A list of batches whose reading can be interrupted."""

    def __init__(self, pressed: Pressed):
        self._pressed = pressed

    def __iter__(self) -> Iterator[Any]:
        for batch in batches(4):
            self._pressed.now("loader")
            yield batch


COUNT = host(
    "count",
    init=lambda state: 0,
    on_batch_end=lambda i, t, s, logs: (s.with_callback_state("count", s.callback_states["count"] + 1), logs),
)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("moment", "time"),
    [
        ("on_train_begin", 1), ("on_epoch_begin", 2), ("on_batch_begin", 3), ("on_batch_end", 1), ("on_batch_end", 4),
        ("on_batch_end", 6), ("on_evaluate_begin", 1), ("on_evaluate_end", 2), ("on_epoch_end", 1),
        ("on_checkpoint", 2), ("on_train_end", 1), ("loader", 2), ("loader", 6), ("tracing", 1),
    ],
)  # fmt: skip
def test_whenever_it_comes_the_run_goes_on_to_the_same_end(moment, time, tmp_path):
    pressed = Pressed(moment, time)

    def squares(outputs: Any, targets: Any) -> Any:
        pressed.now("tracing")
        return (outputs - 1.0).mean(axis=-1) ** 2

    def made(*more: ant.Callback) -> ant.Trainer:
        return trainer(COUNT, ant.callbacks.ema(0.9), *more, criterion=squares, gradient_accumulation_steps=3)

    saving = made(pressed.callback(), ant.callbacks.checkpoint(tmp_path))
    start = saving.init(batches()[0])
    with pytest.raises(KeyboardInterrupt) as raised:
        saving.fit(start, Listed(pressed), 2, batches(2))
    pressed = Pressed("never", 1)
    alone = made()
    whole, history = alone.fit(made().init(batches()[0]), batches(4), 2, batches(2))
    for state in (raised.value.train_state, alone.restore(tmp_path)):  # type: ignore[attr-defined]
        ended, again = (state, state.history) if state.epoch == 2 else alone.fit(state, batches(4), 2, batches(2))
        assert_bit_equal(ended, whole)
        assert again == history


@pytest.mark.parametrize("loader", ["array", "list", "limited"])
def test_in_an_evaluation_it_leaves_no_half_of_an_epoch(loader, tmp_path):
    """The end of the epoch has the step of its last batch, and takes the place of what was saved there."""
    made = {"array": ant.ArrayLoader(data(6 * BATCH), BATCH), "list": batches(6), "limited": batches(6)}
    given: Any = {"steps_per_epoch": 4} if loader != "list" else {}
    stopping = ant.callbacks.early_stopping("val_loss", patience=9, restore_best=True)

    def run(*more: ant.Callback, **options: Any) -> Any:
        a_trainer = trainer(COUNT, stopping, *more, optimizer=optax.sgd(2.0))
        return a_trainer.fit(a_trainer.init(batches()[0]), made[loader], 2, batches(3), **given, **options)

    whole, history = run()
    pressed = Pressed("on_evaluate_begin", 2)
    saving = ant.callbacks.checkpoint(tmp_path, monitor="val_loss")
    with pytest.raises(KeyboardInterrupt):
        run(pressed.callback(), saving, resume=tmp_path)
    for _ in range(2):  # the second time the run is over, and ends once more
        ended, again = run(saving, resume=tmp_path)
        assert_bit_equal(ended, whole)
        assert again == history
    reading = trainer(COUNT, stopping)
    last = reading.restore(tmp_path)
    assert (last.epoch, last.batch_idx, len(last.history)) == (2, 0, 2)
    with reading.checkpointer(tmp_path, mode="min") as saved:
        best = min(range(2), key=lambda epoch: history[epoch]["val_loss"])
        assert saved.best_step == saved.steps[best]
    assert not list(tmp_path.glob("*superseded*"))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_run_that_was_asked_to_stop_still_closes_what_is_open(accumulation, tmp_path):
    def ask(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        return state.request_stop(when=int(state.step) == 4), logs

    def run(*more: ant.Callback, **options: Any) -> Any:
        a_trainer = trainer(host("ask", on_batch_end=ask), *more, gradient_accumulation_steps=accumulation)
        return a_trainer.fit(a_trainer.init(batches()[0]), batches(8), 3, batches(2), **options)

    whole, history = run()
    assert len(history) == 1
    pressed = Pressed("on_batch_end" if accumulation > 1 else "on_evaluate_begin", 4 if accumulation > 1 else 1)
    with pytest.raises(KeyboardInterrupt):
        run(pressed.callback(), ant.callbacks.checkpoint(tmp_path, every=1), resume=tmp_path)
    ended, again = run(ant.callbacks.checkpoint(tmp_path, every=1), resume=tmp_path)
    assert_bit_equal(ended, whole)
    assert again == history


def test_sigterm_ends_the_process_though_a_hook_fails_meanwhile():
    def fail(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        raise ValueError("on purpose")

    a_trainer = trainer(host("fail", on_batch_end=fail))
    with pytest.raises(SystemExit) as raised:
        a_trainer.fit(a_trainer.init(batches()[0]), batches(3), 1)
    assert raised.value.code == 143 and isinstance(raised.value.__cause__, ValueError)


def test_a_run_inside_a_hook_ends_with_the_outer_one():
    inner_batches: list[int] = []

    def look(batch_idx: int, trainer: Any, state: Any, logs: Any) -> Any:
        inner_batches.append(batch_idx)
        if batch_idx == 1:
            signal.raise_signal(signal.SIGINT)
        return state, logs

    def run_another(epoch: int, trainer: Any, state: Any, logs: Any) -> Any:
        inner.fit(inner.init(batches()[0]), batches(9), 1)
        return state, logs

    inner, outer = trainer(host("look", on_batch_end=look)), trainer(host("another", on_epoch_end=run_another))
    with pytest.raises(KeyboardInterrupt):
        outer.fit(outer.init(batches()[0]), batches(3), 1)
    assert inner_batches == [0, 1]


JOB = """
import sys, time, zlib, signal
sys.path.insert(0, {tests!r})
import jax, numpy as np
from problems import BATCH, data, leaves_of, trainer
import ant_jax as ant
directory, pause = sys.argv[1], float(sys.argv[2])
if "distributed" in sys.argv:
    jax.distributed.initialize("localhost:" + sys.argv[4], 1, 0)
def on_batch_end(batch_idx, trainer, state, logs):
    time.sleep(pause)
    return state, logs
slow = ant.Callback(name="slow", on_batch_end=on_batch_end, every=5)
a_trainer = trainer(ant.callbacks.ema(0.9), ant.callbacks.gradient_noise(0.1), slow,
                    ant.callbacks.checkpoint(directory, every=5), gradient_accumulation_steps=3)
loader = ant.ArrayLoader(data(20 * BATCH), BATCH)
print("begins", flush=True)
state, history = a_trainer.fit(a_trainer.init(data(BATCH)), loader, 3, resume=directory)
crc = 0
for leaf in leaves_of(state.replace(host=None)):
    crc = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), crc)
print("ended", int(state.step), crc, repr(history.to_dict()), flush=True)
"""


def job(directory: pathlib.Path, pause: float, *more: str) -> subprocess.Popen[str]:
    program = JOB.format(tests=str(pathlib.Path(__file__).parent))
    command = [sys.executable, "-W", "error", "-c", program, str(directory), str(pause), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


def cut(process: subprocess.Popen[str], directory: pathlib.Path, past: int, number: int) -> str:
    """Send a signal when a checkpoint past that step is there; returns what the process has printed."""
    deadline = time.monotonic() + 120
    while not any(step > past for step in steps_in(directory)) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == (143 if number == signal.SIGTERM else -number), errors
    return output


def test_killed_and_terminated_and_started_again_it_ends_with_the_same_bits(tmp_path):
    alone, directory = job(tmp_path / "alone", 0.0), tmp_path / "cut"
    cut(job(directory, 0.2), directory, 3, signal.SIGKILL)
    after_kill = cut(job(directory, 0.2), directory, 12, signal.SIGTERM)
    assert "resumed from step" in after_kill and "saved step" in after_kill and "SystemExit(143)" in after_kill
    last, errors = job(directory, 0.0).communicate(timeout=120)
    assert "resumed from step" in last, errors
    expected, errors = alone.communicate(timeout=120)
    assert alone.returncode == 0, errors
    assert last.splitlines()[-1] == expected.splitlines()[-1]
    assert last.splitlines()[-1].startswith("ended 60 ")
    assert not list(directory.glob("*tmp*"))


def test_where_jax_distributed_runs_its_preemption_notice_ends_the_run(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    directory = tmp_path / "run"
    # The notice takes about a second to arrive.
    output = cut(job(directory, 0.5, "distributed", port), directory, 3, signal.SIGTERM)
    assert "saved step" in output


def test_a_second_run_is_refused_while_the_first_saves(tmp_path):
    a_trainer = trainer(ant.callbacks.checkpoint(tmp_path))
    state = a_trainer.init(batches()[0])
    with a_trainer.checkpointer(tmp_path):
        with pytest.raises(ant.CheckpointError, match=f"is in use by process {os.getpid()} on .* since 20"):
            a_trainer.fit(state, ant.ArrayLoader(data(), BATCH), 1)
    a_trainer.fit(state, ant.ArrayLoader(data(), BATCH), 1)
    assert np.isfinite(leaves_of(a_trainer.restore(tmp_path))[0]).all()


def test_ctrl_c_while_a_save_is_handed_over_comes_when_that_is_done(tmp_path, monkeypatch):
    # In between, Orbax's threads would wait for what the exception has kept the main thread from telling them.
    original = _Manager.save

    def save(self: _Manager, *arguments: Any, **named: Any) -> bool:
        signal.raise_signal(signal.SIGINT)
        return original(self, *arguments, **named)

    monkeypatch.setattr(_Manager, "save", save)
    before = signal.getsignal(signal.SIGINT)
    a_trainer = trainer()
    state = a_trainer.init(batches()[0])
    with a_trainer.checkpointer(tmp_path) as checkpointer, pytest.raises(KeyboardInterrupt):
        checkpointer.save(state)
    assert signal.getsignal(signal.SIGINT) is before
    assert_bit_equal(a_trainer.restore(tmp_path), state)


def test_ctrl_c_is_put_back_last_since_its_handler_may_raise_at_once(monkeypatch):
    numbers, put = [], signal.signal
    monkeypatch.setattr(signal, "signal", lambda number, handler: (numbers.append(number), put(number, handler))[1])
    with Interrupts().installed():
        numbers.clear()
    assert numbers == [signal.SIGTERM, signal.SIGINT]


FORKING = """
import multiprocessing, os, signal, subprocess, sys, threading, time
sys.path.insert(0, sys.argv[1])
from problems import batches, host, trainer
context = multiprocessing.get_context("fork")
places = set()

def ends_at_once(where):
    # Terminated before it has run a line: the signal must not find the run's handler.
    child = context.Process(target=time.sleep, args=(60,))
    child.start()
    child.terminate()
    child.join(20)
    assert child.exitcode == -signal.SIGTERM, (where, child.exitcode)
    by_hand = os.fork()
    if by_hand == 0:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            os._exit(9)
        os._exit(1)
    time.sleep(0.1)
    os.kill(by_hand, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(by_hand, 0)[1]) == 9, where
    places.add(where)

class Loader:
    def __init__(self, where):
        self.where = where
    def __iter__(self):
        for _ in range(5):
            ends_at_once(self.where)
        for _ in range(8):
            with context.Pool(2) as pool:
                assert pool.map(abs, [-1, 1]) == [1, 1]
        yield from batches(3)

def program():
    read_mask = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    command = [sys.executable, "-c", read_mask]
    assert subprocess.run(command, preexec_fn=lambda: None, capture_output=True, text=True).stdout.strip() == "set()"
    child = subprocess.Popen(["sleep", "60"], preexec_fn=lambda: None)
    child.terminate()
    assert child.wait(20) == -signal.SIGTERM

def look(*arguments):
    ends_at_once("hook")
    program()
    thread = threading.Thread(target=ends_at_once, args=("thread",))
    thread.start()
    thread.join()
    return arguments[-2:]

def nested(*arguments):
    inner = trainer(host("inner", on_train_begin=lambda *a: (ends_at_once("nested"), a[-2:])[1]))
    inner.fit(inner.init(batches(1)[0]), batches(1), 1)
    ends_at_once("after a nested fit")
    return arguments[-2:]

def leave_one(*arguments):
    child = context.Process(target=time.sleep, args=(60,), daemon=True)
    child.start()
    return arguments[-2:]

forking = host("nested", on_epoch_end=nested, on_train_end=leave_one)
a_trainer = trainer(host("look", on_batch_end=look, every=2), forking)
state = a_trainer.init(batches(1)[0])
a_trainer.fit(state, Loader("train_loader"), 1, Loader("val_loader"))
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
print(sorted(places))
"""


def test_a_signal_to_a_forked_child_does_what_it_would_without_a_run():
    command = [sys.executable, "-W", "ignore", "-c", FORKING, str(pathlib.Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['after a nested fit', 'hook', 'nested', 'thread', 'train_loader', 'val_loader']\n"
    assert done.stderr == ""


def test_a_signal_that_comes_as_the_run_forks_ends_the_run_and_not_the_child():
    code = """
import os, signal, sys
from ant_jax._interrupt import Interrupts
interrupts = Interrupts()
with interrupts.installed():
    os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGTERM))
    if os.fork() == 0:
        os._exit(signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    try:
        interrupts.check()
    except SystemExit:
        print("noted")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "noted\n", done.stderr
