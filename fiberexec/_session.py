"""A conversation of two processes over messages that may be lost, come twice or in another order: nothing else is assumed.

Packets are numbered. Each message carries packets, in order, and says up to where the other side's have arrived; what has
not arrived is kept, and sent again after rewind(). Pure: no sockets, no clock.
"""

from __future__ import annotations

import json
import struct
from collections import deque
from typing import Any, NamedTuple

from fiberexec._stream import Buffer, ProtocolError

MESSAGE_BYTES = 1 << 18  # a message takes packets up to about this size
EXCHANGES = 8  # requests of an agent at once
PARKED = 4  # of them, that wait for the hub to have something to say
ABANDONED = 75  # exit code of an agent that has met the hub, and not heard of it for driver_timeout
UNREACHABLE = 3  # ... of one that never found its hub
_MAGIC = b"FXL\x01"
_HEADER = struct.Struct("<4s16sQQQI")  # magic | session | stamp | acknowledged | number of the first packet | packets
_PACKET = struct.Struct("<IBQ")  # bytes of data | kind | channel
KEY_SIZE = 16
_AHEAD = 1 << 16  # packets may come so long before their turn
_AHEAD_BYTES = 16 * MESSAGE_BYTES  # ... of which so much is kept: twice of what is on the way at once
_LONGEST = 1 << 20  # bytes of what one side's logic may say at once

# Kinds of packets.
CONTROL = 0  # a message from one side's logic to the other's, see encode()
DATA = 1  # bytes of a channel
CREDIT = 2  # so many more bytes (u64) may come on this channel
CLOSE = 3  # the channel has ended
OPEN = 4  # a channel begins


class Packet(NamedTuple):
    kind: int
    channel: int
    data: Buffer


class Session:
    """One end. ``key`` names the conversation: packets of another one are refused."""

    def __init__(self, key: bytes) -> None:
        self.key = key
        self._last = 0  # the number of the last packet pushed
        self._kept: deque[Packet] = deque()  # not acknowledged: the last ones, up to _last
        self._next = 1  # the number of the next packet to be sent
        self._sent = 0  # the highest number that was ever sent
        self._due = 0  # the last packet that had been sent when overdue() was asked
        self._received = 0  # up to here everything has arrived
        self._early: dict[int, Packet] = {}  # what has arrived before its turn
        self._early_bytes = 0
        self.backlog = 0  # bytes that are not acknowledged
        self.stamp = 0  # goes out with each message
        self.heard = 0  # the highest stamp that has come

    @property
    def has_output(self) -> bool:
        """Whether there are packets to be sent."""
        return self._next <= self._last

    @property
    def unheard(self) -> int:
        """Packets that are not acknowledged."""
        return len(self._kept)

    def overdue(self) -> bool:
        """Whether something that was sent before the last call of this is still not acknowledged."""
        first = self._last - len(self._kept) + 1
        late, self._due = first <= self._due, self._next - 1
        return late

    def push(self, kind: int, channel: int, data: Buffer = b"") -> None:
        """Take a packet in, to be sent."""
        self._last += 1
        self.backlog += len(data)
        self._kept.append(Packet(kind, channel, data))

    def take(self) -> list[Buffer]:
        """The next message, perhaps without any packet: as the pieces that it consists of."""
        first = self._next
        index = first - (self._last - len(self._kept) + 1)
        parts: list[Buffer] = [b""]
        size = 0
        while self._next <= self._last and size < MESSAGE_BYTES:
            kind, channel, data = self._kept[index]
            parts += (_PACKET.pack(len(data), kind, channel), data)
            size += len(data) + _PACKET.size
            index += 1
            self._next += 1
        self._sent = max(self._sent, self._next - 1)
        parts[0] = _HEADER.pack(_MAGIC, self.key, self.stamp, self._received, first, self._next - first)
        return parts

    def rewind(self) -> None:
        """Send everything again that is not acknowledged."""
        self._next = self._last - len(self._kept) + 1

    def accept(self, message: bytes) -> list[Packet]:
        """The packets whose turn it is, now that this message has come. Raises ProtocolError for what is none."""
        key, stamp, acknowledged, number, count = read_header(message)
        if key != self.key:
            raise ProtocolError("a message of another session")
        if acknowledged > self._sent:
            raise ProtocolError("a message acknowledges what was never sent")
        if count and not 0 < number <= self._received + _AHEAD:
            raise ProtocolError("a message from far in the future")
        packets = _packets(message, count)
        self.heard = max(self.heard, stamp)
        for _ in range(self._last - len(self._kept), acknowledged):
            self.backlog -= len(self._kept.popleft().data)
        self._next = max(self._next, acknowledged + 1)
        found: list[Packet] = []
        for each, packet in enumerate(packets, number):
            if each == self._received + 1:
                self._received = each
                found.append(packet)
                while (early := self._early.pop(self._received + 1, None)) is not None:
                    self._received += 1
                    self._early_bytes -= len(early.data)
                    found.append(early)
            elif each > self._received:
                self._keep(each, packet)
        return found

    def _keep(self, number: int, packet: Packet) -> None:
        """Keep a packet until its turn, unless there are too many bytes of such: it is not acknowledged, and comes again."""
        kind, channel, data = packet
        if number not in self._early and self._early_bytes + len(data) <= _AHEAD_BYTES:
            self._early[number] = Packet(kind, channel, bytes(data))  # not its whole message
            self._early_bytes += len(data)


def _packets(message: bytes, count: int) -> list[Packet]:
    view = memoryview(message)
    position = _HEADER.size
    found: list[Packet] = []
    for _ in range(count):
        start = position + _PACKET.size
        if start > len(message):
            raise ProtocolError("a message ends too early")
        size, kind, channel = _PACKET.unpack_from(message, position)
        position = start + size
        if position > len(message):
            raise ProtocolError("a message ends too early")
        found.append(Packet(kind, channel, view[start:position]))
    if position != len(message):
        raise ProtocolError("a message ends too late")
    return found


def read_header(message: bytes) -> tuple[bytes, int, int, int, int]:
    """(session, stamp, acknowledged, first, count) of a message. Raises ProtocolError for what is none."""
    if len(message) < _HEADER.size or not message.startswith(_MAGIC):
        raise ProtocolError("no message of this protocol: the versions of fiberexec on both sides may differ")
    _, key, stamp, acknowledged, number, count = _HEADER.unpack_from(message)
    if count > len(message):
        raise ProtocolError("a message claims more packets than it can hold")
    return key, stamp, acknowledged, number, count


def encode(*message: object) -> bytes:
    """The data of a CONTROL packet that says ``message``: JSON, which gives its reader values of its size, no more."""
    return json.dumps(message).encode()


def decode(data: Buffer) -> list[Any]:
    """What a CONTROL packet says, lists where there were tuples. Raises ProtocolError."""
    if len(data) > _LONGEST:
        raise ProtocolError(f"a message of {len(data)} bytes")
    try:
        message = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a message cannot be read: {error!r}") from error
    if not isinstance(message, list) or not message:
        raise ProtocolError("a message that says nothing")
    return message
