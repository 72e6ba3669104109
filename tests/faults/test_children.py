"""What a task starts dies with its worker, wherever it has hidden, however the worker dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from fiberexec import FiberExecutor, TaskTimeout, WorkerLost

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux alone")

KINDS = {
    "child": ["sleep", "600"],
    "session": ["setsid", "sleep", "600"],
    "daemon": ["sh", "-c", "setsid sleep 600 &"],
    "family": ["setsid", "sh", "-c", "setsid sh -c 'setsid sleep 600; :'; :"],
    "pipeline": ["sh", "-c", "sleep 600 | sleep 600"],
}
kinds = pytest.mark.parametrize("kind", KINDS)


def start(argv: list[str], variables: dict[str, str], end: str) -> int:
    """Start a program that stays, wait until it has come to rest, and return this worker's pid."""
    subprocess.Popen(
        argv,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    word = next(iter(variables.values())).encode()
    asleep = 0
    wanted = 2 if "|" in " ".join(argv) else 1
    while asleep < wanted:
        asleep = 0
        for pid in os.listdir("/proc"):
            if pid.isdigit():
                try:
                    with open(f"/proc/{pid}/cmdline", "rb") as line, open(f"/proc/{pid}/environ", "rb") as env:
                        asleep += line.read() == b"sleep\x00600\x00" and word in env.read()
                except OSError:
                    pass
    if end == "exit":
        os._exit(3)
    if end == "hang":
        time.sleep(600)
    return os.getpid()


@kinds
@pytest.mark.parametrize("when", ["at once", "later"])
def test_children_die_with_a_worker_that_exits(kind: str, when: str, mark: Any) -> None:
    with FiberExecutor(1, max_worker_losses=1) as ex:
        if when == "later":  # the fork server has had the time for what it does when it is idle
            ex.submit(time.sleep, 0.3).result()
        with pytest.raises(WorkerLost):
            ex.submit(start, KINDS[kind], mark.variables, "exit").result(30)
        assert not mark.left()
        assert ex.submit(abs, -1).result(30) == 1


@kinds
def test_children_die_with_an_idle_worker_that_is_killed(kind: str, mark: Any, until: Callable[..., bool]) -> None:
    with FiberExecutor(1) as ex:
        pid = ex.submit(start, KINDS[kind], mark.variables, "").result(30)
        assert mark.processes()
        os.kill(pid, signal.SIGKILL)
        assert not mark.left()
        assert ex.submit(os.getpid).result(30) != pid


@kinds
def test_children_die_with_a_worker_that_is_stopped_for_its_time_limit(kind: str, mark: Any) -> None:
    with FiberExecutor(1) as ex:
        with pytest.raises(TaskTimeout):
            ex.options(timeout=0.5).submit(start, KINDS[kind], mark.variables, "hang").result(30)
        assert not mark.left()


@kinds
def test_children_die_with_a_worker_that_has_had_its_tasks(kind: str, mark: Any) -> None:
    with FiberExecutor(1, max_tasks_per_child=1) as ex:
        ex.submit(start, KINDS[kind], mark.variables, "").result(30)
        assert not mark.left()


@kinds
def test_children_die_when_the_executor_is_shut_down(kind: str, mark: Any) -> None:
    with FiberExecutor(1) as ex:
        ex.submit(start, KINDS[kind], mark.variables, "").result(30)
    assert not mark.left()


@kinds
@pytest.mark.parametrize("how", ["terminate_workers", "kill_workers"])
def test_children_die_when_the_workers_are_ended_by_hand(kind: str, how: str, mark: Any) -> None:
    ex = FiberExecutor(1)
    ex.submit(start, KINDS[kind], mark.variables, "").result(30)
    getattr(ex, how)()
    assert not mark.left()
    ex.shutdown()


@kinds
def test_children_die_with_the_driver(kind: str, mark: Any, package_root: str) -> None:
    """SIGKILL, while the worker that started them is busy."""
    code = (
        "import sys, pickle, time; from fiberexec import FiberExecutor\n"
        "start, argv, variables = pickle.loads(sys.stdin.buffer.read())\n"
        "ex = FiberExecutor(1); ex.submit(start, argv, variables, '').result(); ex.submit(time.sleep, 600)\n"
        "print('started', flush=True); time.sleep(600)\n"
    )
    from fiberexec._serialize import dumps

    driver = subprocess.Popen(
        [sys.executable, "-c", "import fiberexec._serialize;" + code],
        env={**os.environ, **mark.variables, "PYTHONPATH": package_root},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with driver:
        assert driver.stdin is not None and driver.stdout is not None
        driver.stdin.write(dumps((start, KINDS[kind], mark.variables))[0])
        driver.stdin.close()
        assert driver.stdout.readline() == b"started\n"
        driver.kill()
    assert not mark.left()


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.xfail(reason="nobody knows whose daemon it is: it is ended too"))
        if kind == "daemon"
        else kind
        for kind in KINDS
    ],
)
def test_children_of_a_living_worker_are_left_alone(kind: str, mark: Any) -> None:
    """Another worker's end does not end them."""
    with FiberExecutor(2, max_worker_losses=1) as ex:
        ex.submit(time.sleep, 0.3).result()
        pid = ex.submit(start, KINDS[kind], mark.variables, "").result(30)
        busy = ex.submit(time.sleep, 0.5)  # the other worker, or this one: both outlive what follows
        before = set(mark.processes())
        victim = ex.submit(os._exit, 1)
        with pytest.raises(WorkerLost) as caught:
            victim.result(30)
        busy.result(30)
        if kind == "daemon":
            mark.left()  # it is ended a moment after its neighbour's end was told
        if caught.value.pid != pid:
            assert set(mark.processes()) == before
        else:
            pytest.skip("the worker that started them was the one that ended")
