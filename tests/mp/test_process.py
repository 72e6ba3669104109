"""Process: multiprocessing's promises, and what fiberexec's add to them."""

from __future__ import annotations

import atexit
import gc
import logging
import multiprocessing
import os
import random
import resource
import selectors
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

import fiberexec
from fiberexec import FiberExecutor, mp
from fiberexec._hub import launch
from fiberexec.backends import base, registry
from fiberexec.backends.local import LocalBackend
from fiberexec.mp import _jobs, _popen, context

LIMIT = 30.0  # seconds after which a test that waits gives up
LONG = 1000.0  # seconds that a child sleeps which somebody ends


def ended(process: mp.Process) -> int | None:
    """The exit code of a process, which must end by itself."""
    process.join(LIMIT)
    assert not process.is_alive()
    return process.exitcode


def run(target: Callable[..., object], *args: Any, **options: Any) -> mp.Process:
    """Run a target in a process, to its end."""
    process = mp.Process(target=target, args=args, **options)
    process.start()
    ended(process)
    return process


def say(path: Path, *words: object) -> None:
    """Write words into a file that appears with its content."""
    part = path.with_suffix(".part")
    part.write_text(" ".join(map(str, words)))
    part.rename(path)


def heard(path: Path) -> list[str]:
    """The words in a file, once it is there."""
    deadline = time.monotonic() + LIMIT
    while not path.exists():
        assert time.monotonic() < deadline, f"nobody wrote {path.name}"
        time.sleep(0.002)
    return path.read_text().split()


def gone(pid: int) -> bool:
    """Whether a process ends within the limit."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.002)
    return False


def script(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    return path


def start_script(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(fiberexec.__file__).parent.parent)},
    )


def run_script(path: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a program."""
    with start_script(path) as program:
        out, err = program.communicate(timeout=LIMIT)
    return program.returncode, out, err


