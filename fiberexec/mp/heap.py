"""Memory that the processes of a program share: blocks of mapped files, which travel as the file's name and a place in it.

The files stand in the hub's folder, which nobody else may enter and which goes with the program. A block that was never
pickled is free again when its object goes; one that was pickled stays until the program ends, since a handle may be on its
way anywhere. Large blocks have files of their own; small ones share files, in which multiprocessing's heap finds room.
"""

from __future__ import annotations

import mmap
import os
import weakref
from multiprocessing import heap as _standard
from multiprocessing import util
from typing import Any

from fiberexec import _platform
from fiberexec._errors import HubLost
from fiberexec._hub import launch

__all__ = ["Arena", "BufferWrapper", "Heap"]

_LARGE = 1 << 16  # bytes


class Arena:
    """A mapped file of ``size`` bytes. One that is ``new`` goes with this object, unless it is pinned."""

    def __init__(self, path: str, size: int, new: bool = False) -> None:
        self.path = path
        self.size = size
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if new else 0), 0o600)
        self._unlink: Any = util.Finalize(self, os.unlink, (path,), exitpriority=-90) if new else None
        try:
            if new:
                _allocate(fd, size, path)
            self.buffer = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        _arenas[path] = self

    def pin(self) -> None:
        """Leave the file to the end of the program."""
        if self._unlink is not None:
            self._unlink.cancel()


_arenas: weakref.WeakValueDictionary[str, Arena] = weakref.WeakValueDictionary()  # that this process has mapped, by path


def _new_arena(size: int) -> Arena:
    folder = os.path.dirname(launch.way(launch.address()))  # the hub's, or the job's
    launch.start()  # who made the folder removes it, even if this process is killed
    try:
        return Arena(os.path.join(folder, f"memory-{os.urandom(8).hex()}"), size, new=True)
    except FileNotFoundError:
        raise HubLost(f"the hub has gone, and {folder} with it, where shared memory stands: start the program again") from None


def _allocate(fd: int, size: int, path: str) -> None:
    """Take the memory now: where it is missing, who wrote to it later would be killed."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
        else:
            os.ftruncate(fd, size)
    except OSError as error:
        folder = os.path.dirname(path)
        raise OSError(error.errno, f"{size} bytes of shared memory are not to be had in {folder}: {error.strerror}") from None


class Heap(_standard.Heap):
    """multiprocessing's heap, of files that have names."""

    _size: int

    def __init__(self) -> None:
        super().__init__()
        self.hub = launch.address()

    def _new_arena(self, size: int) -> tuple[Arena, int, int]:
        length = max(self._size, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        self._size = min(2 * self._size, _standard.Heap._DOUBLE_ARENA_SIZE_UNTIL)  # type: ignore[attr-defined]
        arena = _new_arena(length)
        self._arenas.append(arena)  # type: ignore[attr-defined]
        return arena, 0, length


class BufferWrapper:
    """``size`` bytes of shared memory, not initialized. It can be pickled at any time and arrives as the same memory."""

    _heap: Heap | None = None  # where small ones are made now
    _free: Any = None  # gives the memory back to its heap

    def __init__(self, size: int) -> None:
        if size >= _LARGE:
            self._place(_new_arena(size), 0, size)
            return
        heap = BufferWrapper._heap
        if heap is None or heap.hub != launch.address():
            heap = BufferWrapper._heap = Heap()
        block: Any = heap.malloc(size)
        self._place(block[0], block[1], size)
        self._free = util.Finalize(self, heap.free, (block,))

    def _place(self, arena: Arena, start: int, size: int) -> None:
        self._arena = arena
        self._start = start
        self.size = size

    def create_memoryview(self) -> memoryview:
        """The bytes, writable."""
        return memoryview(self._arena.buffer)[self._start : self._start + self.size]

    def __reduce__(self) -> tuple[object, ...]:
        if self._free is not None:
            self._free.cancel()
        self._arena.pin()
        return _attach, (self._arena.path, self._arena.size, self._start, self.size, _platform.host_name())


def _attach(path: str, whole: int, start: int, size: int, host: str) -> BufferWrapper:
    try:
        arena = _arenas.get(path) or Arena(path, whole)
    except FileNotFoundError:
        here = _platform.host_name()
        if here == host:
            reason = "the program that made it has ended"
        else:
            reason = f"it is on host {host}, this is {here}: only processes on one host share memory; "
            reason += "make it in the context of the backend that the processes run on, such as get_context('docker')"
        raise FileNotFoundError(2, f"this shared memory cannot be reached: {reason}", path) from None
    block = BufferWrapper.__new__(BufferWrapper)
    block._place(arena, start, size)
    return block


def forget() -> None:
    """Use what is there no more for what is made from now on: after a fork both sides may hold it."""
    BufferWrapper._heap = None


os.register_at_fork(before=forget)
