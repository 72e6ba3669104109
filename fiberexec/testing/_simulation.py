"""A cluster that exists in memory only: the real scheduler, simulated workers, a simulated clock.

    Scheduler ── actions ──► Simulation ──► SimulatedWorker: claims, runs, replies, as the real one does
              ◄── events ───     │
                                 └── agenda: what happens next, and when

Nothing waits: a day of work on a thousand workers passes in seconds, in the same way every time.
"""

from __future__ import annotations

import heapq
import signal
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from math import inf
from typing import Any

from fiberexec._scheduler import Limits, Profile, Scheduler, Task
from fiberexec._scheduler import events as ev
from fiberexec._states import DELAYED, QUEUED
from fiberexec.backends.base import Exit, Pool, Resources
from fiberexec.testing._script import Attempt, Launch, Refusal, Work

_FLUSH = 0.003  # seconds that a worker keeps results back, as the real one does
_CLAIM_SHOWS = 0.001  # seconds between a recall and its answer


class Stuck(AssertionError):
    """Something is left to do, and nothing will ever happen."""


class SimulatedWorker:
    """A worker as its process sees itself."""

    def __init__(self, id: int, job: str, pool: Pool) -> None:
        self.id = id
        self.job = job
        self.pool = pool
        self.waiting: deque[tuple[int, Task, int, int]] = deque()  # number, task, index, attempt
        self.done: list[tuple[int, int, Any, float]] = []  # records that have not been sent
        self.running = 0  # the number in its cell
        self.since = 0.0
        self.claimed = 0
        self.recalled = 0
        self.stubborn = False
        self.ready = False
        self.draining = False
        self.alive = True
        self.flushed = 0.0
        self.busy = 0.0  # seconds of work in all


