"""Wakes a thread that waits in select()."""

from __future__ import annotations

import os
import threading


class Waker:
    """A byte in a pipe. Any thread may wake(), also from within the garbage collector; open() and close() are the owner's."""

    def __init__(self) -> None:
        self._pipe: tuple[int, int] | None = None
        self._set = False  # a byte is in the pipe
        self._lock = threading.RLock()  # guards both; the garbage collector may come back to the thread that holds it

    def open(self) -> int:
        """Make the pipe; returns the descriptor to wait for."""
        pipe = os.pipe()
        os.set_blocking(pipe[0], False)
        os.set_blocking(pipe[1], False)
        self._pipe = pipe
        return pipe[0]

    def wake(self) -> None:
        """Make the descriptor readable. Nothing happens before open() and after close()."""
        with self._lock:
            if self._pipe is not None and not self._set:
                self._set = True
                try:
                    os.write(self._pipe[1], b"x")
                except BlockingIOError:
                    pass  # it is readable already

    def clear(self) -> None:
        """Make it unreadable again; to be called before one looks for what it was woken for."""
        with self._lock:
            self._set = False
            if self._pipe is not None:
                try:
                    os.read(self._pipe[0], 64)
                except BlockingIOError:
                    pass

    def close(self) -> None:
        with self._lock:
            for fd in self._pipe or ():
                os.close(fd)
            self._pipe = None

    def forked(self) -> None:
        """In a forked child the lock may be held by a thread that does not exist there."""
        self._lock = threading.RLock()
        self.close()
