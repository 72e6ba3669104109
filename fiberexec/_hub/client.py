"""Asking the hub: one call is one frame out and one back, by the very thread that asks.

Rules:
- A connection serves one call at a time and is used again by whichever thread comes next, so there are as many as there
  were calls at once, and the process' last one closes when the process ends.
- A call that is interrupted (Ctrl-C, an exception of a signal's handler) is taken back: a new connection tells the hub
  which one it replaces, and the hub undoes whatever that one was given and nobody saw.
- What finalizers want to say waits for the next call: they may run in the middle of one.
- A forked child is another process: it closes what it inherited.
- The program's end closes its hub under daemon threads: those that use it wait for the interpreter's end, and hear nothing.
"""

from __future__ import annotations

import itertools
import os
from _collections import deque  # type: ignore[import-not-found]
from _socket import AF_UNIX, SHUT_RDWR, SO_SNDBUF, SOCK_STREAM, SOL_SOCKET, socket
from collections.abc import Sequence
from multiprocessing import util
from typing import Any, NoReturn

from fiberexec import _platform
from fiberexec._errors import HubLost
from fiberexec._hub import launch
from fiberexec._hub.launch import Address
from fiberexec._hub.wire import ERROR, ERRORS, HELLO, HUB, KEY_SIZE, MAGIC, POST, REQUEST
from fiberexec._messages import decode, encode
from fiberexec._stream import Buffer, Stream, pack

Buffers = Sequence[Buffer]


class _Channel:
    """A connection. ``number`` is its name within this process."""

    __slots__ = ("hub", "number", "seen", "stream")

    def __init__(
        self, hub: Address, replaces: _Channel | None = None, frame: bytes = b"", fd: int = -1, key: bytes = b""
    ) -> None:
        if hub == launch._address:
            launch.start(hub)
        if not _channels:
            util.Finalize(None, goodbye, exitpriority=-90)  # after the queues' -5, and before the hub's end
        self.hub = hub
        self.number = next(_numbers)
        self.seen = 0  # answers that were returned
        sock = socket(AF_UNIX, SOCK_STREAM)
        sock.setblocking(True)  # whatever socket.setdefaulttimeout() was told
        sock.setsockopt(SOL_SOCKET, SO_SNDBUF, 1 << 20)
        replaced = (replaces.number, replaces.seen) if replaces is not None else (0, 0)
        hello = HELLO.pack(MAGIC, hub.token, key or _key, os.getpid(), self.number, *replaced) + frame
        self.stream = Stream(sock)
        try:
            sock.connect(launch.way(hub))
            if fd >= 0:
                _platform.send_fd(sock, hello, fd)
            else:
                sock.sendall(hello)
            _channels.add(self)
        except OSError as error:
            self.stream.close()
            _lost(hub, error)
        except BaseException:
            _interrupted[self] = None  # it may be the only one that the hub knows: open until another replaces it
            raise

    def shutdown(self) -> None:
        """End a receive() that another thread is in."""
        try:
            self.stream._sock.shutdown(SHUT_RDWR)
        except OSError:
            pass  # it has ended by itself

    def close(self) -> None:
        _channels.discard(self)
        self.stream.close()


_key = os.urandom(KEY_SIZE)  # of this process
_numbers = itertools.count(1)
_channels: set[_Channel] = set()  # all that are open
_idle: dict[bytes, list[_Channel]] = {}  # by the hub's token
_interrupted: dict[_Channel, None] = {}  # in a call
_later: deque[tuple[Address, bytes]] = deque()  # bodies that go out before the next call


def call(op: str, id: int, *args: object, buffers: Buffers = (), hub: Address | None = None) -> Any:
    """Ask for an operation on the object ``id`` (HUB: the hub itself); returns what it says.

    The arguments are plain builtins. Raises HubLost, and what the operation raises.
    """
    return request(hub or launch.address(), (op, id, args), buffers)[0]


def request(
    hub: Address,
    message: tuple[str, int, tuple[Any, ...]],
    buffers: Buffers = (),
    acknowledge: bool = False,
    kind: int = REQUEST,
) -> tuple[Any, list[Any]]:
    """As call(); returns also the buffers that came back.

    ``acknowledge``: say at once that they are here, so that the hub need not keep them until this connection's next call.
    ``kind``: POST is not answered.
    """
    channel = _take(hub)
    answer, value = kind, None
    received: list[Any] = []
    try:
        _say(channel, kind, message, buffers)
        if kind == REQUEST:
            answer, body, received = channel.stream.receive_one()
            value = decode(body)
            if acknowledge and received:
                channel.stream.send(POST, encode(("ping", HUB, ())))
    except (OSError, EOFError) as error:
        channel.close()
        _lost(hub, error)
    except BaseException:
        _interrupted[channel] = None
        _take_back()
        raise
    if kind == REQUEST:
        channel.seen += 1
    _give_back(channel)
    return _said(answer, value), received