class Gate:
    """Children wait at it until the test opens it for some of them."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = str(path)
        self._fd = os.open(path, os.O_RDWR)

    def open(self, count: int = 1) -> None:
        os.write(self._fd, bytes(count))

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    made = Gate(tmp_path / "gate")
    yield made
    made.close()


def wait_at(gate: str) -> None:
    os.read(os.open(gate, os.O_RDONLY), 1)


# -- running


def test_the_target_runs_in_another_process_with_its_arguments(tmp_path: Path) -> None:
    def target(a: int, b: int = 0, *, c: int) -> None:
        say(tmp_path / "said", os.getpid(), a, b, c)

    process = mp.Process(target=target, args=(1,), kwargs={"b": 2, "c": 3})
    assert process.pid is None and process.exitcode is None and not process.is_alive()
    process.start()
    assert ended(process) == 0
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
    assert ended(process) == 5


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
    assert ended(process) == 1


def test_the_target_and_its_arguments_are_let_go() -> None:
    class Thing:
        pass

    thing = Thing()
    alive = weakref.ref(thing)
    process = mp.Process(target=lambda held: None, args=(thing,))
    process.start()
    ended(process)
    del thing
    gc.collect()
    assert alive() is None


def test_100_processes_run_at_once(tmp_path: Path, gate: Gate) -> None:
    # A function of this module would make each of them import pytest.
    program = "import os; os.mkdir(name); os.read(os.open(gate, os.O_RDONLY), 1)"
    names = [tmp_path / str(number) for number in range(100)]
    processes = [mp.Process(target=exec, args=(program, {"name": str(n), "gate": gate.path})) for n in names]
    for process in processes:
        process.start()
    deadline = time.monotonic() + LIMIT
    while not all(name.exists() for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    gate.open(100)
    assert [ended(process) for process in processes] == [0] * 100


# -- joining, ending


def test_join_with_a_limit_returns_while_the_process_runs() -> None:
    process = mp.Process(target=time.sleep, args=(LONG,))
    process.start()
    process.join(0)
    process.join(0.01)
    process.join(-1)
    assert process.is_alive() and process.exitcode is None and process in mp.active_children()
    process.kill()
    assert ended(process) == -signal.SIGKILL
    assert process not in mp.active_children()


@pytest.mark.parametrize("repeat", range(5))
def test_terminate_ends_it_by_sigterm_however_early(repeat: int) -> None:
    process = mp.Process(target=time.sleep, args=(LONG,))
    process.start()
    time.sleep(repeat * 0.002)
    process.terminate()
    assert ended(process) == -signal.SIGTERM


def test_a_process_can_handle_sigterm(tmp_path: Path) -> None:
    def target() -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        say(tmp_path / "ready")
        time.sleep(LONG)

    process = mp.Process(target=target)
    process.start()
    heard(tmp_path / "ready")
    process.terminate()
    assert ended(process) == 5


def test_the_sentinel_becomes_ready_at_the_end() -> None:
    process = mp.Process(target=time.sleep, args=(LONG,))
    with pytest.raises(ValueError, match="not started"):
        process.sentinel  # noqa: B018
    process.start()
    assert not connection.wait([process.sentinel], timeout=0)
    process.kill()
    assert connection.wait([process.sentinel], timeout=LIMIT) == [process.sentinel]
    assert connection.wait([process.sentinel], timeout=LIMIT) == [process.sentinel]
    ended(process)


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
        assert ended(process) == -signal.SIGKILL
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
    ended(process)
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
    assert ended(process) == 5


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
    ended(process)
    assert told.wait(LIMIT)
    told.clear()
    with pytest.raises(Exception, match="pickle"):
        mp.Process(target=print, args=(Handle(), threading.Lock())).start()
    assert told.is_set()


def test_what_a_process_leaves_in_the_background_ends_with_it_and_not_with_others(tmp_path: Path, gate: Gate) -> None:
    def target(gate: str) -> None:
        found = subprocess.run("sleep 1000 >/dev/null & echo $!", shell=True, stdout=subprocess.PIPE, text=True, check=True)
        say(tmp_path / "background", found.stdout)
        wait_at(gate)

    process = mp.Process(target=target, args=(gate.path,))
    process.start()
    [background] = map(int, heard(tmp_path / "background"))
    for _ in range(2):  # the second one is started when the end of the first has been dealt with
        run(int)
    assert psutil.Process(background).status() != psutil.STATUS_ZOMBIE
    gate.open()
    ended(process)
    assert gone(background)


# -- who is who


def test_processes_know_themselves_and_their_parent(capfd: pytest.CaptureFixture[str]) -> None:
    def target(key: bytes) -> None:
        current, above = mp.current_process(), mp.parent_process()
        print(above and (above.pid, above.name, above.is_alive()))
        print(current.name, current.pid == os.getpid(), bytes(current.authkey) == key, mp.active_children())

    assert mp.parent_process() is None
    run(target, bytes(mp.current_process().authkey), name="me")
    assert capfd.readouterr().out == f"({os.getpid()}, 'MainProcess', True)\nme True True []\n"


def test_a_child_starts_children_of_its_own() -> None:
    def child() -> None:
        grandchild = mp.Process(target=lambda: sys.exit(os.getppid() != 0 and 11))
        grandchild.start()
        grandchild.join()
        assert grandchild.name.count(":") == 1
        sys.exit((grandchild.exitcode or 0) + 1)

    assert run(child).exitcode == 12


def test_a_daemon_may_not_have_children(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: mp.Process(target=print).start(), daemon=True).exitcode == 1
    assert "daemonic processes are not allowed to have children" in capfd.readouterr().err


def test_a_forked_child_starts_processes_of_its_own() -> None:
    run(lambda: None)  # so that there is something to be forked
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            process = mp.Process(target=lambda: sys.exit(3))
            process.start()
            process.join()
            code = process.exitcode or 0
        finally:
            _jobs.close()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert run(lambda: sys.exit(4)).exitcode == 4


def test_a_task_of_an_executor_starts_processes() -> None:
    def task() -> int | None:
        process = mp.Process(target=lambda: sys.exit(6))
        process.start()
        process.join()
        return process.exitcode

    with FiberExecutor(1) as executor:
        assert executor.submit(task).result(LIMIT) == 6


def test_a_process_has_an_executor() -> None:
    def target() -> None:
        with FiberExecutor(1) as executor:
            sys.exit(executor.submit(lambda: 21).result() * 2)

    assert run(target).exitcode == 42


# -- the end of programs


def test_no_guard_is_needed_and_main_is_not_run_again(tmp_path: Path) -> None:
    program = script(
        tmp_path / "program.py",
        """
        from fiberexec import mp as multiprocessing

        print("main")
        class Worker(multiprocessing.Process):
            def run(self):
                print("worker", helper(self.name))

        def helper(name):
            return name.lower()

        worker = Worker()
        worker.start()
        worker.join()
        """,
    )
    assert run_script(program) == (0, "main\nworker worker-1\n", "")


def test_at_the_end_daemons_are_ended_and_others_joined(tmp_path: Path) -> None:
    program = script(
        tmp_path / "program.py",
        """
        import time
        from fiberexec import mp

        daemon = mp.Process(target=time.sleep, args=(1000,), daemon=True)
        daemon.start()
        print(daemon.pid, flush=True)
        mp.Process(target=lambda: (time.sleep(0.2), print("done"))).start()
        """,
    )
    code, out, err = run_script(program)
    pid, word = out.split()
    assert (code, word, err) == (0, "done", "")
    assert gone(int(pid))


@pytest.mark.parametrize("daemon", [True, False])
def test_when_the_program_is_killed_its_processes_and_theirs_go(tmp_path: Path, daemon: bool) -> None:
    program = script(
        tmp_path / "program.py",
        f"""
        import os, time
        from fiberexec import mp

        def grandchild():
            print(os.getpid(), flush=True)
            time.sleep(1000)

        def child():
            print(os.getpid(), flush=True)
            if not {daemon}:
                mp.Process(target=grandchild).start()
            time.sleep(1000)

        mp.Process(target=child, daemon={daemon}).start()
        time.sleep(1000)
        """,
    )
    with start_script(program) as running:
        assert running.stdout is not None
        pids = [int(running.stdout.readline()) for _ in range(1 if daemon else 2)]
        running.kill()
        assert all(map(gone, pids))


def test_a_ctrl_c_that_ends_the_program_reaches_its_processes(tmp_path: Path) -> None:
    program = script(
        tmp_path / "program.py",
        """
        import time
        from fiberexec import mp

        def child():
            try:
                print("ready", flush=True)
                time.sleep(1000)
            except KeyboardInterrupt:
                print("interrupted", flush=True)

        mp.Process(target=child).start()
        time.sleep(1000)
        """,
    )
    with start_script(program) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        running.send_signal(signal.SIGINT)
        assert running.stdout.readline() == "interrupted\n"
        assert running.wait(LIMIT) != 0


def test_a_ctrl_c_during_join_reaches_the_process(tmp_path: Path) -> None:
    program = script(
        tmp_path / "program.py",
        """
        import time
        from fiberexec import mp

        def child():
            try:
                print("ready", flush=True)
                time.sleep(1000)
            except KeyboardInterrupt:
                print("interrupted", flush=True)

        process = mp.Process(target=child)
        process.start()
        try:
            process.join()
        except KeyboardInterrupt:
            process.join()
            print(process.exitcode)
        """,
    )
    with start_script(program) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        time.sleep(0.1)  # likely in join() now; the promise holds anyway
        running.send_signal(signal.SIGINT)
        out, _ = running.communicate(timeout=LIMIT)
    assert out == "interrupted\n0\n"


# -- places


def test_a_process_says_where_it_runs() -> None:
    process = mp.Process(target=lambda: None)
    assert [process.host, process.job_id, process.lost] == [None, None, None]
    process.start()
    ended(process)
    assert [process.host, process.job_id, process.lost] == [os.uname().nodename, f"local-{process.pid}", None]


def test_when_what_looks_after_processes_dies_they_are_lost_and_the_next_one_runs() -> None:
    process = mp.Process(target=time.sleep, args=(LONG,))
    process.start()
    [backend] = _jobs.get()._backends.values()
    os.kill(backend._server, signal.SIGKILL)  # type: ignore[attr-defined]
    assert ended(process) == 255
    assert process.lost == "the fork server died"
    assert run(lambda: sys.exit(2)).exitcode == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_in_the_thread_that_looks_after_processes_hangs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    process = mp.Process(target=time.sleep, args=(LONG,))
    process.start()
    with monkeypatch.context() as patch:
        patch.setattr(_jobs.Jobs, "_do", lambda *_: 1 / 0)
        process.kill()
        assert ended(process) == 255
    assert process.pid and gone(process.pid)
    assert process.lost and "division by zero" in process.lost
    assert run(lambda: sys.exit(2)).exitcode == 2


def test_start_says_that_descriptors_have_run_out_and_works_when_there_are_some() -> None:
    def target() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        refused = 0
        for spare in range(40):
            resource.setrlimit(resource.RLIMIT_NOFILE, (5 + spare, hard))
            process = mp.Process(target=int)
            try:
                process.start()
            except (OSError, fiberexec.LaunchError):
                refused += 1
            else:
                process.join()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        process = mp.Process(target=int)
        process.start()
        process.join()
        sys.exit(process.exitcode == 0 < refused and 7)

    assert run(target).exitcode == 7


def test_processes_that_are_killed_at_random_are_all_joined() -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)

    def nested() -> None:
        process = mp.Process(target=time.sleep, args=(LONG,))
        process.start()
        process.join()

    targets: list[Callable[[], object]] = [nested, int]
    for _ in range(5):
        processes = [mp.Process(target=chance.choice(targets)) for _ in range(8)]
        for process in processes:
            process.start()
            time.sleep(chance.random() / 100)
        chance.shuffle(processes)
        for process in processes:
            chance.choice([process.kill, process.terminate])()
        assert {ended(process) for process in processes} <= {0, -signal.SIGTERM, -signal.SIGKILL}


def test_a_launch_that_fails_is_raised_by_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    process = mp.Process(target=print)
    with pytest.raises(fiberexec.LaunchError, match=r"sys\.executable is empty"):
        process.start()
    assert process.exitcode is None and process not in mp.active_children()


def test_a_size_that_this_machine_has_not_is_refused() -> None:
    with pytest.raises(fiberexec.ResourceError, match="has no more than"):
        mp.Process(target=print, cpu=100_000).start()
    with pytest.raises(fiberexec.ConfigError, match="memory"):
        mp.Process(target=print, memory="many")
    with pytest.raises(fiberexec.ConfigError, match="gpu"):
        mp.Process(target=print, gpu=-1)


def test_meta_of_the_target_is_the_size_and_arguments_come_first() -> None:
    target = fiberexec.meta(cpu=100_000)(lambda: sys.exit(1))
    with pytest.raises(fiberexec.ResourceError, match="cpu=100000"):
        mp.Process(target=target).start()
    assert run(target, cpu=1).exitcode == 1


def test_processes_that_ask_for_gpus_share_them_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")

    def target(name: str) -> None:
        say(tmp_path / name, os.environ["CUDA_VISIBLE_DEVICES"])
        time.sleep(LONG)

    processes = [mp.Process(target=target, args=(name,), gpu=1) for name in "ab"]
    for process in processes:
        process.start()
    assert sorted(heard(tmp_path / "a") + heard(tmp_path / "b")) == ["4", "5"]
    for process in processes:
        process.kill()
        ended(process)


class Plain(LocalBackend):
    """Has nothing but what the Protocol asks for, and launches when it may."""

    name = "plain"
    one_pool = False
    preload = remove_at_end = None  # type: ignore[assignment]
    may_launch = threading.Event()

    def launch(self, workers: Sequence[int]) -> None:
        self.kept = getattr(self, "kept", []) + list(workers)

    def signal(self, worker: int, number: int, group: bool) -> None:
        if worker in self.kept:
            self.kept.remove(worker)
            self._events.append(base.Refused(worker, fiberexec.LaunchError("given up")))
        super().signal(worker, number, group)

    def wakeup(self) -> float | None:
        return time.monotonic() + 0.01

    def poll(self) -> list[base.JobEvent]:
        if self.may_launch.is_set():
            super().launch(self.kept)
            self.kept.clear()
        return super().poll()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A backend of that name, which launches from when the event is set."""
    module = types.ModuleType("a_backend")
    module.Plain = Plain  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_backend", module)
    monkeypatch.setitem(registry._BUILT_IN, "plain", "a_backend:Plain")
    monkeypatch.setitem(context._contexts, "plain", context.FiberContext("plain"))
    monkeypatch.setattr(_popen, "_PATIENCE", 0.01)
    monkeypatch.setattr(Plain, "may_launch", threading.Event())
    return Plain.may_launch


