"""Types made with ctypes travel by value, and their instances with them."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from fiberexec._serialize import dumps, loads

__spec__ = None  # type: ignore[assignment]  # as in a script: nothing here can be imported, so all of it travels by value


class Point(ctypes.Structure):
    """A point."""

    _fields_ = (("x", ctypes.c_double), ("y", ctypes.c_double))

    def total(self) -> Any:
        return self.x + self.y


class Word(ctypes.Union):
    _pack_ = 1
    _fields_ = (("raw", ctypes.c_char * 5), ("number", ctypes.c_int32))


class Named(Point):
    _anonymous_ = ("word",)
    _fields_ = (("word", Word), ("flag", ctypes.c_uint8, 3))  # type: ignore[assignment]


class Node(ctypes.Structure):
    pass


Node._fields_ = [("value", ctypes.c_int), ("next", ctypes.POINTER(Node))]


class Swapped(ctypes.BigEndianStructure):
    _fields_ = (("a", ctypes.c_int16), ("b", ctypes.c_uint8))


class Mine(ctypes.c_int):
    pass


TYPES = [ctypes.c_int, ctypes.c_int * 3, (Point * 2) * 3, Point, Word, Named, Node, Swapped, Mine, ctypes.POINTER(Point)]


def shape(kind: Any) -> tuple[object, ...]:
    fields = getattr(kind, "_fields_", ())
    places = [(name, getattr(kind, name).offset, getattr(kind, name).size) for name, *_ in fields]
    return kind.__name__, ctypes.sizeof(kind), ctypes.alignment(kind), places


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_a_type_arrives_with_its_layout_and_comes_back_as_itself(peer: Any, kind: Any) -> None:
    assert peer.call(shape, kind) == shape(kind)
    assert peer.call(lambda one: one, kind) is kind
    assert loads(*dumps(kind)) is kind


def test_instances_arrive_with_their_values_and_methods(peer: Any) -> None:
    named = Named(1, 2, Word(number=77), 5)
    assert peer.call(lambda one: (one.total(), one.number, one.flag), named) == (3, 77, 5)
    assert peer.call(lambda one: type(one).__base__.__doc__, named) == "A point."
    assert peer.call(lambda one: [point.x for point in one], (Point * 2)(Point(1, 2), Point(3, 4))) == [1, 3]
    assert peer.call(lambda one: (one.a, bytes(one)), Swapped(258, 3)) == (258, b"\x01\x02\x03\x00")
    assert peer.call(lambda one: one.value, Mine(9)) == 9
    back = peer.call(lambda one: one, named)
    assert type(back) is Named and back.total() == 3


def test_a_type_that_arrived_twice_is_one_type(peer: Any) -> None:
    def same(one: Any, other: Any) -> bool:
        return type(one) is type(other)

    assert peer.call(same, Point(1, 2), Point(3, 4))
    first = peer.call(lambda one: id(type(one)), Point())
    assert peer.call(lambda one: id(type(one)), Point()) == first
