"""The end of a queue where items come out, as one thread holds it."""

from __future__ import annotations

import os
import threading
from _collections import deque  # type: ignore[import-not-found]
from time import monotonic
from typing import Any

from fiberexec import _platform
from fiberexec._hub import client, launch
from fiberexec._hub.launch import Address
from fiberexec._hub.wire import CELL, CELLS, CLAIMED, HUB, RECALLED

_WORK = 0.001  # seconds of a consumer's work that are taken ahead
_MOST = 256  # items that are taken ahead


class Consumer:
    """One thread's end of one queue."""

    def __init__(self, hub: Address, id: int) -> None:
        self.cells, self.slot = _cell(hub, id)
        self.cell = self.cells.memory[CELL * self.slot : CELL * (self.slot + 1)]
        self.id = id
        self.items: deque[Any] = deque()  # claimed from the left
        self.number = 0  # of the last one claimed
        self.marked = 0  # how many of them are done
        self.taken = 0  # in the last batch
        self.came = 0.0  # when it came
        self.want = 1
        self.is_new = True

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


launch.at_close.append(_all_cells.clear)
os.register_at_fork(after_in_child=_in_child)
