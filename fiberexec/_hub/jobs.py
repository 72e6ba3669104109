"""One job as the hub sees it: what its agent says, and what becomes of its workers.

Rules:
- A worker's end is told once, after all that it had to say, and only when it is certain.
- What is lost together with its job, or the way to it, says whether anything that ran there can have caused it.
- What an agent says is looked at before anybody hears of it: whether it is about a worker of this job, and as it should be.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from fiberexec import _messages as messages
from fiberexec._hub.shared import Timer
from fiberexec._hub.switch import MARGIN, AgentLink
from fiberexec._session import ABANDONED
from fiberexec._stream import ProtocolError

if TYPE_CHECKING:
    from fiberexec._hub.fleet import Fleet

LINGER = 5.0  # seconds that a job without a worker stays
_UNKNOWN = (None, "", "", False)  # an Exit
_END = 1.0  # seconds that an agent has to end by itself
_STARVED = 3  # jobs in a row that memory did not suffice to start a worker in: the next one will be no better
_HUGE = 1 << 64  # nobody counts, or measures, so far
_OUTPUT = 16 << 20  # bytes of workers' output that wait for an owner who does not read
# What agents say, and of which types what they say it with is.
_SAID: dict[str, tuple[type | tuple[type, ...], ...]] = {
    "hello": (int, str, int, str, str),
    "output": (int, str),
    "leaving": (),
    "started": (int, int, str),
    "refused": (int, str),
    "ended": (int, list, (int, type(None))),
    "probed": (int, list),
    "recalled": (int, int, int),
}
_PARTS: dict[str, tuple[type | tuple[type, ...], ...]] = {  # of the list that is said
    "ended": ((int, type(None)), str, str, bool),
    "probed": (int, (int, float), int),
}
_ANSWERS = {"probe": "probed", "recall": "recalled"}


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
        self.served = False  # a worker has started in it
        self.leaving = False  # its host takes it away soon
        self.why_lost = ""  # its agent is not listened to any more
        self.greeted = False  # its agent has said hello
        self._asked: Counter[str] = Counter()  # how often its agent may say what it is asked for
        self.devices = ""  # GPUs that its agent sees: their names, with commas between them
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
        if self.greeted:
            self.link.say("launch", worker, self.workers[worker].channel)

    def attach(self, worker: int, sock: Any) -> None:
        """Connect a socket with a worker's stream."""
        found = self.workers.get(worker)
        if found is None:
            sock.close()
        else:
            self.link.relays.add(found.channel, sock)

    def obey(self, verb: str, *args: Any) -> None:
        """The agent says something. Raises ProtocolError."""
        if self.why_lost:
            return
        tell = self.fleet.tell
        if verb == "hello" and not self.greeted and _fits(args[:4], _SAID["hello"][:4]):
            wrong = _mismatch(self.id, *args)
            if wrong:
                self.terminate()
                self.fail(wrong, True)
                return
            _check(verb, args)
            self.greeted, self.devices = True, args[-1]
            for worker in self.workers:
                self.link.say("launch", worker, self.workers[worker].channel)
            return
        _check(verb, args)
        if verb == "output":
            if self.fleet.backlog < _OUTPUT:
                descriptor, text = args
                tell("output", descriptor, text.encode("latin-1"))
        elif not self.greeted or verb == "hello":
            raise ProtocolError("an agent says hello first, and once")
        elif verb == "leaving":
            if self.leaving:
                raise ProtocolError("an agent says once that it is leaving")
            self.leaving = True
            for worker in self.workers:
                tell("leaving", worker)
        elif args[0] not in self.workers:
            return  # it has been told of its end, or is another job's
        elif self.workers[args[0]].started is (verb in ("started", "refused")):
            raise ProtocolError(f"an agent says {verb!r}, which cannot be")
        elif verb == "started":
            worker, pid, host = args
            self.workers[worker].started = self.served = True
            self.fleet.starved = 0
            tell("started", worker, pid, host, self.id, self.devices)
            if self.leaving:
                tell("leaving", worker)
        elif verb == "refused":
            self._refuse(args[0], args[1], False)
        elif verb == "ended":
            worker, exit, running = args
            self._end(worker, self._judged(exit), running)
        else:
            self._asked[verb] -= 1
            if self._asked[verb] < 0:
                raise ProtocolError(f"an agent says {verb!r}, and nobody has asked")
            tell(verb, *args)
            if verb == "probed":
                self.fleet.looked(*args)

    def ask(self, verb: str, worker: int, *args: object) -> None:
        """Have the agent probe or recall; it answers, unless the worker has gone."""
        self._asked[_ANSWERS[verb]] += 1
        self.link.say(verb, worker, *args)

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

    def end(self, exit: tuple[Any, ...], final: str = "") -> None:
        """Nothing of the job runs any more. ``final`` is why no other can do better, "" if one may."""
        if self.ended:
            return
        starved = False
        if exit[1] == "OOMKilled" and not self.served:
            self.fleet.starved += 1
            starved = self.fleet.starved >= _STARVED
        exit = self._judged(exit)
        if not self.greeted:
            self.fail(final or _explain(self.id, exit), bool(final) or starved)
            return
        self.ending = self.ended = True
        for worker, found in list(self.workers.items()):
            if not found.started:
                self._refuse(worker, _explain(self.id, exit), starved)
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

    def explained(self, text: str) -> None:
        """What is known of a job that has not shown up."""
        if self.greeted:
            text = f"the agent of job {self.id} is there, and its worker is being started"
        for worker, found in self.workers.items():
            if not found.started:
                self.fleet.tell("explained", worker, text)

    def give_up(self, worker: int) -> None:
        """A worker that has not started is not wanted any more."""
        if not self.greeted:
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
        if not self.greeted:
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


def _check(verb: str, args: tuple[Any, ...]) -> None:
    """Raises ProtocolError for what no agent says."""
    wanted = _SAID.get(verb)
    if wanted is None or not _fits(args, wanted):
        raise ProtocolError(f"an agent says {verb!r}")
    parts = _PARTS.get(verb)
    if parts is not None and not _fits(next(value for value in args if isinstance(value, list)), parts):
        raise ProtocolError(f"an agent says {verb!r}")


def _fits(values: Sequence[Any], types: tuple[type | tuple[type, ...], ...]) -> bool:
    return len(values) == len(types) and all(map(isinstance, values, types)) and all(map(_counts, values))


def _counts(value: object) -> bool:
    """Whether a number is one to reckon with, neither huge nor infinite nor NaN; all else is."""
    return not isinstance(value, (int, float)) or abs(value) < _HUGE


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
