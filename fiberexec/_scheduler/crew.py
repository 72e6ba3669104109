"""Who works: launches, starts that fail, workers that are idle, and workers that have to go."""

from __future__ import annotations

import signal
from collections.abc import Callable

from fiberexec._scheduler import events as ev
from fiberexec._scheduler.agenda import Agenda
from fiberexec._scheduler.fleet import Fleet
from fiberexec._scheduler.records import Limits, WorkerRecord
from fiberexec._states import BUSY, IDLE, STARTING, STOPPING
from fiberexec.backends.base import Exit

_PAUSE = 10.0  # seconds without launches after a final failure, where other workers go on
_SOON = 0.01  # seconds: a worker that is idle for less has not been asked yet
_AGAIN = 0.05  # seconds until the next launch when a worker died before it was ready


class Crew:
    """``give_up(error)`` is called when no worker is there, and none can be had."""

    def __init__(self, limits: Limits, agenda: Agenda, fleet: Fleet, give_up: Callable[[BaseException], None]) -> None:
        self._limits = limits
        self._agenda = agenda
        self._fleet = fleet
        self._give_up = give_up
        idle = limits.idle_timeout
        self._idle_timeout = None if idle is None else max(idle, _SOON)
        self._next_id = 1
        self._launch_at = 0.0  # not before
        self._failed_starts = 0  # in a row
        self._failed_at = -1.0  # when the last one failed
        self._watching_starts = False
        self.starting = 0
        self.started = 0
        self.failed_launches = 0

    # -- up

    def fill(self, waiting: int, least: int) -> None:
        """Launch workers for ``waiting`` items that no worker can take now, and ``least`` in all."""
        if self._agenda.now < self._launch_at:
            return
        have = len(self._fleet.workers)
        count = min(self._limits.max_workers, max(have - self.starting + waiting, least)) - have
        if count <= 0:
            return
        launched = []
        for _ in range(count):
            worker = WorkerRecord(self._next_id, self._agenda.now, self._limits.max_tasks_per_child)
            self._next_id += 1
            self._fleet.workers[worker.id] = worker
            launched.append(worker.id)
        self.starting += count
        self._agenda.actions.append(ev.Launch(launched))
        if not self._watching_starts:
            self._watching_starts = True
            self._agenda.at(self._agenda.now + self._limits.startup_timeout, self._check_starts)

    def ready(self, event: ev.WorkerReady) -> None:
        worker = self._fleet.workers.get(event.worker)
        if worker is None or worker.state is not STARTING:
            return
        if event.error is not None:
            self._give_up(event.error)
            return
        now = self._agenda.now
        self.starting -= 1
        self.started += 1
        self._failed_starts = 0
        worker.step("ready")
        worker.since = worker.idle_since = now
        self._fleet.idle[worker.id] = worker
        if self._idle_timeout is not None:
            self._agenda.at(now + self._idle_timeout, self._check_idle, worker.id)

    def refused(self, event: ev.WorkerRefused) -> None:
        worker = self._fleet.workers.get(event.worker)
        if worker is None:
            return
        self._fleet.remove(worker)
        if worker.state is STARTING:
            self.starting -= 1
            self._launch_failed(event.error, event.delay)

    def ended_early(self, worker: WorkerRecord, exit: Exit) -> None:
        """A worker has ended before it was ready. Those that were launched together count as one failure."""
        self.starting -= 1
        if worker.since > self._failed_at:
            self._failed_starts += 1
            self._failed_at = self._agenda.now
        final = self._failed_starts >= self._limits.max_failed_starts
        why = exit.reason or f"exit code {exit.code}"
        text = f"a worker ended before it was ready ({why}); its last words: {exit.log.strip() or 'none'}"
        self._launch_failed(RuntimeError(text), None if final else _AGAIN)

    def _check_starts(self, _: object) -> None:
        """Give up workers that are not ready in time."""
        timeout = self._limits.startup_timeout
        text = f"a worker was not ready after startup_timeout={timeout:g} s"
        self._watching_starts = False
        for worker in list(self._fleet.workers.values()):
            if worker.state is not STARTING:
                continue
            due = worker.since + timeout
            if due <= self._agenda.now:
                self.starting -= 1
                worker.step("stop")
                self.kill(worker.id)
                self._launch_failed(TimeoutError(text), None)
            elif not self._watching_starts:  # they are in the order of their launch
                self._watching_starts = True
                self._agenda.at(due, self._check_starts)

    def _launch_failed(self, error: BaseException, delay: float | None) -> None:
        self.failed_launches += 1
        if delay is None and not any(worker.state in (IDLE, BUSY) for worker in self._fleet.workers.values()):
            self._give_up(error)
            return
        if self._agenda.now >= self._launch_at:  # not for each of those that fail together
            self._agenda.actions.append(ev.Warn(f"a worker could not be started: {error}"))
        self._launch_at = self._agenda.now + (_PAUSE if delay is None else delay)
        self._agenda.at(self._launch_at, lambda _: None)

    # -- down

    def _check_idle(self, worker_id: int) -> None:
        worker = self._fleet.workers.get(worker_id)
        timeout = self._idle_timeout
        if worker is None or timeout is None or worker.state not in (IDLE, BUSY):
            return
        now = self._agenda.now
        due = (worker.idle_since if worker.state is IDLE else now) + timeout
        if due > now:
            self._agenda.at(due, self._check_idle, worker_id)
        elif sum(w.state in (STARTING, IDLE, BUSY) for w in self._fleet.workers.values()) <= self._limits.min_workers:
            self._agenda.at(now + timeout, self._check_idle, worker_id)
        else:
            self.retire(worker)

    def retire(self, worker: WorkerRecord) -> None:
        """Let a worker go that has nothing to do; one that hangs on its way out is killed."""
        self._fleet.idle.pop(worker.id, None)
        if worker.state is STARTING:
            self.starting -= 1
            worker.step("stop")
            self.kill(worker.id)
        else:
            worker.step("drain")
            self._agenda.actions.append(ev.Drain(worker.id))
            self._agenda.at(self._agenda.now + 2 * self._limits.grace, self.kill, worker.id)

    def leave(self, worker: WorkerRecord) -> None:
        """Let a busy worker finish what it has begun, and go."""
        self._fleet.hungry.pop(worker.id, None)
        worker.step("drain")
        self._agenda.actions.append(ev.Drain(worker.id))

    def stop(self, worker: WorkerRecord) -> None:
        """SIGTERM now, SIGKILL after the grace."""
        if worker.state is not STOPPING:
            worker.step("stop")
            self._fleet.hungry.pop(worker.id, None)
            self._terminate(worker, False)

    def end_all(self, kill: bool) -> None:
        """Stop every worker, at once or after the grace."""
        for worker in self._fleet.workers.values():
            if worker.state is STARTING:
                self.starting -= 1
            worker.step("stop")
            if kill:
                self.kill(worker.id)
            else:
                self._terminate(worker, True)
        self._fleet.idle.clear()
        self._fleet.hungry.clear()

    def kill(self, worker_id: int) -> None:
        if worker_id in self._fleet.workers:
            self._agenda.actions.append(ev.Signal(worker_id, signal.SIGKILL, True))

    def _terminate(self, worker: WorkerRecord, group: bool) -> None:
        self._agenda.actions.append(ev.Signal(worker.id, signal.SIGTERM, group))
        self._agenda.at(self._agenda.now + self._limits.grace, self.kill, worker.id)
