"""Workers and fork servers that are stopped or killed from outside, and what is said and charged of it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fiberexec
from fiberexec import FiberExecutor, TaskTimeout, WorkerLost

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
def ex() -> Iterator[FiberExecutor]:
    with FiberExecutor(1) as executor:
        yield executor
        assert executor.submit(pow, 3, 4).result(30) == 81, "the executor does not go on"


def attempt() -> tuple[int, int]:
    task = fiberexec.current_task()
    return os.getpid(), task.attempt


def test_a_worker_that_is_stopped_by_sigstop_ends_with_the_time_limit(ex: FiberExecutor) -> None:
    def stop_me() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    with pytest.raises(TaskTimeout):
        ex.options(timeout=0.2).submit(stop_me).result(30)


def test_an_idle_worker_that_is_killed_costs_no_task_anything(ex: FiberExecutor) -> None:
    for _ in range(10):
        pid, _ = ex.submit(attempt).result(30)
        os.kill(pid, signal.SIGKILL)
        other, attempts = ex.submit(attempt).result(30)
        assert attempts == 1
        assert other != pid or attempts == 1
    assert ex.stats().lost == 0


def test_many_idle_workers_that_are_killed_at_once_are_replaced(until: Callable[..., bool]) -> None:
    with FiberExecutor(4, min_workers=4) as ex:
        assert until(lambda: sum(worker.state == "idle" for worker in ex.workers()) == 4)
        pids = {worker.pid for worker in ex.workers()}
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert sorted(ex.map(abs, range(100), timeout=30)) == list(range(100))
        assert until(lambda: len({w.pid for w in ex.workers() if w.state == "idle"} - pids) == 4)


def count(path: str, seconds: float) -> int:
    """Leave a mark that this has been started, then work for so long."""
    with open(path, "a") as file:
        file.write("x")
    attempt: int = fiberexec.current_task().attempt
    time.sleep(5 if attempt == 1 else seconds)  # the first one is to be killed
    return attempt


def status(pid: int) -> list[str]:
    """State, parent's pid, and so on."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def server_of(pid: int) -> int:
    return int(status(pid)[1])


def has_ended(pid: int) -> bool:
    try:
        return status(pid)[0] == "Z"  # the system's first process takes its time with zombies
    except OSError:
        return True


@linux
def test_tasks_run_again_when_the_fork_server_is_killed(tmp_path: Path, until: Callable[..., bool]) -> None:
    with FiberExecutor(2) as ex:
        pid = ex.submit(os.getpid).result(30)
        running = [ex.submit(count, str(tmp_path / str(number)), 0.3) for number in range(2)]
        queued = [ex.submit(abs, -number) for number in range(50)]
        assert until(lambda: len(list(tmp_path.iterdir())) == 2)
        os.kill(server_of(pid), signal.SIGKILL)
        assert [future.result(30) for future in queued] == list(range(50))
        assert [future.result(30) for future in running] in ([2, 2], [1, 2], [2, 1])  # a loss by the infrastructure
        assert list(ex.map(abs, range(-100, 0), timeout=30)) == list(range(100, 0, -1))


@linux
def test_the_fork_server_may_be_killed_again_and_again(until: Callable[..., bool]) -> None:
    with FiberExecutor(2) as ex:
        for number in range(10):
            pid = ex.submit(os.getpid).result(30)
            os.kill(server_of(pid), signal.SIGKILL)
            assert ex.submit(abs, -number).result(30) == number
            assert until(lambda pid=pid: has_ended(pid)), "a worker outlived the fork server"


@linux
@pytest.mark.parametrize("workers", [1, 4])
def test_a_fork_server_that_is_killed_while_workers_start_breaks_nothing(
    workers: int, until: Callable[..., bool]
) -> None:
    with FiberExecutor(workers, min_workers=workers, initializer=time.sleep, initargs=(0.3,)) as ex:
        future = ex.submit(abs, -5)
        assert until(lambda: sum(worker.pid > 0 for worker in ex.workers()) == workers)
        os.kill(server_of(ex.workers()[0].pid), signal.SIGKILL)
        assert future.result(30) == 5


def kill_the_parent() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


def test_a_task_that_kills_the_fork_server_again_and_again_fails_and_breaks_nothing() -> None:
    with FiberExecutor(2) as ex:
        bad = ex.submit(kill_the_parent)
        others = [ex.submit(abs, -number) for number in range(50)]
        error = bad.exception(60)
        assert isinstance(error, WorkerLost)
        assert "fork server" in error.reason
        assert [future.result(30) for future in others] == list(range(50))


@linux
def test_a_fork_server_that_is_stopped_does_not_stop_what_runs(until: Callable[..., bool]) -> None:
    with FiberExecutor(1) as ex:
        server = server_of(ex.submit(os.getpid).result(30))
        os.kill(server, signal.SIGSTOP)
        try:
            assert ex.submit(abs, -5).result(30) == 5
        finally:
            os.kill(server, signal.SIGCONT)


def last_words() -> None:
    os.write(2, b"these are my last words\n")
    os.kill(os.getpid(), signal.SIGABRT)


def test_worker_lost_says_who_where_how_and_what_it_said_last() -> None:
    with FiberExecutor(1, max_worker_losses=2) as ex:
        error = ex.submit(last_words).exception(30)
        assert isinstance(error, WorkerLost)
        assert (error.exitcode, error.losses) == (-signal.SIGABRT, 2)
        assert error.pid > 0
        assert error.host == os.uname().nodename
        assert "these are my last words" in error.log
        assert "SIGABRT" in str(error)
        assert "last_words" in str(error)
        assert ex.stats().lost == 2


def test_a_task_that_follows_a_crash_is_not_charged(tmp_path: Path) -> None:
    """What waits behind the culprit moves for free, however often the culprit kills."""
    with FiberExecutor(1, max_worker_losses=3) as ex:
        list(ex.map(abs, range(100)))  # measured: what follows is sent ahead
        culprit = ex.submit(os._exit, 4)
        behind = [ex.submit(attempt) for _ in range(100)]
        assert isinstance(culprit.exception(30), WorkerLost)
        assert {future.result(30)[1] for future in behind} == {1}
