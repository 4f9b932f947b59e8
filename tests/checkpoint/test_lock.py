"""One writer at a time has a directory, and what a process forks has nothing."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from ant_jax import CheckpointError
from ant_jax._checkpoint.lock import DirectoryLock


def test_a_second_writer_is_refused_until_the_first_lets_go(tmp_path):
    first = DirectoryLock(tmp_path)
    with pytest.raises(CheckpointError, match=f"is in use by process {os.getpid()} on .* since 20"):
        DirectoryLock(tmp_path)
    assert first.held
    first.release()
    assert not first.held
    DirectoryLock(tmp_path).release()


def test_a_directory_that_was_made_anew_is_not_held(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    lock = DirectoryLock(directory)
    directory.rename(tmp_path / "moved")
    assert not lock.held
    directory.mkdir()
    DirectoryLock(directory).release()
    assert not lock.held
    lock.release()


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program that forks. JAX warns of that, since its own threads are not in the child."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


CHILD_THAT_LETS_GO = """
import os, pathlib, sys
from ant_jax import CheckpointError
from ant_jax._checkpoint.lock import DirectoryLock
lock = DirectoryLock(pathlib.Path(sys.argv[1]))
child = os.fork()
if child == 0:
    held = lock.held
    lock.release()
    os._exit(held)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
try:
    DirectoryLock(pathlib.Path(sys.argv[1]))
except CheckpointError as error:
    assert f"process {os.getpid()}" in str(error) and lock.held
    print("refused")
"""


def test_a_child_holds_nothing_and_cannot_let_go_of_what_its_parent_holds(tmp_path):
    done = run(CHILD_THAT_LETS_GO, tmp_path)
    assert done.stdout == "refused\n", done.stderr


KILLED_WITH_CHILDREN = """
import multiprocessing, os, pathlib, signal, subprocess, sys, time
from ant_jax._checkpoint.lock import DirectoryLock
lock = DirectoryLock(pathlib.Path(sys.argv[1]))
out = open(sys.argv[2], "w")
context = multiprocessing.get_context("fork")
worker = context.Process(target=time.sleep, args=(300,))
worker.start()
pool = context.Pool(1)
pool.map(abs, [1])
program = [sys.executable, "-c", "import time; time.sleep(300)"]
by_program = subprocess.Popen(program, preexec_fn=lambda: None, close_fds=False)
by_hand = os.fork()
if by_hand == 0:
    time.sleep(300)
print(worker.pid, pool._pool[0].pid, by_program.pid, by_hand, file=out, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_a_kill_the_directory_is_free_though_children_live_on(tmp_path):
    directory, pids = tmp_path / "run", tmp_path / "pids"
    directory.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", KILLED_WITH_CHILDREN, str(directory), str(pids)]
    # No pipes: the children would keep them open.
    with (tmp_path / "errors").open("w") as errors:
        assert subprocess.run(command, stderr=errors, timeout=120).returncode == -signal.SIGKILL
    children = [int(pid) for pid in pids.read_text().split()]
    try:
        DirectoryLock(pathlib.Path(directory)).release()
        assert len(children) == 4
        for child in children:
            os.kill(child, 0)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
