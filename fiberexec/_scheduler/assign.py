"""Which waiting task goes to which worker.

- A task whose cost is not known, or is more than ``limits.long``, goes alone to an idle worker: nothing waits
  behind it.
- Cheap tasks travel in batches, as many as ``limits.ahead`` seconds of measured work allow, but never more than a fair
  share of what waits, so that the workers finish together. Where that is too little to be worth a message, a worker
  gets what is, and others nothing.
- A busy worker is sent more of what needs the same resources when half of that is done, and only when no worker is idle, and
  nothing that came before waits for one. That is not done for each new task, but when a worker has replied: what was
  submitted meanwhile travels together.
- Lanes are served by priority, then by who came first. A task that waits for resources keeps tasks of later lanes from
  taking the same kind; a suspect that waits for an empty job has one kept free for it.
"""

from __future__ import annotations

from math import inf

from fiberexec._scheduler.events import Send
from fiberexec._scheduler.fleet import Fleet
from fiberexec._scheduler.queue import Lane, Queue
from fiberexec._scheduler.records import Limits, Task, Unit, WorkerRecord
from fiberexec._states import BUSY, QUEUED, SENT
from fiberexec.backends.base import Resources

_LEAST = 1e-7  # seconds: nothing is cheaper, whatever was measured


def assign(queue: Queue, fleet: Fleet, limits: Limits, top_up: bool) -> list[Send]:
    """Move tasks from the queue to workers until one of both has nothing left to give.

    ``top_up`` is false for a submitting thread: it serves idle workers alone, so that what follows can travel together.
    """
    sends: list[Send] = []
    blocked = Resources()
    suspects = False
    for lane in queue.lanes():
        demand = lane.demand
        if demand is not None and _uses(demand, blocked):
            continue
        while (task := lane.head()) is not None:
            worker = fleet.idle_worker(task)
            if _goes_alone(task, limits):
                if worker is None:
                    break
                sends.append(_send_alone(queue, fleet, lane, task, worker))
            else:
                if worker is None and top_up:
                    worker = fleet.hungry_worker(task)
                if worker is None:
                    break
                sends.append(_send_batch(queue, fleet, lane, worker, limits))
        if task is None:
            continue
        top_up = False  # who came later must not keep workers from becoming idle for this one
        if lane.alone:
            suspects = True
            fleet.reserve_job()
        if demand is not None and fleet.idle and not fleet.has_room(demand):
            cpu, memory, gpu = map(max, blocked, demand)
            blocked = Resources(cpu, int(memory), int(gpu))
    if not suspects:
        fleet.unreserve_job()
    return sends


def _uses(demand: Resources, blocked: Resources) -> bool:
    return any(a and b for a, b in zip(demand, blocked, strict=True))


def _goes_alone(task: Task, limits: Limits) -> bool:
    profile = task.profile
    cost, demand = profile.cost, profile.demand
    return cost is None or cost > limits.long or task.alone or (demand is not None and demand.gpu > 0)


def _send_alone(queue: Queue, fleet: Fleet, lane: Lane, task: Task, worker: WorkerRecord) -> Send:
    if task.stop - task.start > 1:
        task = task.split(1)
    else:
        lane.tasks.popleft()
    queue.items -= 1
    fleet.occupy(worker, task)
    worker.solo = True
    units: list[tuple[int, Task, int, int]] = []
    _hand_over([(task, task.profile.cost or 0.0)], worker, units)
    demand = task.profile.demand
    return Send(worker.id, units, worker.devices if demand is not None and demand.gpu else None)


def _send_batch(queue: Queue, fleet: Fleet, lane: Lane, worker: WorkerRecord, limits: Limits) -> Send:
    if not worker.inflight:
        fleet.occupy(worker, lane.tasks[0])
        worker.solo = False
    tasks = lane.tasks
    seconds = limits.ahead - worker.backlog
    worthwhile = limits.worthwhile
    size = limits.ahead_bytes
    share = max(1, queue.items // (2 * len(fleet.workers)))
    most = inf if worker.quota is None else worker.quota
    given = 0
    chosen: list[tuple[Task, float]] = []
    profile = None
    cost = 0.0
    while tasks and seconds > 0 and size > 0 and given < most and (given < share or worthwhile > 0):
        task = tasks[0]
        if task.state is not QUEUED:
            tasks.popleft()
            continue
        if task.profile is not profile:
            if _goes_alone(task, limits):
                break
            profile = task.profile
            cost = max(profile.cost or 0.0, _LEAST)
        count = task.stop - task.start
        if count > 1:
            fair = max(share - given, int(worthwhile / cost) + 1)
            count = int(min(count, fair, most - given, int(seconds / cost) + 1))
        if count < task.stop - task.start:
            task = task.split(count)
        else:
            tasks.popleft()
        estimate = cost * count
        if task.payload is not None:
            estimate += task.payload.size * limits.byte
            size -= task.payload.size
        chosen.append((task, estimate))
        given += count
        seconds -= estimate
        worthwhile -= estimate
    queue.items -= given
    units: list[tuple[int, Task, int, int]] = []
    _hand_over(chosen, worker, units)
    if worker.backlog * 2 >= limits.ahead or worker.quota == 0:
        fleet.hungry.pop(worker.id, None)
    else:
        fleet.hungry[worker.id] = worker
    return Send(worker.id, units, None)


def _hand_over(chosen: list[tuple[Task, float]], worker: WorkerRecord, units: list[tuple[int, Task, int, int]]) -> None:
    """Put tasks, each with the seconds that it may take, into a worker's hands."""
    inflight = worker.inflight
    number = first = worker.next_number
    for task, estimate in chosen:
        task.state = SENT  # "assign" of the table; too hot a path to look it up
        task.worker = worker.id
        inflight.append(Unit(number, task, estimate))
        units.append((number, task, task.start, task.stop))
        worker.backlog += estimate
        number += task.stop - task.start
    worker.next_number = number
    worker.items += number - first
    if worker.quota is not None:
        worker.quota -= number - first
    worker.state = BUSY
