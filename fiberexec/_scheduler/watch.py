"""What guards the tasks at the workers: time limits, recalls from workers that are slower than was thought."""

from __future__ import annotations

from math import inf

from fiberexec._scheduler import events as ev
from fiberexec._scheduler.agenda import Agenda
from fiberexec._scheduler.fleet import Fleet
from fiberexec._scheduler.hands import isolate, unit_of
from fiberexec._scheduler.records import Limits, WorkerRecord
from fiberexec._states import BUSY, DRAINING

_RECALLS = 4  # at once, more than there are idle workers: many silent workers mean that it is us who are late
_SOON = 0.001  # seconds between two looks at a worker that is about to reach what is to be stopped


class Watch:
    """Nothing new is sent to a worker while a recall is under way: its answer is about all that the worker has."""

    def __init__(self, limits: Limits, agenda: Agenda, fleet: Fleet) -> None:
        self._limits = limits
        self._agenda = agenda
        self._workers = fleet.workers
        self._hungry = fleet.hungry
        self._idle = fleet.idle
        self._stall_armed = False

    def follow(self, sends: list[ev.Send]) -> None:
        """Guard the tasks that have just been sent."""
        now = self._agenda.now
        for worker_id, units, _ in sends:
            worker = self._workers[worker_id]
            if len(worker.inflight) == len(units):
                worker.heard = now
            limits = [task.profile.timeout for _, task, _, _ in units if task.profile.timeout is not None]
            if limits:
                self._look_at(worker, now + min(limits))
            if worker.items > 1 and not self._stall_armed:
                self._stall_armed = True
                self._agenda.at(now + self._limits.stall, self._check_stall)

    def recall(self, worker: WorkerRecord) -> None:
        """Take back what a worker has not claimed; RecallDone says what that is."""
        if not worker.recalling:
            worker.recalling = True
            worker.recalled_from = worker.inflight[0].number
            self._hungry.pop(worker.id, None)
            self._agenda.actions.append(ev.Recall(worker.id, worker.next_number - 1))

    def probe(self, worker: WorkerRecord) -> None:
        self._agenda.actions.append(ev.Probe(worker.id))

    def judge(self, worker: WorkerRecord, running: int, seconds: float) -> bool:
        """Whether a worker has to be stopped now, by what its cell says; if not, look again when it may have to be."""
        unit = unit_of(worker, running)
        if unit is not None and unit.task.doom is not None:
            return True
        limits = [u.task.profile.timeout for u in worker.inflight if u.task.profile.timeout is not None]
        rest = min(limits, default=inf)
        if unit is not None and unit.task.profile.timeout is not None:
            rest = unit.task.profile.timeout - seconds
            if rest <= 0:
                isolate(worker, unit, running).doom = ev.TIMEOUT
                return True
        if any(u.task.doom is not None for u in worker.inflight):
            rest = _SOON
        if rest is not inf:
            self._look_at(worker, self._agenda.now + max(rest, _SOON))
        return False

    def _look_at(self, worker: WorkerRecord, due: float) -> None:
        if due < worker.look_at:
            worker.look_at = due
            self._agenda.at(due, self._look, worker.id)

    def _look(self, worker_id: int) -> None:
        worker = self._workers.get(worker_id)
        if worker is None or worker.look_at > self._agenda.now:
            return  # it has gone, or another look has come in between
        worker.look_at = inf
        if worker.state in (BUSY, DRAINING) and any(
            unit.task.profile.timeout is not None or unit.task.doom is not None for unit in worker.inflight
        ):
            self.probe(worker)

    def _check_stall(self, _: object) -> None:
        """Recall what waits behind a task that takes longer than was thought; look again while anything waits."""
        self._stall_armed = False
        oldest = self._agenda.now - self._limits.stall
        most = _RECALLS + len(self._idle)
        for worker in self._workers.values():
            if worker.items > 1 and worker.state is BUSY:
                self._stall_armed = True
                if worker.heard + worker.backlog + worker.patience <= oldest and not worker.recalling and most:
                    most -= 1
                    self.recall(worker)
        if self._stall_armed:
            self._agenda.at(self._agenda.now + self._limits.stall, self._check_stall)
