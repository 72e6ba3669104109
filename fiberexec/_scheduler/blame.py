"""What the tasks of a dead worker are charged with.

Only what was *executing* is charged; what was next in line moves for free. Where nobody knows what was executing, all
that may have been are suspects: not charged, but re-run alone, so that the culprit shows.
"""

from __future__ import annotations

from fiberexec._scheduler.records import Task, WorkerRecord


def sort_out(worker: WorkerRecord, running: int | None) -> tuple[list[Task], list[Task], list[Task]]:
    """Empty a worker's hands: what was executing, who is suspected of it, and the rest, each in order."""
    tasks = [(unit.number, unit.task) for unit in worker.inflight]
    worker.inflight.clear()
    worker.items = 0
    if running is None:
        singles = [item for _, task in tasks for item in _single(task)]
        if len(singles) == 1:
            return singles, [], []
        return [], singles, []
    executing: list[Task] = []
    rest: list[Task] = []
    for number, task in tasks:
        count = task.stop - task.start
        if number <= running < number + count:
            if running > number:
                rest.append(task.split(running - number))
            if task.stop - task.start > 1:
                executing.append(task.split(1))
                rest.append(task)
            else:
                executing.append(task)
        else:
            rest.append(task)
    return executing, [], rest


def _single(task: Task) -> list[Task]:
    found = []
    while task.stop - task.start > 1:
        found.append(task.split(1))
    return [*found, task]
