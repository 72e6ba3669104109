"""Pipes and connections: multiprocessing's, with fiberexec's pickling, and picklable at any time.

A message on the wire is multiprocessing's: its length, then one stream of bytes. So an end may talk to a program that
uses multiprocessing, and ``send`` may meet ``recv_bytes``. What is large is neither joined before it is sent nor
gathered before it is unpickled: the pickler's pieces go to the kernel as they are, and the unpickler reads from it.

Ends that are sent through a local pipe go with the message, before which stand -2 and a byte that carries their
descriptors: if nobody is left to read it, the kernel closes them, and their other ends hear it. On any other way the hub
keeps the descriptors until they are fetched.

Where processes may be on other hosts, pipes pass through the hub: see `_hubconnection`.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import socket
import struct
import threading
from array import array
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from multiprocessing import BufferTooShort
from multiprocessing import connection as _standard
from multiprocessing.context import get_spawning_popen
from typing import TYPE_CHECKING, Any, NoReturn

from fiberexec import _platform
from fiberexec._hub import client, launch
from fiberexec._hub.wire import HUB
from fiberexec._serialize import dumps_pieces, loads, register
from fiberexec.mp._incoming import LARGE, ConnectionLost, Message, a_socket, is_local, lost, room
from fiberexec.mp.context import shares_host

__all__ = ["Client", "Connection", "ConnectionLost", "Listener", "Pipe", "wait"]

_SHORT = struct.Struct("!i")
_LONG = struct.Struct("!Q")
_SHORT_MAX = (1 << 31) - 1
_DESCRIPTORS = struct.pack("!i", -2)
_MOST_DESCRIPTORS = 250  # in one message: the kernel takes a few more
_IOV = 512  # below every platform's IOV_MAX
HUB_NAME = "fiberexec-hub:"  # how the address of a listener in the hub begins
_NOT_ACROSS = (
    "a connection or socket that has a descriptor stays on its host (use a Pipe() of the backend that the processes run on, a "
    "Queue, or a Listener without an address)"
)
_CAPACITY = 1 << 20  # bytes that the kernel may keep of what is under way, if it allows that


class Connection(_standard.Connection):
    """One end of a pipe or a socket: ``multiprocessing.connection.Connection``, with fiberexec's pickling.

    It can be pickled at any time and arrives as the same end, so what one process receives no other does. ``EOFError``
    says that no process holds the other end any more.
    """

    _handle: int
    by_hub = False  # a pipe that passes through the hub
    whole = False  # whether the last recv() has read its message to the end: what it raised comes from unpickling that
    _local: bool | None = None  # whether descriptors can go with a message; None: not known yet
    if TYPE_CHECKING:  # what the base class has

        def _check_closed(self) -> None: ...
        def _check_readable(self) -> None: ...
        def _check_writable(self) -> None: ...
        def _bad_message_length(self) -> NoReturn: ...

    def __reduce__(self) -> tuple[object, ...]:
        return _reduce_connection(None, self)

    def send(self, obj: Any) -> None:
        """Send an object. Raises ``PicklingError``, and ``OSError`` when the other end has gone."""
        self._check_closed()
        self._check_writable()
        if self._local is None:
            self._local = is_local(self._handle)
        descriptors: list[int] | None = [] if self._local else None
        pieces = dumps_pieces(obj, descriptors)
        if descriptors:
            self._send_descriptors(descriptors)
        self._send_pieces(pieces)

    def recv(self) -> Any:
        """Wait for an object. Raises ``EOFError`` when the other end has gone."""
        self.whole = False
        self._check_closed()
        self._check_readable()
        size = self._recv_size()
        if size == -2:
            return self._recv_with_descriptors()
        return self._recv_object(size)

    def _recv_object(self, size: int) -> Any:
        if size < LARGE:
            data = self._recv_exactly(size)
            self.whole = True
            return loads(data)
        message = Message(self._handle, size)
        try:
            return pickle.Unpickler(io.BufferedReader(message, LARGE)).load()
        finally:
            message.skip()
            self.whole = not message.lost

    def _recv_with_descriptors(self) -> Any:
        outer = getattr(_arrived, "descriptors", None)
        _arrived.descriptors = descriptors = dict(enumerate(self._recv_descriptors()))
        try:
            return self._recv_object(self._recv_size())
        finally:
            _arrived.descriptors = outer
            for fd in descriptors.values():  # nobody took
                os.close(fd)

    def recv_bytes(self, maxlength: int | None = None) -> bytes:
        """Wait for one message of bytes. Raises ``EOFError``; ``OSError`` when it is longer than ``maxlength``."""
        self._check_recv("maxlength", maxlength)
        size = self._recv_bytes_size()
        if maxlength is not None and size > maxlength:
            self._bad_message_length()
        return self._recv_exactly(size)

    def recv_bytes_into(self, buf: Any, offset: int = 0) -> int:
        """Wait for one message of bytes, write it into ``buf`` from byte ``offset`` on and return its length.

        Raises ``EOFError``; ``BufferTooShort``, which carries the message, when it does not fit.
        """
        self._check_recv("offset", offset)
        with memoryview(buf) as view, view.cast("B") as whole, room(whole, offset) as target:
            size = self._recv_bytes_size()
            if size > len(target):
                raise BufferTooShort(self._recv_exactly(size))
            message = Message(self._handle, size)
            start = 0
            while start < size:
                start += message.readinto(target[start:size])
            return size

    def _check_recv(self, name: str, number: int | None) -> None:
        self._check_closed()
        self._check_readable()
        if number is not None and number < 0:
            raise ValueError(f"negative {name}")

    def _recv_size(self) -> int:
        """Wait for a message: its length in bytes."""
        try:
            head = os.read(self._handle, 4)
        except ConnectionResetError:
            raise ConnectionLost("the other end of the connection has gone without reading all messages") from None
        if not head:
            raise EOFError
        if len(head) < 4:
            head += self._recv_exactly(4 - len(head))
        size: int = _SHORT.unpack(head)[0]
        if size == -1:
            size = _LONG.unpack(self._recv_exactly(8))[0]
        if size < -2:
            self._bad_message_length()
        return size

    def _recv_bytes_size(self) -> int:
        """As _recv_size(); whoever wants bytes has no use for descriptors."""
        size = self._recv_size()
        if size == -2:
            for fd in self._recv_descriptors():
                os.close(fd)
            size = self._recv_size()
        return size

    def _recv_descriptors(self) -> list[int]:
        data, descriptors = b"", list[int]()
        with a_socket(self._handle) as sock, suppress(ConnectionResetError):
            data, descriptors = _platform.receive_fds(sock, 1, _MOST_DESCRIPTORS)
        if not data:
            raise lost()
        for fd in descriptors:
            os.set_inheritable(fd, False)
        return descriptors

    def _send_descriptors(self, descriptors: list[int]) -> None:
        try:
            with a_socket(self._handle) as sock:
                sock.sendall(_DESCRIPTORS)
                try:
                    sock.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))])
                except OSError:
                    sock.sendall(b"\0")  # so that the next message can be read
                    raise
        finally:
            for fd in descriptors:
                os.close(fd)

    def _recv_exactly(self, size: int) -> bytes:
        start = b""
        if size < LARGE:
            try:
                start = os.read(self._handle, size)
            except ConnectionResetError:
                pass  # said below
            if len(start) == size:
                return start
        message = Message(self._handle, size - len(start))
        return start + io.BufferedReader(message, LARGE).read(size - len(start))

    def _send_bytes(self, buf: memoryview) -> None:
        self._send_pieces([buf.cast("B")])

    def _send_pieces(self, pieces: list[Any]) -> None:
        """Send one message."""
        size = sum(map(len, pieces))
        head = _SHORT.pack(size) if size <= _SHORT_MAX else _SHORT.pack(-1) + _LONG.pack(size)
        pieces = [head, *pieces] if size >= LARGE else [b"".join([head, *pieces])]
        first = 0
        while first < len(pieces):
            sent = os.writev(self._handle, pieces[first : first + _IOV])
            while first < len(pieces) and sent >= len(pieces[first]):
                sent -= len(pieces[first])
                first += 1
            if sent:
                pieces[first] = memoryview(pieces[first])[sent:]


def Pipe(duplex: bool = True) -> tuple[Connection, Connection]:
    """Two connected ends; unless ``duplex``, the first only receives and the second only sends."""
    return make_pipe(duplex, None)


def make_pipe(duplex: bool, method: str | None) -> tuple[Connection, Connection]:
    """A pipe for the processes of a start method: through the hub, unless they are on this host."""
    if not shares_host(method):
        from fiberexec.mp._hubconnection import pipe

        return pipe(duplex)
    one, other = socket.socketpair()
    for end in (one, other):
        end.setblocking(True)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CAPACITY)
    return Connection(one.detach(), writable=duplex), Connection(other.detach(), readable=duplex)


def wait(object_list: Iterable[Any], timeout: float | None = None) -> list[Any]:
    """Those of ``object_list`` (connections, sockets, sentinels) that can be read.

    If none can, wait for one, ``timeout`` seconds at most; None: as long as it takes.
    """
    objects = list(object_list)
    ends = [each for each in objects if getattr(each, "by_hub", False)]
    if not ends:
        return _standard.wait(objects, timeout)
    from fiberexec.mp._hubconnection import ready

    others = [each for each in objects if not getattr(each, "by_hub", False)]
    found: list[Any] = [*ready(ends, 0).result(), *_standard.wait(others, 0)]
    if not found and (timeout is None or timeout > 0):
        answer: Any = ready(ends, None)
        try:
            found = _standard.wait([*others, answer], timeout)
            if answer in found:
                found.remove(answer)
                found += answer.result()
        finally:
            answer.cancel()
    ids = set(map(id, found))
    return [each for each in objects if id(each) in ids]


# -- travelling

_arrived = threading.local()  # descriptors: those that came with the message that this thread unpickles, by their number


def _give(pickler: Any, fd: int) -> tuple[Any, ...]:
    """Let a copy of a descriptor travel with what is being pickled: what takes it there, once."""
    descriptors = getattr(pickler, "descriptors", None)
    if descriptors is not None and len(descriptors) < _MOST_DESCRIPTORS:
        descriptors.append(os.dup(fd))
        return (len(descriptors) - 1,)
    hub = launch.address()
    if launch.in_job():
        raise OSError(errno.EXDEV, f"{_NOT_ACROSS}: this process is in a job, and the receiver may be on another host")
    id = client.deposit(fd, hub)
    # A process that ends before it has fetched the descriptor must not keep others from hearing that it has ended.
    discard = partial(_discard, id, hub)
    at_end = getattr(get_spawning_popen(), "at_end", None)
    if at_end is not None:
        at_end.append(discard)
    if pickler is not None:
        pickler.undo = (*getattr(pickler, "undo", ()), discard)
    return id, *hub


def _discard(id: int, hub: launch.Address) -> None:
    try:
        client.post(hub, ("drop", HUB, (id,)))
    except OSError:
        pass  # the hub has gone, and its copy


def _take(id: int, *hub: Any) -> int:
    try:
        if not hub:
            fd = _arrived.descriptors.pop(id)
            return int(fd)
        if launch.in_job():
            _discard(id, launch.Address(*hub))  # so that the other end hears that nobody has it
            raise OSError(errno.EXDEV, f"{_NOT_ACROSS}: it was pickled on the driver's host, this process is in a job")
        return client.fetch(id, launch.Address(*hub))
    except (LookupError, AttributeError, TypeError):
        text = "this end of a connection has arrived elsewhere already: what was pickled once is unpickled once"
        raise OSError(errno.EBADF, text) from None


def _make_connection(where: tuple[Any, ...], readable: bool, writable: bool) -> Connection:
    return Connection(_take(*where), readable, writable)


def _make_socket(where: tuple[Any, ...], family: int, kind: int, proto: int) -> socket.socket:
    return socket.socket(family, kind, proto, _take(*where))


def _reduce_connection(pickler: Any, plain: Any) -> tuple[object, ...]:
    return _make_connection, (_give(pickler, plain.fileno()), plain.readable, plain.writable)


def _reduce_socket(pickler: Any, plain: socket.socket) -> tuple[object, ...]:
    return _make_socket, (_give(pickler, plain.fileno()), plain.family, plain.type, plain.proto)


register(Connection, _reduce_connection)
register(_standard.Connection, _reduce_connection)
register(socket.socket, _reduce_socket)


# -- multiprocessing's listeners


def _adopt(plain: Any) -> Connection:
    """A standard connection as one of ours."""
    if isinstance(plain, Connection):
        return plain
    fd, plain._handle = plain._handle, None
    return Connection(fd, plain.readable, plain.writable)


class Listener(_standard.Listener):
    """``multiprocessing.connection.Listener``, whose connections are fiberexec's.

    Without address and family, and where processes may be on other hosts, it has a name in the hub as its ``address``, and is
    reached by every process of the program and by nobody else.
    """

    _listener: Any
    _authkey: bytes | None

    def __init__(self, address: Any = None, family: str | None = None, backlog: int = 1, authkey: bytes | None = None) -> None:
        if address is not None or family is not None or shares_host():
            super().__init__(address, family, backlog, authkey)
            return
        if authkey is not None and not isinstance(authkey, bytes):
            raise TypeError("authkey should be a byte string")
        from fiberexec.mp._hublistener import Backlog

        self._listener = Backlog()
        self._authkey = authkey

    def accept(self) -> Connection:
        """Wait for a client, as the standard's; raises ``AuthenticationError`` for one without the key."""
        return _adopt(super().accept())


def Client(address: Any, family: str | None = None, authkey: bytes | None = None) -> Connection:
    """Connect to a ``Listener``, this module's or multiprocessing's."""
    if isinstance(address, str) and address.startswith(HUB_NAME):
        from fiberexec.mp._hublistener import connect

        return connect(address, authkey)
    return _adopt(_standard.Client(address, family, authkey))


def __getattr__(name: str) -> Any:
    return getattr(_standard, name)
