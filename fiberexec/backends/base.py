"""What a backend is: the few things that the manager asks of a place where workers can run.

Where workers are processes that the driver itself can start, a backend is a Backend. Where they are in containers, pods or
batch jobs it is a JobBackend, which knows nothing of workers: it starts jobs, and says how they ended.

    manager ── launch(ids) ─► backend ── JobEvent ─► manager        a backend says what happened, and nothing else
            ── signal(id)  ─►

Rules:
- Every method returns at once; what it starts is reported later by an event, exactly one Ended for each Started.
- Ended is a fact: the process does not run any more. What cannot be known is not reported (an API that does not answer
  ends no job).
- Events come from poll(), which the manager calls after each call of its own, when a descriptor of fds() is readable, and
  when wakeup() says so.
"""

from __future__ import annotations

from _socket import socket  # the module around it costs a fresh driver 4 ms
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable


class Resources(NamedTuple):
    """An amount of cpu (cores), memory (bytes) and gpu (devices): what there is, or what a task needs."""

    cpu: float = 0.0
    memory: int = 0
    gpu: int = 0

    def __str__(self) -> str:
        return f"cpu={self.cpu:g}, memory={self.memory / 2**20:g} MiB, gpu={self.gpu}"


class Cell(NamedTuple):
    """What a worker says of itself in shared memory: see _worker."""

    running: int  # the number of the item that it executes, 0 for none
    seconds: float  # since the running item started; meaningful for items with a time limit
    claimed: int  # the last item that it has taken on


class Pool(NamedTuple):
    """Where resources are counted together: a host, or a job. ``devices`` names each of the GPUs in its capacity."""

    name: str
    capacity: Resources
    devices: tuple[str, ...] = ()


class Exit(NamedTuple):
    """How a worker's process ended.

    ``code`` is the exit code (negative: the signal's number; None: unknown), ``reason`` a word such as "OOMKilled" or
    "Evicted", ``log`` the last lines of stderr. ``infrastructure`` is true when neither the task nor its worker can have
    caused it.
    """

    code: int | None = None
    reason: str = ""
    log: str = ""
    infrastructure: bool = False


class Started(NamedTuple):
    """A worker's process runs. ``connection`` is the driver's end of its stream."""

    worker: int
    pid: int
    host: str
    connection: socket
    pool: Pool
    job: str


class Refused(NamedTuple):
    """A worker could not be started. ``final`` is true when trying again cannot help."""

    worker: int
    error: BaseException
    final: bool = False


class Ended(NamedTuple):
    """A worker's process has ended. ``running`` is the item that it was executing (0: none; None: nobody knows)."""

    worker: int
    exit: Exit = Exit()
    running: int | None = None


class Probed(NamedTuple):
    """An answer to probe(): what the worker's cell said, read where the worker is."""

    worker: int
    cell: Cell


class Recalled(NamedTuple):
    """An answer to recall(): no item after ``claimed``, up to ``number``, will be run."""

    worker: int
    number: int
    claimed: int


class Leaving(NamedTuple):
    """A worker's host will take it away soon: it should begin nothing new. Its Ended follows."""

    worker: int


JobEvent = Started | Refused | Ended | Probed | Recalled | Leaving


@runtime_checkable
class Backend(Protocol):
    """The contract. Times are in seconds; ``largest`` and ``peek`` apart, only the manager's thread calls."""

    name: str  # as in FiberExecutor(backend=...)
    host: str  # where its workers are, for messages, if that is one place
    same_host: bool  # whether workers share this host's files, processors and memory, so that there are no jobs to be sized
    largest: Pool  # the largest pool that a task can be given
    default_workers: int  # max_workers where the user gives none
    idle_timeout: float | None  # seconds after which an idle worker goes where the user says nothing; None: never

    def launch(self, workers: Sequence[int]) -> None:
        """Start one process a worker id. Started or Refused follows for each."""

    def signal(self, worker: int, number: int, group: bool) -> None:
        """Send a signal to a worker's process, or to its group. One that has ended is left alone.

        SIGKILL to one that has not started gives its launch up: Refused follows, or Started and Ended.
        """

    def probe(self, worker: int) -> None:
        """Read the worker's cell. Probed follows, unless the worker ends."""

    def recall(self, worker: int, number: int) -> None:
        """Tell the worker not to start items up to ``number``. Recalled follows, unless the worker ends."""

    def peek(self, worker: int) -> Cell | None:
        """The newest that is known of the worker's cell; may be old, None for nothing. Any thread may ask."""

    def wakeup(self) -> float | None:
        """When poll() should be called though no descriptor is readable: a time.monotonic(), None for never."""

    def fds(self) -> Sequence[int]:
        """Descriptors that become readable when poll() has something to say."""

    def poll(self) -> list[JobEvent]:
        """What happened since the last call."""

    def close(self) -> None:
        """End everything that was started, remove everything that was made, and return when that is done."""

    def forked(self) -> None:
        """Close, in a forked child, what belongs to the parent."""


class Job(NamedTuple):
    """A container, a pod or a batch job that is to be started."""

    id: str  # "<program>-<number>", of a-z, 0-9 and "-": unique in the world
    program: str  # its jobs are found by this name, whoever looks
    command: tuple[str, ...]  # what runs in it: the agent
    credentials: bytes  # what the agent reads first, from its stdin or a file. A secret


class JobEnded(NamedTuple):
    """A fact: nothing of the job runs any more. ``final`` says why no other job can do better, "" if one may."""

    job: str
    exit: Exit = Exit()
    final: str = ""


@runtime_checkable
class JobBackend(Protocol):
    """A place where jobs can run. Its methods may block; any thread may call them, several at once."""

    name: str
    largest: Pool  # what one job has
    default_workers: int
    idle_timeout: float | None

    def advertise(self) -> tuple[str, ...]:
        """Addresses of this host that jobs can reach; the hub listens on the first."""

    def reach(self, port: int, program: str) -> tuple[str, ...]:
        """Where agents dial to reach a port of these addresses: "host:port" each. What that takes is made first.

        Asked before each start, since what was made may have gone. Raises LaunchError.
        """

    def start(self, job: Job) -> None:
        """Start a job. Raises LaunchError, which says what happened, what to do, and whether it is final."""

    def watch(self, report: Callable[[list[JobEnded]], None]) -> None:
        """Report the end of each job that was started, once, until close(). While nobody can know, nothing is reported."""

    def terminate(self, jobs: Sequence[str]) -> None:
        """End jobs and remove what was made for them. watch() reports their end."""

    def explain(self, job: str) -> str:
        """Why a job that was started is not there yet, as far as anybody knows."""

    def list(self) -> list[dict[str, Any]]:
        """All jobs of fiberexec that are there, of every program: id, program, state, host, image, started."""

    def logs(self, job: str, follow: bool = False) -> Iterator[str]:
        """What a job has written, line by line."""

    def remove(self, program: str) -> int:
        """End and remove everything that a program has made; returns how many jobs that were."""

    def close(self) -> None:
        """End watch()."""


class BackendFactory(Protocol):
    """What an entry point in the group ``fiberexec.backends`` names: makes a backend from the executor's settings.

    It contacts nobody. Raises ConfigError for settings that make no sense.
    """

    def __call__(self, settings: Any, max_workers: int | None) -> Backend | JobBackend: ...
