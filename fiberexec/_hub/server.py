"""The hub's process: one thread, one loop over all connections.

Rules:
- No connection makes the others wait: everything is read and written as far as the kernel takes it now.
- What only looks, and what must not wait (a timeout of 0), is answered after another look at all connections: then
  whatever had been sent before it, by anybody, has been carried out.
- What is wrong with a frame ends its connection, and what is wrong with a call is its answer; the hub goes on.
"""

from __future__ import annotations

import itertools
import mmap
import os
import resource
import select
import signal
import sys
import time
import traceback
from _operator import _compare_digest
from _socket import SO_SNDBUF, SOL_SOCKET, socket
from collections.abc import Callable
from time import monotonic
from typing import Any

from fiberexec import _messages as messages
from fiberexec import _platform
from fiberexec._hub import janitor, launch
from fiberexec._hub.fleet import Fleet, Launcher
from fiberexec._hub.listeners import Listener
from fiberexec._hub.locks import Barrier, Condition, Event, Semaphore
from fiberexec._hub.memory import Memory
from fiberexec._hub.peers import IN, NOBODY, OUT, Peer, Process
from fiberexec._hub.pipes import Pipe
from fiberexec._hub.queues import Queue
from fiberexec._hub.shared import PARKED, Shared, Timer
from fiberexec._hub.switch import AgentLink, Switch
from fiberexec._hub.timers import Timers
from fiberexec._hub.wire import ERRORS, HELLO, HUB, MAGIC, POST, REPLY, REQUEST, TOKEN_SIZE
from fiberexec._stream import Frame, ProtocolError, pack

_GLANCE = 1.0  # seconds between two looks at the root process
_ACCEPTS = 64  # connections that are accepted at once
_READ = 1 << 16

KINDS: dict[str, Callable[..., Shared]] = {
    "barrier": Barrier,
    "condition": Condition,
    "event": Event,
    "fleet": Fleet,
    "launcher": Launcher,
    "listener": Listener,
    "memory": Memory,
    "pipe": Pipe,
    "queue": Queue,
    "semaphore": Semaphore,
}


