"""The workers, who of them can take work, and the resources promised on them."""

from __future__ import annotations

from fiberexec._scheduler.records import Task, WorkerRecord
from fiberexec._states import IDLE
from fiberexec.backends.base import Pool, Resources


class _PoolState:
    """What is still free of a pool."""

    __slots__ = ("cpu", "devices", "gpu", "memory", "workers")

    def __init__(self, pool: Pool) -> None:
        self.cpu, self.memory, self.gpu = pool.capacity
        self.devices = list(pool.devices)
        self.workers = 0

    def fits(self, demand: Resources) -> bool:
        # Fractions of a core are summed many times: a thousandth of one is no reason to refuse.
        return demand.cpu <= self.cpu + 0.001 and demand.memory <= self.memory and demand.gpu <= self.gpu


class Fleet:
    """Every worker is in ``workers``; those that may be sent something are in ``idle`` or ``hungry`` as well."""

    def __init__(self) -> None:
        self.workers: dict[int, WorkerRecord] = {}
        self.idle: dict[int, WorkerRecord] = {}  # nothing in flight; the last one in is the first one out
        self.hungry: dict[int, WorkerRecord] = {}  # busy with measured work, and soon out of it
        self._pools: dict[str, _PoolState] = {}
        self._busy_in_job: dict[str, int] = {}
        self._closed_jobs: set[str] = set()  # jobs in which a suspect runs alone

    def place(self, worker: WorkerRecord, job: str, pool: Pool) -> None:
        worker.job = job
        worker.pool = pool
        self._pools.setdefault(pool.name, _PoolState(pool)).workers += 1

    def idle_worker(self, task: Task) -> WorkerRecord | None:
        """An idle worker that may run this task now, None if there is none."""
        demand = task.profile.demand
        if demand is None and not task.alone and not self._closed_jobs:
            return next(reversed(self.idle.values()), None)
        for worker in reversed(self.idle.values()):
            if worker.job in self._closed_jobs or (task.alone and self._busy_in_job.get(worker.job, 0)):
                continue
            if demand is None or (self._state(worker).fits(demand) and self._devices_fit(worker, demand)):
                return worker
        return None

    def has_room(self, demand: Resources) -> bool:
        """Whether any pool has this much free, idle worker or not."""
        return not self._pools or any(pool.fits(demand) for pool in self._pools.values())

    def occupy(self, worker: WorkerRecord, task: Task) -> None:
        """Note that an idle worker gets this task: takes it off the idle ones and what it needs off the pool."""
        self.idle.pop(worker.id, None)
        self._busy_in_job[worker.job] = self._busy_in_job.get(worker.job, 0) + 1
        if task.alone:
            self._closed_jobs.add(worker.job)
        demand = task.profile.demand
        if demand is None:
            return
        state = self._state(worker)
        worker.held = demand
        state.cpu -= demand.cpu
        state.memory -= demand.memory
        state.gpu -= demand.gpu
        if demand.gpu:
            if not worker.devices:
                worker.devices = tuple(state.devices[: demand.gpu])
            for device in worker.devices:
                state.devices.remove(device)

    def release(self, worker: WorkerRecord) -> None:
        """Note that a worker has nothing in flight any more."""
        self._busy_in_job[worker.job] -= 1
        if not self._busy_in_job[worker.job]:
            del self._busy_in_job[worker.job]
        self._closed_jobs.discard(worker.job)
        self.hungry.pop(worker.id, None)
        demand = worker.held
        if demand is not None:
            worker.held = None
            state = self._state(worker)
            state.cpu += demand.cpu
            state.memory += demand.memory
            state.gpu += demand.gpu
            if demand.gpu:
                state.devices += worker.devices

    def remove(self, worker: WorkerRecord) -> None:
        """Forget a worker that has ended."""
        if worker.inflight:
            self.release(worker)
        self.idle.pop(worker.id, None)
        self.hungry.pop(worker.id, None)
        del self.workers[worker.id]
        if worker.pool is not None:
            state = self._state(worker)
            state.workers -= 1
            if not state.workers:
                del self._pools[worker.pool.name]

    def bound_elsewhere(self, demand: Resources) -> WorkerRecord | None:
        """An idle worker that stands in the way of a gpu task: its process is bound to other devices."""
        if demand.gpu:
            for worker in self.idle.values():
                if worker.devices and self._state(worker).fits(demand) and worker.state is IDLE:
                    return worker
        return None

    def _devices_fit(self, worker: WorkerRecord, demand: Resources) -> bool:
        if not demand.gpu or not worker.devices:
            return True
        free = self._state(worker).devices
        return len(worker.devices) == demand.gpu and all(device in free for device in worker.devices)

    def _state(self, worker: WorkerRecord) -> _PoolState:
        assert worker.pool is not None
        return self._pools[worker.pool.name]