def plain_process(**options: Any) -> mp.Process:
    process = mp.Process(target=time.sleep, args=(LONG,), **options)
    process._context_name = "plain"
    return process


def test_start_does_not_wait_for_a_slow_backend_and_the_pid_does(plain: threading.Event) -> None:
    processes = [plain_process(cpu=cpu) for cpu in (None, 1, 1)]
    for process in processes:
        process.start()
    assert all(process.is_alive() for process in processes)
    assert set(mp.active_children()) >= set(processes)
    threading.Timer(0.05, plain.set).start()
    for process in processes:
        assert process.pid and process.host
        process.kill()
        assert ended(process) == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_has_not_been_launched_yet_is_given_up(plain: threading.Event, number: int) -> None:
    process = plain_process()
    process.start()
    if number == signal.SIGTERM:
        process.terminate()
    else:
        process.kill()
    assert ended(process) == -number and process.lost is None and process.pid is None


# -- contexts


@pytest.fixture
def unset() -> Any:
    mp.set_start_method(None, force=True)
    yield
    mp.set_start_method(None, force=True)


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver", "local"])
def test_contexts_are_had_by_a_start_method_or_a_backend(method: str) -> None:
    found: Any = mp.get_context(method)
    assert found.get_start_method() == method and mp.get_context(method) is found is found.get_context()
    with pytest.raises(ValueError, match="cannot set start method of concrete context"):
        found.set_start_method("spawn")
    process = found.Process(target=lambda: sys.exit(mp.get_start_method() == method and 8))
    assert issubclass(found.Process, mp.Process) and issubclass(mp.Process, multiprocessing.process.BaseProcess)
    process.start()
    assert ended(process) == 8
    assert type(process).__name__.lower() == f"{method}process"


