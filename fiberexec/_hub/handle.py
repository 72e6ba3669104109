"""A shared object as its users hold it."""

from __future__ import annotations

import os
from typing import Any

from fiberexec._hub import client, launch
from fiberexec._hub.launch import Address
from fiberexec._hub.wire import HUB

_forks = 0  # of this process


def seconds(timeout: float | None) -> float | None:
    """A timeout as the hub takes it: plain, whatever kind of number (numpy's, ...) the user has."""
    return None if timeout is None else float(max(0.0, timeout))


class Handle:
    """Names an object of the hub. It can be pickled at any time, and so travel to any process of the program.

    The object goes with the handle that made it, and with the process; once that has been pickled, or its process has
    forked, others may have it too: then it lives as long as the program.
    """

    _hub: Address
    _id: int
    _owner: tuple[int, int] | None = None  # (pid, forks) when it was made; None: others may have it

    def _make(self, kind: str, *args: object) -> None:
        self._hub = launch.address()
        self._id = client.call("make", HUB, kind, *args, hub=self._hub)
        self._owner = os.getpid(), _forks
        _hubs.add(self._hub)

    def _call(self, op: str, *args: object) -> Any:
        return client.request(self._hub, (op, self._id, args))[0]

    def _share(self) -> tuple[tuple[str, bytes], int]:
        """What another process needs to know."""
        if self._owner is not None:
            self._owner = None
            _tell_shared(self._hub, self._id)
        return (self._hub.path, self._hub.token), self._id

    def _adopt(self, shared: tuple[tuple[str, bytes], int]) -> None:
        address, self._id = shared
        self._hub = Address(*address)

    def __del__(self) -> None:
        if self._owner == (os.getpid(), _forks):
            client.post_later(self._hub, ("drop", HUB, (self._id,)))


_hubs: set[Address] = set()  # that hold what this process has made since it forked


def _tell_shared(hub: Address, *ids: int) -> None:
    try:
        client.post(hub, ("share", HUB, ids))
    except OSError:
        pass  # the hub has gone


def _before_fork() -> None:
    global _forks
    _forks += 1
    while _hubs:
        _tell_shared(_hubs.pop())


os.register_at_fork(before=_before_fork)
