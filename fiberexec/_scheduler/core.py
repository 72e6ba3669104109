"""The scheduler: one method an event, then progress; see the package's description."""

from __future__ import annotations

import heapq
import signal
from collections.abc import Callable
from typing import Any

from fiberexec._scheduler import events as ev
from fiberexec._scheduler.assign import assign
from fiberexec._scheduler.blame import sort_out
from fiberexec._scheduler.fleet import Fleet
from fiberexec._scheduler.queue import Queue
from fiberexec._scheduler.records import Limits, Task, Unit, WorkerRecord
from fiberexec._states import BUSY, DELAYED, DONE, DRAINING, IDLE, JUDGING, QUEUED, SENT, STARTING, STOPPING
from fiberexec.backends.base import Exit

_RISE, _DROP = 0.3, 0.25  # how a measured cost follows: slowly, but at once when it falls to a quarter


class Scheduler:
    """``handle(event, now)`` changes the state and returns what to do; ``wakeup()`` says when to come back with a Tick."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.queue = Queue()
        self.fleet = Fleet()
        self.open = 0  # items that have no outcome yet
        self.started = self.done = self.retried = self.lost = self.freed = self.failed_launches = 0
        self.closing = False
        self.broken: BaseException | None = None
        self.delayed = 0
        self._starting = 0
        self._failed_starts = 0
        self._launch_at = 0.0  # not before
        self._next_worker = 1
        self._timers: list[tuple[float, int, Callable[..., None], Any]] = []
        self._order = 0
        self._stall_armed = False
        self._now = 0.0
        self._actions: list[Any] = []
        self._handlers: dict[type, Callable[[Any], None]] = {
            ev.Submitted: self._submitted,
            ev.Cancelled: self._cancelled,
            ev.Terminated: self._terminated,
            ev.WorkerStarted: self._worker_started,
            ev.WorkerReady: self._worker_ready,
            ev.WorkerRefused: self._worker_refused,
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
        self._now = now
        actions = self._actions = []
        self._handlers[type(event)](event)
        while self._timers and self._timers[0][0] <= now:
            _, _, method, argument = heapq.heappop(self._timers)
            method(argument)
        if self.broken is None:
            self._progress(top_up=type(event) is not ev.Submitted)
        return actions

    def wakeup(self) -> float | None:
        """When the next Tick is due at the latest; None: when something happens."""
        due = self.queue.next_due()
        if self._timers and (due is None or self._timers[0][0] < due):
            due = self._timers[0][0]
        return due

    @property
    def finished(self) -> bool:
        """Nothing is open, nobody is there, and nothing will come."""
        return self.closing and not self.open and not self.fleet.workers

    # -- after every event

    def _progress(self, top_up: bool) -> None:
        if not top_up and not self.fleet.idle and len(self.fleet.workers) >= self.limits.max_workers:
            return  # a new task, and nobody who could take it
        for task in self.queue.pop_due(self._now):
            if task.state is DELAYED:
                task.step("due")
                self.delayed -= 1
                self.queue.push(task)
        if self.queue.items:
            sends = assign(self.queue, self.fleet, self.limits, top_up)
            if sends:
                self._actions += sends
                self._watch(sends)
            if self.queue.items:
                self._make_room()
        if (self.queue.items and len(self.fleet.workers) < self.limits.max_workers) or (
            len(self.fleet.workers) < self.limits.min_workers and not self.closing
        ):
            self._scale_up()
        if self.closing and not self.open:
            for worker in list(self.fleet.workers.values()):
                if worker.state in (IDLE, STARTING):
                    self._retire(worker)

    def _timer(self, due: float, method: Callable[..., None], argument: Any = None) -> None:
        self._order += 1
        heapq.heappush(self._timers, (due, self._order, method, argument))

    def _watch(self, sends: list[ev.Send]) -> None:
        """Arm what guards the tasks that have just been sent: time limits, and recalls from a stalled worker."""
        workers = self.fleet.workers
        for worker_id, units, _ in sends:
            worker = workers[worker_id]
            if len(worker.inflight) == len(units):
                worker.heard = self._now
            if not worker.timed:
                limits = [task.profile.timeout for _, task, _, _ in units if task.profile.timeout is not None]
                if limits:
                    worker.timed = True
                    self._timer(self._now + min(limits), self._check_limit, worker_id)
            if worker.items > 1 and not self._stall_armed:
                self._stall_armed = True
                self._timer(self._now + self.limits.stall, self._check_stall)

    # -- tasks

    def _submitted(self, event: ev.Submitted) -> None:
        push = self.queue.push
        for task in event.tasks:
            push(task)
            self.open += task.stop - task.start

    def _cancelled(self, event: ev.Cancelled) -> None:
        for task in event.tasks:
            if task.state is QUEUED:
                self.queue.items -= task.stop - task.start
            elif task.state is DELAYED:
                self.delayed -= 1
            else:
                continue
            self.open -= task.stop - task.start
            task.step("cancel")

    def _terminated(self, event: ev.Terminated) -> None:
        task = event.task
        if task.state in (QUEUED, DELAYED):
            self._cancelled(ev.Cancelled([task]))
            self._actions.append(ev.Fail(task, ev.CANCELLED))
        elif task.state is JUDGING:
            task.doom = ev.CANCELLED
        elif task.state is SENT and task.worker is not None:
            task.doom = ev.CANCELLED
            worker = self.fleet.workers[task.worker]
            if worker.items > 1:
                self._recall(worker)  # RecallDone decides whether it has to be stopped
            else:
                self._stop(worker)

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
            self.queue.delay(task, self._now + delay)

    def _fail(self, task: Task, step: str, why: str, worker: int | None = None, exit: Exit | None = None) -> None:
        self._actions.append(ev.Fail(task, why, worker, exit))
        self.open -= task.stop - task.start
        task.step(step)

    def _end_doomed(self, task: Task) -> None:
        """The attempt that was being stopped has ended."""
        if task.doom is ev.TIMEOUT and task.profile.retry is not None:
            task.doom = None
            task.step("judge")
            self._actions.append(ev.Judge(task, None))
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
        worker.heard = self._now
        inflight = worker.inflight
        actions = self._actions
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
                task = _split_unit(worker, unit, count)
            worker.items -= count
            profile = task.profile
            if outcome is None:
                self._requeue([task], "free")
                continue
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
        elif not worker.solo and worker.state is BUSY and worker.backlog * 2 < self.limits.ahead and worker.quota != 0:
            self.fleet.hungry[worker.id] = worker

    def _has_finished(self, worker: WorkerRecord) -> None:
        worker.backlog = 0.0
        if worker.state is not BUSY:
            if worker.state is STOPPING or worker.state is DRAINING:
                self.fleet.release(worker)
            return
        self.fleet.release(worker)
        worker.state = IDLE
        worker.idle_since = self._now
        if worker.quota == 0:
            self._retire(worker)
            return
        self.fleet.idle[worker.id] = worker

    # -- time limits, recalls

    def _check_limit(self, worker_id: int) -> None:
        worker = self.fleet.workers.get(worker_id)
        if worker is not None:
            worker.timed = False
            if worker.state is BUSY and any(u.task.profile.timeout is not None for u in worker.inflight):
                worker.timed = True
                self._actions.append(ev.Probe(worker_id))

    def _probed(self, event: ev.Probed) -> None:
        worker = self.fleet.workers.get(event.worker)
        if worker is None or worker.state is not BUSY:
            return
        worker.timed = False
        limits = [unit.task.profile.timeout for unit in worker.inflight if unit.task.profile.timeout is not None]
        if not limits:
            return
        rest = min(limits)
        unit = _unit_of(worker, event.running)
        if unit is not None and unit.task.profile.timeout is not None:
            rest = unit.task.profile.timeout - event.seconds
            if rest <= 0:
                _isolate(worker, unit, event.running).doom = ev.TIMEOUT
                self._stop(worker)
                return
        worker.timed = True
        self._timer(self._now + max(rest, 0.001), self._check_limit, worker.id)

    def _check_stall(self, _: object) -> None:
        """Recall what waits behind a task that takes longer than was thought; look again while anything waits."""
        self._stall_armed = False
        oldest = self._now - self.limits.stall
        for worker in self.fleet.workers.values():
            if worker.items > 1 and worker.state is BUSY:
                self._stall_armed = True
                if worker.heard <= oldest and not worker.recalling:
                    self._recall(worker)
        if self._stall_armed:
            self._timer(self._now + self.limits.stall, self._check_stall)

    def _recall(self, worker: WorkerRecord) -> None:
        worker.recalling = worker.next_number - 1
        self.fleet.hungry.pop(worker.id, None)
        self._actions.append(ev.Recall(worker.id, worker.recalling))

    def _recall_done(self, event: ev.RecallDone) -> None:
        worker = self.fleet.workers.get(event.worker)
        if worker is None or not worker.recalling:
            return
        number, worker.recalling = worker.recalling, 0
        taken: list[Task] = []
        while worker.inflight:
            unit = worker.inflight[-1]
            last = unit.number + unit.task.stop - unit.task.start - 1
            if last <= event.claimed or unit.number > number:
                break
            worker.inflight.pop()
            if unit.number <= event.claimed:  # a part of it was claimed
                rest = unit.task
                head = rest.split(event.claimed - unit.number + 1)
                worker.inflight.append(Unit(unit.number, head, unit.estimate))
                unit.task = rest
            taken.append(unit.task)
        taken.reverse()
        moved = sum(task.stop - task.start for task in taken)
        worker.items -= moved
        if worker.quota is not None:
            worker.quota += moved
        self.freed += moved
        worker.solo = True  # it is slower than was thought: nothing more until it has finished
        self._requeue(taken, "free")
        if any(unit.task.doom is not None for unit in worker.inflight) and worker.state is BUSY:
            self._stop(worker)
        elif not worker.inflight and worker.state is BUSY:
            self._has_finished(worker)

    # -- workers

    def _scale_up(self) -> None:
        if self._now < self._launch_at or self.broken is not None:
            return
        have = len(self.fleet.workers)
        wanted = min(self.limits.max_workers, max(have - self._starting + self.queue.items, self.limits.min_workers))
        count = wanted - have
        if count <= 0:
            return
        launched = []
        for _ in range(count):
            worker = WorkerRecord(self._next_worker, self._now, self.limits.max_tasks_per_child)
            self._next_worker += 1
            self.fleet.workers[worker.id] = worker
            launched.append(worker.id)
            self._timer(self._now + self.limits.startup_timeout, self._check_start, worker.id)
        self._starting += count
        self._actions.append(ev.Launch(launched))

    def _make_room(self) -> None:
        """Retire a worker whose process is bound to GPUs that are not the ones that are free."""
        for lane in self.queue.lanes:
            if lane.demand is not None and lane.head() is not None:
                worker = self.fleet.bound_elsewhere(lane.demand)
                if worker is not None:
                    self._retire(worker)

    def _worker_started(self, event: ev.WorkerStarted) -> None:
        worker = self.fleet.workers.get(event.worker)
        if worker is not None and worker.pool is None:
            self.fleet.place(worker, event.job, event.pool)

    def _worker_ready(self, event: ev.WorkerReady) -> None:
        worker = self.fleet.workers.get(event.worker)
        if worker is None or worker.state is not STARTING:
            return
        if event.error is not None:
            self._break(ev.Broken(event.error))
            return
        self._starting -= 1
        self._failed_starts = 0
        self.started += 1
        worker.step("ready")
        worker.ready_at = worker.idle_since = self._now
        self.fleet.idle[worker.id] = worker
        if self.limits.idle_timeout is not None:
            self._timer(self._now + self.limits.idle_timeout, self._check_idle, worker.id)

    def _worker_refused(self, event: ev.WorkerRefused) -> None:
        worker = self.fleet.workers.get(event.worker)
        if worker is None:
            return
        self.fleet.remove(worker)
        if worker.state is STARTING:
            self._starting -= 1
            self._launch_failed(event.error, event.delay)

    def _launch_failed(self, error: BaseException, delay: float | None) -> None:
        self.failed_launches += 1
        if delay is None and len(self.fleet.workers) == self._starting:
            self._break(ev.Broken(error))
            return
        self._actions.append(ev.Warn(f"a worker could not be started: {error}"))
        self._launch_at = self._now + (10.0 if delay is None else delay)
        self._timer(self._launch_at, lambda _: None)

    def _check_start(self, worker_id: int) -> None:
        worker = self.fleet.workers.get(worker_id)
        if worker is not None and worker.state is STARTING:
            self._failed_starts = self.limits.max_failed_starts
            worker.step("stop")
            self._starting -= 1
            self._actions.append(ev.Signal(worker_id, signal.SIGKILL, True))
            text = f"a worker was not ready after startup_timeout={self.limits.startup_timeout:g} s"
            self._launch_failed(TimeoutError(text), None)

    def _check_idle(self, worker_id: int) -> None:
        worker = self.fleet.workers.get(worker_id)
        timeout = self.limits.idle_timeout
        if worker is None or timeout is None or worker.state not in (IDLE, BUSY):
            return
        due = (worker.idle_since if worker.state is IDLE else self._now) + timeout
        if due > self._now or len(self.fleet.workers) <= self.limits.min_workers:
            self._timer(due if due > self._now else self._now + timeout, self._check_idle, worker_id)
        else:
            self._retire(worker)

    def _retire(self, worker: WorkerRecord) -> None:
        """Let an idle worker go; one that hangs on its way out is killed."""
        self.fleet.idle.pop(worker.id, None)
        if worker.state is STARTING:
            self._starting -= 1
            worker.step("stop")
            self._kill(worker.id)
        else:
            worker.step("drain")
            self._actions.append(ev.Drain(worker.id))
            self._timer(self._now + 2 * self.limits.grace, self._kill, worker.id)

    def _stop(self, worker: WorkerRecord) -> None:
        """SIGTERM now, SIGKILL after the grace."""
        if worker.state is STOPPING:
            return
        worker.step("stop")
        self.fleet.hungry.pop(worker.id, None)
        self._actions.append(ev.Signal(worker.id, signal.SIGTERM, False))
        self._timer(self._now + self.limits.grace, self._kill, worker.id)

    def _kill(self, worker_id: int) -> None:
        if worker_id in self.fleet.workers:
            self._actions.append(ev.Signal(worker_id, signal.SIGKILL, True))

    def _worker_ended(self, event: ev.WorkerEnded) -> None:
        worker = self.fleet.workers.get(event.worker)
        if worker is None:
            return
        self.fleet.remove(worker)
        expected = worker.state in (STOPPING, DRAINING)
        executing, suspects, rest = sort_out(worker, event.running)
        if worker.state is STARTING:
            self._starting -= 1
            self._failed_starts += 1
            final = self._failed_starts >= self.limits.max_failed_starts
            why = event.exit.reason or f"exit code {event.exit.code}"
            text = f"a worker ended before it was ready ({why}); its last words: {event.exit.log.strip() or 'none'}"
            self._launch_failed(RuntimeError(text), None if final else 0.05)
        worker.step("end")
        for task in suspects:
            task.alone = True
        if expected:
            self._requeue([*executing, *suspects, *rest], "free")
            return
        charged = [task for task in executing if self._charge(task, worker.id, event.exit)]
        if executing:
            self.lost += 1
        self._requeue([*charged, *suspects, *rest], "lose")

    def _charge(self, task: Task, worker: int, exit: Exit) -> bool:
        """Charge a task with the loss of its worker; False when that was one too many."""
        if task.doom is not None:
            return True
        if exit.infrastructure:
            task.infra += 1
            over = task.infra >= self.limits.max_infrastructure_losses
        else:
            task.losses += 1
            over = task.losses >= task.profile.max_losses
        if over:
            self._fail(task, "fail", ev.LOST, worker, exit)
            return False
        task.alone = True
        task.attempt += 1
        return True

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
            if worker.state is STARTING:
                self._starting -= 1
            worker.step("stop")
            number = signal.SIGKILL if event.kill else signal.SIGTERM
            self._actions.append(ev.Signal(worker.id, number, True))
        self.fleet.idle.clear()
        self.fleet.hungry.clear()


def _unit_of(worker: WorkerRecord, number: int) -> Unit | None:
    for unit in worker.inflight:
        if unit.number <= number < unit.number + unit.task.stop - unit.task.start:
            return unit
    return None


def _isolate(worker: WorkerRecord, unit: Unit, number: int) -> Task:
    """Give one item of a unit a unit of its own."""
    task = unit.task
    parts: list[Unit] = []
    if number > unit.number:
        parts.append(Unit(unit.number, task.split(number - unit.number), 0.0))
    item = task.split(1) if task.stop - task.start > 1 else task
    parts.append(Unit(number, item, 0.0))
    if item is not task:
        parts.append(Unit(number + 1, task, 0.0))
    place = worker.inflight.index(unit)
    del worker.inflight[place]
    for part in reversed(parts):
        worker.inflight.insert(place, part)
    return item


def _split_unit(worker: WorkerRecord, unit: Unit, count: int) -> Task:
    """Take the first items off a unit that has been answered in part."""
    task = unit.task
    part = unit.estimate * count / (task.stop - task.start)
    unit.estimate -= part
    worker.backlog -= part
    unit.number += count
    return task.split(count)
