"""The agent: the first process of a job on another host. It starts workers, and carries what they and the hub say.

    hub ◄── link: a session over mutual TLS ──► agent ─ LocalBackend ─► workers, each with its stream
                                                  └─ door: a Unix socket, through which processes of the job reach the hub

Rules:
- What goes through a stream is not looked at. What hub and agent say to each other are plain messages.
- The hub says with each answer what it has heard last of this agent. When that is ``driver_timeout`` seconds ago, however
  late an answer comes, the hub may have given it up: it ends everything, and itself.
- A worker's end is told after all that it had to say.
- SIGTERM means that this job is about to be taken away: nothing new begins, what runs may finish within _GRACE, or what the
  variable FIBEREXEC_GRACE says.
- Workers know by the variable FIBEREXEC_JOB that they are in a job: it names a folder with the door and with shipped code.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tempfile
from _socket import AF_UNIX, SOCK_STREAM, gethostname, socket
from collections.abc import Callable
from time import monotonic, monotonic_ns
from typing import Any

from fiberexec import _config, _platform
from fiberexec import _messages as messages
from fiberexec._bundle._job import SHIPPED
from fiberexec._hub.folder import place
from fiberexec._hub.launch import ADDRESS, DOOR
from fiberexec._inherited import JOB
from fiberexec._relay import IN, Relays
from fiberexec._session import ABANDONED, CONTROL, EXCHANGES, KEY_SIZE, PARKED, UNREACHABLE, Session, decode, encode
from fiberexec._stream import ProtocolError
from fiberexec.backends.base import Ended, JobEvent, Probed, Recalled, Refused, Started
from fiberexec.backends.local import LocalBackend

# A connection is made again when it was silent for this part of driver_timeout, or so many seconds: nng does not notice
# every connection that was reset while it was busy. It waits longer each time that nobody answers.
SILENCE = 3.0
_LONGEST_SILENCE = 6.5
_FOLDER = "fiberexec-job-"  # how the name of its folder begins
_GRACE = 25.0  # seconds; who sends SIGTERM sends SIGKILL a little later
GRACE = "FIBEREXEC_GRACE"  # the variable that says otherwise
_BULK = 1 << 15  # bytes of an answer, beyond which more are likely to follow
_SHUT = 0.5  # seconds that the door is shut when there is no descriptor for who comes in
_BACKLOG = 4 << 20  # bytes on the way to the hub, beyond which workers' output waits
LEFT = 0  # the exit code after SIGTERM


class Agent:
    """See the module's description. ``credentials`` is what the launcher made for this job: see Launcher."""

    def __init__(self, credentials: dict[str, Any], folder: str) -> None:
        self._credentials = credentials
        self._timeout: float = credentials["driver_timeout"]
        self._local = LocalBackend(_config.Settings(), credentials["workers"])
        self._poll = select.poll()
        self._calls: dict[int, Callable[[int], None]] = {}
        self._session = Session(os.urandom(KEY_SIZE))
        self._relays = Relays(self._session.push, self, self._refuse)
        self._channels: dict[int, int] = {}  # by worker
        self._doors = 1  # the last channel that was opened here: odd ones are
        self._backend_fds: set[int] = set()
        self._waiting_outputs: list[Callable[[], None]] = []  # go on reading them
        self._parked = PARKED  # requests that are to wait at the hub
        self._ending = False
        self._called = self._answered = monotonic()  # when the connection was made, when the last answer came
        self._lease = monotonic()  # the hub has heard of this agent at this time, or later
        self._met = False  # it has answered once
        self._least_patience: float = min(self._timeout / SILENCE, _LONGEST_SILENCE)
        self._patience: float = self._least_patience
        self._look_at = monotonic() + self._least_patience  # whether what was said has arrived
        self._grace = float(os.environ.pop(GRACE, _GRACE))
        self._leave_at = float("inf")  # end, whatever runs
        self._running = 0  # workers
        self._link = self._dial()
        self._door = socket(AF_UNIX, SOCK_STREAM)
        self._door.bind(os.path.join(folder, DOOR))
        self._door.listen(128)
        self._door.setblocking(False)
        self._opens_at = 0.0  # when the door opens again, 0: it is open
        self.follow(self._door.fileno(), IN, self._accept)
        self._follow_signals()
        self._pipes: set[int] = set()  # where workers' output comes from
        self._outputs = {1: self._capture(1), 2: self._capture(2)}  # where it went before, by descriptor
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        devices = ",".join(self._local.largest.devices)
        self._say("hello", messages.VERSION, version, os.getpid(), gethostname(), devices)

    # -- the loop

    def follow(self, fd: int, events: int, call: Callable[[int], None]) -> None:
        self._calls[fd] = call
        self._poll.register(fd, events)

    def unfollow(self, fd: int) -> None:
        del self._calls[fd]
        self._poll.unregister(fd)

    def run(self) -> int:
        """Serve until the hub says so, or has gone. Returns the exit code."""
        while not self._ending:
            self._speak()
            self._watch_backend()
            ready = self._poll.poll(1000 * max(0.0, self._wakeup() - monotonic()))
            # What a task printed comes before its result.
            for fd, events in sorted(ready, key=lambda each: each[0] not in self._pipes):
                call = self._calls.get(fd)
                if call is not None:
                    call(events)
            for event in self._local.poll():
                self._tell(event)
            if self._opens_at and monotonic() >= self._opens_at:
                self._opens_at = 0.0
                self.follow(self._door.fileno(), IN, self._accept)
            if monotonic() > self._lease + self._timeout:
                return self._give_up()
            if monotonic() > self._silent():
                self._redial()
            if monotonic() > self._look_at:
                self._look_at = monotonic() + self._least_patience
                if self._session.overdue():  # requests may get lost while others are answered
                    self._session.rewind()
            if monotonic() > self._leave_at or (self._leaving and not self._running and not self._session.backlog):
                return LEFT
        return 0

    def end(self) -> None:
        """End every worker."""
        self._local.close()
        for fd, before in self._outputs.items():
            os.dup2(before, fd)

    def _wakeup(self) -> float:
        due = min(self._silent(), self._lease + self._timeout, self._leave_at) + 0.001
        other = self._local.wakeup()
        if self._opens_at:
            due = min(due, self._opens_at)
        return due if other is None else min(due, other)

    def _silent(self) -> float:
        """When the connection will have been silent for too long."""
        return max(self._answered, self._called) + self._patience

    def _follow_signals(self) -> None:
        wake, wakeup = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, lambda *_: None)
        self.follow(wake, IN, lambda events: self._leave(wake))

    @property
    def _leaving(self) -> bool:
        return self._leave_at < float("inf")

    def _leave(self, wake: int) -> None:
        """SIGTERM has come."""
        os.read(wake, 64)
        if not self._leaving:
            self._leave_at = monotonic() + self._grace
            self._say("leaving")

    def _watch_backend(self) -> None:
        wanted = set(self._local.fds())
        for fd in self._backend_fds - wanted:
            self.unfollow(fd)
        for fd in wanted - self._backend_fds:
            self.follow(fd, IN, lambda events: None)  # run() asks it anyway
        self._backend_fds = wanted

    def _capture(self, fd: int) -> int:
        """Let what is written to ``fd`` come here; returns where it went before."""
        before = os.dup(fd)
        os.set_inheritable(before, False)
        read, write = os.pipe()
        os.dup2(write, fd)
        os.close(write)
        os.set_blocking(read, False)
        self._pipes.add(read)

        def pass_on(events: int) -> None:
            if self._session.backlog > _BACKLOG:
                self.unfollow(read)  # until the hub has got some
                self._waiting_outputs.append(resume)
                return
            try:
                data = os.read(read, 1 << 16)
            except BlockingIOError:
                return
            writable = select.poll()
            writable.register(before, select.POLLOUT)
            if writable.poll(0):  # whoever reads our own output may be stuck
                try:
                    os.write(before, data)
                except OSError:
                    pass
            self._say("output", fd, data.decode("latin-1"))

        def resume() -> None:
            self.follow(read, IN, pass_on)

        resume()
        return before

    # -- the hub

    def _dial(self) -> Any:
        from fiberexec._link import Dialer

        told = self._credentials
        url = _reachable(told["hub"])
        link = Dialer(url, told["server"], told["ca"], told["certificate"], told["key"], EXCHANGES)
        self.follow(link.fileno(), IN, lambda events: self._hear())
        return link

    def _redial(self) -> None:
        """The connection may be dead without anybody having said so: make another."""
        self.unfollow(self._link.fileno())
        self._link.close()
        self._called = monotonic()
        self._patience = min(2 * self._patience, self._timeout / SILENCE)
        self._link = self._dial()
        self._session.rewind()

    def _speak(self) -> None:
        self._session.stamp = monotonic_ns()
        while self._link.free and (self._session.has_output or self._link.waiting < self._parked):
            self._link.send(self._session.take())

    def _hear(self) -> None:
        for answer in self._link.received():
            if answer is None:
                self._session.rewind()
                continue
            if not answer:
                self._report("the hub has given this job up")
                self._ending = True
                return
            self._parked = PARKED if len(answer) > _BULK else PARKED // 2  # each request that only waits is work for both
            try:
                packets = self._session.accept(answer)
                self._answered = monotonic()
                self._patience = self._least_patience
                self._lease = max(self._lease, self._session.heard / 1e9)
                self._met = True
                for packet in packets:
                    if packet.kind == CONTROL:
                        self._obey(*decode(packet.data))
                    else:
                        self._relays.handle(packet)
            except (ProtocolError, TypeError, ValueError) as error:
                self._report(f"the hub said what an agent does not understand: {error!r}")
                self._ending = True
        if self._session.backlog < _BACKLOG:
            waiting, self._waiting_outputs = self._waiting_outputs, []
            for resume in waiting:
                resume()

    def _say(self, *message: object) -> None:
        self._session.push(CONTROL, 0, encode(*message))

    def _obey(self, verb: str, *args: Any) -> None:
        if verb == "launch":
            worker, self._channels[args[0]] = args
            self._running += 1
            self._local.launch([worker])
        elif verb == "signal":
            self._local.signal(*args)
        elif verb == "probe":
            self._local.probe(*args)
        elif verb == "recall":
            self._local.recall(*args)
        elif verb == "end":
            self._ending = True
        else:
            raise ProtocolError(f"the order {verb!r}")

    def _tell(self, event: JobEvent) -> None:
        if isinstance(event, Started):
            self._relays.add(self._channels[event.worker], event.connection)
            self._say("started", event.worker, event.pid, event.host)
        elif isinstance(event, Refused):
            self._channels.pop(event.worker, None)
            self._running -= 1
            self._say("refused", event.worker, str(event.error))
        elif isinstance(event, Ended):
            self._running -= 1
            channel = self._relays.channels.get(self._channels.pop(event.worker, 0))
            told = "ended", event.worker, event.exit, event.running
            if channel is None:
                self._say(*told)
            else:
                channel.at_close = lambda: self._say(*told)
                channel.finish()
        elif isinstance(event, Probed):
            self._say("probed", event.worker, event.cell)
        elif isinstance(event, Recalled):
            self._say("recalled", event.worker, event.number, event.claimed)

    def _refuse(self, channel: int) -> None:
        raise ProtocolError("only agents open channels")

    # -- processes of the job

    def _accept(self, events: int) -> None:
        try:
            fd, _ = self._door._accept()  # type: ignore[attr-defined]
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:  # out of descriptors; who waits at the door would keep the loop busy until there are some
            self.unfollow(self._door.fileno())
            self._opens_at = monotonic() + _SHUT
            return
        self._doors += 2
        self._relays.open(self._doors, socket(fileno=fd))

    # -- the end

    def _give_up(self) -> int:
        if self._met:
            self._report(f"nothing was heard of the hub for {self._timeout:g} seconds: the driver, or the way to it, has gone")
            return ABANDONED
        urls = self._credentials["hub"]
        self._report(f"the hub at {', '.join(urls)} cannot be reached: {_diagnose(urls)}")
        return UNREACHABLE

    def _report(self, text: str) -> None:
        try:
            os.write(self._outputs[2], f"fiberexec agent {self._credentials['job']}: {text}\n".encode(errors="replace"))
        except OSError:
            pass  # nobody reads it


