"""Pipes whose ends may be anywhere: the hub's side.

    send ─► inbox of the other end: messages, at most CAPACITY bytes, or one that is larger ─► recv

A message is bytes that are never read here: ``bytes`` in the body of a frame, or, from BULK bytes on, the frame's buffers.
Whoever wants to send so much asks for room first, so that it does not lie here while it waits.

Rules:
- An end is open while a process holds a handle to it, or a ticket to a new handle is under way: pickled, not unpickled yet.
  A ticket belongs to nobody, or to the message that carries it, or to the process that this message was given to; it goes
  when that goes.
- When an end has closed, the other end reads what is left and then the end of the pipe, and what it sends is refused.
- What was given to a process that dies was delivered. Only what an interrupted call did not see goes back, to the front.
"""

from __future__ import annotations

import errno
import itertools
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fiberexec._errors import HubFull
from fiberexec._hub.shared import PARKED, Shared, Timer, Wait, first

if TYPE_CHECKING:
    from fiberexec._hub.peers import Peer, Process
    from fiberexec._hub.server import Hub

CAPACITY = 1 << 20  # bytes under way to one end
_OVERHEAD = 100  # bytes that a message costs beside its own
_numbers = itertools.count(1)  # of tickets and rooms

Ticket = tuple[int, int, int]  # id of the pipe, end, number


class Message:
    __slots__ = ("buffers", "data", "size", "tickets")

    def __init__(self, data: bytes | None, buffers: Sequence[Any], tickets: Sequence[Ticket]) -> None:
        self.data = data
        self.buffers = buffers
        self.tickets = tickets
        self.size = _OVERHEAD + (len(data) if data is not None else 0) + sum(map(len, buffers))


class End:
    def __init__(self) -> None:
        self.other = self
        self.closed = False
        self.holders: dict[Process, int] = {}  # with the number of their handles
        self.tickets: dict[int, Process | None] = {}  # with the process whose death ends them
        self.inbox: deque[Message] = deque()
        self.size = 0  # bytes in the inbox and in rooms
        self.rooms: dict[int, tuple[Process, int]] = {}  # kept for what a process is sending here
        self.readers: OrderedDict[Wait, None] = OrderedDict()
        self.writers: OrderedDict[Send, None] = OrderedDict()  # who wait for room in the inbox
        self.watchers: OrderedDict[Ready, None] = OrderedDict()

    @property
    def is_ready(self) -> bool:
        """Whether a recv() would not wait."""
        return bool(self.inbox) or self.closed or self.other.closed

    def fits(self, size: int) -> bool:
        return not self.size or self.size + size <= CAPACITY


