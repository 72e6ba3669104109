"""Pipes through the hub, for ends that no descriptor can reach: `Connection`, with the same messages and the same errors.

Each process counts as a holder of an end for each connection that it has open there. Pickling makes a ticket, which becomes
a connection where it is unpickled; those in a message that nobody will unpickle are discarded with it.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import BufferTooShort
from multiprocessing.context import get_spawning_popen
from typing import Any, NoReturn

from fiberexec._hub import client, launch
from fiberexec._hub.launch import Address
from fiberexec._hub.wire import HUB
from fiberexec._messages import BULK
from fiberexec._serialize import dumps_pieces, loads, register
from fiberexec.mp._incoming import room
from fiberexec.mp.connection import Connection

Ticket = tuple[int, int, int]  # as the hub's
_sending = threading.local()  # tickets: those that what this thread pickles for a send() has made so far


class HubConnection(Connection):
    """One end of a pipe that passes through the hub: a ``Connection``, but without a descriptor."""

    by_hub = True

    def __init__(self, hub: Address, id: int, end: int, readable: bool = True, writable: bool = True) -> None:
        super().__init__(id, readable, writable)
        self._hub = hub
        self._id = id
        self._end = end
        _live.add(self)

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            try:
                self.close()
            except Exception:
                pass  # the hub has gone, or the interpreter is going, and suppress() with it

    def __reduce__(self) -> tuple[object, ...]:
        return _reduce(None, self)

    def fileno(self) -> int:
        """Raises OSError: there is none."""
        self._check_closed()
        raise OSError(errno.EBADF, "this pipe has no descriptor here: it passes through the hub; wait() takes it as it is")

    def send(self, obj: Any) -> None:
        """Send an object. Raises ``PicklingError``, and ``BrokenPipeError`` when the other end has gone."""
        self._check_closed()
        self._check_writable()
        outer = getattr(_sending, "tickets", None)
        _sending.tickets = tickets = list[Ticket]()
        try:
            try:
                pieces = dumps_pieces(obj)
            finally:
                _sending.tickets = outer
            self._send_message(pieces, tickets)
        except BaseException:
            _discard(self._hub, tickets)
            raise

    def recv(self) -> Any:
        """Wait for an object. Raises ``EOFError`` when the other end has gone."""
        self.whole = False
        self._check_closed()
        self._check_readable()
        message, tickets = self._recv_message()
        self.whole = True
        try:
            return loads(message)
        finally:
            _discard(self._hub, tickets)  # what was not used

    def recv_bytes(self, maxlength: int | None = None) -> bytes:
        """Wait for one message of bytes. Raises ``EOFError``; ``OSError`` when it is longer than ``maxlength``."""
        self._check_recv("maxlength", maxlength)
        message = self._recv_plain()
        if maxlength is not None and len(message) > maxlength:
            self._bad_message_length()
        return bytes(message)

    def recv_bytes_into(self, buf: Any, offset: int = 0) -> int:
        """Wait for one message of bytes, write it into ``buf`` from byte ``offset`` on and return its length.

        Raises ``EOFError``; ``BufferTooShort``, which carries the message, when it does not fit.
        """
        self._check_recv("offset", offset)
        with memoryview(buf) as view, view.cast("B") as whole, room(whole, offset) as target:
            message = self._recv_plain()
            if len(message) > len(target):
                raise BufferTooShort(bytes(message))
            target[: len(message)] = message
            return len(message)

    def _poll(self, timeout: float | None) -> bool:
        return bool(self._call("ready", [(self._id, self._end)], timeout)[0])

    def _send_pieces(self, pieces: list[Any]) -> None:
        self._send_message(pieces, [])

    def _send_message(self, pieces: list[Any], tickets: list[Ticket]) -> None:
        size = sum(map(len, pieces))
        if size < BULK:
            self._call("send", self._end, b"".join(pieces), tickets, 0)
            return
        room = self._call("room", self._end, size)[0]
        try:
            buffers = [memoryview(piece) for piece in pieces]  # bytes would be copied once more at the hub
            self._call("send", self._end, None, tickets, room, buffers=buffers)
        except BaseException:
            with suppress(OSError):
                client.post(self._hub, ("leave", self._id, (self._end, room)))
            raise

    def _recv_message(self) -> tuple[Any, list[Ticket]]:
        answer, buffers = self._call("recv", self._end)
        if answer is None:
            raise EOFError
        message, tickets = answer
        if message is None:
            message = buffers[0] if len(buffers) == 1 else b"".join(buffers)
        return message, tickets

    def _recv_plain(self) -> Any:
        """As _recv_message(); whoever wants bytes has no use for ends."""
        message, tickets = self._recv_message()
        _discard(self._hub, tickets)
        return message

    def _call(self, op: str, *args: object, buffers: Sequence[Any] = ()) -> tuple[Any, list[Any]]:
        try:
            return client.request(self._hub, (op, self._id, args), buffers, acknowledge=True)
        except KeyError:
            _refuse("this end of a pipe is closed")

    def _close(self) -> None:
        _live.discard(self)
        with suppress(OSError):  # the hub has gone, and the pipe
            client.post(self._hub, ("close", self._id, (self._end,)))


_live: weakref.WeakSet[HubConnection] = weakref.WeakSet()


def pipe(duplex: bool) -> tuple[HubConnection, HubConnection]:
    """As ``Pipe()``."""
    hub = launch.address()
    id = client.call("new", HUB, "pipe", hub=hub)
    client.call("open", id, id, hub=hub)
    return HubConnection(hub, id, 0, writable=duplex), HubConnection(hub, id, 1, readable=duplex)


def ready(ends: Sequence[HubConnection], timeout: float | None) -> Ready:
    """A call to the hub that answers when some of these can be read."""
    for end in ends:
        end._check_closed()
    return Ready(ends, timeout)


class Ready(client.Pending):
    """See ready()."""

    def __init__(self, ends: Sequence[HubConnection], timeout: float | None) -> None:
        self._ends = ends
        super().__init__(ends[0]._hub, ("ready", ends[0]._id, ([(end._id, end._end) for end in ends], timeout)))

    def result(self) -> list[HubConnection]:
        """Those that can be read."""
        try:
            return [self._ends[place] for place in super().result()]
        except KeyError:
            _refuse("this end of a pipe is closed")


# -- travelling


def _reduce(pickler: Any, connection: HubConnection) -> tuple[object, ...]:
    connection._check_closed()
    tickets = getattr(_sending, "tickets", None)
    hub, id, end = connection._hub, connection._id, connection._end
    ticket = id, end, connection._call("give", end, tickets is not None)[0]
    if tickets is not None:
        tickets.append(ticket)
    discard = partial(_discard, hub, [ticket])
    # A process that ends before it has unpickled the end must not keep others from hearing that it has ended.
    at_end = getattr(get_spawning_popen(), "at_end", None)
    if at_end is not None:
        at_end.append(discard)
    if pickler is not None:
        pickler.undo = (*getattr(pickler, "undo", ()), discard)
    return make, (type(connection), tuple(hub), ticket, connection.readable, connection.writable)


def make(
    cls: type[HubConnection], address: tuple[str, bytes], ticket: Ticket, readable: bool, writable: bool
) -> HubConnection:
    hub = Address(*address)
    id, end, number = ticket
    try:
        client.call("take", id, end, number, hub=hub)
    except KeyError:
        _refuse("this end of a connection has arrived elsewhere already: what was pickled once is unpickled once")
    return cls(hub, id, end, readable, writable)


def _discard(hub: Address, tickets: Sequence[Ticket]) -> None:
    if tickets:
        with suppress(OSError):  # the hub has gone, and the tickets
            for id, end, number in tickets:
                client.post(hub, ("discard", id, (end, number)))


def _refuse(text: str) -> NoReturn:
    raise OSError(errno.EBADF, text) from None


register(HubConnection, _reduce)


# -- forked children hold what their parent held

_forking = threading.local()  # heir: of the child that this thread forks


def _before_fork() -> None:
    _forking.heir = heir = None
    for end in list(_live):
        with suppress(OSError, KeyError):  # its hub has gone, or both ends are closed
            if heir is None:
                _forking.heir = heir = client.Heir(end._hub)
            if end._hub == heir.hub:
                heir.call("hold", end._id, end._end)


def _in_parent() -> None:
    if _forking.heir is not None:
        _forking.heir.close()
        _forking.heir = None


def _in_child() -> None:
    if _forking.heir is not None:
        _forking.heir.inherit()
        _forking.heir = None


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
