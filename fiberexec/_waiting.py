"""What a thread waits for: its waker, the streams of its workers, the descriptors of its backend."""

from __future__ import annotations

import selectors
from collections.abc import Iterable, Iterator
from typing import Any

Source = Any  # a descriptor, or what has a fileno()
BACKEND = object()  # the owner of a backend's descriptors


class Waiting:
    """Each source has an owner, which wait() names when there is something to read, or room to write where that was asked."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._backend: set[int] = set()

    def wait(self, timeout: float | None) -> Iterator[tuple[Any, bool, bool]]:
        """Owners of what is ready, and whether for reading and for writing; none after ``timeout`` seconds."""
        for key, mask in self._selector.select(timeout):
            yield key.data, bool(mask & selectors.EVENT_READ), bool(mask & selectors.EVENT_WRITE)

    def add(self, source: Source, owner: object) -> None:
        self._selector.register(source, selectors.EVENT_READ, owner)

    def ask_for_room(self, source: Source, owner: object, wanted: bool) -> None:
        """Whether room to write counts as well."""
        try:
            self._selector.modify(source, selectors.EVENT_READ | (selectors.EVENT_WRITE if wanted else 0), owner)
        except (KeyError, ValueError):
            pass  # it has ended meanwhile

    def remove(self, source: Source) -> None:
        try:
            self._selector.unregister(source)
        except (KeyError, ValueError):
            pass  # it was removed before

    def follow(self, backend: Iterable[int]) -> None:
        """Wait for these descriptors of the backend, and for no other of its own any more."""
        wanted = set(backend)
        for fd in self._backend - wanted:
            self.remove(fd)
        for fd in wanted - self._backend:
            self.add(fd, BACKEND)
        self._backend = wanted

    def close(self) -> None:
        self._selector.close()