def test_a_context_that_there_is_not_is_refused(unset: None) -> None:
    with pytest.raises(ValueError, match="cannot find context for 'nowhere'"):
        mp.get_context("nowhere")
    with pytest.raises(ValueError, match="cannot find context for 'nowhere'"):
        mp.set_start_method("nowhere")


def test_the_start_method_is_set_once(unset: None) -> None:
    assert mp.get_start_method(allow_none=True) is None
    mp.set_start_method("local")
    with pytest.raises(RuntimeError, match="already been set"):
        mp.set_start_method("spawn")
    assert mp.get_start_method() == "local"
    assert run(lambda: sys.exit(mp.get_start_method() == "local")).exitcode == 1
    mp.set_start_method("spawn", force=True)
    assert mp.get_start_method() == "spawn"


def test_the_module_has_every_name_of_multiprocessing() -> None:
    assert set(multiprocessing.__all__) <= set(mp.__all__) <= set(dir(mp))
    assert mp.TimeoutError is multiprocessing.TimeoutError and mp.cpu_count() == multiprocessing.cpu_count()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mp.nothing  # noqa: B018


def test_the_import_loads_nothing_heavy() -> None:
    program = "import sys; from fiberexec import mp; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pynng", "dill", "numpy", "multiprocessing", "threading", "logging"} & set(loaded)


