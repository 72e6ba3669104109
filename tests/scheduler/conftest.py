"""What every test of the scheduler checks after every event, and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fiberexec._scheduler.records import Task, WorkerRecord
from fiberexec._states import BUSY, DELAYED, DRAINING, GONE, IDLE, QUEUED, SENT, STARTING, STOPPING, TASK, WORKER
from fiberexec.testing import Simulation


@pytest.fixture(autouse=True)
def every_step_is_in_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever sets a state, the tables of _states must have a step for it."""
    for record, table in ((Task, TASK), (WorkerRecord, WORKER)):
        slot = record.__dict__["state"]

        def move(self: Any, new: str, slot: Any = slot, table: Any = table) -> None:
            try:
                old = slot.__get__(self)
            except AttributeError:  # it is being made; a part that is split off takes the state of the whole
                old = new
            first = isinstance(self, Task) and old is QUEUED and new in (SENT, QUEUED)
            assert old == new or first or new in table[old].values(), f"{old} -> {new} is not in the table"
            slot.__set__(self, new)

        monkeypatch.setattr(record, "state", property(slot.__get__, move))


@pytest.fixture
def check() -> Callable[[Simulation], None]:
    return check_invariants


@pytest.fixture
def simulate(check: Callable[[Simulation], None]) -> Iterator[Callable[..., Simulation]]:
    """Makes simulations that check every invariant after every event."""

    def make(*args: Any, **kwargs: Any) -> Simulation:
        simulation = Simulation(*args, **kwargs)
        simulation.after_event = lambda: check(simulation)
        return simulation

    yield make


def items_of(task: Task) -> range:
    return range(task.id + task.start, task.id + task.stop)


def check_invariants(simulation: Simulation) -> None:
    """Everything that must hold between two events."""
    scheduler = simulation.scheduler
    workers = scheduler.fleet.workers
    where = Counter[int]()
    queued = 0
    for task in scheduler.queue.waiting():
        if task.state in (QUEUED, DELAYED):
            where.update(items_of(task))
        if task.state is QUEUED:
            queued += task.count
    assert scheduler.queue.items == queued
    for worker in workers.values():
        check_worker(worker, scheduler)
        for unit in worker.inflight:
            where.update(items_of(unit.task))
    for task in simulation.judging:
        where.update(items_of(task))
    twice = [item for item, places in where.items() if places > 1 or item in simulation.outcomes]
    assert not twice, f"items {twice} are in two places"
    assert scheduler.open == len(where), "an item is in no place"
    assert scheduler.open + len(simulation.outcomes) == simulation.submitted, "an item was lost"
    check_sets(simulation)
    if scheduler.broken is None:
        check_promises(simulation)
    check_somebody_comes_back(simulation)


def check_worker(worker: WorkerRecord, scheduler: Any) -> None:
    assert worker.state is not GONE
    assert worker.items == sum(unit.task.count for unit in worker.inflight)
    number = 0
    for unit in worker.inflight:
        assert unit.number > number, "numbers go up"
        assert unit.task.state is SENT and unit.task.worker == worker.id
        number = unit.number + unit.task.count - 1
    assert number < worker.next_number
    assert worker.backlog > -1e-6
    assert worker.quota is None or worker.quota >= 0
    if worker.inflight and scheduler.broken is None:
        assert worker.occupied and worker.state in (BUSY, DRAINING, STOPPING)
    if worker.solo and worker.occupied and worker.alone:
        assert worker.items <= 1, "a suspect has company"


def check_sets(simulation: Simulation) -> None:
    scheduler = simulation.scheduler
    fleet, limits = scheduler.fleet, scheduler.limits
    assert len(fleet.workers) <= limits.max_workers
    assert scheduler._crew.starting == sum(w.state is STARTING for w in fleet.workers.values())
    assert set(fleet.idle) == {w.id for w in fleet.workers.values() if w.state is IDLE}
    for worker in fleet.hungry.values():
        assert worker.state is BUSY and worker.inflight and not worker.solo
        assert not worker.recalling and worker.quota != 0
    for worker in fleet.workers.values():
        if worker.state is BUSY:
            assert worker.inflight or worker.recalling, "busy with nothing"
        if worker.state is IDLE:
            assert not worker.inflight and not worker.occupied and worker.held is None


def check_promises(simulation: Simulation) -> None:
    fleet = simulation.scheduler.fleet
    for name, free in fleet._pools.items():
        members = [w for w in fleet.workers.values() if w.pool is not None and w.pool.name == name]
        capacity = members[0].pool.capacity
        held = [w.held for w in members if w.held is not None]
        assert abs(free.cpu + sum(h.cpu for h in held) - capacity.cpu) < 1e-6
        assert free.memory + sum(h.memory for h in held) == capacity.memory
        assert free.gpu + sum(h.gpu for h in held) == capacity.gpu
        assert free.cpu > -0.0011 and free.memory >= 0 and free.gpu >= 0, "more was promised than there is"
        devices = [d for w in members if w.held is not None and w.held.gpu for d in w.devices] + free.devices
        assert sorted(devices) == sorted(members[0].pool.devices), "a device is with two tasks, or with none"
    for worker in fleet.workers.values():
        assert worker.held is None or worker.occupied
    jobs = Counter(worker.job for worker in fleet.workers.values() if worker.occupied)
    assert fleet._busy_in_job == jobs
    alone = {worker.job for worker in fleet.workers.values() if worker.alone}
    assert all(jobs[job] == 1 for job in alone), "a suspect's job has another one busy"
    reserved = {fleet._reserved} - {None}
    assert fleet._closed_jobs == alone | reserved


def check_somebody_comes_back(simulation: Simulation) -> None:
    """What is open is with somebody who will say something, or there is a time to look at it again."""
    scheduler = simulation.scheduler
    if scheduler.open:
        states = {worker.state for worker in scheduler.fleet.workers.values()}
        coming = bool(states & {STARTING, BUSY, DRAINING, STOPPING}) or simulation.judging
        assert coming or scheduler.wakeup() is not None, "nobody will ever take what waits"
    if not scheduler.closing:
        least = min(scheduler.limits.min_workers, scheduler.limits.max_workers)
        assert len(scheduler.fleet.workers) >= least or scheduler.wakeup() is not None
