"""Jobs and the workers in them, as the hub sees them: between who wants workers, who starts jobs, and the agents.

    RemoteBackend ── launch, signal, ... ─► Fleet ── start, terminate ─► Launcher (a thread of the driver) ─► docker, ...
                  ◄─ started, ended, ... ──   ▲  ◄─ failed, ended ──
                                              └── AgentLink ◄─► agent

Rules:
- A fleet belongs to the process that made it, and ends with it; so do the jobs of a launcher.
- What processes in a job want to be started is started by the launcher that started their job.
"""

from __future__ import annotations

import itertools
import sys
from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

from fiberexec import _messages as messages
from fiberexec._hub.jobs import Job
from fiberexec._hub.shared import PARKED, Shared, Wait
from fiberexec._hub.wire import EVENT

if TYPE_CHECKING:
    from fiberexec._hub.peers import Peer, Process
    from fiberexec._hub.server import Hub

_CODE = 60.0  # seconds that the driver has to pack a module
_LOOK = 1.0  # seconds that agents have to say what their workers do
_CONFIRM = 10.0  # seconds without any job's end after which who closes is not kept waiting: a janitor removes what is left


class Subscriber:
    """A connection by which the hub tells events, as they come."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def tell(self, *event: object) -> None:
        self._peer.push(EVENT, messages.encode(event))

    @property
    def backlog(self) -> int:
        return self._peer.stream.backlog


class Launcher(Shared):
    """The thread of a process that starts jobs."""

    def __init__(self, hub: Hub, program: str) -> None:
        super().__init__(hub)
        self.program = program
        self.remains: list[Any] = []  # what a janitor needs to know of each backend
        self.fleets: dict[Fleet, None] = {}
        self.tell: Callable[..., None] = lambda *event: None
        self._numbers = itertools.count(1)
        self._asking: dict[int, Wait] = {}  # who waits for code, by the request's number

    def do_events(self, peer: Peer) -> None:
        self.tell = Subscriber(peer).tell
        peer.process.uses[self] = None

    def do_listen(self, peer: Peer, host: str, tls: tuple[str, str, str], path: list[str], remains: Any) -> int:
        """Let agents come by an address of this host; ``tls`` is (ca, certificate, key), ``path`` where pynng is found."""
        sys.path += [folder for folder in path if folder not in sys.path]
        if remains not in self.remains:
            self.remains.append(remains)
        return self.hub.switch.listen(host, *tls)

    def do_leave(self, peer: Peer) -> None:
        """Its process ends in order, and has removed everything."""
        self.remains.clear()

    def do_answer(self, peer: Peer, request: int, digest: str) -> None:
        """The code that was asked for, as the frame's first buffer; with an empty digest, why it is not sent."""
        asking = self._asking.pop(request, None)
        if asking is not None and not asking.done:
            asking.leave()
            asking.peer.reply(digest, peer.buffers)

    def ask_code(self, peer: Peer, name: str) -> Any:
        """Ask for the code of a top-level module; the answer goes to this peer."""
        request = next(self._numbers)
        self._asking[request] = _Asked(peer, OrderedDict(), _CODE)
        self.tell("code", request, name)
        return PARKED

    def do_explained(self, peer: Peer, job: str, text: str) -> None:
        for found in self._find(job):
            found.explained(text)

    def do_failed(self, peer: Peer, job: str, text: str, final: bool) -> None:
        for found in self._find(job):
            found.fail(text, final)

    def do_ended(self, peer: Peer, job: str, exit: tuple[Any, ...], final: str) -> None:
        for found in self._find(job):
            found.end(exit, final)

    def do_unwatched(self, peer: Peer, job: str, text: str) -> None:
        """Its end may have gone unheard. An agent that has shown up is heard of by itself."""
        for found in self._find(job):
            if not found.greeted:
                found.terminate()
                found.fail(text, False)

    def _find(self, job: str) -> list[Job]:
        return [fleet.jobs[job] for fleet in self.fleets if job in fleet.jobs]

    def new_id(self) -> str:
        return f"{self.program}-{next(self._numbers)}"

    def gone(self, process: Process) -> None:
        """Its process has ended: nobody else looks after its jobs."""
        for fleet in list(self.fleets):
            fleet.close()
        for wait in self._asking.values():
            if not wait.done:
                wait.finish(None)
        self.hub.clean(self.program, self.remains)
        self.remains = []


class _Asked(Wait):
    """A process in a job waits for code."""

    __slots__ = ()

    def due(self) -> None:
        self.leave()
        self.peer.reply("", [f"the driver has not answered for {_CODE:g} seconds".encode()])


class _Look(Wait):
    """Somebody wants to know what workers do now."""

    __slots__ = ("asked", "found")

    def __init__(self, peer: Peer, queue: OrderedDict[Any, None], asked: set[int]) -> None:
        super().__init__(peer, queue, _LOOK)
        self.asked = asked
        self.found: list[tuple[int, Any]] = []

    def tell(self, worker: int, cell: Any) -> None:
        if worker in self.asked:
            self.asked.discard(worker)
            self.found.append((worker, cell))
            if not self.asked:
                self.finish(self.found)

    def due(self) -> None:
        self.finish(self.found)  # those that are stopped or out of reach do not answer