class Pipe(Shared):
    def __init__(self, hub: Hub) -> None:
        super().__init__(hub)
        self._id = 0
        self._ends = one, other = End(), End()
        one.other, other.other = other, one

    # -- handles

    def do_open(self, peer: Peer, id: int) -> None:
        """The process that has made it holds both ends."""
        self._id = id
        for end in self._ends:
            self._hold(end, peer.process)

    def do_hold(self, peer: Peer, index: int) -> None:
        """The caller's process is forked from one that has a handle."""
        if not self._ends[index].closed:
            self._hold(self._ends[index], peer.process)

    def do_give(self, peer: Peer, index: int, bound: bool) -> int:
        """Make a ticket. ``bound``: it goes with the caller's process, until the message that it is for is sent."""
        end = self._ends[index]
        if end.closed:
            raise KeyError("this end of a pipe is closed")
        number = next(_numbers)
        end.tickets[number] = peer.process if bound else None
        peer.process.uses[self] = None
        peer.undo = partial(self._discard, index, number)
        return number

    def do_take(self, peer: Peer, index: int, number: int) -> None:
        """Turn a ticket into a handle of the caller's."""
        end = self._ends[index]
        if number not in end.tickets:
            raise KeyError("this ticket has been used, or discarded")
        del end.tickets[number]
        self._hold(end, peer.process)
        peer.undo = partial(self.do_close, peer, index)

    def do_discard(self, peer: Peer, index: int, number: int) -> None:
        """Nobody will use this ticket, if somebody has not."""
        self._discard(index, number)

    def do_close(self, peer: Peer, index: int) -> None:
        """The caller's process has one handle less."""
        end = self._ends[index]
        count = end.holders.pop(peer.process, 0)
        if count > 1:
            end.holders[peer.process] = count - 1
        self._look(end)

    def gone(self, process: Process) -> None:
        for end in self._ends:
            end.holders.pop(process, None)
            for number in [number for number, owner in end.tickets.items() if owner is process]:
                del end.tickets[number]
            for number in [number for number, (owner, _) in end.rooms.items() if owner is process]:
                self._leave(end, number)
        for end in self._ends:
            self._look(end)

    # -- messages

    def do_send(self, peer: Peer, index: int, data: bytes | None, tickets: Sequence[Ticket], room: int) -> Any:
        """Answers when the message is in the inbox; at once if there is room for it."""
        end = self._ends[index].other
        message = Message(data, peer.buffers, tickets)
        if room:
            self._leave(end, room)
            if not end.closed:
                self._add(end, message)
                self._move(end)
                return None
        return self._let_in(peer, end, message.size, message)

    def do_room(self, peer: Peer, index: int, size: int) -> Any:
        """Answers a number when there is room for a message of ``size`` bytes, which the caller sends with it."""
        return self._let_in(peer, self._ends[index].other, size + _OVERHEAD, None)

    def do_leave(self, peer: Peer, index: int, room: int) -> None:
        """The caller does not send what it asked room for."""
        end = self._ends[index].other
        self._leave(end, room)
        self._move(end)

    def do_recv(self, peer: Peer, index: int) -> Any:
        """Answers (data, tickets) and buffers, or None at the end."""
        end = self._ends[index]
        if end.closed:
            peer.fail(_closed())
            return PARKED
        Wait(peer, end.readers, None)
        self._move(end)
        return PARKED

    def do_ready(self, peer: Peer, ends: Sequence[tuple[int, int]], timeout: float | None) -> Any:
        """Answers which of these (pipe, end) can be read; the place of each in the list. None is, when the time is over."""
        Ready(peer, [_find(self.hub, id, index) for id, index in ends], timeout).look()
        return PARKED

    def _let_in(self, peer: Peer, end: End, size: int, message: Message | None) -> Any:
        if self.hub.bytes + size > self.hub.limit:
            self.hub.free()
        if end.closed:
            peer.fail(_broken())
        elif self.hub.bytes + size > self.hub.limit:
            raise HubFull(
                f"the hub holds {self.hub.bytes} bytes, its limit is {self.hub.limit}, and a message of {size} bytes was to "
                "go through a pipe: send less at once, or let the processes that receive keep up"
            )
        else:
            Send(peer, end.writers, size, message)
            self._move(end)
        return PARKED

    def _move(self, end: End) -> None:
        """Let come in, and go out, what can."""
        while True:
            if end.inbox and end.readers:
                self._deliver(end, first(end.readers))
            elif end.writers and end.fits(first(end.writers).size):
                self._accept(end, first(end.writers))
            else:
                break
        if end.is_ready:
            for ready in list(end.watchers):
                ready.look()
            while end.readers and not end.inbox:
                first(end.readers).finish(None)

    def _accept(self, end: End, send: Send) -> None:
        send.leave()
        if send.message is not None:
            self._add(end, send.message)
            send.peer.reply(None)
            return
        number = next(_numbers)
        peer = send.peer
        end.rooms[number] = peer.process, send.size
        self._grow(end, send.size)
        peer.process.uses[self] = None
        peer.undo = partial(self.do_leave, peer, self._ends.index(end.other), number)
        peer.reply(number)

    def _add(self, end: End, message: Message) -> None:
        end.inbox.append(message)
        self._grow(end, message.size)
        bind(self.hub, message.tickets, None)

    def _deliver(self, end: End, wait: Wait) -> None:
        message = end.inbox.popleft()
        self._grow(end, -message.size)
        peer = wait.peer
        bind(self.hub, message.tickets, peer.process)
        wait.leave()
        peer.undo = partial(self._put_back, end, message)
        peer.reply((message.data, message.tickets), message.buffers)

    def _put_back(self, end: End, message: Message) -> None:
        if end.closed:
            discard(self.hub, message.tickets)
            return
        end.inbox.appendleft(message)
        self._grow(end, message.size)
        bind(self.hub, message.tickets, None)
        self._move(end)

    def _leave(self, end: End, room: int) -> None:
        _, size = end.rooms.pop(room, (None, 0))
        self._grow(end, -size)

    def _grow(self, end: End, size: int) -> None:
        end.size += size
        if size > 0:
            self.hub.bytes += size
        else:
            self.hub.release(-size)

    # -- ends

    def _hold(self, end: End, process: Process) -> None:
        end.holders[process] = end.holders.get(process, 0) + 1
        process.uses[self] = None

    def _discard(self, index: int, number: int) -> None:
        end = self._ends[index]
        end.tickets.pop(number, None)
        self._look(end)

    def _look(self, end: End) -> None:
        """Close an end that nobody holds, and let go on what waited for a change."""
        if not end.closed and not end.holders and not end.tickets:
            end.closed = True
            for message in end.inbox:
                discard(self.hub, message.tickets)
            end.inbox.clear()
            end.rooms.clear()
            self._grow(end, -end.size)
            while end.writers:
                first(end.writers).fail(_broken())
            while end.readers:
                first(end.readers).fail(_closed())
            self._move(end.other)
            if end.other.closed:
                self.hub.objects.pop(self._id, None)
                for process in self.hub.processes.values():
                    process.uses.pop(self, None)
        self._move(end)


