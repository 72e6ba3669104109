"""The scheduler's records: plain data, changed by the scheduler alone."""

from __future__ import annotations

from collections import deque
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

from fiberexec._states import DONE, QUEUED, STARTING, TASK, WORKER, step
from fiberexec.backends.base import Pool, Resources

if TYPE_CHECKING:
    from fiberexec._scheduler.queue import Lane


class Limits(NamedTuple):
    """The numbers that steer a scheduler: times in seconds, sizes in bytes."""

    max_workers: int = 1
    min_workers: int = 0
    max_tasks_per_child: int | None = None
    idle_timeout: float | None = None
    startup_timeout: float = 600.0
    max_infrastructure_losses: int = 20
    max_failed_starts: int = 3  # launches in a row whose workers died before they were ready
    grace: float = 2.0  # between SIGTERM and SIGKILL
    long: float = 0.001  # a task that takes longer is never sent ahead
    ahead: float = 0.004  # measured work in flight at one worker, at most; refilled below half of it
    worthwhile: float = 0.0003  # measured work that a message is worth; a batch has at least so much, if it is there
    ahead_bytes: int = 1 << 20  # of payloads in one batch
    byte: float = 1e-9  # seconds that a byte of a payload takes on its way, as counted in the work in flight
    stall: float = 0.005  # a worker with tasks waiting that is silent for so long has them recalled


class Profile:
    """What tasks of one function with the same options have in common, and what was measured of them."""

    __slots__ = ("cost", "demand", "lane", "max_losses", "name", "priority", "retry", "timeout")

    def __init__(
        self,
        name: str = "",
        *,
        priority: int = 0,
        demand: Resources | None = None,
        timeout: float | None = None,
        retry: Any = None,
        max_losses: int = 3,
    ) -> None:
        self.name = name
        self.priority = priority
        self.demand = demand
        self.timeout = timeout
        self.retry = retry  # not None: outcomes are judged by the manager
        self.max_losses = max_losses
        self.cost: float | None = None  # seconds an item, as measured
        self.lane: Lane | None = None


class Task:
    """One or more items that share a payload: ``stop - start`` of them. A part can be split off at any time."""

    __slots__ = (
        "alone",
        "attempt",
        "doom",
        "error",
        "id",
        "infra",
        "losses",
        "payload",
        "profile",
        "retry_state",
        "sink",
        "start",
        "state",
        "stop",
        "worker",
    )

    def __init__(
        self, id: int, profile: Profile, payload: Any = None, sink: Any = None, start: int = 0, stop: int = 1
    ) -> None:
        self.id = id  # of item 0; item i has id + i
        self.profile = profile
        self.payload = payload  # opaque here; has .size (bytes) or is None
        self.sink = sink  # opaque: where the outcome goes
        self.start = start
        self.stop = stop
        self.state = QUEUED
        self.attempt = 1
        self.losses = 0  # charged
        self.infra = 0  # infrastructure losses
        self.alone = False  # suspected, or charged before: gets a worker for itself
        self.doom: str | None = None  # why its running attempt is being stopped
        self.error: bytes | None = None  # what ended the attempt before
        self.retry_state: Any = None
        self.worker: int | None = None  # where it was sent

    @property
    def count(self) -> int:
        """How many items."""
        return self.stop - self.start

    def split(self, count: int) -> Task:
        """Take the first ``count`` items off into a task of their own."""
        head = Task(self.id, self.profile, self.payload, self.sink, self.start, self.start + count)
        head.state = self.state
        head.attempt = self.attempt
        head.losses = self.losses
        head.infra = self.infra
        head.alone = self.alone
        head.doom = self.doom
        head.error = self.error
        head.worker = self.worker
        self.start += count
        return head

    def step(self, event: str) -> None:
        self.state = step(TASK, self.state, event)
        if self.state is DONE:
            self.payload = self.error = None


class Unit:
    """A task in a worker's hands: its items have that worker's numbers ``number`` ... in order."""

    __slots__ = ("estimate", "number", "task")

    def __init__(self, number: int, task: Task, estimate: float) -> None:
        self.number = number
        self.task = task
        self.estimate = estimate  # seconds


class WorkerRecord:
    """One worker, from its launch to its end."""

    __slots__ = (
        "alone",
        "backlog",
        "devices",
        "heard",
        "held",
        "id",
        "idle_since",
        "inflight",
        "items",
        "job",
        "look_at",
        "next_number",
        "occupied",
        "patience",
        "pool",
        "quota",
        "recalled_from",
        "recalling",
        "since",
        "solo",
        "state",
    )

    def __init__(self, id: int, now: float, quota: int | None) -> None:
        self.id = id
        self.state = STARTING
        self.job = ""
        self.pool: Pool | None = None
        self.inflight: deque[Unit] = deque()
        self.items = 0  # in flight
        self.next_number = 1
        self.backlog = 0.0  # estimated seconds in flight
        self.quota = quota  # items that it may still be given, None: any number
        self.solo = False  # nothing more is sent to it until it has finished
        self.alone = False  # it runs a suspect, and the rest of its job stays idle
        self.occupied = False  # something is in flight, or a recall of it under way
        self.held: Resources | None = None  # what its task was promised
        self.devices: tuple[str, ...] = ()  # the GPUs that its process has been bound to
        self.heard = now  # when it last gave a sign
        self.idle_since = now
        self.since = now  # when it became ready; until then: when it was launched
        self.recalling = False  # a recall is under way
        self.recalled_from = 0  # the first number that was in its hands then
        self.patience = 0.0  # seconds beyond limits.stall that what is sent to it may be on its way
        self.look_at = inf  # when its time limits are looked at next

    def step(self, event: str) -> None:
        self.state = step(WORKER, self.state, event)
