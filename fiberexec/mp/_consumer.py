"""The end of a queue where items come out, as one thread holds it.

In a job on another host it has no memory in common with the hub: a `FarConsumer` tells the hub what it has written into its
cell, and a thread hears what the hub would write there.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from _collections import deque  # type: ignore[import-not-found]
from contextlib import suppress
from time import monotonic
from typing import Any

from fiberexec import _platform
from fiberexec._hub import client, launch
from fiberexec._hub.launch import Address
from fiberexec._hub.wire import CELL, CELLS, CLAIMED, DONE, GOT, HUB, RECALLED
from fiberexec._messages import decode

_WORK = 0.001  # seconds of a consumer's work that are taken ahead
_MOST = 256  # items that are taken ahead


class Consumer:
    """One thread's end of one queue."""

    cell: memoryview[int] | list[int]

    def __init__(self, hub: Address, id: int) -> None:
        self._open(hub, id)
        self.hub = hub
        self.id = id
        self.items: deque[Any] = deque()  # claimed from the left
        self.number = 0  # of the last one claimed
        self.marked = 0  # how many of them are done
        self.taken = 0  # in the last batch
        self.came = 0.0  # when it came
        self.want = 1
        self.is_new = True

    def _open(self, hub: Address, id: int) -> None:
        self.cells, self.slot = _cell(hub, id)
        self.cell = self.cells.memory[CELL * self.slot : CELL * (self.slot + 1)]

    def got(self) -> None:
        """What was claimed is the caller's now."""
        self.cell[GOT] = self.number

    def claim(self) -> Any:
        """The next item that is here; None if there is none, or it was taken back."""
        if not self.items:
            return None
        cell = self.cell
        number = self.number + 1
        cell[CLAIMED] = number
        if cell[RECALLED] >= number:
            cell[CLAIMED] = number - 1
            self.items.clear()
            return None
        self.number = number
        return self.items.popleft()

    def pace(self) -> None:
        """Want as many items as take _WORK seconds, going by the last batch."""
        used = self.taken - len(self.items)
        if used:
            seconds = (monotonic() - self.came) / used
            self.want = max(1, min(_MOST, 2 * self.want, int(_WORK / max(seconds, 1e-7))))

    def receive(self, number: int, items: list[Any], buffers: list[Any]) -> Any:
        """What the hub has answered; returns the first item, which is claimed and cannot be taken back."""
        self.cell[CLAIMED] = self.number = number
        self.taken = len(items)
        self.came = monotonic()
        if buffers:
            position = 0
            for index, item in enumerate(items):
                if type(item) is tuple:
                    data, kinds = item
                    own = [bytes(b) if kind else b for b, kind in zip(buffers[position : position + len(kinds)], kinds)]
                    position += len(kinds)
                    items[index] = (own.pop(0) if data is None else data), own
        self.items = deque(items)
        return self.items.popleft()

    def __del__(self) -> None:
        if hasattr(self, "id"):  # else it could not be made
            self.cells.free.append((self.id, self.slot))


class FarConsumer(Consumer):
    """In a process that is not on the hub's host."""

    def _open(self, hub: Address, id: int) -> None:
        self.slot = next(_slots)
        self.cell = [0] * CELL
        _far[self.slot] = self

    def got(self) -> None:
        super().got()
        with suppress(OSError):  # the hub has gone, but the item is here
            self.tell()

    def tell(self) -> None:
        """Tell the hub what is in the cell."""
        client.post(self.hub, ("tell", self.id, (self.slot, *self._told())))

    def _told(self) -> tuple[int, int, int]:
        return self.cell[CLAIMED], self.cell[GOT], self.cell[DONE]

    def pace(self) -> None:
        super().pace()
        if self.want > 1:
            _hear_recalls(self.hub)
        self.cell[RECALLED] = 0  # should one come that is older than the answer, the hub will hear what was not claimed

    def recall(self, last: int, number: int) -> None:
        """Give back what is not claimed yet."""
        self.cell[RECALLED] = last
        client.post(self.hub, ("recalled", self.id, (self.slot, number, *self._told())))

    def __del__(self) -> None:
        if hasattr(self, "id"):
            client.post_later(self.hub, ("leave", self.id, (self.slot, *self._told())))


_slots = itertools.count()
_far: weakref.WeakValueDictionary[int, FarConsumer] = weakref.WeakValueDictionary()
_hearing: set[bytes] = set()  # hubs, by their tokens


def _hear_recalls(hub: Address) -> None:
    """Let a thread hear what the hub wants back."""
    with _cells_lock:
        if hub.token in _hearing:
            return
        channel = client.subscribe(hub, ("recalls", HUB, ()))
        threading.Thread(target=_listen, args=(hub, channel), name="fiberexec-recalls", daemon=True).start()
        _hearing.add(hub.token)


def _listen(hub: Address, channel: Any) -> None:
    try:
        while True:
            slot, last, number = decode(channel.stream.receive_one()[1])
            consumer = _far.get(slot)
            if consumer is None:
                client.call("ping", HUB, hub=hub)  # lets go out what it has left to be said
            else:
                consumer.recall(last, number)
            del consumer
    except (OSError, EOFError):
        channel.close()  # the hub has gone, as everybody hears


class _Cells:
    """The memory in which this process' consumers tell one hub how far they are."""

    def __init__(self, hub: Address) -> None:
        fd = _platform.make_cells(CELLS * CELL // _platform.CELL_WORDS)  # workers' cells are smaller
        try:
            self.memory = _platform.map_cells(fd)
            client.send_fd(hub, ("cells", HUB, ()), fd)
        finally:
            os.close(fd)
        self.unused = iter(range(CELLS))
        self.free: deque[tuple[int, int]] = deque()  # queue, slot: of threads that have ended


_all_cells: dict[bytes, _Cells] = {}  # by the hub's token
_cells_lock = threading.Lock()


def _cell(hub: Address, id: int) -> tuple[_Cells, int]:
    """A slot that nobody uses."""
    with _cells_lock:
        cells = _all_cells.get(hub.token)
        if cells is None:
            cells = _all_cells[hub.token] = _Cells(hub)
    while True:
        try:
            queue, slot = cells.free.popleft()
        except IndexError:
            break
        try:
            if client.call("leave", queue, slot, hub=hub):
                return cells, slot
        except KeyError:  # the queue has gone
            return cells, slot
    try:
        return cells, next(cells.unused)
    except StopIteration:
        raise RuntimeError(f"more than {CELLS} threads and queues: let threads end that only got from a queue") from None


def _in_child() -> None:
    global _cells_lock
    _cells_lock = threading.Lock()
    _all_cells.clear()
    _far.clear()
    _hearing.clear()


launch.at_close.append(_all_cells.clear)
os.register_at_fork(after_in_child=_in_child)