class Send(Wait):
    """Waits for room; the message comes later if there is none."""

    __slots__ = ("message", "size")

    def __init__(self, peer: Peer, queue: OrderedDict[Any, None], size: int, message: Message | None) -> None:
        super().__init__(peer, queue, None)
        self.size = size
        self.message = message


class Ready(Wait):
    """Waits for any of several ends."""

    __slots__ = ("ends",)

    def __init__(self, peer: Peer, ends: Sequence[End], timeout: float | None) -> None:
        super().__init__(peer, OrderedDict(), timeout)
        self.ends = ends
        for end in ends:
            end.watchers[self] = None

    def look(self) -> None:
        found = [place for place, end in enumerate(self.ends) if end.is_ready]
        if found:
            self.finish(found)

    def due(self) -> None:
        self.finish([])

    def leave(self) -> None:
        super().leave()
        for end in self.ends:
            end.watchers.pop(self, None)


def _find(hub: Hub, id: int, index: int) -> End:
    pipe = hub.objects.get(id)
    if isinstance(pipe, Pipe):
        return pipe._ends[index]
    end = End()
    end.closed = True
    return end


def bind(hub: Hub, tickets: Sequence[Ticket], process: Process | None) -> None:
    """Let tickets go with a process; None: with the message that carries them."""
    for id, index, number in tickets:
        pipe = hub.objects.get(id)
        if isinstance(pipe, Pipe) and number in pipe._ends[index].tickets:
            pipe._ends[index].tickets[number] = process
            if process is not None:
                process.uses[pipe] = None


def discard(hub: Hub, tickets: Iterable[Ticket]) -> None:
    """Discard tickets, later: what closes then may hold tickets itself, and so on without an end."""
    for id, index, number in tickets:
        pipe = hub.objects.get(id)
        if isinstance(pipe, Pipe):
            hub.at(0.0, Timer(partial(pipe._discard, index, number)))


def _broken() -> OSError:
    return OSError(errno.EPIPE, "Broken pipe: no process holds the other end")


def _closed() -> OSError:
    return OSError(errno.EBADF, "this end of a pipe is closed")
