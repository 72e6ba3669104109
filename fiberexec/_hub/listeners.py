"""Listeners whose clients may be anywhere: the hub's side.

    connect ─► a new pipe: one end is the client's, a ticket to the other waits in the backlog ─► accept

A listener is its process', and ends with it: then the ends of those that nobody has accepted read the end of the pipe, and
who connects is refused.
"""

from __future__ import annotations

import errno
from collections import OrderedDict, deque
from functools import partial
from typing import TYPE_CHECKING, Any

from fiberexec._hub.pipes import Pipe, Ticket, bind, discard
from fiberexec._hub.shared import PARKED, Shared, Wait, first

if TYPE_CHECKING:
    from fiberexec._hub.peers import Peer, Process
    from fiberexec._hub.server import Hub


class Listener(Shared):
    def __init__(self, hub: Hub) -> None:
        super().__init__(hub)
        self._id = 0
        self._backlog: deque[Ticket] = deque()
        self._accepting: OrderedDict[Wait, None] = OrderedDict()

    def do_open(self, peer: Peer, id: int) -> None:
        """The listener is the caller's process'."""
        self._id = id
        peer.process.uses[self] = None

    def do_connect(self, peer: Peer) -> int:
        """Answers the id of a pipe, whose end 0 is the caller's."""
        id = self.hub.do_new(peer, "pipe")
        pipe = self.hub.objects[id]
        assert isinstance(pipe, Pipe)
        pipe.do_open(peer, id)
        self._backlog.append((id, 1, pipe.do_give(peer, 1, False)))
        pipe.do_close(peer, 1)
        peer.undo = partial(pipe.do_close, peer, 0)
        self._move()
        return id

    def do_accept(self, peer: Peer) -> Any:
        """Answers a ticket when a client is there."""
        Wait(peer, self._accepting, None)
        self._move()
        return PARKED

    def do_close(self, peer: Peer) -> None:
        self._close()

    def gone(self, process: Process) -> None:
        self._close()

    def _move(self) -> None:
        while self._accepting and self._backlog:
            ticket = self._backlog.popleft()
            wait = first(self._accepting)
            wait.leave()
            bind(self.hub, [ticket], wait.peer.process)
            wait.peer.undo = partial(self._put_back, ticket)
            wait.peer.reply(ticket)

    def _put_back(self, ticket: Ticket) -> None:
        bind(self.hub, [ticket], None)
        self._backlog.appendleft(ticket)
        self._move()

    def _close(self) -> None:
        self.hub.objects.pop(self._id, None)
        discard(self.hub, self._backlog)
        self._backlog.clear()
        while self._accepting:
            first(self._accepting).fail(OSError(errno.EBADF, "the listener is closed"))
