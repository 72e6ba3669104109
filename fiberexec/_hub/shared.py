"""What all kinds of shared objects have in common, as the hub sees them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fiberexec._hub.peers import Peer, Process
    from fiberexec._hub.server import Hub

PARKED: Any = object()  # what an operation returns when it is answered later


class Shared:
    """An object. Its operations are the methods ``do_...(peer, *arguments)``: they return the answer, or PARKED."""

    # Operations that only look are carried out after whatever had been sent before them, on any connection.
    looks: Collection[str] = ()

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def gone(self, process: Process) -> None:
        """A process that used this object has gone: take back what it held."""

    def dropped(self) -> None:
        """Nobody refers to this object any more."""


class Timer:
    """Calls ``due`` at its time, unless it is done before."""

    __slots__ = ("done", "due")

    def __init__(self, due: Callable[[], None]) -> None:
        self.due = due
        self.done = False


class Wait:
    """A call that is answered later. Subclasses say what happens when its time is over, or its caller has gone."""

    __slots__ = ("done", "peer", "queue")

    def __init__(self, peer: Peer, queue: OrderedDict[Any, None], timeout: float | None) -> None:
        self.peer = peer
        self.done = False
        self.queue = queue  # where it waits, in the order of arrival
        queue[self] = None
        peer.parked = self
        if timeout is not None:
            peer.hub.at(monotonic() + timeout if timeout > 0 else 0.0, self)

    def leave(self) -> None:
        """Wait no longer, whatever the reason."""
        self.done = True
        self.queue.pop(self, None)
        self.peer.parked = None

    def move(self, queue: OrderedDict[Any, None]) -> None:
        """Wait elsewhere."""
        del self.queue[self]
        self.queue = queue
        queue[self] = None

    def finish(self, value: object) -> None:
        self.leave()
        self.peer.reply(value)

    def fail(self, error: Exception) -> None:
        self.leave()
        self.peer.fail(error)

    def due(self) -> None:
        """The time is over."""
        self.finish(False)

    def cancel(self) -> None:
        """The caller has gone, or was interrupted."""
        self.leave()


def first(queue: OrderedDict[Any, None]) -> Any:
    """Who waits for the longest time."""
    return next(iter(queue))
