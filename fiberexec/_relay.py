"""Local sockets carried over a session: what is read from one comes out of the other, as if they were connected.

    socket ── bytes ─► Relay ── DATA ─► session ... session ── DATA ─► Relay ── bytes ─► socket
                         ◄── CREDIT: so many more bytes, when they have been written ──

Rules:
- Not more than WINDOW bytes of a channel are on the way: one that is slow holds up its own socket and nothing else.
- A socket that ends ends its channel, and the other socket when it has got everything.
"""

from __future__ import annotations

import select
from _socket import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from fiberexec._session import CLOSE, CREDIT, DATA, OPEN, Packet
from fiberexec._stream import Buffer, ProtocolError

PIECE = 1 << 18  # bytes that are read at once
_LITTLE = 1 << 16  # bytes that are read at once as long as there are not more: this much malloc() has at hand
WINDOW = 4 * PIECE  # bytes
IN, OUT = select.POLLIN, select.POLLOUT


class Loop(Protocol):
    """Where descriptors are watched: ``call(events)`` when there is something."""

    def follow(self, fd: int, events: int, call: Callable[[int], None]) -> None: ...

    def unfollow(self, fd: int) -> None: ...


class Relay:
    """One channel, with the socket at this end of it."""

    def __init__(self, relays: Relays, channel: int, sock: socket) -> None:
        self._relays = relays
        self.channel = channel
        self._socket = sock
        self._out: deque[Buffer] = deque()  # arrived, not yet written
        self._waiting = 0  # bytes of that
        self._credit = WINDOW  # bytes that may be read
        self._size = _LITTLE  # bytes that are asked for
        self._written = 0  # bytes for which no credit has been given yet
        self._ending = False  # the other end has closed
        self._deaf = False  # nobody reads what is written to the socket
        self._last = False  # nobody writes to it any more: what can be read at once is all
        self._events = 0
        self.at_close: Callable[[], None] | None = None
        sock.setblocking(False)
        self._follow()

    def _follow(self) -> None:
        wanted = (IN if self._credit and not self._ending else 0) | (OUT if self._out else 0)
        if wanted != self._events:
            self._events = wanted
            if wanted:
                self._relays.loop.follow(self._socket.fileno(), wanted, self._ready)
            else:  # a socket whose peer has gone would be reported for ever
                self._relays.loop.unfollow(self._socket.fileno())

    def _ready(self, events: int) -> None:
        if self._out:
            self._flush()
        if events & ~OUT and self._credit and not self.closed:
            self._read()

    @property
    def closed(self) -> bool:
        return self._socket.fileno() < 0

    def _read(self) -> None:
        try:
            data = self._socket.recv(min(self._size, self._credit))
            self._size = PIECE if len(data) >= _LITTLE else _LITTLE
        except (BlockingIOError, InterruptedError):
            if not self._last:
                return
            data = b""
        except OSError:
            data = b""
        if not data:
            self._relays.push(CLOSE, self.channel)
            self.close()
            return
        self._credit -= len(data)
        self._relays.push(DATA, self.channel, data)
        self._follow()

    def deliver(self, data: Buffer) -> None:
        """Bytes have come from the other end."""
        if self._ending or not data or self._waiting + self._written + len(data) > 2 * WINDOW:
            raise ProtocolError("more bytes than there was credit for, or none")
        if self._deaf:
            return
        self._waiting += len(data)
        if not self._out:
            self._out.append(data)
            self._flush()
        elif len(data) >= _LITTLE:
            self._out.append(data)
        else:  # many little pieces, each with all of the message that it came in, would take much more than their bytes
            last = self._out[-1]
            if isinstance(last, bytearray) and len(last) < _LITTLE:
                last += data
            else:
                self._out.append(bytearray(data))

    def grant(self, credit: int) -> None:
        """The other end has written so many bytes."""
        self._credit += credit
        if self._credit > WINDOW:
            raise ProtocolError("more credit than there was to be given")
        if self._last:
            self.finish()
        else:
            self._follow()

    def finish(self) -> None:
        """Whoever wrote to the socket has gone, though others may have inherited his end: read the rest, and close."""
        self._last = True
        while self._credit and not self.closed:
            self._read()

    def end(self) -> None:
        """The other end has closed: so does this one, when everything is written."""
        self._ending = True
        self._flush()

    def _flush(self) -> None:
        try:
            while self._out:
                data = self._out[0]
                sent = self._socket.send(data)
                self._written += sent
                self._waiting -= sent
                if sent < len(data):
                    self._out[0] = memoryview(data)[sent:]
                else:
                    self._out.popleft()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:  # the peer has closed; what it wrote before can still be read
            self._out.clear()
            self._waiting = 0
            self._deaf = True
        if self._ending:
            if not self._out:
                self.close()
                return
        elif self._written >= PIECE:
            self._relays.push(CREDIT, self.channel, self._written.to_bytes(8, "little"))
            self._written = 0
        self._follow()

    def close(self) -> None:
        """Close the socket, and forget the channel."""
        if not self.closed:
            if self._events:
                self._relays.loop.unfollow(self._socket.fileno())
            self._socket.close()
            self._relays.channels.pop(self.channel, None)
            if self.at_close is not None:
                self.at_close()


class Push(Protocol):
    """Takes a packet that is to be sent: see Session.push."""

    def __call__(self, kind: int, channel: int, data: Buffer = b"") -> None: ...


class Relays:
    """All channels of a session. ``opened`` is called with the number of a channel that the other side has opened."""

    def __init__(self, push: Push, loop: Loop, opened: Callable[[int], Any]) -> None:
        self.push = push
        self.loop = loop
        self.channels: dict[int, Relay] = {}
        self._opened = opened

    def add(self, channel: int, sock: socket) -> None:
        """Carry a socket over this channel."""
        self.channels[channel] = Relay(self, channel, sock)

    def open(self, channel: int, sock: socket) -> None:
        """As add(), for a channel that the other side does not know yet."""
        self.push(OPEN, channel)
        self.add(channel, sock)

    def handle(self, packet: Packet) -> None:
        """A packet has come for a channel; one that has ended meanwhile is left alone. Raises ProtocolError."""
        kind, channel, data = packet
        if kind == OPEN:
            self._opened(channel)
            return
        relay = self.channels.get(channel)
        if relay is None:
            return
        if kind == DATA:
            relay.deliver(data)
        elif kind == CREDIT:
            relay.grant(int.from_bytes(data, "little"))
        elif kind == CLOSE:
            relay.end()
        else:
            raise ProtocolError(f"a packet of unknown kind {kind}")

    def close(self) -> None:
        """Close all of them."""
        for relay in list(self.channels.values()):
            relay.close()
