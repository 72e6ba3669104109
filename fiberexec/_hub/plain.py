"""Messages of those who may be anybody with the certificate of a job.

What messages.encode() has made is read here as by messages.decode(), but at no more than the cost of its own size. To a pickle
that somebody else has made, Python's unpickler may give gigabytes for a few bytes (a place far out in its memo), an hour
(a tuple of twice the same tuple, and so on, as a key), or its process (a key so deep that the hash of it exhausts the stack).
"""

from __future__ import annotations

import struct
from typing import Any

from fiberexec._stream import Buffer, ProtocolError

_LONGEST = 1 << 20  # bytes
_DEPTH = 50  # containers in one another
_VALUES = 1 << 20  # where one that is used again counts again
_KEYS = {str, bytes, int, float, bool, type(None)}
_INNER = {tuple, list, dict}
_U16, _I32, _U32, _U64, _F64 = (struct.Struct(form).unpack_from for form in ("<H", "<i", "<I", "<Q", ">d"))


def read(body: Buffer) -> Any:
    """What ``body`` says. Raises ProtocolError for all but what messages.encode() makes of numbers, strings, bytes, None, and
    tuples, lists and dicts of such."""
    if len(body) > _LONGEST:
        raise ProtocolError(f"a message of {len(body)} bytes")
    try:
        return _Reader(bytes(body)).read()
    except ProtocolError:
        raise
    except (struct.error, ValueError, LookupError) as error:
        raise ProtocolError(f"a message cannot be read: {error!r}") from error


class _Reader:
    def __init__(self, body: bytes) -> None:
        self._body = body
        self._position = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []  # lengths of the stack
        self._memo: list[Any] = []
        self._measures: dict[int, tuple[int, int]] = {}  # of containers, by id: how deep they are, and their values

    def read(self) -> Any:
        stack, memo = self._stack, self._memo
        while True:
            code = self._body[self._position]
            self._position += 1
            if code == 0x94:  # MEMOIZE
                memo.append(stack[-1])
            elif code == 0x68 or code == 0x6A:  # BINGET, LONG_BINGET
                found = memo[self._take(1)[0] if code == 0x68 else _U32(self._take(4))[0]]
                if type(found) is list or type(found) is dict:
                    raise ProtocolError("a message has the same list in two places")  # it might be one inside itself
                stack.append(found)
            elif code in _SCALARS:
                stack.append(_SCALARS[code](self))
            elif code == 0x28:  # MARK
                self._marks.append(len(stack))
            elif 0x85 <= code <= 0x87:  # TUPLE1 to 3
                self._tuple(len(stack) - (code - 0x84))
            elif code == 0x74:  # TUPLE
                self._tuple(self._marks.pop())
            elif code == 0x61 or code == 0x65:  # APPEND, APPENDS
                self._extend(list, len(stack) - 1 if code == 0x61 else self._marks.pop())
            elif code == 0x73 or code == 0x75:  # SETITEM, SETITEMS
                self._extend(dict, len(stack) - 2 if code == 0x73 else self._marks.pop())
            elif code == 0x80:  # PROTO
                self._take(1)
            elif code == 0x95:  # FRAME
                if _U64(self._take(8))[0] > len(self._body) - self._position:
                    raise ProtocolError("a message claims more than it has")
            elif code == 0x2E:  # STOP
                if len(stack) != 1 or self._marks or self._position != len(self._body):
                    raise ProtocolError("a message ends too early, or too late")
                return stack[0]
            else:
                raise ProtocolError(f"a message says {code:#x}")

    def _take(self, size: int) -> bytes:
        end = self._position + size
        if end > len(self._body):
            raise ProtocolError("a message claims more than it has")
        data = self._body[self._position : end]
        self._position = end
        return data

    def _pop(self, start: int) -> list[Any]:
        """What is on the stack from there on."""
        if not 0 <= start <= len(self._stack) or (self._marks and start < self._marks[-1]):
            raise ProtocolError("a message is out of order")
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _tuple(self, start: int) -> None:
        items = tuple(self._pop(start))
        self._measure(items, items)
        self._stack.append(items)

    def _extend(self, kind: type, start: int) -> None:
        items = self._pop(start)
        target = self._stack[-1]
        if isinstance(target, list) and kind is list:
            target += items
        elif isinstance(target, dict) and kind is dict and _KEYS.issuperset(map(type, items[::2])):
            target.update(zip(items[::2], items[1::2], strict=True))
        else:
            raise ProtocolError("a message puts something where it cannot be")
        self._measure(target, items)

    def _measure(self, whole: Any, items: list[Any] | tuple[Any, ...]) -> None:
        """Note that a container has these items too."""
        depth, values = self._measures.get(id(whole), (1, 1))
        values += len(items)
        for item in items:
            if type(item) in _INNER:
                inner, more = self._measures.get(id(item), (1, 1))
                depth = max(depth, inner + 1)
                values += more
        if depth > _DEPTH or values > _VALUES:
            raise ProtocolError("a message is too deep, or says the same thing too often")
        self._measures[id(whole)] = depth, values


def _text(reader: _Reader, size: int) -> str:
    return str(reader._take(size), "utf-8", "surrogatepass")


def _number(reader: _Reader, size: int) -> int:
    return int.from_bytes(reader._take(size), "little", signed=True)


_SCALARS: dict[int, Any] = {
    0x4E: lambda reader: None,
    0x88: lambda reader: True,
    0x89: lambda reader: False,
    0x4A: lambda reader: _I32(reader._take(4))[0],
    0x4B: lambda reader: reader._take(1)[0],
    0x4D: lambda reader: _U16(reader._take(2))[0],
    0x8A: lambda reader: _number(reader, reader._take(1)[0]),
    0x8B: lambda reader: _number(reader, _U32(reader._take(4))[0]),
    0x47: lambda reader: _F64(reader._take(8))[0],
    0x43: lambda reader: reader._take(reader._take(1)[0]),
    0x42: lambda reader: reader._take(_U32(reader._take(4))[0]),
    0x8E: lambda reader: reader._take(_U64(reader._take(8))[0]),
    0x96: lambda reader: bytearray(reader._take(_U64(reader._take(8))[0])),
    0x8C: lambda reader: _text(reader, reader._take(1)[0]),
    0x58: lambda reader: _text(reader, _U32(reader._take(4))[0]),
    0x8D: lambda reader: _text(reader, _U64(reader._take(8))[0]),
    0x29: lambda reader: (),
    0x5D: lambda reader: [],
    0x7D: lambda reader: {},
}
