"""Jobs and the workers in them, as the hub sees them: between who wants workers, who starts jobs, and the agents.

    RemoteBackend ── launch, signal, ... ─► Fleet ── start, terminate ─► Launcher (a thread of the driver) ─► docker, ...
                  ◄─ started, ended, ... ──   ▲  ◄─ failed, ended ──
                                              └── AgentLink ◄─► agent

Rules:
- A fleet belongs to the process that made it, and ends with it; so do the jobs of a launcher.
- A worker's end is told once, after all that it had to say, and only when it is certain.
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
from fiberexec._hub.shared import PARKED, Shared, Timer, Wait
from fiberexec._hub.switch import MARGIN, AgentLink
from fiberexec._hub.wire import EVENT
from fiberexec._session import ABANDONED
from fiberexec._stream import ProtocolError

if TYPE_CHECKING:
    from fiberexec._hub.server import Hub, Peer, Process

LINGER = 5.0  # seconds that a job without a worker stays
_UNKNOWN = (None, "", "", False)  # an Exit
_END = 1.0  # seconds that an agent has to end by itself
_OUTPUT = 16 << 20  # bytes of workers' output that wait for an owner who does not read


class Subscriber:
    """A connection by which the hub tells events, as they come."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def tell(self, *event: object) -> None:
        self._peer.push(EVENT, messages.encode(event))

    @property
    def backlog(self) -> int:
        return self._peer.stream.backlog


class Worker:
    """A worker in a job, with the channel of its stream."""

    def __init__(self, channel: int) -> None:
        self.channel = channel
        self.started = False


class Job:
    """A job, from the wish for it to its end."""

    def __init__(self, fleet: Fleet, id: str) -> None:
        self.fleet = fleet
        self.id = id
        self.workers: dict[int, Worker] = {}
        self.ending = False
        self.ended = False
        self.leaving = False  # its host takes it away soon
        self.why_lost = ""  # its agent is not listened to any more
        self.hello: tuple[Any, ...] | None = None  # what its agent said of itself
        hub = fleet.hub
        self.link = hub.switch.links[id] = AgentLink(hub.switch, fleet.timeout, self.obey, self.lost)
        self.link.job = self
        self._channels = itertools.count(2, 2)

    @property
    def free(self) -> bool:
        return not self.ending and not self.leaving and len(self.workers) < self.fleet.workers_per_job

    def add(self, worker: int) -> None:
        """Start a worker as soon as there is an agent."""
        self.workers[worker] = Worker(next(self._channels))
        if self.hello is not None:
            self.link.say("launch", worker, self.workers[worker].channel)

    def attach(self, worker: int, sock: Any) -> None:
        """Connect a socket with a worker's stream."""
        found = self.workers.get(worker)
        if found is None:
            sock.close()
        else:
            self.link.relays.add(found.channel, sock)

    def obey(self, verb: str, *args: Any) -> None:
        """The agent says something."""
        tell = self.fleet.tell
        if verb == "hello":
            wrong = _mismatch(self.id, *args)
            if wrong:
                self.terminate()
                self.fail(wrong, True)
                return
            self.hello = args
            for worker in self.workers:
                self.link.say("launch", worker, self.workers[worker].channel)
        elif verb == "output":
            if self.fleet.backlog < _OUTPUT:
                tell("output", *args)
        elif self.hello is None:
            raise ProtocolError("an agent that has not said hello")
        elif verb == "started":
            worker, pid, host = args
            if worker in self.workers:
                self.workers[worker].started = True
                tell("started", worker, pid, host, self.id, *self.hello)
                if self.leaving:
                    tell("leaving", worker)
        elif verb == "refused":
            self._refuse(args[0], args[1], False)
        elif verb == "ended":
            worker, exit, running = args
            self._end(worker, self._judged(exit), running)
        elif verb == "leaving":
            self.leaving = True
            for worker in self.workers:
                tell("leaving", worker)
        elif verb in ("probed", "recalled"):
            tell(verb, *args)
        else:
            raise ProtocolError(f"an agent says {verb!r}")

    def lost(self, why: str) -> None:
        """Nothing has been heard of the agent for so long that it has ended itself, or is stopped."""
        if not self.why_lost:
            self.why_lost = why
            self.terminate()
            self.fleet.hub.at(monotonic() + MARGIN, Timer(lambda: self.end(_UNKNOWN)))  # whatever the backend can find out

    def fail(self, text: str, final: bool) -> None:
        """The job could not be started."""
        self.ending = self.ended = True
        for worker in list(self.workers):
            self._refuse(worker, text, final)
        self._forget()

    def end(self, exit: tuple[Any, ...]) -> None:
        """Nothing of the job runs any more."""
        if self.ended:
            return
        if self.hello is None:
            self.fail(_explain(self.id, exit), False)
            return
        self.ending = self.ended = True
        exit = self._judged(exit)
        for worker, found in list(self.workers.items()):
            if not found.started:
                self._refuse(worker, _explain(self.id, exit), False)
                continue
            self._end(worker, exit, None)
        self._forget()

    def _judged(self, exit: tuple[Any, ...]) -> tuple[Any, ...]:
        """An Exit that says whether what runs in the job can have caused it."""
        code, reason, log, infrastructure = exit
        if self.why_lost:
            return code, self.why_lost, log, True
        if self.leaving:
            return code, reason or "its host took the job away", log, True
        if code == ABANDONED:
            return code, "the hub was out of its reach", log, True
        return code, reason, log, infrastructure

    def give_up(self, worker: int) -> None:
        """A worker that has not started is not wanted any more."""
        if self.hello is None:
            self._refuse(worker, "it was given up", False)
        else:
            self.link.say("signal", worker, 9, True)

    def terminate(self) -> None:
        """End it, whatever it does."""
        self.ending = True
        self.fleet.launcher.tell("terminate", self.id)

    def finish(self) -> None:
        """End it: it has nothing to do any more."""
        if self.ending:
            return
        self.ending = True
        if self.hello is None:
            self.terminate()
        else:
            self.link.say("end")
            self.fleet.hub.at(monotonic() + _END, Timer(lambda: None if self.ended else self.terminate()))

    def _refuse(self, worker: int, text: str, final: bool) -> None:
        if self.workers.pop(worker, None) is not None:
            self.fleet.tell("refused", worker, text, final)
            self._linger()

    def _end(self, worker: int, exit: tuple[Any, ...], running: int | None) -> None:
        """Tell a worker's end, when all that it said has been passed on."""
        found = self.workers.pop(worker, None)
        if found is None:
            return
        relay = self.link.relays.channels.get(found.channel)
        if relay is None:
            self.fleet.tell("ended", worker, tuple(exit), running)
        else:
            relay.at_close = lambda: self.fleet.tell("ended", worker, tuple(exit), running)
            relay.end()
        self._linger()

    def _linger(self) -> None:
        if not self.workers and not self.ending:
            wait = 0.0 if self.fleet.closing else LINGER
            self.fleet.hub.at(monotonic() + wait, Timer(lambda: None if self.workers else self.finish()))

    def _forget(self) -> None:
        """Nothing is accepted of its agent any more; what is left to be passed on to its owner still is."""
        self.fleet.hub.switch.links.pop(self.id, None)
        self.link.retire()
        self.fleet.forget(self)


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
        """The code that was asked for, as the frame's first buffer; an empty digest: it is not the user's own."""
        asking = self._asking.pop(request, None)
        if asking is not None:
            asking.leave()
            asking.peer.reply(digest or None, peer.buffers)

    def ask_code(self, peer: Peer, name: str) -> Any:
        """Ask for the code of a top-level module; the answer goes to this peer."""
        request = next(self._numbers)
        self._asking[request] = Wait(peer, OrderedDict(), None)
        self.tell("code", request, name)
        return PARKED

    def do_failed(self, peer: Peer, job: str, text: str, final: bool) -> None:
        for found in self._find(job):
            found.fail(text, final)

    def do_ended(self, peer: Peer, job: str, exit: tuple[Any, ...]) -> None:
        for found in self._find(job):
            found.end(exit)

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