class _Closing(Wait):
    """Somebody waits for the ends of all jobs."""

    __slots__ = ("fleet",)

    def __init__(self, peer: Peer, queue: OrderedDict[Any, None], fleet: Fleet) -> None:
        super().__init__(peer, queue, _CONFIRM)
        self.fleet = fleet

    def due(self) -> None:
        again = self.fleet.forgot + _CONFIRM
        if again > monotonic():
            self.fleet.hub.at(again, self)
        else:
            self.finish(None)


class Fleet(Shared):
    """The workers of one RemoteBackend."""

    def __init__(self, hub: Hub) -> None:
        super().__init__(hub)
        self.jobs: dict[str, Job] = {}
        self.launcher: Launcher
        self.timeout = 60.0
        self.workers_per_job = 1
        self.closing = False
        self.starved = 0  # jobs in a row that were killed for want of memory before a worker had started in them
        self.forgot = 0.0  # when a job was last known to have ended
        self.shipped: tuple[str, list[Any]] = "", []
        self._subscriber: Subscriber | None = None
        self._owner: Process | None = None
        self._looks: OrderedDict[Any, None] = OrderedDict()
        self._closers: OrderedDict[Any, None] = OrderedDict()  # who waits for the end

    def do_events(self, peer: Peer, launcher: int, settings: tuple[Any, ...], workers_per_job: int, timeout: float) -> None:
        """The first call. ``settings`` is for the launcher; 0 as launcher: the caller is a process in a job."""
        found = self.hub.objects.get(launcher) if launcher else peer.link and peer.link.job.fleet.launcher
        if not isinstance(found, Launcher):
            raise ValueError("only a process of this host, or one in a job, can start jobs")
        self.launcher = found
        self.launcher.fleets[self] = None
        self.timeout, self.workers_per_job = timeout, workers_per_job
        self._settings = settings
        self._subscriber = Subscriber(peer)
        self._owner = peer.process
        peer.process.uses[self] = None

    def do_ship(self, peer: Peer, digest: str) -> None:
        """Keep an archive, the frame's buffer, for all workers."""
        self.shipped = digest, list(peer.buffers)

    def do_launch(self, peer: Peer, workers: list[int]) -> None:
        for worker in workers:
            if self.closing:
                self.tell("refused", worker, "the backend is closed", True)
                continue
            job = next((job for job in self.jobs.values() if job.free), None)
            if job is None:
                job = Job(self, self.launcher.new_id())
                self.jobs[job.id] = job
                self.launcher.tell("start", job.id, self._settings)
            job.add(worker)

    def do_signal(self, peer: Peer, worker: int, number: int, group: bool) -> None:
        job = self._job_of(worker)
        if job is not None and job.workers[worker].started:
            job.link.say("signal", worker, number, group)
        elif job is not None and number == 9:
            job.give_up(worker)

    def do_explain(self, peer: Peer, worker: int) -> None:
        """Why is there no worker yet? "explained" follows, if there is still none then."""
        job = self._job_of(worker)
        if job is not None:
            self.launcher.tell("explain", job.id)

    def do_probe(self, peer: Peer, worker: int) -> None:
        self._ask("probe", worker)

    def do_look(self, peer: Peer) -> Any:
        """What all workers do now, as far as their agents say so in time: (worker, cell)."""
        asked = {worker for job in self.jobs.values() for worker, found in job.workers.items() if found.started}
        if not asked:
            return []
        _Look(peer, self._looks, asked)
        for worker in asked:
            self._ask("probe", worker)
        return PARKED

    def looked(self, worker: int, cell: Any) -> None:
        for look in list(self._looks):
            look.tell(worker, cell)

    def do_recall(self, peer: Peer, worker: int, number: int) -> None:
        self._ask("recall", worker, number)

    def do_attach(self, peer: Peer, worker: int) -> Any:
        """Make the caller's connection the worker's stream, after the answer."""
        job = self._job_of(worker)
        peer.reply(None)
        sock = self.hub.hand_over(peer)
        if job is None:
            sock.close()
        else:
            job.attach(worker, sock)
        return PARKED

    def do_close(self, peer: Peer) -> Any:
        """End everything; answered when it is gone."""
        self.close()
        if not self.jobs:
            return None
        _Closing(peer, self._closers, self)
        return PARKED

    def _job_of(self, worker: int) -> Job | None:
        return next((job for job in self.jobs.values() if worker in job.workers), None)

    def _ask(self, verb: str, worker: int, *args: object) -> None:
        job = self._job_of(worker)
        if job is not None:
            job.ask(verb, worker, *args)

    def tell(self, *event: object) -> None:
        if self._subscriber is not None:
            self._subscriber.tell(*event)

    @property
    def backlog(self) -> int:
        return 0 if self._subscriber is None else self._subscriber.backlog

    def close(self) -> None:
        self.closing = True
        for job in list(self.jobs.values()):
            job.finish()
        self._done()

    def _done(self) -> None:
        """Keep nothing, if this is closed and the last job has ended."""
        if not self.jobs and self._owner is not None:
            self.launcher.fleets.pop(self, None)
            self._owner.uses.pop(self, None)
            self.shipped = "", []

    def forget(self, job: Job) -> None:
        self.jobs.pop(job.id, None)
        self.forgot = monotonic()
        if self.closing and not self.jobs:
            self._done()
            for wait in list(self._closers):
                wait.finish(None)

    def gone(self, process: Process) -> None:
        self._subscriber = None
        self.close()