def _said(kind: int, value: Any) -> Any:
    """What an answer is: a value, or an error."""
    if kind == ERROR:
        name, args = value
        raise ERRORS[name](*args)
    return value


def post(hub: Address, message: tuple[str, int, tuple[Any, ...]]) -> None:
    """Tell the hub something that it does not answer. Raises HubLost."""
    request(hub, message, kind=POST)


def post_later(hub: Address, message: tuple[str, int, tuple[Any, ...]]) -> None:
    """As post(), before this process' next call: for finalizers."""
    _later.append((hub, encode(message)))


def subscribe(hub: Address, message: tuple[str, int, tuple[Any, ...]]) -> _Channel:
    """Ask for events, which come as frames of the channel's stream from now on. Whoever has it closes it."""
    channel = _Channel(hub)
    try:
        _say(channel, REQUEST, message, ())
        kind, body, _ = channel.stream.receive_one()
        value = decode(body)
    except (OSError, EOFError) as error:
        channel.close()
        _lost(hub, error)
    if kind == ERROR:
        channel.close()
        raise ERRORS[value[0]](*value[1])
    return channel


def attach(hub: Address, message: tuple[str, int, tuple[Any, ...]]) -> socket:
    """Ask for an operation that makes the connection something else than the hub's: returns its socket."""
    channel = subscribe(hub, message)
    _channels.discard(channel)
    return channel.stream._sock


def send_fd(hub: Address, message: tuple[str, int, tuple[Any, ...]], fd: int) -> Any:
    """Ask for an operation that needs a descriptor of ours; it stays open here."""
    return _with_fd(hub, message, fd)[0]


def receive_fd(hub: Address, message: tuple[str, int, tuple[Any, ...]]) -> int:
    """Ask for an operation that gives a descriptor; it is not inherited by other programs."""
    return _with_fd(hub, message, -1)[1][0]


def deposit(fd: int, hub: Address | None = None) -> int:
    """Leave a copy of a descriptor with the hub; returns the id that fetches or discards it. ``fd`` stays open here.

    The hub's copy keeps the other end of a pipe from hearing its end, so whoever does not fetch it discards it.
    """
    return int(send_fd(hub or launch.address(), ("deposit", HUB, ()), fd))


def fetch(id: int, hub: Address | None = None) -> int:
    """Take a deposited descriptor out. Raises KeyError if it was fetched or discarded before."""
    return receive_fd(hub or launch.address(), ("fetch", HUB, (id,)))


def discard(id: int, hub: Address | None = None) -> None:
    """Close the hub's copy of a deposited descriptor, if it is still there. Finalizers may call it."""
    post_later(hub or launch.address(), ("drop", HUB, (id,)))


class Pending:
    """A call under way, whose answer is waited for together with other things: readable when it is there.

    It ends with result(), or is taken back with cancel(), or when nobody has it any more.
    """

    def __init__(self, hub: Address, message: tuple[str, int, tuple[Any, ...]]) -> None:
        self._channel: _Channel | None = None
        channel = _take(hub)
        try:
            self._channel = channel
            _say(channel, REQUEST, message, ())
        except OSError as error:
            self._channel = None
            channel.close()
            _lost(hub, error)

    def fileno(self) -> int:
        return -1 if self._channel is None else self._channel.stream.fileno()

    def result(self) -> Any:
        """Wait for the answer. Raises as call()."""
        channel = self._channel
        assert channel is not None
        try:
            kind, body, _ = channel.stream.receive_one()
            value = decode(body)
            self._channel = None
        except (OSError, EOFError) as error:
            self._channel = None
            channel.close()
            _lost(channel.hub, error)
        channel.seen += 1
        _give_back(channel)
        return _said(kind, value)

    def cancel(self) -> None:
        """Take the call back, whatever has become of it, if it has not ended."""
        self.__del__()
        _take_back()

    def __del__(self) -> None:
        if self._channel is not None:
            _interrupted[self._channel] = None
            self._channel = None


