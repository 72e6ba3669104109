"""Bytes that processes on several hosts share: the hub's side of Value and Array."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fiberexec._errors import HubFull
from fiberexec._hub.shared import PARKED, Shared
from fiberexec._messages import BULK

if TYPE_CHECKING:
    from fiberexec._hub.peers import Peer
    from fiberexec._hub.server import Hub


class Memory(Shared):
    def __init__(self, hub: Hub, size: int) -> None:
        super().__init__(hub)
        if hub.bytes + size > hub.limit:
            hub.free()
        if hub.bytes + size > hub.limit:
            raise HubFull(
                f"the hub holds {hub.bytes} bytes, its limit is {hub.limit}, and {size} bytes of shared memory were to be had"
            )
        self._data = bytearray(size)
        hub.bytes += size

    def do_read(self, peer: Peer, start: int, size: int) -> Any:
        """Answers bytes, or None and a buffer."""
        data = bytes(memoryview(self._data)[start : start + size])  # what is written later is not in it
        if size < BULK:
            return data
        peer.reply(None, [data])
        return PARKED

    def do_write(self, peer: Peer, start: int, data: bytes | None) -> None:
        written = peer.buffers[0] if data is None else data
        memoryview(self._data)[start : start + len(written)] = written

    def dropped(self) -> None:
        self.hub.release(len(self._data))
