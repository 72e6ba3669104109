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
        self._jobs: dict[str, list[int]] = {}  # how many workers a job has had, and has
        self._busy_in_job: dict[str, int] = {}
        self._closed_jobs: set[str] = set()  # where a suspect runs alone, or is to run
        self._reserved: str | None = None  # the one of them that is getting empty for the next suspect

    def place(self, worker: WorkerRecord, job: str, pool: Pool) -> None:
        worker.job = job
        worker.pool = pool
        if pool.name not in self._pools:
            self._pools[pool.name] = _PoolState(pool)
        self._pools[pool.name].workers += 1
        counts = self._jobs.setdefault(job, [0, 0])
        counts[0] += 1
        counts[1] += 1

    def idle_worker(self, task: Task) -> WorkerRecord | None:
        """An idle worker that may run this task now, None if there is none."""
        demand = task.profile.demand
        if demand is None and not task.alone and not self._closed_jobs:
            return next(reversed(self.idle.values()), None)
        for worker in reversed(self.idle.values()):
            if task.alone:
                if self._busy_in_job.get(worker.job, 0):
                    continue
            elif worker.job in self._closed_jobs:
                continue
            if demand is None or (self._state(worker).fits(demand) and self._devices_fit(worker, demand)):
                return worker
        return None

    def hungry_worker(self, task: Task) -> WorkerRecord | None:
        """A busy worker that more may be sent to: what is promised to it is what the task needs."""
        for worker in reversed(self.hungry.values()):  # the first would have to be looked for behind those that have left
            if worker.job not in self._closed_jobs and worker.held == task.profile.demand:
                return worker
        return None

    def reserve_job(self) -> None:
        """Keep a job free of new tasks, so that a suspect finds one empty even if there is always more to do."""
        if self._reserved is None or not self._busy_in_job.get(self._reserved, 0):
            self.unreserve_job()
            jobs = [job for job in self._busy_in_job if job not in self._closed_jobs]
            if jobs:
                self._reserved = min(jobs, key=self._busy_in_job.__getitem__)
                self._closed_jobs.add(self._reserved)

    def unreserve_job(self) -> None:
        if self._reserved is not None:
            self._closed_jobs.discard(self._reserved)
            self._reserved = None

    def has_room(self, demand: Resources) -> bool:
        """Whether any pool has this much free, idle worker or not."""
        return not self._pools or any(pool.fits(demand) for pool in self._pools.values())

    def occupy(self, worker: WorkerRecord, task: Task) -> None:
        """Note that an idle worker gets this task: takes it off the idle ones and what it needs off the pool."""
        self.idle.pop(worker.id, None)
        worker.occupied = True
        self._busy_in_job[worker.job] = self._busy_in_job.get(worker.job, 0) + 1
        if task.alone:
            if worker.job == self._reserved:
                self._reserved = None
            self._closed_jobs.add(worker.job)
            worker.alone = True
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
        """Note that a worker has nothing in flight any more; saying it twice does no harm."""
        if not worker.occupied:
            return
        worker.occupied = False
        self._busy_in_job[worker.job] -= 1
        if not self._busy_in_job[worker.job]:
            del self._busy_in_job[worker.job]
        if worker.alone:
            worker.alone = False
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
        self.release(worker)
        self.idle.pop(worker.id, None)
        self.hungry.pop(worker.id, None)
        del self.workers[worker.id]
        if worker.pool is not None:
            counts = self._jobs[worker.job]
            counts[1] -= 1
            if not counts[1]:
                del self._jobs[worker.job]
            state = self._state(worker)
            state.workers -= 1
            if not state.workers:
                del self._pools[worker.pool.name]

    def is_by_itself(self, worker: WorkerRecord) -> bool:
        """Whether no other worker's task can have ended this one: its job has no other, or none of them was busy."""
        return worker.alone or worker.job not in self._jobs or self._jobs[worker.job][0] == 1

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
