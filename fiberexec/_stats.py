"""What ``FiberExecutor.stats()`` and ``workers()`` return."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fiberexec import _platform
from fiberexec._states import STARTING

if TYPE_CHECKING:
    from fiberexec._connection import Connection
    from fiberexec._manager import Manager
    from fiberexec._scheduler.records import WorkerRecord


@dataclass(frozen=True)
class Stats:
    """Counts of an executor at one moment. Tasks are counted by item: every item of a ``map()`` is one."""

    queued: int  #: tasks that wait for a worker
    running: int  #: tasks that are with a worker: executing, or next in line there
    delayed: int  #: tasks that wait for their next attempt
    done: int  #: tasks that ended in a result or in an exception of their own
    retried: int  #: attempts that were followed by another one because a retry policy said so
    lost: int  #: workers that died while they executed a task
    workers: int  #: workers that are there, starting ones included
    starting: int  #: workers of these that are not ready yet: where a cluster is full, pods that wait for room
    idle: int  #: workers that have nothing to do
    started: int  #: workers that have become ready so far
    failed_launches: int  #: workers that could not be started


@dataclass(frozen=True)
class WorkerInfo:
    """One worker at one moment."""

    id: int  #: counts from 1 in each executor
    host: str  #: where it runs
    pid: int  #: its process there, 0 while it starts
    state: str  #: "starting", "idle", "busy", "draining" or "stopping"
    task: int | None  #: the id of the task that it executes
    uptime: float  #: seconds since it became ready, 0 while it starts
    memory: int  #: resident bytes, 0 where that is not known


def stats(manager: Manager) -> Stats:
    """See FiberExecutor.stats()."""
    with manager.lock:
        scheduler = manager.scheduler
        return Stats(
            queued=scheduler.queue.items,
            running=sum(worker.items for worker in scheduler.fleet.workers.values()),
            delayed=scheduler.delayed,
            done=scheduler.done,
            retried=scheduler.retried,
            lost=scheduler.lost,
            workers=len(scheduler.fleet.workers),
            starting=sum(worker.state is STARTING for worker in scheduler.fleet.workers.values()),
            idle=len(scheduler.fleet.idle),
            started=scheduler.started,
            failed_launches=scheduler.failed_launches,
        )


def workers(manager: Manager) -> list[WorkerInfo]:
    """See FiberExecutor.workers()."""
    if not manager.backend.same_host:
        look = getattr(manager.backend, "look", None)
        if look is not None:
            look()
    with manager.lock:
        return [
            _worker_info(manager, worker, manager.switchboard.connections.get(worker.id))
            for worker in manager.scheduler.fleet.workers.values()
        ]


def _worker_info(manager: Manager, worker: WorkerRecord, connection: Connection | None) -> WorkerInfo:
    if connection is None:
        return WorkerInfo(worker.id, manager.backend.host, 0, worker.state, None, 0.0, 0)
    task = None
    cell = manager.backend.peek(worker.id)
    for unit in worker.inflight if cell is not None else ():
        assert cell is not None
        if unit.number <= cell.running < unit.number + unit.task.stop - unit.task.start:
            task = unit.task.id + unit.task.start + cell.running - unit.number
    local = connection.host == _platform.host_name()
    return WorkerInfo(
        id=worker.id,
        host=connection.host,
        pid=connection.pid,
        state=worker.state,
        task=task,
        uptime=0.0 if worker.state is STARTING else time.monotonic() - worker.since,
        memory=_platform.memory_of(connection.pid) if local else 0,
    )
