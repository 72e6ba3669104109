"""What Value, Array, RawValue and RawArray stand on where processes are on several hosts: bytes in the hub.

A `HubObject` looks like the ctypes object whose bytes they are: it has its ``value``, items or fields, each of which is read
or written by one call to the hub. There is no memory to get at.
"""

from __future__ import annotations

import ctypes
from operator import index
from typing import Any, NoReturn

from fiberexec._hub import client
from fiberexec._hub.handle import Handle
from fiberexec._messages import BULK

_NO_MEMORY = (
    "this object is kept by the hub, since processes on other hosts use it: there is no memory that numpy or ctypes could "
    'look into. Read and write its value, items or slices (array[:]); or make it with get_context("local"), for one host'
)


def no_memory() -> NoReturn:
    raise TypeError(_NO_MEMORY)


class Memory(Handle):
    """So many bytes of the hub, all zero."""

    def __init__(self, size: int) -> None:
        self._make("memory", size)

    def read(self, start: int, size: int) -> Any:
        answer, buffers = client.request(self._hub, ("read", self._id, (start, size)))
        return buffers[0] if answer is None else answer

    def write(self, start: int, data: bytes) -> None:
        if len(data) < BULK:
            self._call("write", start, data)
        else:
            client.request(self._hub, ("write", self._id, (start, None)), (memoryview(data),))

    def __getstate__(self) -> tuple[Any, ...]:
        return self._share()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._adopt((state[0], state[1]))


class HubObject:
    """A ctypes object of type ``_type``, whose bytes begin at ``_start``; None: it is all of the memory.

    As with ctypes in shared memory, it travels as itself if it is that, and a part of it as a copy.
    """

    _memory: Memory
    _type: Any
    _start: int
    _is_part: bool

    def __init__(self, memory: Memory, type_: Any, start: int | None = None) -> None:
        vars(self).update(_memory=memory, _type=type_, _start=start or 0, _is_part=start is not None)

    def __reduce__(self) -> tuple[object, ...]:
        return (_itself, (self.load(),)) if self._is_part else (view, (self._memory, self._type))

    def __copy__(self) -> Any:
        return self.load()

    def __deepcopy__(self, memo: object) -> Any:
        return self.load()

    def __repr__(self) -> str:
        return f"<{self._type.__name__} in the hub>"

    def __array__(self, *args: object, **options: object) -> NoReturn:
        no_memory()

    def __buffer__(self, flags: int) -> NoReturn:  # Python asks from 3.12 on
        no_memory()

    def load(self) -> Any:
        """A copy of it, here."""
        return self._type.from_buffer_copy(self._memory.read(self._start, ctypes.sizeof(self._type)))

    def store(self, obj: Any) -> None:
        """Give it the bytes of a ctypes object of its type."""
        self._memory.write(self._start, bytes(obj))


class HubValue(HubObject):
    @property
    def value(self) -> Any:
        return self.load().value

    @value.setter
    def value(self, value: Any) -> None:
        obj = self._type()
        obj.value = value
        self.store(obj)


class HubArray(HubObject):
    def __init__(self, memory: Memory, type_: Any, start: int | None = None) -> None:
        super().__init__(memory, type_, start)
        vars(self)["_size"] = ctypes.sizeof(type_._type_)  # of an item

    _size: int

    def __len__(self) -> int:
        return int(self._type._length_)

    def __getitem__(self, key: Any) -> Any:
        item = self._type._type_
        if not isinstance(key, slice):
            place = self._place(key)
            if _has_parts(item):
                return view(self._memory, item, self._start + place * self._size)
            return self._load(place, 1)[0]
        places = range(*key.indices(len(self)))
        if _has_parts(item):
            return [self[place] for place in places]
        if not places:
            return (item * 0)()[:]
        first = min(places[0], places[-1])
        return self._load(first, abs(places[-1] - places[0]) + 1)[:][:: places.step]

    def __setitem__(self, key: Any, value: Any) -> None:
        item = self._type._type_
        if isinstance(key, slice):
            first, stop, step = key.indices(len(self))
            if step != 1:
                raise ValueError("slices with a step other than 1 cannot be set")
            obj = (item * max(0, stop - first))()
            obj[:] = value
        else:
            first = self._place(key)
            obj = (item * 1)()
            obj[0] = value
        self._memory.write(self._start + first * self._size, bytes(obj))

    def __iter__(self) -> Any:
        return iter(self[:])

    def _place(self, key: Any) -> int:
        place = index(key)
        place += len(self) if place < 0 else 0
        if not 0 <= place < len(self):
            raise IndexError("invalid index")
        return place

    def _load(self, first: int, count: int) -> Any:
        """A copy of some items."""
        data = self._memory.read(self._start + first * self._size, count * self._size)
        return (self._type._type_ * count).from_buffer_copy(data)


class HubString(HubArray):
    """With ``value``, and of bytes ``raw`` as well."""

    def __iter__(self) -> Any:
        return iter(self.load())  # items of bytes, where a slice is one whose items are numbers

    @property
    def value(self) -> Any:
        return self.load().value

    @value.setter
    def value(self, value: Any) -> None:
        obj = self._type()
        obj.value = value
        count = min(len(value) + 1, len(self))  # with the NUL, if there is room; what is behind it stays
        self._memory.write(self._start, bytes(obj)[: count * self._size])

    @property
    def raw(self) -> bytes:
        raw: bytes = self.load().raw
        return raw

    @raw.setter
    def raw(self, raw: bytes) -> None:
        if len(raw) > len(self):
            raise ValueError("byte string too long")
        self._memory.write(self._start, bytes(raw))


class HubFields(HubObject):
    """A structure or union, with its fields as attributes."""

    def __getattr__(self, name: str) -> Any:
        field = self._field(name)
        found = getattr(self.load(), name)
        return view(self._memory, type(found), self._start + field.offset) if _has_parts(type(found)) else found

    def __setattr__(self, name: str, value: Any) -> None:
        field = self._field(name)
        obj = self.load()  # a field of bits has neighbours
        setattr(obj, name, value)
        if field.size > ctypes.sizeof(self._type):
            self.store(obj)
        else:
            self._memory.write(self._start + field.offset, bytes(obj)[field.offset : field.offset + field.size])

    def _field(self, name: str) -> Any:
        field = None if name.startswith("__") else getattr(self._type, name, None)
        if not hasattr(field, "offset"):
            raise AttributeError(f"{self._type.__name__!r} object has no field {name!r}")
        return field


def _has_parts(type_: Any) -> bool:
    """Whether what ctypes gives for an item or field of this type is a part of the object itself."""
    return issubclass(type_, (ctypes.Structure, ctypes.Union, ctypes.Array))


def view(memory: Memory, type_: Any, start: int | None = None) -> Any:
    """The object of a type whose bytes begin there; None: that is all of this memory."""
    if issubclass(type_, ctypes.Array):
        kind: Any = HubString if type_._type_ in (ctypes.c_char, ctypes.c_wchar) else HubArray
    else:
        kind = HubFields if _has_parts(type_) else HubValue
    return kind(memory, type_, start)


def new(type_: Any) -> Any:
    """An object of a type, in the hub and all zero."""
    return view(Memory(ctypes.sizeof(type_)), type_)


def copied(obj: Any) -> Any:
    """An object in the hub that is equal to a ctypes object of this process."""
    made = new(type(obj))
    made.store(obj)
    return made


def _itself(obj: Any) -> Any:
    return obj
