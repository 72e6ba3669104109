"""Framed messages over a connected stream socket.

One frame on the wire:

    magic 'FX\\x01' | kind u8 | buffers u32 | body length u32 | crc of table and body u32 | crc of these 16 bytes u32
    table: one u64 a buffer, length * 4 + how it arrives: 0 writable memory of any type, 1 bytes, 2 a bytearray
    body
    the buffers' bytes

Rules: lengths are believed only after the header's checksum has been verified, so garbage can neither make the reader
wait for bytes that never come nor allocate memory. Buffers are bulk data that nothing interprets here; they are not
summed, and never copied when sent. A frame is either delivered whole and verified, or ProtocolError ends the stream.
"""

from __future__ import annotations

import struct
from _collections import deque  # type: ignore[import-not-found]
from _socket import MSG_WAITALL, SHUT_RD, socket
from zlib import crc32

from fiberexec import _platform

Buffer = bytes | bytearray | memoryview
Frame = tuple[int, "bytes | bytearray", "list[Buffer]"]  # kind, body, buffers
# A frame that still lacks buffers: kind, body, table, buffers.
_Partial = tuple[int, "bytes | bytearray", "list[int]", "list[bytearray | memoryview]"]

MAGIC = b"FX\x01"
_HEADER = struct.Struct("<3sBIII")
_CRC = struct.Struct("<I")
_FULL_HEADER = struct.Struct("<3sBIIII")
HEADER_SIZE = _FULL_HEADER.size
MAX_BUFFERS = 1 << 20
MAX_LENGTH = 1 << 40
_READ = 1 << 16
_IOV = 512  # below every platform's IOV_MAX
_ANY, _BYTES, _BYTEARRAY = 0, 1, 2  # how a buffer arrives
_DIRECT = 1 << 16  # a buffer of at least this size is read straight into its own memory


class ProtocolError(ConnectionError):
    """What arrived is not a frame of this protocol: the peer is another program, or bytes were damaged on the way."""


def pack(kind: int, body: bytes, buffers: list[Buffer] | tuple[Buffer, ...] = ()) -> list[Buffer]:
    """The pieces of one frame, in the order in which they are sent."""
    if buffers:
        views = [b if type(b) is bytes else memoryview(b).cast("B") for b in buffers]
        body_and_table = struct.pack(f"<{len(views)}Q", *(len(v) * 4 + _arrival(v) for v in views)) + body
    else:
        views = []
        body_and_table = body
    head = _HEADER.pack(MAGIC, kind, len(views), len(body), crc32(body_and_table))
    return [head + _CRC.pack(crc32(head)) + body_and_table, *views]


def _arrival(view: bytes | memoryview) -> int:
    if isinstance(view, bytes):
        return _BYTES
    return _BYTEARRAY if type(view.obj) is bytearray else _ANY


