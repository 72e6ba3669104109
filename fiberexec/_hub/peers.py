"""Who talks to the hub: processes of the program, and their connections."""

from __future__ import annotations

import os
import select
from _socket import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fiberexec import _messages as messages
from fiberexec._hub.wire import ERROR, ERRORS, EVENT, REPLY
from fiberexec._stream import Stream

if TYPE_CHECKING:
    from fiberexec._hub.server import Hub
    from fiberexec._hub.shared import Shared, Wait
    from fiberexec._hub.switch import AgentLink

IN, OUT = select.POLLIN, select.POLLOUT  # epoll's have the same values


class Process:
    """A process of the program, as long as it has a connection."""

    def __init__(self, key: bytes, pid: int) -> None:
        self.key = key
        self.pid = pid
        self.peers: dict[int, Peer] = {}  # by the connection's number
        self.uses: dict[Shared, None] = {}  # objects that want to hear of its end
        self.made: set[int] = set()  # objects that nobody else can know
        self.cells = memoryview(b"")  # empty if it is on another host
        self.recalls: Peer | None = None  # by which it hears of them then
        self.leaving = False  # it ends in order

    def tell_recall(self, *recall: int) -> None:
        if self.recalls is not None:
            self.recalls.push(EVENT, messages.encode(recall))


class Peer:
    """A connection. ``undo`` takes back the last answer, which the other end may not have seen."""

    __slots__ = ("answers", "buffers", "fds", "hub", "link", "number", "parked", "process", "sock", "stream", "undo")

    def __init__(self, hub: Hub, sock: socket, link: AgentLink | None = None) -> None:
        self.hub = hub
        self.link = link  # by which it comes, from a process in a job
        self.sock = sock
        self.stream = Stream(sock)
        self.process: Process = NOBODY  # until it has proved that it belongs to the program
        self.number = 0
        self.answers = 0
        self.parked: Wait | None = None
        self.undo: Callable[[], None] | None = None
        self.buffers: list[Any] = []  # of the frame that is being handled
        self.fds: list[int] = []  # that came with the hello

    def reply(self, value: object, buffers: Sequence[Any] = ()) -> None:
        self._send(REPLY, value, buffers)

    def fail(self, error: Exception) -> None:
        name = next((kind.__name__ for kind in type(error).__mro__ if ERRORS.get(kind.__name__) is kind), "RuntimeError")
        self._send(ERROR, (name, tuple(error.args) if name in ERRORS else (repr(error),)))

    def _send(self, kind: int, value: object, buffers: Sequence[Any] = ()) -> None:
        self.answers += 1
        self.push(kind, messages.encode(value), buffers)

    def push(self, kind: int, body: bytes, buffers: Sequence[Any] = ()) -> None:
        """Send a frame as far as the kernel takes it, and the rest later."""
        try:
            if not self.stream.send_some(kind, body, buffers):  # type: ignore[arg-type]
                self.hub.watch(self, IN | OUT)
        except OSError:
            pass  # its end will be read

    def close(self) -> None:
        self.stream.close()
        for fd in self.fds:
            os.close(fd)


NOBODY = Process(b"", 0)
