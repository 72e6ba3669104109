"""Workers come on demand and go when idle; stats() and workers() say the truth."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest
import tenacity

import fiberexec
from fiberexec import FiberExecutor, Stats, WorkerInfo

LIMIT = 30.0
Make = Callable[..., FiberExecutor]


def hold(board: Any, name: str = "held") -> int:
    task = fiberexec.current_task()
    assert task is not None
    board.post(name, [os.getpid(), task.id])
    board.wait("go")
    return os.getpid()


def test_no_worker_before_the_first_task(make_executor: Make) -> None:
    executor = make_executor(4)
    assert executor.workers() == [] and executor.stats().workers == 0


def test_one_task_after_the_other_needs_one_worker(make_executor: Make) -> None:
    executor = make_executor(4)
    assert len({executor.submit(os.getpid).result(LIMIT) for _ in range(10)}) == 1
    assert executor.stats().started == len(executor.workers()) == 1


@pytest.mark.one_host("it tells workers apart by their pids")
def test_as_many_workers_as_tasks_but_no_more_than_allowed(make_executor: Make, board: Any) -> None:
    executor = make_executor(3)
    futures = [executor.submit(hold, board) for _ in range(10)]
    board.wait("held", 3)
    assert len(executor.workers()) == 3 and len({pid for pid, _ in board.read("held")}) == 3
    board.post("go")
    assert len({future.result(LIMIT) for future in futures}) == 3


def test_min_workers_are_there_without_a_task_and_stay(make_executor: Make, eventually: Any) -> None:
    executor = make_executor(3, min_workers=2, idle_timeout=0.05)
    eventually(lambda: executor.stats().idle == 2, "two workers are idle")
    pids = {worker.pid for worker in executor.workers()}
    assert executor.submit(os.getpid).result(LIMIT) in pids
    assert executor.stats().started == 2


@pytest.mark.one_host("it looks at its workers' processes")
def test_min_workers_are_replaced(make_executor: Make, eventually: Any) -> None:
    executor = make_executor(2, min_workers=2)
    eventually(lambda: executor.stats().idle == 2)
    before = {worker.pid for worker in executor.workers()}
    killed = min(before)
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: executor.stats().idle == 2 and killed not in {worker.pid for worker in executor.workers()})
    assert executor.stats().lost == 0  # it did not execute anything


@pytest.mark.one_host("it tells workers apart by their pids")
def test_idle_workers_go_down_to_min_workers_and_come_back(make_executor: Make, board: Any, eventually: Any) -> None:
    executor = make_executor(3, min_workers=1, idle_timeout=0.1)
    futures = [executor.submit(hold, board) for _ in range(3)]
    board.wait("held", 3)
    board.post("go")
    pids = {future.result(LIMIT) for future in futures}
    left = eventually(lambda: len(executor.workers()) == 1 and executor.workers())
    assert {worker.pid for worker in left} < pids
    assert {executor.submit(hold, board).result(LIMIT) for _ in range(3)} <= pids


@pytest.mark.one_host("it tells workers apart by their pids")
def test_without_min_workers_all_go_and_come_back(make_executor: Make, eventually: Any) -> None:
    executor = make_executor(2, idle_timeout=0.1)
    first = executor.submit(os.getpid).result(LIMIT)
    eventually(lambda: executor.workers() == [], "nobody is there")
    assert executor.submit(os.getpid).result(LIMIT) != first
    assert executor.stats().lost == 0 and executor.stats().started == 2


@pytest.mark.one_host("it tells workers apart by their pids")
def test_a_busy_worker_is_not_idle(make_executor: Make, board: Any, eventually: Any) -> None:
    executor = make_executor(2, idle_timeout=0.1)
    held = executor.submit(hold, board)
    board.wait("held")
    other = executor.submit(os.getpid).result(LIMIT)
    eventually(lambda: other not in {worker.pid for worker in executor.workers()}, "the idle one has gone")
    board.post("go")
    assert held.result(LIMIT) != other


def test_min_workers_beyond_max_workers_are_refused(make_executor: Make) -> None:
    with pytest.raises(fiberexec.ConfigError, match="min_workers"):
        make_executor(2, min_workers=3)


# -- stats


def test_stats_count_every_state(make_executor: Make, board: Any, eventually: Any) -> None:
    executor = make_executor(2)
    assert [executor.submit(int).result(LIMIT) for _ in range(5)] == [0] * 5
    delayed = executor.options(retry=tenacity.Retrying(wait=tenacity.wait_fixed(600))).submit(int, "x")
    eventually(lambda: executor.stats().delayed == 1)
    held = [executor.submit(hold, board) for _ in range(2)]
    board.wait("held", 2)
    pending = [executor.submit(int) for _ in range(3)]
    now = executor.stats()
    assert (now.queued, now.running, now.delayed, now.done, now.retried, now.lost) == (3, 2, 1, 5, 1, 0)
    assert (now.workers, now.idle, now.failed_launches) == (2, 0, 0)
    board.post("go")
    for future in held + pending:
        future.result(LIMIT)
    delayed.cancel()
    now = eventually(lambda: executor.stats().idle == 2 and executor.stats())
    assert (now.queued, now.running, now.delayed, now.done, now.retried) == (0, 0, 0, 10, 1)


def test_stats_count_items_and_losses(executor: FiberExecutor) -> None:
    list(executor.map(abs, range(1000)))
    assert executor.stats().done == 1000
    executor.options(max_worker_losses=2).submit(os._exit, 1).exception(LIMIT)
    assert executor.stats().lost == 2
    assert isinstance(executor.submit(int, "x").exception(LIMIT), ValueError)
    assert executor.stats().done == 1001


@pytest.mark.parametrize("kind", [Stats, WorkerInfo])
def test_what_they_return_is_a_frozen_dataclass(kind: Any, executor: FiberExecutor) -> None:
    executor.submit(int).result(LIMIT)
    for found in (executor.stats(), *executor.workers()):
        assert dataclasses.is_dataclass(found)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(found, dataclasses.fields(found)[0].name, 99)
    assert {field.name for field in dataclasses.fields(kind)} == set(kind.__annotations__)


@pytest.mark.one_host("it looks at its workers' processes")
def test_workers_tell_who_does_what(make_executor: Make, board: Any, eventually: Any) -> None:
    executor = make_executor(2)
    held = executor.submit(hold, board)
    assert executor.submit(os.getpid).result(LIMIT)
    (pid, task), *_ = board.wait("held")
    eventually(lambda: executor.stats().idle == 1)
    workers = {worker.pid: worker for worker in executor.workers()}
    assert len(workers) == 2 and pid in workers
    busy, idle = workers.pop(pid), next(iter(workers.values()))
    assert (busy.state, busy.task) == ("busy", task)
    assert (idle.state, idle.task) == ("idle", None)
    for worker in (busy, idle):
        assert worker.host == socket.gethostname() and worker.uptime > 0
        os.kill(worker.pid, 0)
        if sys.platform == "linux":
            assert 1 << 20 < worker.memory < 1 << 31
    assert busy.id != idle.id
    again = next(worker for worker in executor.workers() if worker.pid == pid)
    assert again.uptime > busy.uptime
    board.post("go")
    held.result(LIMIT)


def test_workers_tell_the_item_of_a_batch_that_runs(make_executor: Make, board: Any, eventually: Any) -> None:
    def work(i: int) -> int:
        task = fiberexec.current_task()
        assert task is not None
        if i == 700:
            hold(board)
        return task.id

    executor = make_executor(1)
    results = executor.map(work, range(1000))
    _, task = board.wait("held")[0]
    assert executor.workers()[0].task == task
    board.post("go")
    assert list(results)[700] == task


def test_a_starting_worker_is_seen(make_executor: Make, board: Any, eventually: Any) -> None:
    executor = make_executor(1, initializer=board.wait, initargs=("go",))
    future = executor.submit(int)
    (worker,) = executor.workers()
    assert worker.state == "starting" and worker.task is None
    assert executor.stats().started == 0 and executor.stats().queued == 1
    eventually(lambda: executor.workers()[0].pid)  # its process is there, and not ready
    assert executor.workers()[0].uptime == 0
    board.post("go")
    assert future.result(LIMIT) == 0
    assert executor.stats().started == 1


def test_after_shutdown_nobody_is_there_and_the_counts_stay(make_executor: Make) -> None:
    executor = make_executor(2)
    list(executor.map(abs, range(10)))
    executor.shutdown()
    now = executor.stats()
    assert executor.workers() == []
    assert (now.done, now.queued, now.running, now.workers, now.idle) == (10, 0, 0, 0, 0)