class Stream:
    """Both ends of the wire. The worker's end blocks; the driver's never does (``setblocking(False)``)."""

    def __init__(self, sock: socket) -> None:
        self._sock = sock
        self._data: bytes | bytearray = b""  # received, not yet parsed
        self._partial: _Partial | None = None
        self._target: memoryview | None = None  # the rest of the large buffer that is being read
        self._out: deque[Buffer] = deque()  # packed, not yet sent
        self.backlog = 0  # bytes of that

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def in_bulk(self) -> bool:
        """Whether a large buffer is being read."""
        return self._target is not None

    def close(self) -> None:
        self._sock.close()
        self._out.clear()
        self.backlog = 0

    def deafen(self) -> None:
        """Read nothing any more: who still sends is told so, and does not wait for room."""
        try:
            self._sock.shutdown(SHUT_RD)
        except OSError:
            pass  # it has closed

    # -- sending

    def send(self, kind: int, body: bytes, buffers: list[Buffer] | tuple[Buffer, ...] = ()) -> None:
        """Send one frame and return when the kernel has all of it (blocking sockets)."""
        pieces = pack(kind, body, buffers)
        if len(pieces) == 1:
            self._sock.sendall(pieces[0])
        else:
            self._keep(pieces)
            while not self.flush():
                pass

    def send_some(self, kind: int, body: bytes, buffers: list[Buffer] | tuple[Buffer, ...] = ()) -> bool:
        """Send one frame as far as the kernel takes it now, after what is queued. True when nothing is left."""
        pieces = pack(kind, body, buffers)
        if len(pieces) == 1 and not self._out:
            data = pieces[0]
            try:
                sent = self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            if sent == len(data):
                return True
            pieces[0] = memoryview(data)[sent:]
        self._keep(pieces)
        return self.flush()

    def queue(self, kind: int, body: bytes, buffers: list[Buffer] | tuple[Buffer, ...] = ()) -> None:
        """Add one frame to what flush() sends."""
        self._keep(pack(kind, body, buffers))

    def _keep(self, pieces: list[Buffer]) -> None:
        self._out.extend(pieces)
        self.backlog += sum(map(len, pieces))

    def flush(self) -> bool:
        """Send what the kernel takes now. True when nothing is left. Raises OSError when the peer has gone."""
        out = self._out
        while out:
            pieces = [out[i] for i in range(min(len(out), _IOV))] if len(out) > 1 else [out[0]]
            try:
                sent = self._sock.sendmsg(pieces)
            except (BlockingIOError, InterruptedError):
                return False
            self.backlog -= sent
            while sent:
                size = len(out[0])
                if sent < size:
                    out[0] = memoryview(out[0])[sent:]
                    break
                sent -= size
                out.popleft()
            while out and not len(out[0]):
                out.popleft()
        return True

    # -- receiving

    def receive(self) -> list[Frame]:
        """One read, and the frames that it completes (perhaps none). Raises EOFError when the peer has closed."""
        self._read(0)
        return list(iter(self._parse, None))

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that ``data``, read by somebody else, completes."""
        self._data += data
        return list(iter(self._parse, None))

    def receive_one(self) -> Frame:
        """Block until one frame is there (blocking sockets)."""
        while (frame := self._parse()) is None:
            self._read(MSG_WAITALL)
        return frame

    def _read(self, flags: int) -> None:
        if self._target is not None:
            got = self._sock.recv_into(self._target, 0, flags)
            self._target = self._target[got:] if got < len(self._target) else None
        else:
            data = self._sock.recv(_READ)
            got = len(data)
            self._data = self._data + data if self._data else data  # short: what is long has its own target
        if not got:
            raise EOFError("the stream ended inside a frame" if self._data or self._partial else "the peer has closed")

    def _parse(self) -> Frame | None:
        if self._target is not None:
            return None
        if self._partial is None:
            if len(self._data) < HEADER_SIZE:
                if not MAGIC.startswith(self._data[:3]):
                    raise ProtocolError("the stream carries no fiberexec frames")
                return None
            head = self._parse_head()
            if head is None or not head[2]:
                return head and (head[0], head[1], [])
            self._partial = head
        kind, body, table, buffers = self._partial
        data = self._data
        position = 0
        while len(buffers) < len(table):
            size = table[len(buffers)] >> 2
            if len(data) - position >= size:
                buffers.append(bytearray(data[position : position + size]))
                position += size
                continue
            if size >= _DIRECT:
                kept = table[len(buffers)] & 3 == _BYTEARRAY  # what arrives as bytes is copied once more anyway
                whole = bytearray(size) if kept else _platform.fresh_memory(size)
                rest = len(data) - position
                whole[:rest] = data[position:]
                buffers.append(whole)
                self._target = memoryview(whole)[rest:]
                position = len(data)
            self._data = data[position:]
            return None
        self._data = data[position:]
        self._partial = None
        return kind, body, [bytes(b) if entry & _BYTES else b for b, entry in zip(buffers, table, strict=True)]

    def _parse_head(self) -> _Partial | None:
        data = self._data
        magic, kind, count, length, crc, head_crc = _FULL_HEADER.unpack_from(data)
        if magic != MAGIC or head_crc != crc32(data[: _HEADER.size]):
            raise ProtocolError("the stream carries no fiberexec frames, or a damaged one")
        if count > MAX_BUFFERS:
            raise ProtocolError(f"a frame claims {count} buffers")
        end = HEADER_SIZE + 8 * count + length
        if len(data) < end:
            if end - len(data) >= _DIRECT:
                self._data = whole = bytearray(end)
                whole[: len(data)] = data
                self._target = memoryview(whole)[len(data) :]
            return None
        content = data[HEADER_SIZE:end]
        self._data = data[end:]
        if crc32(content) != crc:
            raise ProtocolError("a frame is damaged")
        if not count:
            return kind, content, [], []
        table = list(struct.unpack_from(f"<{count}Q", content))
        if max(table) >> 2 > MAX_LENGTH:
            raise ProtocolError("a frame claims a buffer that is too large")
        return kind, content[8 * count :], table, []
