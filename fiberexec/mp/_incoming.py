"""A message that comes in by a descriptor, and what may go wrong on its way."""

from __future__ import annotations

import io
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LARGE = 1 << 16  # bytes: from here on a message is not copied together, nor read whole before it is unpickled


class ConnectionLost(EOFError, ConnectionResetError):
    """The other end of a connection has gone half-way through a message, or without reading what was sent to it."""

    __module__ = "fiberexec.mp.connection"


def lost() -> ConnectionLost:
    return ConnectionLost("the other end of the connection has gone in the middle of a message")


def is_local(fd: int) -> bool:
    """Whether ``fd`` is a socket of this host."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return False
    with a_socket(fd) as sock:
        return sock.family == socket.AF_UNIX


@contextmanager
def a_socket(fd: int) -> Iterator[socket.socket]:
    """``fd`` as a socket, blocking whatever socket.setdefaulttimeout() says."""
    sock = socket.socket(fileno=fd)
    try:
        sock.setblocking(True)
        yield sock
    finally:
        sock.detach()


class Message(io.RawIOBase):
    """What has not been read yet of one message, as a file."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._left = size
        self.lost = False  # whether the rest will never come

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            return 0
        try:
            got = os.readv(self._fd, [memoryview(buffer)[: self._left]])
        except ConnectionResetError:
            got = 0
        if not got:
            self._left, self.lost = 0, True
            raise lost()
        self._left -= got
        return got

    def skip(self) -> None:
        """Read the rest, so that the next message can be."""
        while self._left:
            self.readinto(bytearray(LARGE))


def room(buffer: memoryview, offset: int) -> memoryview:
    """What is left of a buffer from a place on."""
    if offset > len(buffer):
        raise ValueError("offset too large")
    return buffer[offset:]
