"""Which waiting task goes to which worker.

- A task whose cost is not known, or is more than ``limits.long``, goes alone to an idle worker: nothing waits
  behind it.
- Cheap tasks travel in batches, as many as ``limits.ahead`` seconds of measured work allow, but never more than a fair
  share of what waits, so that the workers finish together.
- A busy worker is sent more when half of that is done, and only when no worker is idle. That is not done for each new
  task, but when a worker has replied: what was submitted meanwhile travels together.
- Lanes are served by priority, then by who came first. A task that waits for resources keeps tasks of later lanes from
  taking the same kind; a suspect that waits for an empty job has one kept free for it.
"""

from __future__ import annotations

from fiberexec._scheduler.events import Send
from fiberexec._scheduler.fleet import Fleet
from fiberexec._scheduler.queue import Lane, Queue
from fiberexec._scheduler.records import Limits, Task, Unit, WorkerRecord
from fiberexec._states import BUSY, SENT
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
                    worker = fleet.hungry_worker()
                if worker is None:
                    break
                sends.append(_send_batch(queue, fleet, lane, worker, limits))
        if task is None:
            continue
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
    cost = profile.cost
    return cost is None or cost > limits.long or profile.demand is not None or task.alone


def _send_alone(queue: Queue, fleet: Fleet, lane: Lane, task: Task, worker: WorkerRecord) -> Send:
    if task.stop - task.start > 1:
        task = task.split(1)
    else:
        lane.tasks.popleft()
    queue.items -= 1
    fleet.occupy(worker, task)
    worker.solo = True
    units = [_hand_over(task, worker, task.profile.cost or 0.0)]
    _account(worker, 1)
    demand = task.profile.demand
    return Send(worker.id, units, worker.devices if demand is not None and demand.gpu else None)


def _send_batch(queue: Queue, fleet: Fleet, lane: Lane, worker: WorkerRecord, limits: Limits) -> Send:
    if not worker.inflight:
        fleet.occupy(worker, lane.tasks[0])
        worker.solo = False
    seconds = limits.ahead - worker.backlog
    size = limits.ahead_bytes
    share = max(1, queue.items // (2 * len(fleet.workers)))
    if worker.quota is not None:
        share = min(share, worker.quota)
    units: list[tuple[int, Task, int, int]] = []
    given = 0
    while (task := lane.head()) is not None and not _goes_alone(task, limits):
        cost = max(task.profile.cost or 0.0, _LEAST)
        count = min(task.stop - task.start, share - given, int(seconds / cost) + 1)
        if count < task.stop - task.start:
            task = task.split(count)
        else:
            lane.tasks.popleft()
        units.append(_hand_over(task, worker, cost * count))
        given += count
        seconds -= cost * count
        if task.payload is not None:
            size -= task.payload.size
        if seconds <= 0 or size <= 0 or given >= share:
            break
    queue.items -= given
    _account(worker, given)
    if worker.backlog * 2 >= limits.ahead or worker.quota == 0:
        fleet.hungry.pop(worker.id, None)
    else:
        fleet.hungry[worker.id] = worker
    return Send(worker.id, units, None)


def _hand_over(task: Task, worker: WorkerRecord, estimate: float) -> tuple[int, Task, int, int]:
    task.state = SENT  # "assign" of the table; too hot a path to look it up
    task.worker = worker.id
    number = worker.next_number
    count = task.stop - task.start
    worker.next_number = number + count
    worker.inflight.append(Unit(number, task, estimate))
    worker.backlog += estimate
    worker.items += count
    return number, task, task.start, task.stop


def _account(worker: WorkerRecord, given: int) -> None:
    if worker.quota is not None:
        worker.quota -= given
    worker.state = BUSY
