"""What ``FiberExecutor.stats()`` and ``workers()`` return."""

from __future__ import annotations

from dataclasses import dataclass


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
    uptime: float  #: seconds since it became ready
    memory: int  #: resident bytes, 0 where that is not known
