"""Kinds of functions and classes that are easily forgotten."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import sys
import typing
from typing import Any

import pytest

from fiberexec._serialize import dumps, loads

__spec__ = None  # as in a script: nothing here can be imported, so all of it travels by value


@functools.singledispatch
def kind_of(x: object) -> str:
    return "any"


@kind_of.register
def _(x: int) -> str:
    return "int"


class Methods:
    @functools.singledispatchmethod
    def dispatched(self, x: object) -> str:
        return "any"

    @dispatched.register
    def _(self, x: int) -> str:
        return "int"

    @functools.lru_cache  # noqa: B019
    def cached(self) -> int:
        return 7

    partial = functools.partialmethod(dispatched, 1)


@contextlib.contextmanager
def managed() -> Any:
    yield 3


class Named:
    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> str:
        return self.name


class Described:
    field = Named()


class Single:
    instance: Any = None

    def __new__(cls) -> Any:
        if cls.instance is None:
            cls.instance = super().__new__(cls)
        return cls.instance


@typing.runtime_checkable
class Measured(typing.Protocol):
    def size(self) -> int: ...


class Stick(Measured):
    def size(self) -> int:
        return 1


class Outer:
    class Inner(enum.Enum):
        A = 1


class Auto(enum.Enum):
    @staticmethod
    def _generate_next_value_(name: str, *_: Any) -> str:
        return name.lower()

    X = enum.auto()


@dataclasses.dataclass
class Item:
    x: int


class Items(Item, enum.Enum):
    A = 3
    B = 4


class Cyclic:
    def __init__(self) -> None:
        self.me = self
        self.all = [self]


def test_functions_made_by_the_standard_library_run_there(peer: Any) -> None:
    def use() -> Any:
        with managed() as got:
            m = Methods()
            return got, kind_of(1), kind_of("a"), m.dispatched(1), m.dispatched(""), m.cached()

    assert peer.call(use) == (3, "int", "any", "int", "any", 7)


def test_descriptors_singletons_and_protocols_work_there(peer: Any) -> None:
    def use() -> Any:
        return Described().field, Single() is Single(), isinstance(Stick(), Measured), isinstance(3, Measured)

    assert peer.call(use) == ("field", True, True, False)


def test_nested_generated_and_mixed_enums_work_there(peer: Any) -> None:
    inner, auto, item, x = peer.call(lambda: (Outer.Inner.A, Auto("x"), Items.B, Items.B.x))
    assert inner is Outer.Inner.A and auto is Auto.X and item is Items.B and x == 4


@pytest.mark.skipif(sys.version_info < (3, 11), reason="these came with Python 3.11")
def test_newer_enums_work_there(peer: Any) -> None:
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(
        "import enum\nclass S(enum.StrEnum):\n  A = enum.auto()\n"
        "class F(enum.Flag, boundary=enum.KEEP):\n  A = 1\n  B = 2\n"
        "def use(): return S.A, f'{S.A}', F(8).value, list(F), F.A | F.B",
        space,
    )
    s, text, eight, flags, both = peer.call(space["use"])
    assert s is space["S"].A and text == "a" and eight == 8 and flags == list(space["F"])
    assert both is space["F"].A | space["F"].B


@pytest.mark.skipif(sys.version_info < (3, 12), reason="this syntax came with Python 3.12")
def test_type_parameters_and_aliases_travel(peer: Any) -> None:
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(
        "type Alias = int | str\ndef same[T](x: T) -> T: return x\n"
        "class Box[T]:\n  def get(self, x: T) -> T: return x\n"
        "def use(): return same(1), Box[int]().get(2), Alias.__value__ == int | str, same.__type_params__",
        space,
    )
    one, two, equal, parameters = peer.call(space["use"])
    assert (one, two, equal) == (1, 2, True) and parameters[0].__name__ == "T"
    assert peer.call(lambda x: x, space["Alias"]).__name__ == "Alias"


def test_objects_that_contain_themselves_arrive_as_such(peer: Any) -> None:
    back = peer.call(lambda x: x, Cyclic())
    assert type(back) is Cyclic and back.me is back and back.all[0] is back


def test_a_function_that_lies_about_its_name_is_not_taken_for_another(peer: Any) -> None:
    def liar(x: Any) -> str:
        return "mine"

    liar.__module__, liar.__qualname__ = "builtins", "len"
    assert peer.call(liar, "abc") == "mine"


def test_a_long_chain_of_closures_travels(peer: Any) -> None:
    chain: Any = functools.reduce(lambda inner, _: lambda: inner() + 1, range(100), lambda: 0)
    assert peer.call(chain) == 100


def test_state_of_a_large_closure_is_not_copied_into_the_stream() -> None:
    np = pytest.importorskip("numpy")
    data = np.zeros(1_000_000)
    stream, buffers = dumps(lambda: data)
    assert len(stream) < 2000 and memoryview(buffers[0]).nbytes == data.nbytes
    assert loads(stream, [bytearray(buffers[0])])().shape == data.shape
