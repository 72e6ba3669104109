"""Process: what it runs, how it is joined and how it ends."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest

import fiberexec
from fiberexec import mp

from .helpers import LIMIT, LONG, Gate, deserted, eventually, exit_code, heard, run, say, stay, wait_at

# -- running


def test_the_target_runs_in_another_process_with_its_arguments(tmp_path: Path) -> None:
    def target(a: int, b: int = 0, *, c: int) -> None:
        say(tmp_path / "said", os.getpid(), a, b, c)

    process = mp.Process(target=target, args=(1,), kwargs={"b": 2, "c": 3})
    assert process.pid is None and process.exitcode is None and not process.is_alive()
    process.start()
    assert exit_code(process) == 0
    assert heard(tmp_path / "said") == [str(process.pid), "1", "2", "3"]
    assert process.pid != os.getpid()


def test_a_lambda_can_be_the_target() -> None:
    assert run(lambda: sys.exit(7)).exitcode == 7


def test_a_class_with_run_travels_with_its_attributes() -> None:
    class Adder(mp.Process):
        def __init__(self, value: int) -> None:
            super().__init__(name="adder")
            self.value = value

        def run(self) -> None:
            sys.exit(self.value + 1 if self.name == "adder" else 99)

    process = Adder(4)
    process.start()
    assert exit_code(process) == 5


@pytest.mark.parametrize(
    ("leave", "code"),
    [
        (lambda: None, 0),
        (lambda: sys.exit(), 0),
        (lambda: sys.exit(3), 3),
        (lambda: sys.exit("text"), 1),
        (lambda: sys.exit(256 + 5), 5),
        (lambda: 1 / 0, 1),
        (lambda: os._exit(9), 9),
        (lambda: os.abort(), -signal.SIGABRT),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL),
        (lambda: os.kill(os.getpid(), signal.SIGINT), 1),
    ],
    ids=["returns", "exit", "exit 3", "exit text", "exit 261", "raises", "_exit", "abort", "SIGKILL", "SIGINT"],
)
def test_the_exit_code_says_how_it_ended(leave: Callable[[], object], code: int) -> None:
    assert run(leave).exitcode == code


def test_an_exception_prints_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    def target() -> None:
        raise LookupError("what went wrong")

    run(target, name="Unlucky")
    err = capfd.readouterr().err
    assert err.startswith("Process Unlucky:\nTraceback (most recent call last):")
    assert err.endswith("LookupError: what went wrong\n")


def test_what_a_process_prints_is_there_when_it_has_ended(capfd: pytest.CaptureFixture[str]) -> None:
    run(lambda: print("hello"))
    assert capfd.readouterr().out == "hello\n"


def test_a_target_that_cannot_be_rebuilt_is_a_traceback_and_exit_code_1(capfd: pytest.CaptureFixture[str]) -> None:
    class Fragile:
        def __reduce__(self) -> Any:
            return int, ("no number",)

    assert run(print, Fragile()).exitcode == 1
    assert "ValueError: invalid literal for int()" in capfd.readouterr().err


def test_what_cannot_be_pickled_is_said_by_start() -> None:
    process = mp.Process(target=print, args=(threading.Lock(),))
    with pytest.raises((TypeError, fiberexec.PicklingError)):
        process.start()
    assert not process.is_alive() and process.exitcode is None


def test_stdin_is_empty() -> None:
    assert run(lambda: sys.exit(len(sys.stdin.read()))).exitcode == 0


def test_functions_registered_with_atexit_run(tmp_path: Path) -> None:
    run(lambda: atexit.register(say, tmp_path / "said", "bye"))
    assert heard(tmp_path / "said") == ["bye"]


def test_the_process_waits_for_its_threads(tmp_path: Path) -> None:
    assert run(lambda: threading.Timer(0.1, say, (tmp_path / "said", "thread")).start()).exitcode == 0
    assert (tmp_path / "said").exists()


@pytest.mark.one_host("directory and path are a host's own")
def test_a_child_sees_the_environment_directory_path_and_arguments_of_this_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REMOVED_LATER", "x")
    assert run(lambda: sys.exit(os.environ.get("REMOVED_LATER") == "x")).exitcode == 1  # the backend is there now
    monkeypatch.delenv("REMOVED_LATER")
    monkeypatch.setenv("ADDED_LATER", "y")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("/somewhere")
    monkeypatch.setattr(sys, "argv", ["program", "argument"])

    def target(expected: str) -> None:
        environment = os.environ.get("ADDED_LATER"), os.environ.get("REMOVED_LATER")
        print(environment, os.getcwd() == expected, sys.path[0], sys.argv)

    run(target, str(tmp_path))
    assert capfd.readouterr().out == "('y', None) True /somewhere ['program', 'argument']\n"


def test_large_arguments_arrive_and_other_processes_start_meanwhile() -> None:
    big = bytes(64 << 20)
    process = mp.Process(target=lambda data: sys.exit(data == bytes(64 << 20)), args=(big,))
    process.start()
    assert run(lambda: sys.exit(4)).exitcode == 4
    assert exit_code(process) == 1


def test_the_target_and_its_arguments_are_let_go() -> None:
    class Thing:
        pass

    thing = Thing()
    alive = weakref.ref(thing)
    process = mp.Process(target=lambda held: None, args=(thing,))
    process.start()
    exit_code(process)
    del thing
    gc.collect()
    assert alive() is None


def test_many_processes_run_at_once(tmp_path: Path, gate: Gate, backend: str) -> None:
    count = 100 if backend == "local" else 12  # there each has an agent
    # A function of this module would make each of them import pytest.
    program = "import os; os.mkdir(name); os.read(os.open(gate, os.O_RDONLY), 1)"
    names = [tmp_path / str(number) for number in range(count)]
    processes = [mp.Process(target=exec, args=(program, {"name": str(n), "gate": gate.path})) for n in names]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 90
    while not all(name.exists() for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    gate.open(count)
    assert [exit_code(process) for process in processes] == [0] * count


# -- joining, ending


def test_join_with_a_limit_returns_while_the_process_runs() -> None:
    process = mp.Process(target=time.sleep, args=(LONG,))
    process.start()
    process.join(0)
    process.join(0.01)
    process.join(-1)
    assert process.is_alive() and process.exitcode is None and process in mp.active_children()
    process.kill()
    assert exit_code(process) == -signal.SIGKILL
    assert process not in mp.active_children()


@pytest.mark.parametrize("repeat", range(5))
def test_terminate_ends_it_by_sigterm_however_early(repeat: int) -> None:
    process = mp.Process(target=time.sleep, args=(LONG,))
    process.start()
    time.sleep(repeat * 0.002)
    process.terminate()
    assert exit_code(process) == -signal.SIGTERM


def test_a_process_can_handle_sigterm(tmp_path: Path) -> None:
    def target() -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        say(tmp_path / "ready")
        time.sleep(LONG)

    process = mp.Process(target=target)
    process.start()
    heard(tmp_path / "ready")
    process.terminate()
    assert exit_code(process) == 5


def test_the_sentinel_becomes_ready_at_the_end() -> None:
    process = mp.Process(target=time.sleep, args=(LONG,))
    with pytest.raises(ValueError, match="not started"):
        process.sentinel  # noqa: B018
    process.start()
    assert not connection.wait([process.sentinel], timeout=0)
    process.kill()
    assert connection.wait([process.sentinel], timeout=LIMIT) == [process.sentinel]
    assert connection.wait([process.sentinel], timeout=LIMIT) == [process.sentinel]
    exit_code(process)


def test_the_sentinel_becomes_ready_though_a_forked_child_holds_a_copy() -> None:
    process = mp.Process(target=time.sleep, args=(LONG,))
    process.start()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        process.kill()
        assert exit_code(process) == -signal.SIGKILL
    finally:
        os.close(read)
        os.close(write)
        os.waitpid(pid, 0)


def test_close_releases_it_once_it_has_ended() -> None:
    process = mp.Process(target=time.sleep, args=(LONG,))
    process.start()
    with pytest.raises(ValueError, match="still running"):
        process.close()
    process.kill()
    exit_code(process)
    process.close()
    uses: list[Callable[[], object]] = [process.join, process.is_alive, process.terminate, lambda: process.exitcode]
    for use in uses:
        with pytest.raises(ValueError, match="closed"):
            use()


def test_a_process_starts_once() -> None:
    process = run(lambda: None)
    with pytest.raises(AssertionError, match="twice"):
        process.start()


def test_threads_may_start_and_join_processes_at_once() -> None:
    codes: list[int | None] = []

    def work(code: int) -> None:
        codes.append(run(lambda: sys.exit(code)).exitcode)

    threads = [threading.Thread(target=work, args=(code,)) for code in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert sorted(code for code in codes if code is not None) == list(range(8))


def test_a_child_may_close_what_it_finds_open(tmp_path: Path, gate: Gate) -> None:
    def target(gate: str) -> None:
        os.closerange(3, 256)
        say(tmp_path / "closed")
        wait_at(gate)
        sys.exit(5)

    process = mp.Process(target=target, args=(gate.path,))
    process.start()
    heard(tmp_path / "closed")
    assert run(lambda: sys.exit(3)).exitcode == 3  # by now the closing has been seen
    gate.open()
    assert exit_code(process) == 5


def test_what_is_pickled_for_a_process_is_told_of_its_end(gate: Gate) -> None:
    told = threading.Event()

    class Handle:
        def __reduce__(self) -> Any:
            multiprocessing.context.get_spawning_popen().at_end.append(told.set)  # type: ignore[union-attr]
            return int, ()

    process = mp.Process(target=lambda handle, gate: wait_at(gate), args=(Handle(), gate.path))
    process.start()
    assert not told.is_set()
    gate.open()
    exit_code(process)
    assert told.wait(LIMIT)
    told.clear()
    with pytest.raises(Exception, match="pickle"):
        mp.Process(target=print, args=(Handle(), threading.Lock())).start()
    assert told.is_set()


def test_what_a_process_leaves_in_the_background_ends_with_it_and_not_with_others(tmp_path: Path, gate: Gate) -> None:
    def target(gate: str) -> None:
        place = stay(tmp_path / "background")
        subprocess.run("sleep 1000 >/dev/null &", shell=True, pass_fds=[place], check=True)
        os.close(place)
        say(tmp_path / "begun")
        wait_at(gate)

    process = mp.Process(target=target, args=(gate.path,))
    process.start()
    heard(tmp_path / "begun")
    for _ in range(2):  # the second one is started when the end of the first has been dealt with
        run(int)
    assert not deserted(tmp_path / "background")
    gate.open()
    exit_code(process)
    assert eventually(lambda: deserted(tmp_path / "background"))
