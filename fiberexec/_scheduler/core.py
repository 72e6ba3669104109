"""The scheduler: one method an event, then progress; see the package's description."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fiberexec._scheduler import events as ev
from fiberexec._scheduler.agenda import Agenda
from fiberexec._scheduler.assign import assign
from fiberexec._scheduler.blame import charge, runs_once, sort_out
from fiberexec._scheduler.crew import Crew
from fiberexec._scheduler.fleet import Fleet
from fiberexec._scheduler.hands import split_off, take_back
from fiberexec._scheduler.queue import Queue
from fiberexec._scheduler.records import Limits, Task, WorkerRecord
from fiberexec._scheduler.watch import Watch
from fiberexec._states import BUSY, DELAYED, DONE, DRAINING, IDLE, JUDGING, QUEUED, SENT, STARTING, STOPPING
from fiberexec.backends.base import Exit

_FADE = 0.9  # what a reply leaves of a worker's patience
_RISE, _DROP = 0.3, 0.25  # how a measured cost follows: slowly, but at once when it falls to a quarter


class Scheduler:
    """``handle(event, now)`` changes the state and returns what to do; ``wakeup()`` says when a Tick is due."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.queue = Queue()
        self.fleet = Fleet()
        self.open = 0  # items that have no outcome yet
        self.done = self.retried = self.lost = self.freed = 0
        self.closing = False
        self.broken: BaseException | None = None
        self.delayed = 0
        self._agenda = Agenda()
        self._crew = Crew(limits, self._agenda, self.fleet, lambda error: self._break(ev.Broken(error)))
        self._watch = Watch(limits, self._agenda, self.fleet)
        self._handlers: dict[type, Callable[[Any], None]] = {
            ev.Submitted: self._submitted,
            ev.Cancelled: self._cancelled,
            ev.Terminated: self._terminated,
            ev.WorkerStarted: self._worker_started,
            ev.WorkerReady: self._crew.ready,
            ev.WorkerRefused: self._crew.refused,
            ev.WorkerLeaving: self._worker_leaving,
            ev.WorkerEnded: self._worker_ended,
            ev.Replied: self._replied,
            ev.Probed: self._probed,
            ev.RecallDone: self._recall_done,
            ev.Judged: self._judged,
            ev.Tick: lambda event: None,
            ev.Closing: self._closing,
            ev.Broken: self._break,
        }

    def handle(self, event: Any, now: float) -> list[Any]:
        """Take one event in; the actions are to be done in their order."""
        agenda = self._agenda
        agenda.now = now
        actions = agenda.actions = []
        self._handlers[type(event)](event)
        agenda.run_due()
        if self.broken is None:
            self._progress(top_up=type(event) is not ev.Submitted or event.tasks[0].stop - event.tasks[0].start > 1)
        return actions

    def wakeup(self) -> float | None:
        """When the next Tick is due at the latest; None: when something happens."""
        due, other = self.queue.next_due(), self._agenda.next_due()
        return due if other is None or (due is not None and due < other) else other

    @property
    def finished(self) -> bool:
        """Nothing is open, nobody is there, and nothing will come."""
        return self.closing and not self.open and not self.fleet.workers

    @property
    def started(self) -> int:
        """Workers that have become ready."""
        return self._crew.started

    @property
    def failed_launches(self) -> int:
        """Workers that could not be started."""
        return self._crew.failed_launches

    # -- after every event

    def _progress(self, top_up: bool) -> None:
        queue, workers = self.queue, self.fleet.workers
        most = self.limits.max_workers
        if not top_up and not self.fleet.idle and len(workers) >= most:
            return  # a new task, and nobody who could take it
        for task in queue.pop_due(self._agenda.now):
            if task.state is DELAYED:
                task.step("due")
                self.delayed -= 1
                queue.push(task)
        if queue.items:
            sends = assign(queue, self.fleet, self.limits, top_up)
            if sends:
                self._agenda.actions += sends
                self._watch.follow(sends)
        least = 0 if self.closing else self.limits.min_workers
        if (queue.items and len(workers) < most) or len(workers) < least:
            self._crew.fill(queue.items, least)
        if queue.items:
            self._make_room()
        if self.closing and not self.open:
            for worker in list(workers.values()):
                if worker.state in (IDLE, STARTING):
                    self._crew.retire(worker)

    def _make_room(self) -> None:
        """Retire a worker whose process is bound to GPUs that are not the ones that are free. One at a time."""
        for lane in self.queue.lanes():
            if lane.demand is not None and lane.demand.gpu:
                worker = self.fleet.bound_elsewhere(lane.demand)
                if worker is not None and all(w.state in (IDLE, BUSY) for w in self.fleet.workers.values()):
                    self._crew.retire(worker)

    # -- tasks

    def _submitted(self, event: ev.Submitted) -> None:
        self.open += self.queue.extend(event.tasks)

    def _cancelled(self, event: ev.Cancelled) -> None:
        for task in event.tasks:
            if task.state is QUEUED:
                self.queue.items -= task.count
            elif task.state is DELAYED:
                self.delayed -= 1
            else:
                continue
            self.open -= task.count
            task.step("cancel")

    def _terminated(self, event: ev.Terminated) -> None:
        task = event.task
        if task.state in (QUEUED, DELAYED):
            self._cancelled(ev.Cancelled([task]))
            self._agenda.actions.append(ev.Fail(task, ev.CANCELLED))
        elif task.state is JUDGING:
            task.doom = ev.CANCELLED
        elif task.state is SENT and task.worker is not None:
            task.doom = ev.CANCELLED
            worker = self.fleet.workers[task.worker]
            if worker.items > 1:
                self._watch.recall(worker)  # RecallDone tells whether it has to be stopped
            else:
                self._crew.stop(worker)

    def _judged(self, event: ev.Judged) -> None:
        task, delay, error = event
        if task.state is not JUDGING:
            return
        if task.doom is not None:
            self._fail(task, "break", task.doom)
        elif delay is not None and self.broken is not None:
            self._fail(task, "break", ev.BROKEN)
        elif delay is None:
            task.step("settle")
            self.open -= 1
            self.done += 1
        else:
            task.step("retry")
            task.attempt += 1
            task.error = error
            task.worker = None
            self.retried += 1
            self.delayed += 1
            self.queue.delay(task, self._agenda.now + delay)

    def _fail(self, task: Task, step: str, why: str, worker: int | None = None, exit: Exit | None = None) -> None:
        self._agenda.actions.append(ev.Fail(task, why, worker, exit))
        self.open -= task.count
        task.step(step)

    def _end_doomed(self, task: Task) -> None:
        """The attempt that was being stopped has ended."""
        if task.doom is ev.TIMEOUT and task.profile.retry is not None:
            task.doom = None
            task.step("judge")
            self._agenda.actions.append(ev.Judge(task, None))
        else:
            assert task.doom is not None
            self._fail(task, "fail", task.doom)

    def _requeue(self, tasks: list[Task], step: str) -> None:
        for task in reversed(tasks):
            if task.doom is not None:
                self._end_doomed(task)
                continue
            task.step(step)
            task.worker = None
            self.queue.push_front(task)

    # -- replies

    def _replied(self, event: ev.Replied) -> None:
        worker = self.fleet.workers.get(event.worker)
        if worker is None:
            return
        worker.heard = self._agenda.now
        if worker.patience and any(outcome is not None for _, _, outcome, _ in event.records):
            worker.patience *= _FADE
        inflight = worker.inflight
        actions = self._agenda.actions
        for number, count, outcome, seconds in event.records:
            if not inflight or number != inflight[0].number:
                continue  # it was taken back, or accepted before
            unit = inflight[0]
            task = unit.task
            size = task.stop - task.start
            if count >= size:
                inflight.popleft()
                worker.backlog -= unit.estimate
                count = size
            else:
                task = split_off(worker, unit, count)
            worker.items -= count
            if outcome is None:
                self._requeue([task], "free")
                continue
            profile = task.profile
            if seconds:
                cost = seconds / count
                known = profile.cost
                profile.cost = cost if known is None or cost < known * _DROP else known + _RISE * (cost - known)
            if task.doom is not None:
                self._end_doomed(task)
            elif profile.retry is not None:
                task.step("judge")
                actions.append(ev.Judge(task, outcome))
            else:
                task.state = DONE  # "settle" of the table; too hot a path to look it up
                task.payload = task.error = None
                self.open -= count
                self.done += count
                actions.append(ev.Settle(task, outcome))
        if not inflight:
            self._has_finished(worker)
        elif (
            worker.backlog * 2 < self.limits.ahead
            and worker.state is BUSY
            and not worker.solo
            and not worker.recalling
            and worker.quota != 0
        ):
            self.fleet.hungry[worker.id] = worker

    def _has_finished(self, worker: WorkerRecord) -> None:
        if worker.recalling:
            return  # RecallDone comes here again
        self.fleet.release(worker)
        worker.backlog = 0.0
        if worker.state is BUSY:
            worker.state = IDLE
            worker.idle_since = self._agenda.now
            if worker.quota == 0:
                self._crew.retire(worker)
            else:
                self.fleet.idle[worker.id] = worker

    def _recall_done(self, event: ev.RecallDone) -> None:
        worker = self.fleet.workers.get(event.worker)
        if worker is None or not worker.recalling:
            return
        worker.recalling = False
        if event.claimed < worker.recalled_from:
            # Not the work is slow but the way to it: what is sent again as late as this would never be begun.
            worker.patience = 2 * worker.patience + self.limits.stall
        before = worker.items
        taken = take_back(worker, event.claimed)
        moved = before - worker.items
        if worker.quota is not None:
            worker.quota += moved
        self.freed += moved
        worker.solo = True  # it is slower than was thought: nothing more until it has finished
        self._requeue(taken, "free")
        if not worker.inflight:
            self._has_finished(worker)
        elif any(unit.task.doom is not None for unit in worker.inflight):
            self._watch.probe(worker)

    def _probed(self, event: ev.Probed) -> None:
        worker = self.fleet.workers.get(event.worker)
        if worker is not None and worker.state in (BUSY, DRAINING) and self._watch.judge(worker, event.running, event.seconds):
            self._crew.stop(worker)

    # -- workers

    def _worker_started(self, event: ev.WorkerStarted) -> None:
        worker = self.fleet.workers.get(event.worker)
        if worker is not None and worker.pool is None:
            self.fleet.place(worker, event.job, event.pool)

    def _worker_leaving(self, event: ev.WorkerLeaving) -> None:
        worker = self.fleet.workers.get(event.worker)
        if worker is None:
            return
        if worker.state is BUSY:
            if worker.items > 1:
                self._watch.recall(worker)  # what it has not begun goes elsewhere
            self._crew.leave(worker)
        elif worker.state in (IDLE, STARTING):
            self._crew.retire(worker)

    def _worker_ended(self, event: ev.WorkerEnded) -> None:
        worker = self.fleet.workers.get(event.worker)
        if worker is None:
            return
        by_itself = self.fleet.is_by_itself(worker)
        self.fleet.remove(worker)
        before = worker.state
        worker.step("end")
        verdict = sort_out(worker, event.running, event.exit, by_itself)
        for task in verdict.suspects:
            task.alone = True
        if before is STOPPING:
            self._requeue([*verdict.charged, *verdict.suspects, *verdict.free], "free")
            return
        if before is STARTING:
            self._crew.ended_early(worker, event.exit)
        again = []
        for task in verdict.charged or verdict.suspects:  # never both
            if task.doom is not None:
                over = False
            elif verdict.charged:
                over = charge(task, verdict.executed, event.exit, self.limits)
            else:
                over = runs_once(task)
            if over:
                self._fail(task, "fail", ev.LOST, worker.id, event.exit)
            else:
                again.append(task)
        if verdict.suspects or (verdict.charged and verdict.executed):
            self.lost += 1
        self._requeue([*again, *verdict.free], "lose")

    # -- the end

    def _closing(self, event: ev.Closing) -> None:
        self.closing = True

    def _break(self, event: ev.Broken) -> None:
        if self.broken is not None:
            return
        self.broken = event.error
        self.closing = True
        for task in self.queue.waiting():
            if task.state is not DONE:
                self._fail(task, "break", ev.BROKEN)
        self.queue = Queue()
        self.delayed = 0
        for worker in self.fleet.workers.values():
            for unit in worker.inflight:
                self._fail(unit.task, "break", ev.BROKEN)
            worker.inflight.clear()
            worker.items = 0
        self._crew.end_all(event.kill)
