"""What the tasks of a dead worker are charged with.

- Only what was *executing* is charged; what was next in line moves for free.
- Where nobody knows what was executing, all that may have been are suspects: not charged, but re-run alone, so that the
  culprit shows.
- A loss that no task can have caused is counted apart, and so is one that came before anything was executed: somebody
  killed the worker, or the first task of the batch is more than it can take in. That one travels alone from then on.
"""

from __future__ import annotations

from fiberexec._scheduler.records import Limits, Task, WorkerRecord
from fiberexec.backends.base import Exit


class Verdict:
    """What follows from a worker's end: its items sorted into those that are charged, suspected and free, in order."""

    __slots__ = ("charged", "executed", "free", "suspects")

    def __init__(self) -> None:
        self.charged: list[Task] = []
        self.suspects: list[Task] = []
        self.free: list[Task] = []
        self.executed = True  # what is charged was executing


def sort_out(worker: WorkerRecord, running: int | None, exit: Exit, by_itself: bool) -> Verdict:
    """Empty a dead worker's hands.

    ``running`` is the number of the item that it executed; 0: none, None: unknown. ``by_itself``: no task of another
    worker can have ended it.
    """
    verdict = Verdict()
    units = list(worker.inflight)
    worker.inflight.clear()
    worker.items = 0
    if not units:
        return verdict
    first = units[0].number
    if running is None:
        if exit.infrastructure or (by_itself and len(units) == 1 and units[0].task.count == 1):
            running = first  # nobody is to blame, or nobody else can be
        else:
            verdict.suspects = [item for unit in units for item in _single(unit.task)]
            return verdict
    if running < first:
        running, verdict.executed = first, False
    for unit in units:
        number, task = unit.number, unit.task
        if not number <= running < number + task.count:
            verdict.free.append(task)
            continue
        if running > number:
            verdict.free.append(task.split(running - number))
        if task.count > 1:
            verdict.charged.append(task.split(1))
            verdict.free.append(task)
        else:
            verdict.charged.append(task)
    return verdict


def charge(task: Task, executed: bool, exit: Exit, limits: Limits) -> bool:
    """Charge a task with the loss of its worker; True when that was one too many."""
    if executed:
        task.attempt += 1
    if executed and not exit.infrastructure:
        task.losses += 1
        task.alone = True
        return task.losses >= task.profile.max_losses
    task.infra += 1
    task.alone = task.alone or not exit.infrastructure
    return (executed and runs_once(task)) or task.infra >= limits.max_infrastructure_losses


def runs_once(task: Task) -> bool:
    """Whether a task that may have been executing must not run again, whoever is to blame."""
    return task.profile.max_losses == 1


def _single(task: Task) -> list[Task]:
    found = []
    while task.count > 1:
        found.append(task.split(1))
    return [*found, task]
