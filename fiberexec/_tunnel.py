"""A tunnel: connections that arrive at its outer end are made again at its inner end, over one stream that may break.

    agents ─ TCP ─► outer end ═ messages of a session, over a stream ═► inner end ─ TCP ─► the hub's port

It lets jobs reach a hub that is behind a firewall or on a laptop. What passes through it is TLS between agent and hub: neither
end of the tunnel can read it, or has a key.

Rules:
- When the stream breaks, everything waits: connections stay open, and the session sends again what was lost.
- Each end says something every ``beat`` seconds. A stream on which nothing is heard for three of these is dead.
- The outer end is a program, `python -m fiberexec._tunnel`, which ends when the inner end has been silent for too long.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import struct
import sys
from _socket import (
    AF_INET,
    AF_INET6,
    IPPROTO_IPV6,
    IPPROTO_TCP,
    IPV6_V6ONLY,
    SO_REUSEADDR,
    SOCK_STREAM,
    SOL_SOCKET,
    TCP_NODELAY,
    socket,
)
from collections import deque
from collections.abc import Callable
from time import monotonic

from fiberexec._relay import IN, OUT, Relays
from fiberexec._session import CLOSE, KEY_SIZE, MESSAGE_BYTES, Session, read_header
from fiberexec._stream import Buffer, ProtocolError

BEAT = 5.0  # seconds, at most
_BEATS = 12  # in the time for which an end may be out of the other's reach
_LENGTH = struct.Struct("<I")
_LONGEST = 4 * MESSAGE_BYTES  # bytes of a message
_SHUT = 0.5  # seconds that a door is shut when there is no descriptor for who comes in
_FULL = 1 << 20  # bytes that wait for the stream: then no more messages are made


class _End:
    """What both ends have: a loop, a session, and a stream as long as there is one."""

    def __init__(self, session: Session | None) -> None:
        self._poll = select.poll()
        self._calls: dict[int, Callable[[int], None]] = {}
        self.session = session
        self.relays = Relays(self._push, self, self.opened)
        self._stream: socket | None = None
        self._in = bytearray()
        self._out: deque[Buffer] = deque()
        self._waiting = 0  # bytes in _out
        self._beat_at = 0.0
        self.beat = BEAT
        self.heard = monotonic()
        self.told = monotonic()  # likewise, but a stream that has only been made says nothing

    def opened(self, channel: int) -> None:
        """The other end has a new connection."""
        raise ProtocolError("only the outer end has new connections")

    def follow(self, fd: int, events: int, call: Callable[[int], None]) -> None:
        self._calls[fd] = call
        self._poll.register(fd, events)

    def unfollow(self, fd: int) -> None:
        del self._calls[fd]
        self._poll.unregister(fd)

    @property
    def connected(self) -> bool:
        return self._stream is not None

    def turn(self) -> None:
        """Wait for something, at most for a beat, and deal with it."""
        self._speak()
        for fd, events in self._poll.poll(1000 * self.beat / 5):
            call = self._calls.get(fd)
            if call is not None:
                call(events)
        if self.connected and monotonic() > self.heard + 3 * self.beat:
            self.detach()

    def attach(self, stream: socket) -> None:
        """Use this stream from now on."""
        self.detach()
        stream.setblocking(False)
        self._stream = stream
        self.heard = monotonic()
        self._beat_at = 0.0
        if self.session is not None:
            self.session.rewind()
        self.follow(stream.fileno(), IN, self._ready)

    def detach(self) -> None:
        """The stream is dead, if there is one."""
        if self._stream is not None:
            self.unfollow(self._stream.fileno())
            self._stream.close()
            self._stream = None
        self._in.clear()
        self._out.clear()
        self._waiting = 0

    def _push(self, kind: int, channel: int, data: Buffer = b"") -> None:
        if self.session is None:
            raise ProtocolError("nobody has connected to the tunnel yet")
        self.session.push(kind, channel, data)

    def _speak(self) -> None:
        session = self.session
        if self._stream is None or session is None:
            return
        beat = monotonic() >= self._beat_at
        while (session.has_output or beat) and self._waiting < _FULL:
            parts = session.take()
            size = sum(map(len, parts))
            self._out.append(b"".join([_LENGTH.pack(size), *parts]))  # many small pieces are much work on the way
            self._waiting += size + _LENGTH.size
            if beat:
                beat = False
                self._beat_at = monotonic() + self.beat
                if session.overdue():
                    session.rewind()
        self._flush()

    def _flush(self) -> None:
        assert self._stream is not None
        try:
            while self._out:
                data = self._out.popleft()
                if not len(data):
                    continue
                sent = self._stream.send(data)
                self._waiting -= sent
                if sent < len(data):
                    self._out.appendleft(memoryview(data)[sent:])
        except (BlockingIOError, InterruptedError):
            self._out.appendleft(data)
        except OSError:
            self.detach()
            return
        self.follow(self._stream.fileno(), IN | (OUT if self._out else 0), self._ready)

    def _ready(self, events: int) -> None:
        if events & OUT:
            self._flush()
        if self._stream is None or not events & ~OUT:
            return
        try:
            data = self._stream.recv(1 << 18)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.detach()
            return
        self._in += data
        try:
            self._read()
        except ProtocolError:
            self.detach()

    def _read(self) -> None:
        while len(self._in) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._in)
            if size > _LONGEST:
                raise ProtocolError("no message of a tunnel")
            if len(self._in) < _LENGTH.size + size:
                return
            message = bytes(self._in[_LENGTH.size : _LENGTH.size + size])
            del self._in[: _LENGTH.size + size]
            if self.session is None:
                self.session = Session(read_header(message)[0])
            for packet in self.session.accept(message):
                self.relays.handle(packet)
            self.heard = self.told = monotonic()


class OuterEnd(_End):
    """Where the connections arrive: on ``port`` of every address. The stream is made to ``inner``, which is local."""

    def __init__(self, port: int, inner: int) -> None:
        super().__init__(None)
        self._doors = 0  # the last channel
        self._opens_at = 0.0  # when what was shut opens again
        try:
            self._agents = _listener("::", port)
        except OSError:  # a host without IPv6
            self._agents = _listener("0.0.0.0", port)
        self._streams = _listener("127.0.0.1", inner)
        self.follow(self._streams.fileno(), IN, lambda events: self._welcome())

    def _welcome(self) -> None:
        stream = self._let_in(self._streams)
        if stream is not None:
            self.attach(stream)
            self.follow(self._agents.fileno(), IN, lambda events: self._accept())

    def _let_in(self, door: socket) -> socket | None:
        """The next who waits at a door, if somebody does and there is a descriptor for it."""
        try:
            fd, _ = door._accept()  # type: ignore[attr-defined]
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError:  # out of descriptors: who waits would keep the loop busy until there are some
            self.unfollow(door.fileno())
            self._opens_at = monotonic() + _SHUT
            return None
        sock = socket(fileno=fd)
        sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        return sock

    def turn(self) -> None:
        super().turn()
        if self._opens_at and monotonic() >= self._opens_at:
            self._opens_at = 0.0
            self.follow(self._streams.fileno(), IN, lambda events: self._welcome())
            if self.session is not None:
                self.follow(self._agents.fileno(), IN, lambda events: self._accept())

    def _accept(self) -> None:
        if self.session is None:
            return  # the other end has not said which session it is
        sock = self._let_in(self._agents)
        if sock is not None:
            self._doors += 1
            self.relays.open(self._doors, sock)

    def run(self, patience: float) -> None:
        """Serve until nothing has been heard of the inner end for ``patience`` seconds."""
        while monotonic() < self.heard + patience:
            self.turn()


class InnerEnd(_End):
    """Where the connections are made again, to ``port`` of this host. ``connect`` makes the stream; raises OSError."""

    def __init__(self, key: bytes, port: int, connect: Callable[[], socket]) -> None:
        if len(key) != KEY_SIZE:
            raise ValueError(f"a key has {KEY_SIZE} bytes")
        super().__init__(Session(key))
        self._port = port
        self._connect = connect
        self._again = 0.0  # when to connect
        self._pause = 0.1

    def opened(self, channel: int) -> None:
        try:
            sock = socket(AF_INET, SOCK_STREAM)
        except OSError:  # out of descriptors: that agent tries again
            self._push(CLOSE, channel)
            return
        try:
            sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
            sock.connect(("127.0.0.1", self._port))
        except OSError:
            pass  # the relay finds it broken, and closes the channel
        self.relays.add(channel, sock)

    def turn(self) -> None:
        if not self.connected and monotonic() >= self._again:
            try:
                self.attach(self._connect())
                self._pause = 0.1
            except OSError:
                self._again = monotonic() + self._pause
                self._pause = min(2 * self._pause, self.beat / 2)
        super().turn()


def beat(timeout: float) -> float:
    """How often both ends say something, if one may be out of reach for ``timeout`` seconds."""
    return min(BEAT, timeout / _BEATS)


def _listener(host: str, port: int) -> socket:
    sock = socket(AF_INET6 if ":" in host else AF_INET, SOCK_STREAM)
    try:
        sock.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        if ":" in host:
            sock.setsockopt(IPPROTO_IPV6, IPV6_V6ONLY, 0)
        sock.bind((host, port))
        sock.listen(1024)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def main() -> None:
    """The outer end's program: the port for agents, the one for the stream, the patience and the beat in seconds."""
    port, inner, patience = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one connection for each agent, and for each door
    # The first process of a container, which signals without a handler do not end. It has nothing to lose.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    end = OuterEnd(port, inner)
    end.beat = float(sys.argv[4])
    end.run(patience)
    print(f"fiberexec: nothing was heard of the driver for {patience:g} seconds", file=sys.stderr)


if __name__ == "__main__":
    main()
