"""A backend of real processes on this machine that fails in the ways in which a cluster does.

FiberExecutor ──► FakeBackend ──► LocalBackend ──► processes
                      │ script: refusals, delays, jobs, pools
                      └ by hand: kill(), kill_job(), unreachable
"""

from __future__ import annotations

import heapq
import os
import signal
import threading
from collections.abc import Sequence
from time import monotonic

from fiberexec import _config
from fiberexec.backends.base import Cell, Ended, Exit, JobEvent, Pool, Refused, Resources, Started
from fiberexec.backends.local import LocalBackend
from fiberexec.testing._script import Launch, Refusal

_ASK_AGAIN = 0.02  # seconds between two polls while the backend cannot be reached


class FakeBackend:
    """A backend for tests: ``FiberExecutor(backend=FakeBackend(...))``.

    - ``max_workers``: workers at most, and what the executor takes if it is given no number.
    - ``launch(n)``: what the n-th launch comes to, counted from 1: seconds until the process is started, or a ``Refusal``.
      By default every process is started at once.
    - ``workers_per_job``: so many workers, in the order of their launches, share a job and its pool; 0: all of them.
    - ``capacity``, ``devices``: what a pool has; by default all the CPUs and the memory of this machine, and a device a name.
    - ``latency``: seconds until the executor hears of what happened.

    Setting ``unreachable`` to true keeps everything that happens from the executor until it is false again, as an API that
    does not answer does. ``pids`` and ``jobs`` say by worker which process it is and where it runs; a worker's number is
    that of its launch. All of this may be used by any thread.
    """

    name = "fake"
    host = "fake-host"
    same_host = True

    def __init__(
        self,
        max_workers: int = 2,
        *,
        launch: Launch | None = None,
        workers_per_job: int = 1,
        capacity: Resources | None = None,
        devices: tuple[str, ...] = (),
        latency: float = 0.0,
        idle_timeout: float | None = None,
    ) -> None:
        self._inner = LocalBackend(_config.load(), max_workers)
        has = self._inner.largest.capacity
        self._capacity = capacity or Resources(has.cpu, has.memory, len(devices))
        if self._capacity.gpu != len(devices):
            raise ValueError(f"capacity has gpu={self._capacity.gpu}, devices names {len(devices)}")
        self._devices = devices
        self.largest = self._pool("fake-0")
        self.default_workers = max_workers
        self.idle_timeout = idle_timeout
        self.unreachable = False
        self.latency = latency
        self.pids: dict[int, int] = {}
        self.jobs: dict[int, str] = {}
        self._launch = launch or (lambda n: 0.0)
        self._workers_per_job = workers_per_job
        self._launched = 0
        self._lock = threading.Lock()  # guards _fates
        self._fates: dict[int, tuple[Exit | None, bool]] = {}  # of workers that were killed: exit, whether its cell is lost
        self._waiting: list[tuple[float, int]] = []  # launches that are delayed: when, worker
        self._news: list[tuple[float, int, JobEvent]] = []  # when the executor hears of it, order, what
        self._order = 0

    # -- faults by hand

    def kill(self, worker: int, exit: Exit | None = None, *, lose_cell: bool = False) -> None:
        """Kill a worker's process group.

        ``exit``: what is reported instead of what the kernel says, for example ``Exit(None, "node drained",
        infrastructure=True)``. ``lose_cell``: nobody knows what it was executing. KeyError for a worker that never started.
        """
        pid = self.pids[worker]
        with self._lock:
            self._fates[worker] = exit, lose_cell
        for kill in (os.killpg, os.kill):  # a process that has just been forked does not lead its group yet
            try:
                kill(pid, signal.SIGKILL)
                return
            except ProcessLookupError:
                pass

    def kill_job(self, job: str, exit: Exit | None = None) -> None:
        """Kill all workers of a job, and their cells with them."""
        for worker, where in list(self.jobs.items()):
            if where == job:
                self.kill(worker, exit, lose_cell=True)

    # -- the contract, see backends.base

    def launch(self, workers: Sequence[int]) -> None:
        now = []
        for worker in workers:
            self._launched += 1
            comes_to = self._launch(self._launched)
            if isinstance(comes_to, Refusal):
                self._tell(Refused(worker, comes_to.error, final=comes_to.again is None))
            elif comes_to > 0:
                heapq.heappush(self._waiting, (monotonic() + comes_to, worker))
            else:
                now.append(worker)
            job = (self._launched - 1) // self._workers_per_job if self._workers_per_job else 0
            self.jobs[worker] = f"fake-{job}"
        self._inner.launch(now)

    def signal(self, worker: int, number: int, group: bool) -> None:
        delayed = [entry for entry in self._waiting if entry[1] == worker]
        if delayed and number == signal.SIGKILL:
            self._waiting.remove(delayed[0])
            heapq.heapify(self._waiting)
            self._tell(Refused(worker, RuntimeError("the launch was given up")))
        self._inner.signal(worker, number, group)

    def probe(self, worker: int) -> None:
        self._inner.probe(worker)

    def recall(self, worker: int, number: int) -> None:
        self._inner.recall(worker, number)

    def peek(self, worker: int) -> Cell | None:
        return self._inner.peek(worker)

    def wakeup(self) -> float | None:
        inner = self._inner.wakeup()
        due = [] if inner is None else [inner]
        if self._waiting:
            due.append(self._waiting[0][0])
        if self.unreachable:
            due.append(monotonic() + _ASK_AGAIN)
        elif self._news:
            due.append(self._news[0][0])
        return min(due, default=None)

    def fds(self) -> Sequence[int]:
        return self._inner.fds()

    def poll(self) -> list[JobEvent]:
        now = monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            self._inner.launch([heapq.heappop(self._waiting)[1]])
        for event in self._inner.poll():
            self._tell(self._as_scripted(event))
        news: list[JobEvent] = []
        while not self.unreachable and self._news and self._news[0][0] <= now:
            news.append(heapq.heappop(self._news)[2])
        return news

    def close(self) -> None:
        self._inner.close()
        self._waiting.clear()
        for _, _, event in self._news:
            if isinstance(event, Started):
                event.connection.close()  # nobody will hear of it
        self._news.clear()

    def forked(self) -> None:
        self._inner.forked()

    # -- inside

    def _pool(self, name: str) -> Pool:
        return Pool(name, self._capacity, self._devices)

    def _tell(self, event: JobEvent) -> None:
        self._order += 1
        heapq.heappush(self._news, (monotonic() + self.latency if self.latency else 0.0, self._order, event))

    def _as_scripted(self, event: JobEvent) -> JobEvent:
        if isinstance(event, Started):
            job = self.jobs[event.worker]
            self.pids[event.worker] = event.pid
            return event._replace(host=self.host, pool=self._pool(job), job=job)
        if isinstance(event, Ended):
            with self._lock:
                exit, lost = self._fates.pop(event.worker, (None, False))
            return Ended(event.worker, exit or event.exit, None if lost else event.running)
        return event