class Hub(Shared):
    """See the module's description. Among the objects it is the one that makes and drops the others."""

    def __init__(self, listener: socket, lifeline: int, token: bytes) -> None:
        super().__init__(self)
        self.objects: dict[int, Shared | int] = {HUB: self}  # by id; an int is a deposited descriptor
        self.processes: dict[bytes, Process] = {}
        self.bytes = 0  # what queues hold
        self.limit = _platform.memory_total() // 2  # of these bytes
        self.parked = 0  # bytes beside these, of puts that wait for room
        self.starved: dict[Queue, None] = {}  # queues whose puts wait for memory
        self._token = token
        self._ids = itertools.count(int.from_bytes(os.urandom(4), "little") << 31 | 1)  # no program's are another's
        self._listener = listener
        self._lifeline = lifeline
        self._peers: dict[int, Peer] = {}  # by descriptor
        self.switch = Switch(self)
        self._others: dict[int, Callable[[int], None]] = {}  # by descriptor, what the switch follows
        self._janitors = janitor.Janitors()
        self._timers = Timers()
        self.at = self._timers.at
        self._root = os.getppid()
        self._next_glance = 0.0
        listener.setblocking(False)
        self._poller: Any
        self._poll: Callable[[float], list[tuple[int, int]]]
        if sys.platform == "linux" and _platform.LINUX:
            self._poller = select.epoll()
            self._poll = self._poller.poll
        else:
            self._poller = poller = getattr(select, "poll")()  # noqa: B009  untyped where there is no epoll
            self._poll = lambda seconds: poller.poll(int(seconds * 1000) + (seconds > 0))
        self._poller.register(listener, IN)
        self._poller.register(lifeline, IN)

    def run(self) -> None:
        """Serve until the root process has gone."""
        while True:
            now = monotonic()
            if now >= self._next_glance:  # a forked child of the root may keep the lifeline's other end
                if os.getppid() != self._root:
                    return
                self._next_glance = now + _GLANCE
                if self.bytes:
                    self.free()
            for fd, event in self._poll(self._timers.pause(now, self._next_glance)):
                peer = self._peers.get(fd)
                if peer is not None:
                    self._serve(peer, event)
                elif fd in self._others:
                    self._others[fd](event)
                elif fd == self._lifeline:
                    return
                elif fd == self._listener.fileno():
                    self._accept()
            self._timers.run()
            self.switch.speak()

    def follow(self, fd: int, events: int, call: Callable[[int], None]) -> None:
        """Call when there is something at a descriptor."""
        if fd in self._others:
            self._poller.modify(fd, events)
        else:
            self._poller.register(fd, events)
        self._others[fd] = call

    def unfollow(self, fd: int) -> None:
        del self._others[fd]
        self._poller.unregister(fd)

    def release(self, size: int) -> None:
        """A queue holds so many bytes less."""
        was_full = self.bytes > self.limit
        self.bytes -= size
        if was_full and self.bytes <= self.limit:
            starved, self.starved = self.starved, {}
            for queue in starved:
                self.at(0.0, Timer(queue.admit))

    def free(self) -> None:
        """Let queues go of what need not be held."""
        for shared in list(self.objects.values()):
            if isinstance(shared, Queue):
                shared.free()

    def clean(self, program: str, remains: list[Any]) -> None:
        """Let a janitor remove what a program's launcher has made."""
        if remains:
            self._janitors.add(program, remains)
            self._start_janitors()

    def _start_janitors(self) -> None:
        if self._janitors.start():
            self.at(monotonic() + janitor.AGAIN, Timer(self._start_janitors))

    def finish(self) -> None:
        """The program has gone: end what is left of it elsewhere."""
        for shared in list(self.objects.values()):
            if isinstance(shared, Launcher):
                shared.gone(NOBODY)
        deadline = monotonic() + _GLANCE
        while self.switch.links and monotonic() < deadline:
            self.switch.speak()
            for fd, event in self._poll(0.05):
                if fd in self._others:
                    self._others[fd](event)
        while self._janitors.start():
            time.sleep(janitor.AGAIN)

    def watch(self, peer: Peer, events: int) -> None:
        self._poller.modify(peer.sock, events)

    # -- connections

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            try:
                fd, _ = self._listener._accept()  # type: ignore[attr-defined]
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._next_glance = 0.0  # out of descriptors: it is tried again
                return
            self.welcome(socket(fileno=fd), None)

    def welcome(self, sock: socket, link: AgentLink | None) -> None:
        """Serve a new connection."""
        sock.setblocking(False)
        sock.setsockopt(SOL_SOCKET, SO_SNDBUF, 1 << 20)
        self._peers[sock.fileno()] = Peer(self, sock, link)
        self._poller.register(sock, IN)

    def hand_over(self, peer: Peer) -> socket:
        """Stop serving a connection: its socket is somebody else's now."""
        del self._peers[peer.sock.fileno()]
        self._poller.unregister(peer.sock)
        peer.process.peers.pop(peer.number)
        return peer.sock

    def _serve(self, peer: Peer, event: int) -> None:
        try:
            if event & OUT and peer.stream.flush():
                self.watch(peer, IN)
            if event & ~OUT:
                self._read(peer)
        except (BlockingIOError, InterruptedError):
            pass
        except (OSError, EOFError):  # ProtocolError is one
            self._close(peer)

    def _read(self, peer: Peer) -> None:
        if peer.process is NOBODY:
            frames = self._welcome(peer)
        else:
            frames = peer.stream.receive()
        for frame in frames:
            self._handle(peer, frame)

    def _welcome(self, peer: Peer) -> list[Frame]:
        """Read the hello of a new connection. It comes in one piece, or the other end is not one of ours."""
        data, fds = _platform.receive_fds(peer.sock, _READ, 1)
        peer.fds += fds
        if len(data) < HELLO.size:
            raise ProtocolError("no hello")
        magic, token, key, pid, number, replaces, seen = HELLO.unpack_from(data)
        if magic != MAGIC or not _compare_digest(token, self._token):
            raise ProtocolError("not one of this program")
        process = self.processes.get(key)
        if process is None:
            process = self.processes[key] = Process(key, pid)
        peer.process = process
        peer.number = number
        process.peers[number] = peer
        if replaces in process.peers:
            self._take_back(process.peers[replaces], seen)
        return peer.stream.feed(data[HELLO.size :]) if len(data) > HELLO.size else []

    def _take_back(self, peer: Peer, seen: int) -> None:
        """The other end was interrupted in a call: undo what it was given without seeing it."""
        try:
            while True:
                self._read(peer)  # what it had sent before still counts
        except (OSError, EOFError):
            pass
        if peer.parked is not None:
            peer.parked.cancel()
        if peer.undo is not None and peer.answers > seen:
            peer.undo()
        self._close(peer)

    def _close(self, peer: Peer) -> None:
        fd = peer.sock.fileno()
        if fd < 0:
            return
        del self._peers[fd]
        self._poller.unregister(fd)
        peer.close()
        process = peer.process
        process.peers.pop(peer.number, None)
        if peer.parked is not None:
            peer.parked.cancel()
        if not process.peers and process is not NOBODY:
            del self.processes[process.key]
            for shared in list(process.uses):
                shared.gone(process)
            process.uses.clear()
            for id in list(process.made):
                self.do_drop(peer, id)

    # -- calls

    def _handle(self, peer: Peer, frame: Frame) -> None:
        kind, body, peer.buffers = frame
        peer.undo = None  # whoever asks again has seen the last answer
        op, id, args = messages.decode(body)
        if (kind != REQUEST and kind != POST) or peer.parked is not None:
            raise ProtocolError("no call, or one inside another")
        shared = self.objects.get(id)
        operation = getattr(shared, "do_" + op, None)
        if operation is None:
            if kind == REQUEST:
                peer.fail(KeyError(f"the hub has no object {id} that could {op}; its last handle has gone, or it was fetched"))
        elif op in shared.looks:  # type: ignore[union-attr]
            self._timers.look(lambda: self._carry_out(kind, peer, operation, args))
        else:
            self._carry_out(kind, peer, operation, args)

    def _carry_out(self, kind: int, peer: Peer, operation: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            answer = operation(peer, *args)
        except Exception as error:
            if kind == REQUEST:
                peer.fail(error)
            if type(error) not in ERRORS.values():
                traceback.print_exc()
            return
        finally:
            peer.buffers = []  # an idle connection holds nothing
        if kind == REQUEST and answer is not PARKED:
            peer.reply(answer)

    def do_goodbye(self, peer: Peer) -> None:
        peer.process.leaving = True

    def do_ping(self, peer: Peer) -> None:
        """Nothing, in the order of what is sent."""

    def do_new(self, peer: Peer, kind: str, *args: Any) -> int:
        id = next(self._ids)
        self.objects[id] = KINDS[kind](self, *args)
        return id

    def do_make(self, peer: Peer, kind: str, *args: Any) -> int:
        """As new, for as long as the process: until it says that others may know it."""
        id = self.do_new(peer, kind, *args)
        peer.process.made.add(id)
        return id

    def do_share(self, peer: Peer, *ids: int) -> None:
        """Others may know these from now on, or all that the process has made so far: they outlive it."""
        peer.process.made.difference_update(ids or list(peer.process.made))

    def do_code(self, peer: Peer, name: str) -> Any:
        """The user's own code for a process in a job: (digest, archive as a buffer), or None."""
        return None if peer.link is None else peer.link.job.fleet.launcher.ask_code(peer, name)

    def do_shipped(self, peer: Peer) -> Any:
        """What ``ship`` named, for a process in a job: (digest, archive as a buffer)."""
        if peer.link is not None:
            digest, archive = peer.link.job.fleet.shipped
            peer.reply(digest, archive)
        return PARKED

    def do_drop(self, peer: Peer, id: int) -> None:
        shared = self.objects.pop(id, None)
        peer.process.made.discard(id)
        if isinstance(shared, int):
            os.close(shared)
        elif shared is not None:
            shared.dropped()
            if not isinstance(shared, Fleet):  # its jobs end when its process does
                for process in self.processes.values():
                    process.uses.pop(shared, None)

    def do_limit(self, peer: Peer, limit: int) -> None:
        """Hold at most so many bytes in queues."""
        self.limit = limit

    def do_cells(self, peer: Peer) -> None:
        """The memory in which a process' consumers say how far they are."""
        fd = peer.fds.pop()
        try:
            peer.process.cells = memoryview(mmap.mmap(fd, os.fstat(fd).st_size)).cast("Q")
        finally:
            os.close(fd)

    def do_recalls(self, peer: Peer) -> None:
        """Tell on this connection what queues take back of what the process holds."""
        peer.process.recalls = peer

    def do_deposit(self, peer: Peer) -> int:
        id = next(self._ids)
        self.objects[id] = peer.fds.pop()
        return id

    def do_fetch(self, peer: Peer, id: int) -> Any:
        fd = self.objects.get(id)
        if not isinstance(fd, int):
            raise KeyError(f"descriptor {id} has been fetched already, or was discarded")
        del self.objects[id]
        try:
            _platform.send_fd(peer.sock, b"".join(pack(REPLY, messages.encode(None))), fd)
        finally:
            os.close(fd)
        return PARKED


def main(listener: int, lifeline: int) -> None:
    """The hub's program: descriptors of the listening socket and of the pipe that says "alive", after the token."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    token = os.read(lifeline, TOKEN_SIZE)
    try:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        pass  # as many as there are
    sock = socket(fileno=listener)
    path = sock.getsockname()
    hub = Hub(sock, lifeline, token)
    try:
        hub.run()
        hub.finish()
    except BaseException:  # a defect: whoever loses everything with this process is told why
        traceback.print_exc()
    finally:
        launch.remove_folder(path)
        os._exit(0)
