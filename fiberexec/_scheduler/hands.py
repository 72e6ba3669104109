"""What a worker has in its hands: the units that it was sent and has not answered, in order."""

from __future__ import annotations

from fiberexec._scheduler.records import Task, Unit, WorkerRecord


def unit_of(worker: WorkerRecord, number: int) -> Unit | None:
    """The unit that an item belongs to."""
    for unit in worker.inflight:
        if unit.number <= number < unit.number + unit.task.stop - unit.task.start:
            return unit
    return None


def isolate(worker: WorkerRecord, unit: Unit, number: int) -> Task:
    """Give one item of a unit a unit of its own, and return its task."""
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


def split_off(worker: WorkerRecord, unit: Unit, count: int) -> Task:
    """Take the first items off a unit that has been answered in part."""
    task = unit.task
    part = unit.estimate * count / (task.stop - task.start)
    unit.estimate -= part
    worker.backlog -= part
    unit.number += count
    return task.split(count)


def take_back(worker: WorkerRecord, claimed: int) -> list[Task]:
    """Take everything after the item ``claimed`` out of a worker's hands, in order."""
    taken: list[Task] = []
    while worker.inflight:
        unit = worker.inflight[-1]
        if unit.number + unit.task.stop - unit.task.start - 1 <= claimed:
            break
        worker.inflight.pop()
        worker.backlog -= unit.estimate
        if unit.number <= claimed:  # a part of it was claimed
            count = claimed - unit.number + 1
            head = unit.task.split(count)
            worker.inflight.append(Unit(unit.number, head, 0.0))
        taken.append(unit.task)
    taken.reverse()
    worker.items -= sum(task.stop - task.start for task in taken)
    return taken