def _reachable(urls: list[str]) -> str:
    """The first of these addresses that somebody answers at, or the first."""
    for url in urls if len(urls) > 1 else ():
        if not _probe(url):
            return url
    return urls[0]


def _probe(url: str) -> str:
    """Why nobody answers there, "" if somebody does."""
    from socket import create_connection

    host, _, port = url.rpartition("//")[2].rpartition(":")
    try:
        create_connection((host.strip("[]"), int(port)), 3.0).close()
    except OSError as error:
        return str(error)
    return ""


def _diagnose(urls: list[str]) -> str:
    found = [f"{url}: {why}" for url in urls if (why := _probe(url))]
    if found:
        return "; ".join(found) + "; is there a route from this job to the driver's host, and no firewall between them?"
    return (
        "it does not accept this job's certificate: the program that started it has gone, "
        "or the clock of this host is more than a day behind (or years ahead)"
    )


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def main() -> None:
    """``python -m fiberexec._agent FILE``: with the credentials in a file, or "-": on stdin."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m fiberexec._agent FILE    (fiberexec runs this in the jobs that it starts)")
    if sys.argv[1] == "-":
        credentials = json.load(sys.stdin)
    else:
        with open(sys.argv[1], encoding="utf-8") as file:
            credentials = json.load(file)
    os.environ.update(credentials["env"])
    folder = tempfile.mkdtemp(prefix=_FOLDER, dir=place(_FOLDER))
    os.environ[JOB] = folder
    with open(os.path.join(folder, ADDRESS), "w", encoding="utf-8", opener=_private) as file:
        file.write("\n".join(credentials["address"]))
    if credentials["shipped"]:
        with open(os.path.join(folder, SHIPPED), "w", encoding="ascii") as file:
            file.write(credentials["shipped"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _platform.adopt_orphans()
    code = 1
    try:
        agent = Agent(credentials, folder)
        try:
            code = agent.run()
        finally:
            agent.end()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
        os._exit(code)  # nng's threads do not end in order


if __name__ == "__main__":
    main()
