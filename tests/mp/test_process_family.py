"""Processes, their parents and children, and the end of programs."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from fiberexec import FiberExecutor, mp
from fiberexec.mp import _jobs

from .helpers import LIMIT, deserted, eventually, run, run_script, script, start_script

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
        f"""
        import fcntl, time
        from fiberexec import mp

        def stay(begun):
            file = open("{tmp_path / "daemon"}", "w")
            fcntl.flock(file, fcntl.LOCK_SH)
            begun.set()
            time.sleep(1000)

        begun = mp.Event()
        daemon = mp.Process(target=stay, args=(begun,), daemon=True)
        daemon.start()
        begun.wait()
        mp.Process(target=lambda: (time.sleep(0.2), print("done"))).start()
        """,
    )
    code, out, err = run_script(program)
    assert (code, out, err) == (0, "done\n", "")
    assert eventually(lambda: deserted(tmp_path / "daemon"))


@pytest.mark.parametrize("daemon", [True, False])
def test_when_the_program_is_killed_its_processes_and_theirs_go(tmp_path: Path, daemon: bool) -> None:
    program = script(
        tmp_path / "program.py",
        f"""
        import fcntl, os, time
        from fiberexec import mp

        def stay():
            fcntl.flock(os.open("{tmp_path / "family"}", os.O_RDWR | os.O_CREAT), fcntl.LOCK_SH)
            print("up", flush=True)

        def grandchild():
            stay()
            time.sleep(1000)

        def child():
            stay()
            if not {daemon}:
                mp.Process(target=grandchild).start()
            time.sleep(1000)

        mp.Process(target=child, daemon={daemon}).start()
        time.sleep(1000)
        """,
    )
    with start_script(program) as running:
        assert running.stdout is not None
        assert [running.stdout.readline() for _ in range(1 if daemon else 2)] == ["up\n"] * (1 if daemon else 2)
        assert not deserted(tmp_path / "family")
        running.kill()
        assert eventually(lambda: deserted(tmp_path / "family"))


INTERRUPTED = """
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
"""
JOINS = """
try:
    process.join()
except KeyboardInterrupt:
    process.join()
    print(process.exitcode)
"""


@pytest.mark.parametrize(
    ("rest", "said"), [("time.sleep(1000)", "interrupted\n"), (JOINS, "interrupted\n0\n")], ids=["ends", "joins"]
)
def test_a_ctrl_c_reaches_the_processes_of_a_program_that_it_ends_and_of_one_that_joins(
    rest: str, said: str, tmp_path: Path
) -> None:
    with start_script(script(tmp_path / "program.py", INTERRUPTED + rest)) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        time.sleep(1)  # likely in join() now; the promise holds anyway
        running.send_signal(signal.SIGINT)
        out, _ = running.communicate(timeout=LIMIT)
    assert out == said
    assert (running.returncode == 0) == (rest == JOINS)
