"""What goes into the scheduler, and what comes out of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from fiberexec._scheduler.records import Task
from fiberexec.backends.base import Exit, Pool

# -- events


class Submitted(NamedTuple):
    """New tasks."""

    tasks: list[Task]


class Cancelled(NamedTuple):
    """Tasks that nobody wants any more, and whose sinks know it. Those that have been sent go on."""

    tasks: list[Task]


class Terminated(NamedTuple):
    """A task that must end now, running or not."""

    task: Task


class WorkerStarted(NamedTuple):
    """A worker's process runs."""

    worker: int
    job: str
    pool: Pool


class WorkerReady(NamedTuple):
    """A worker has run its initializer, or failed in it (``error``)."""

    worker: int
    error: Any = None


class WorkerRefused(NamedTuple):
    """A worker could not be started. ``delay``: seconds until another try makes sense, None: never."""

    worker: int
    error: BaseException
    delay: float | None


class WorkerLeaving(NamedTuple):
    """A worker will be taken away soon."""

    worker: int


class WorkerEnded(NamedTuple):
    """A worker's process has ended; ``running`` is its item's number, 0 for none, None for unknown."""

    worker: int
    running: int | None
    exit: Exit


class Replied(NamedTuple):
    """Records from a worker: (number, count, outcome, seconds); outcome is None for items that it did not run."""

    worker: int
    records: list[tuple[int, int, Any, float]]


class Probed(NamedTuple):
    """An answer to Probe: the number of the running item (0: none), and for how long it has been running."""

    worker: int
    running: int
    seconds: float


class RecallDone(NamedTuple):
    """An answer to Recall: everything after ``claimed`` will not be run."""

    worker: int
    claimed: int


class Judged(NamedTuple):
    """An answer to Judge: seconds until the next attempt, or None when the task has been settled."""

    task: Task
    delay: float | None
    error: bytes | None = None


class Tick(NamedTuple):
    """Time has passed."""


class Closing(NamedTuple):
    """No more tasks will come; workers go when everything is done."""


class Broken(NamedTuple):
    """The executor cannot go on. ``kill`` chooses SIGKILL over SIGTERM for what is running."""

    error: BaseException
    kill: bool = True


# -- actions


class Send(NamedTuple):
    """Send units to a worker, in this order."""

    worker: int
    units: list[tuple[int, Task, int, int]]  # number of the first item, task, its start and stop when it was sent
    devices: tuple[str, ...] | None


class Settle(NamedTuple):
    """A task's outcome is its result or its own exception."""

    task: Task
    outcome: Any


class Judge(NamedTuple):
    """Ask the task's retry policy about an outcome (or a time limit: None), then say Judged."""

    task: Task
    outcome: Any


class Fail(NamedTuple):
    """A task's outcome is none of its own: why is TIMEOUT, CANCELLED, LOST or BROKEN."""

    task: Task
    why: str
    worker: int | None = None
    exit: Exit | None = None


class Launch(NamedTuple):
    """Start these workers."""

    workers: list[int]


class Signal(NamedTuple):
    """Send a signal to a worker, or to its whole group."""

    worker: int
    number: int
    group: bool


class Drain(NamedTuple):
    """Tell a worker to go when it has finished."""

    worker: int


class Probe(NamedTuple):
    """Read a worker's cell, then say Probed."""

    worker: int


class Recall(NamedTuple):
    """Take back what a worker has not claimed up to ``number``, then say RecallDone."""

    worker: int
    number: int


class Warn(NamedTuple):
    """Something the user should know, once."""

    text: str


TIMEOUT = "timeout"
CANCELLED = "cancelled"
LOST = "lost"
BROKEN = "broken"