class Heir:
    """A forked child's first connection, made before the fork: so the hub hears of the child's end, whenever that is.

    The parent closes its copy after the fork, the child inherits it.
    """

    def __init__(self, hub: Address) -> None:
        self.hub = hub
        self._key = os.urandom(KEY_SIZE)
        self._channel = _Channel(hub, key=self._key)
        _channels.discard(self._channel)

    def call(self, op: str, id: int, *args: object) -> Any:
        """As call(), in the child's name."""
        stream = self._channel.stream
        try:
            stream.send(REQUEST, encode((op, id, args)))
            kind, body, _ = stream.receive_one()
            value = decode(body)
        except (OSError, EOFError) as error:
            _lost(self.hub, error)
        self._channel.seen += 1
        return _said(kind, value)

    def close(self) -> None:
        self._channel.stream.close()

    def inherit(self) -> None:
        """This process is the child."""
        global _key
        _key = self._key
        _channels.add(self._channel)
        _give_back(self._channel)


# -- connections


def _take(hub: Address) -> _Channel:
    if _interrupted:
        _take_back()
    try:
        return _idle[hub.token].pop()
    except (KeyError, IndexError):
        return _Channel(hub)


def _give_back(channel: _Channel) -> None:
    _idle.setdefault(channel.hub.token, []).append(channel)
    if channel not in _channels:
        channel.close()  # the hub has been closed meanwhile


def _say(channel: _Channel, kind: int, message: tuple[str, int, tuple[Any, ...]], buffers: Buffers) -> None:
    while _later:
        try:
            hub, body = _later.popleft()
        except IndexError:
            break  # another thread took it
        if hub == channel.hub:
            channel.stream.send(POST, body)
    channel.stream.send(kind, encode(message), buffers)  # type: ignore[arg-type]


def _take_back() -> None:
    """After an interrupt nobody knows what a connection has sent and received. Interrupted again, the next call does it."""
    for channel in list(_interrupted):
        try:
            fresh = _Channel(channel.hub, replaces=channel)
            fresh.stream.send(REQUEST, encode(("ping", HUB, ())))
            fresh.stream.receive_one()
            fresh.seen = 1
            _give_back(fresh)
        except (OSError, EOFError):
            pass  # the hub has gone
        channel.close()
        _interrupted.pop(channel, None)


def _with_fd(hub: Address, message: tuple[str, int, tuple[Any, ...]], fd: int) -> tuple[Any, list[int]]:
    """On a connection of its own: what else is received on it would lose descriptors."""
    if not _channels:
        call("ping", HUB, hub=hub)  # the hub would take the end of the only connection for the end of the process
    frame = b"".join(pack(REQUEST, encode(message)))
    channel = _Channel(hub, None, frame, fd)
    try:
        stream = channel.stream
        frames: list[Any] = []
        fds: list[int] = []
        while not frames:
            data, got = _platform.receive_fds(stream._sock, 1 << 16, 1)
            fds += got
            if not data:
                raise EOFError("the hub has closed")
            frames = stream.feed(data)
        kind, body, _ = frames[0]
        value = decode(body)
    except (OSError, EOFError) as error:
        _lost(hub, error)
    finally:
        channel.close()
    _said(kind, value)
    for each in fds:
        os.set_inheritable(each, False)
    return value, fds


def _lost(hub: Address, error: BaseException) -> NoReturn:
    launch.stay_at_end()
    raise HubLost(
        f"the hub at {hub.path} has gone, or refused this process ({error}): "
        "queues, locks and other objects that it held are lost; start the program again"
    ) from error


def goodbye() -> None:
    """Tell every hub that this process ends in order."""
    for hub in {channel.hub for channel in list(_channels)}:
        try:
            post(hub, ("goodbye", HUB, ()))
        except OSError:
            pass  # it has gone before


def _disconnect() -> None:
    """Let go of all hubs. Who waits for one, or for its events, hears that it has gone, and closes his connection himself."""
    channels = list(_channels)
    _channels.clear()  # first: who gives one back from now on closes it
    for channel in channels:
        channel.shutdown()
    _forget()


def _forget() -> None:
    for channel in [*itertools.chain(*_idle.values()), *_interrupted]:
        channel.close()
    _idle.clear()
    _interrupted.clear()
    _later.clear()


def _in_child() -> None:
    global _key
    _key = os.urandom(KEY_SIZE)
    for channel in list(_channels):
        channel.close()  # the parent's stays open
    _forget()


launch.at_close.append(_disconnect)
os.register_at_fork(after_in_child=_in_child)
