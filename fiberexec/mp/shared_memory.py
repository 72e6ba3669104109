"""Shared memory by name: multiprocessing's, for the processes of one host.

The process that a program begins with tracks what it made or attached, as multiprocessing does, and unlinks at its end what
nobody has unlinked. Its workers track nothing: they end earlier than the memory that others still use.
"""

from __future__ import annotations

from multiprocessing import resource_tracker
from multiprocessing import shared_memory as _standard
from typing import Any

from fiberexec import _platform, _worker

__all__ = ["ShareableList", "SharedMemory"]


class SharedMemory(_standard.SharedMemory):
    """``multiprocessing.shared_memory.SharedMemory``; ``track=False`` works on every Python.

    Raises ``FileNotFoundError`` when one that was pickled arrives on another host.
    """

    _name: str
    _untracked = False

    def __init__(self, name: str | None = None, create: bool = False, size: int = 0, *, track: bool = True) -> None:
        super().__init__(name, create, size)
        self._untrack(track)

    def _untrack(self, track: bool) -> None:
        self._untracked = not track or _worker.current is not None
        if self._untracked:
            resource_tracker.unregister(self._name, "shared_memory")

    def unlink(self) -> None:
        """Remove the name; the memory goes with the last process that has it open. Raises ``FileNotFoundError``."""
        if self._untracked:  # what follows makes the tracker forget it
            resource_tracker.register(self._name, "shared_memory")
        try:
            super().unlink()
        except OSError:
            if self._untracked:
                resource_tracker.unregister(self._name, "shared_memory")
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (type(self), self.name, _platform.host_name())


class ShareableList(_standard.ShareableList):  # type: ignore[type-arg]
    """``multiprocessing.shared_memory.ShareableList``, in a ``SharedMemory`` of this module."""

    shm: SharedMemory

    def __init__(self, sequence: Any = None, *, name: str | None = None) -> None:
        super().__init__(sequence, name=name)
        self.shm.__class__ = SharedMemory  # it differs in what happens at the end alone
        self.shm._untrack(True)

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (type(self), self.shm.name, _platform.host_name())


def _attach(kind: Any, name: str, host: str) -> Any:
    try:
        return kind(name=name)
    except FileNotFoundError:
        here = _platform.host_name()
        if here == host:
            raise
        text = f"shared memory is for processes of one host: it was made on {host}, this is {here}; "
        text += "use an Array, or a Manager's objects"
        raise FileNotFoundError(2, text, name) from None
