"""Consumers of queues, as the hub sees them: what they hold, and how far they are. See queues."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fiberexec._hub.shared import Timer
from fiberexec._hub.wire import CELL, CLAIMED, DONE, GOT

if TYPE_CHECKING:
    from fiberexec._hub.peers import Process

_OVERHEAD = 100  # bytes that an item costs beside its own


class Item:
    __slots__ = ("buffers", "data", "kinds", "size")

    def __init__(self, data: bytes | None, kinds: bytes, buffers: Sequence[Any]) -> None:
        self.data = data
        self.kinds = kinds
        self.buffers = buffers
        self.size = _OVERHEAD + (len(data) if data is not None else 0) + sum(map(len, buffers))


def unpacked(items: list[Any], buffers: list[Any]) -> list[Item]:
    """A frame's items."""
    if not buffers:
        return [Item(data, b"", ()) for data in items]
    found = []
    position = 0
    for item in items:
        if type(item) is tuple:
            data, kinds = item
            found.append(Item(data, kinds, buffers[position : position + len(kinds)]))
            position += len(kinds)
        else:
            found.append(Item(item, b"", ()))
    return found


class Consumer:
    """``held`` are the items ``first`` .. ``first + len(held) - 1`` in its own count."""

    def __init__(self, process: Process, slot: int) -> None:
        self.process = process
        self.slot = slot
        self.is_far = not process.cells  # it tells what is in its cell
        self.cell: memoryview[int] | list[int] = [0] * CELL if self.is_far else process.cells[CELL * slot : CELL * (slot + 1)]
        self.held: deque[Item] = deque()
        self.first = 1
        self.done = 0  # task_done() calls that have been counted
        self.since = 0.0  # when it got the last ones
        self.promised = 0  # the number of the first of them
        self.holding: Timer | None = None  # due when it may have held something for too long
        self.recall: Timer | None = None  # under way
        self.recalls = 0  # how many there were

    @property
    def last(self) -> int:
        return self.first + len(self.held) - 1

    @property
    def kept(self) -> int:
        """The last item that cannot be taken back."""
        return max(self.cell[CLAIMED], self.promised)

    def hear(self, claimed: int, got: int, done: int) -> None:
        """What is in its cell."""
        for word, told in ((CLAIMED, claimed), (GOT, got), (DONE, done)):
            self.cell[word] = max(self.cell[word], told)

    def end_recall(self) -> None:
        if self.recall is not None:
            self.recall.done = True
            self.recall = None