class Simulation:
    """Drive a scheduler through simulated time.

    - ``max_workers`` and ``limits``: see ``FiberExecutor``; limits may be any field of the scheduler's ``Limits``.
    - ``work(item, attempt)``: what an attempt at an item comes to (an ``Attempt``); by default 1 ms and a value.
    - ``launch(n)``: what the n-th launch comes to, counted from 1: seconds until the worker is ready, or a ``Refusal``.
      By default 50 ms.
    - ``workers_per_job``: so many workers share a job and a pool of ``capacity`` and ``devices``; 0: one for all.

    ``now`` is the time in seconds. ``outcomes`` says by item how it ended: "value", "error", "timeout", "cancelled",
    "lost" or "broken"; ``attempts`` how often it was begun. An item that gets a second outcome is an AssertionError.
    """

    def __init__(
        self,
        max_workers: int = 1,
        *,
        work: Work | None = None,
        launch: Launch | None = None,
        workers_per_job: int = 1,
        capacity: Resources | None = None,
        devices: tuple[str, ...] = (),
        **limits: Any,
    ) -> None:
        self.scheduler = Scheduler(Limits(max_workers=max_workers, **limits))
        self.now = 0.0
        self.workers: dict[int, SimulatedWorker] = {}  # that have been started and have not ended
        self.outcomes: dict[int, str] = {}
        self.attempts: dict[int, int] = {}
        self.judging: list[Task] = []  # their retry policy is being asked
        self.submitted = 0  # items
        self.warnings: list[str] = []
        self.launched = 0
        self.after_event: Callable[[], None] | None = None  # called after every event, for invariants
        self._work = work or (lambda item, attempt: Attempt())
        self._launch = launch or (lambda n: 0.05)
        self._per_job = workers_per_job
        self._capacity = capacity or Resources(float(max_workers), 1 << 40, len(devices))
        self._devices = devices
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self._next_id = 1
        self._given_up: set[int] = set()  # killed before they were started

    # -- what a program does

    def profile(self, **options: Any) -> Profile:
        """A function with its options: priority, demand (Resources), timeout, max_losses, retry.

        ``retry(attempt, outcome)`` says after how many seconds to try again, or None; outcome is None for a time limit.
        """
        return Profile(**options)

    def submit(self, profile: Profile, items: int = 1, *, tasks: int = 1) -> list[Task]:
        """Submit ``tasks`` tasks of ``items`` items each; returns them."""
        made = []
        for _ in range(tasks):
            made.append(Task(self._next_id, profile, None, None, 0, items))
            self._next_id += items
        self.submitted += items * tasks
        self.tell(ev.Submitted(made))
        return made

    def cancel(self, tasks: Iterable[Task] | None = None) -> None:
        """Cancel tasks that have not been sent; by default all."""
        waiting = self.scheduler.queue.waiting() if tasks is None else tasks
        mine = [task for task in waiting if task.state in (QUEUED, DELAYED)]
        for task in mine:
            self._settle(task, ev.CANCELLED)
        self.tell(ev.Cancelled(mine))

    def terminate(self, task: Task) -> None:
        self.tell(ev.Terminated(task))

    def close(self) -> None:
        self.tell(ev.Closing())

    # -- what the world does

    def kill(self, worker: int, exit: Exit | None = None, *, running: bool = True) -> None:
        """End a worker. ``running=False``: its cell is lost, so nobody knows what it was executing."""
        simulated = self.workers.get(worker)
        if simulated is not None and simulated.alive:
            self._end(simulated, exit or Exit(-int(signal.SIGKILL)), running)

    def kill_job(self, job: str, exit: Exit | None = None, *, running: bool = False) -> None:
        """End all workers of a job; nobody knows what they were executing."""
        for worker in [w for w in self.workers.values() if w.job == job]:
            self.kill(worker.id, exit, running=running)

    def at(self, due: float, function: Callable[[], None]) -> None:
        """Call ``function`` when the clock shows ``due``."""
        self._order += 1
        heapq.heappush(self._agenda, (max(due, self.now), self._order, function))

    def run(self, until: float | None = None, *, events: int = 10_000_000) -> None:
        """Let time pass: until then, or until everything has its outcome and, if closed, all workers have gone.

        Raises Stuck when that can never be, or takes more than ``events`` events.
        """
        for _ in range(events):
            due = self._next()
            if until is None and not self.scheduler.open and (not self.scheduler.closing or self.scheduler.finished):
                return
            if due is None or (until is not None and due > until):
                break
            self.now = max(self.now, due)
            if self._agenda and self._agenda[0][0] <= self.now:
                heapq.heappop(self._agenda)[2]()
            else:
                self.tell(ev.Tick())
        else:
            raise Stuck(f"{self.scheduler.open} items are open after {events} events")
        if until is not None:
            self.now = max(self.now, until)
        else:
            left = f"{self.scheduler.open} items and {len(self.scheduler.fleet.workers)} workers are left"
            raise Stuck(f"{left}, and nothing is to come")

    def tell(self, event: Any) -> None:
        """Let the scheduler take an event, and do what it says."""
        for action in self.scheduler.handle(event, self.now):
            self._do(action)
        if self.after_event is not None:
            self.after_event()

    def _next(self) -> float | None:
        due = self.scheduler.wakeup()
        if self._agenda and (due is None or self._agenda[0][0] < due):
            due = self._agenda[0][0]
        return due

    # -- actions

    def _do(self, action: Any) -> None:
        if isinstance(action, ev.Send):
            self._receive(self.workers[action.worker], action)
        elif isinstance(action, ev.Settle):
            self._settle(action.task, action.outcome)
        elif isinstance(action, ev.Fail):
            self._settle(action.task, action.why)
        elif isinstance(action, ev.Judge):
            self.judging.append(action.task)
            self.at(self.now, lambda: self._judge(action.task, action.outcome))
        elif isinstance(action, ev.Launch):
            for worker in action.workers:
                self._launch_one(worker)
        elif isinstance(action, ev.Signal):
            self.at(self.now, lambda: self._signal(action.worker, action.number))
        elif isinstance(action, ev.Drain):
            self.workers[action.worker].draining = True
            self.at(self.now, lambda: self._go_on(action.worker))
        elif isinstance(action, ev.Probe):
            self.at(self.now, lambda: self._probe(action.worker))
        elif isinstance(action, ev.Recall):
            self.at(self.now, lambda: self._recall(action.worker, action.number))
        elif isinstance(action, ev.Warn):
            self.warnings.append(action.text)

    def _judge(self, task: Task, outcome: str | None) -> None:
        delay = task.profile.retry(task.attempt, outcome)
        self.judging.remove(task)
        if delay is None and task.doom is None:
            self._settle(task, outcome or ev.TIMEOUT)
        self.tell(ev.Judged(task, delay))

    def _settle(self, task: Task, outcome: str) -> None:
        for item in range(task.id + task.start, task.id + task.stop):
            if item in self.outcomes:
                raise AssertionError(f"item {item} ended in {self.outcomes[item]!r} before it ended in {outcome!r}")
            self.outcomes[item] = outcome

    def _launch_one(self, worker: int) -> None:
        self.launched += 1
        number = self.launched
        comes_to = self._launch(number)
        if isinstance(comes_to, Refusal):
            self.at(self.now, lambda: self.tell(ev.WorkerRefused(worker, *comes_to)))
        else:
            job = str((number - 1) // self._per_job if self._per_job else 0)
            simulated = SimulatedWorker(worker, job, Pool(job, self._capacity, self._devices))
            self.at(self.now + comes_to, lambda: self._start(simulated))

    def _start(self, worker: SimulatedWorker) -> None:
        if worker.id in self._given_up:
            return
        self.workers[worker.id] = worker
        self.tell(ev.WorkerStarted(worker.id, worker.job, worker.pool))
        if worker.alive:
            worker.ready = True
            self.tell(ev.WorkerReady(worker.id))

    def _signal(self, worker_id: int, number: int) -> None:
        worker = self.workers.get(worker_id)
        if worker is None:
            if worker_id not in self._given_up and worker_id in self.scheduler.fleet.workers:
                self._given_up.add(worker_id)
                self.tell(ev.WorkerRefused(worker_id, RuntimeError("given up"), 0.0))
        elif number == signal.SIGKILL or not worker.stubborn:
            self._end(worker, Exit(-number), True)

    def _probe(self, worker_id: int) -> None:
        worker = self.workers.get(worker_id)
        if worker is not None:
            self.tell(ev.Probed(worker_id, worker.running, self.now - worker.since))

    def _recall(self, worker_id: int, number: int) -> None:
        worker = self.workers.get(worker_id)
        if worker is not None:
            worker.recalled = number
            self._flush(worker)
            self.at(self.now + _CLAIM_SHOWS, lambda: self._answer_recall(worker))

    def _answer_recall(self, worker: SimulatedWorker) -> None:
        if worker.alive:
            self.tell(ev.RecallDone(worker.id, worker.claimed))

    # -- the workers

    def _receive(self, worker: SimulatedWorker, send: ev.Send) -> None:
        for number, task, start, stop in send.units:
            worker.waiting.extend((number + i - start, task, i, task.attempt) for i in range(start, stop))
        self.at(self.now, lambda: self._go_on(worker.id))

    def _go_on(self, worker_id: int) -> None:
        """Start the next item, if none is running."""
        worker = self.workers.get(worker_id)
        if worker is None or worker.running:
            return
        while worker.waiting:
            number, task, index, attempt = worker.waiting.popleft()
            if number <= worker.recalled:
                worker.done.append((number, 1, None, 0.0))
                continue
            item = task.id + index
            worker.claimed = worker.running = number
            worker.since = self.now
            self.attempts[item] = self.attempts.get(item, 0) + 1
            comes_to = self._work(item, attempt)
            worker.stubborn = comes_to.stubborn
            if comes_to.seconds != inf:
                self.at(self.now + comes_to.seconds, partial(self._finish, worker, number, comes_to))
            return
        self._flush(worker)
        if worker.draining:
            self._end(worker, Exit(0), True)

    def _finish(self, worker: SimulatedWorker, number: int, comes_to: Attempt) -> None:
        if not worker.alive or worker.running != number:
            return
        if comes_to.ends == "crash":
            self._end(worker, Exit(-int(signal.SIGSEGV)), True)
            return
        worker.busy += comes_to.seconds
        worker.running = 0
        worker.stubborn = False
        worker.done.append((number, 1, comes_to.ends, comes_to.seconds))
        if self.now - worker.flushed > _FLUSH:
            self._flush(worker)
        self._go_on(worker.id)

    def _flush(self, worker: SimulatedWorker) -> None:
        worker.flushed = self.now
        if worker.done:
            records, worker.done = worker.done, []
            self.tell(ev.Replied(worker.id, records))

    def _end(self, worker: SimulatedWorker, exit: Exit, known: bool) -> None:
        if worker.alive:
            worker.alive = False
            del self.workers[worker.id]
            self.tell(ev.WorkerEnded(worker.id, worker.running if known else None, exit))