class Fleet(Shared):
    """The workers of one RemoteBackend."""

    def __init__(self, hub: Hub) -> None:
        super().__init__(hub)
        self.jobs: dict[str, Job] = {}
        self.launcher: Launcher
        self.timeout = 60.0
        self.workers_per_job = 1
        self.closing = False
        self.shipped: tuple[str, list[Any]] = "", []
        self._subscriber: Subscriber | None = None
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

    def do_probe(self, peer: Peer, worker: int) -> None:
        self._say(worker, "probe", worker)

    def do_recall(self, peer: Peer, worker: int, number: int) -> None:
        self._say(worker, "recall", worker, number)

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
        Wait(peer, self._closers, None)
        return PARKED

    def _job_of(self, worker: int) -> Job | None:
        return next((job for job in self.jobs.values() if worker in job.workers), None)

    def _say(self, worker: int, *message: object) -> None:
        job = self._job_of(worker)
        if job is not None:
            job.link.say(*message)

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

    def forget(self, job: Job) -> None:
        self.jobs.pop(job.id, None)
        if self.closing and not self.jobs:
            self.launcher.fleets.pop(self, None)
            for wait in list(self._closers):
                wait.finish(None)

    def gone(self, process: Process) -> None:
        self._subscriber = None
        self.close()


def _mismatch(job: str, version: int, python: str, pid: int, host: str, *_: object) -> str:
    """What is wrong with an agent's versions."""
    mine = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if (version, python) == (messages.VERSION, mine):
        return ""
    return (
        f"job {job} on {host} runs Python {python} and protocol {version} of fiberexec, the driver Python {mine} and protocol "
        f"{messages.VERSION}: use an image with Python {mine} and the driver's version of fiberexec "
        f"(in its Dockerfile: FROM python:{mine}-slim)"
    )


def _explain(job: str, exit: tuple[Any, ...]) -> str:
    code, reason, log, _ = exit
    how = reason or (f"exit code {code}" if code is not None else "for an unknown reason")
    return f"job {job} ended ({how}) before its agent could start a worker" + (f"; its last lines:\n{log}" if log else "")