# -- multiprocessing's own


@pytest.mark.leaks("multiprocessing's resource tracker stays")
def test_multiprocessings_locks_travel_as_arguments() -> None:
    lock = multiprocessing.get_context("spawn").Lock()

    def target(lock: Any) -> None:
        lock.acquire()
        sys.exit(lock.acquire(block=False) is False)

    assert run(target, lock).exitcode == 1
    assert not lock.acquire(block=False)


def test_the_loggers_level_and_what_is_logged_travel(caplog: pytest.LogCaptureFixture) -> None:
    def target() -> None:
        logging.info("from the child")
        sys.exit(mp.get_logger().getEffectiveLevel())

    logger = mp.get_logger()
    before = logger.level
    logger.setLevel(17)
    try:
        with caplog.at_level(logging.INFO):
            assert run(target).exitcode == 17
    finally:
        logger.setLevel(before)
    assert any("from the child" in record.getMessage() for record in caplog.records)


def test_what_a_child_logs_below_this_programs_level_is_not_said(caplog: pytest.LogCaptureFixture) -> None:
    def target() -> None:
        logger = logging.getLogger("talkative")
        logger.setLevel(logging.DEBUG)
        logger.debug("not for you")
        logger.warning("for you")

    assert run(target).exitcode == 0
    said = [record.getMessage() for record in caplog.records if record.name == "talkative"]
    assert len(said) == 1 and said[0].endswith(" for you")


def test_a_number_of_the_hubs_listener_that_a_process_gets_is_the_processs() -> None:
    """Another thread starts the hub and closes the listener between two looks of the thread that watches it."""
    jobs: Any = _jobs.Jobs()
    jobs._selector = selectors.PollSelector()
    fd, other = os.pipe()
    jobs._watch(fd, "hub")
    jobs._watched = {fd: "hub"}
    jobs._watch(fd, "the process")
    jobs._follow()
    assert jobs._selector.get_key(fd).data == "the process"
    jobs._selector.close()
    os.close(fd)
    os.close(other)


def test_a_child_may_be_the_first_to_use_a_shared_object() -> None:
    def target() -> None:
        queue = mp.Queue()
        process = mp.Process(target=queue.put, args=(5,))
        process.start()
        process.join()
        sys.exit(queue.get(timeout=LIMIT))

    assert run(target).exitcode == 5
    assert run(target).exitcode == 5


def test_a_hub_that_cannot_be_started_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError("no hub today")

    monkeypatch.setattr(launch, "start", refuse)
    assert run(lambda: mp.Queue().put(1)).exitcode == 1
