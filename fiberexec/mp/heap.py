"""Memory that the processes of a program share: blocks of mapped files, which travel as the file's name and a place in it.

The files stand in the hub's folder, which nobody else may enter and which goes with the program. A block that was never
pickled is free again when its object goes; one that was pickled stays until the program ends, since a handle may be on its
way anywhere. Where in its files there is room is for multiprocessing's heap to find.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from multiprocessing import heap as _standard
from multiprocessing import util
from typing import Any

from fiberexec import _platform
from fiberexec._hub import launch

__all__ = ["Arena", "Block", "Heap"]


class Arena:
    """A mapped file of ``size`` bytes: a new one, which goes with this object unless it is pinned, or that at ``path``."""

    def __init__(self, size: int, path: str | None = None) -> None:
        self.size = size
        self._unlink: Any = None
        if path is None:
            folder = os.path.dirname(launch.address().path)
            launch.start()  # the hub removes the folder even if this process is killed
            fd, path = tempfile.mkstemp(prefix="memory-", dir=folder)
            self._unlink = util.Finalize(self, os.unlink, (path,), exitpriority=-100)
        else:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if self._unlink is not None:
                _allocate(fd, size, path)
            self.buffer = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self.path = path
        _arenas[path] = self

    def pin(self) -> None:
        """Leave the file to the end of the program."""
        if self._unlink is not None:
            self._unlink.cancel()


_arenas: weakref.WeakValueDictionary[str, Arena] = weakref.WeakValueDictionary()  # that this process has mapped, by path


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

    def _new_arena(self, size: int) -> tuple[Arena, int, int]:
        length = max(self._size, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        self._size = min(2 * self._size, _standard.Heap._DOUBLE_ARENA_SIZE_UNTIL)  # type: ignore[attr-defined]
        arena = Arena(length)
        self._arenas.append(arena)  # type: ignore[attr-defined]
        return arena, 0, length


class Block:
    """``size`` bytes of shared memory, not initialized. It can be pickled at any time and arrives as the same memory."""

    _heap = Heap()

    def __init__(self, size: int) -> None:
        block: Any = self._heap.malloc(size)
        self._place(block[0], block[1], size)
        self._free: Any = util.Finalize(self, self._heap.free, (block,))

    def _place(self, arena: Arena, start: int, size: int) -> None:
        self._arena = arena
        self._start = start
        self.size = size
        self._free = None

    @property
    def memory(self) -> memoryview:
        """The bytes, writable."""
        return memoryview(self._arena.buffer)[self._start : self._start + self.size]

    def __reduce__(self) -> tuple[object, ...]:
        if self._free is not None:
            self._free.cancel()
            self._arena.pin()
        return _attach, (self._arena.path, self._arena.size, self._start, self.size, _platform.host_name())


def _attach(path: str, whole: int, start: int, size: int, host: str) -> Block:
    try:
        arena = _arenas.get(path) or Arena(whole, path)
    except FileNotFoundError:
        here = _platform.host_name()
        if here == host:
            reason = "the program that made it has ended"
        else:
            reason = f"it is on host {host}, this is {here}: only processes on one host share memory, use a Manager's objects"
        raise FileNotFoundError(2, f"this shared memory cannot be reached: {reason}", path) from None
    block = Block.__new__(Block)
    block._place(arena, start, size)
    return block
