"""Listeners that have a name in the hub, for clients that no socket of the listener's host can reach."""

from __future__ import annotations

import errno
from contextlib import suppress
from multiprocessing.connection import answer_challenge, deliver_challenge
from typing import Any

from fiberexec._hub import client, launch
from fiberexec._hub.wire import HUB
from fiberexec.mp._hubconnection import HubConnection, make
from fiberexec.mp.connection import HUB_NAME


class Backlog:
    """What a ``Listener`` has in the place of a socket."""

    _last_accepted = None

    def __init__(self) -> None:
        self._hub = launch.address()
        self._id = client.call("new", HUB, "listener", hub=self._hub)
        client.call("open", self._id, self._id, hub=self._hub)
        self._address = f"{HUB_NAME}{self._id}"

    def accept(self) -> HubConnection:
        try:
            ticket = client.call("accept", self._id, hub=self._hub)
        except KeyError:
            raise OSError(errno.EBADF, "the listener is closed") from None
        return make(HubConnection, self._hub, ticket, True, True)

    def close(self) -> None:
        with suppress(OSError):  # the hub has gone, and the listener
            client.post(self._hub, ("close", self._id, ()))


def connect(address: str, authkey: bytes | None) -> HubConnection:
    """See ``Client()``. Raises ConnectionRefusedError if there is no such listener, or no more."""
    try:
        if not launch.is_known():
            raise KeyError(address)
        hub = launch.address()
        id = client.call("connect", int(address.removeprefix(HUB_NAME)), hub=hub)
    except (KeyError, ValueError):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody listens there: its process has ended", address) from None
    connection: Any = HubConnection(hub, id, 0)
    if authkey is not None:
        try:
            answer_challenge(connection, authkey)
            deliver_challenge(connection, authkey)
        except BaseException:
            connection.close()
            raise
    return connection  # type: ignore[no-any-return]
