from __future__ import annotations

import abc
import collections
import copy
import dataclasses
import enum
import functools
import gc
import time
import typing
import weakref
from typing import Any, Generic, NamedTuple, TypedDict, TypeVar

import pytest

from fiberexec._serialize import dumps, loads

__spec__ = None  # as in a script: nothing here can be imported, so all of it travels by value

T = TypeVar("T", bound=int)
UserId = typing.NewType("UserId", int)


def same(value: Any) -> Any:
    return value


class Base:
    kind = "base"

    def __init__(self, x: int = 0) -> None:
        self.x = x

    def describe(self) -> str:
        return f"{self.kind} {self.x}"


class Derived(Base):
    kind = "derived"

    def describe(self) -> str:
        return "*" + super().describe() + type(self).__name__ + __class__.__name__  # type: ignore[name-defined]

    @property
    def double(self) -> int:
        return self.x * 2

    @double.setter
    def double(self, value: int) -> None:
        self.x = value // 2

    @functools.cached_property
    def slow(self) -> int:
        return self.x + 100


@dataclasses.dataclass(order=True)
class Point:
    x: int
    y: int = dataclasses.field(default=2, metadata={"unit": "m"})
    tags: list[str] = dataclasses.field(default_factory=list, compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    a: int
    b: str


class Pair(NamedTuple):
    a: int
    b: str = "b"

    def total(self) -> int:
        return self.a + len(self.b)


class Movie(TypedDict, total=False):
    name: str


class Box(Generic[T]):
    def __init__(self, item: T) -> None:
        self.item = item


class Shape(abc.ABC):
    @abc.abstractmethod
    def area(self) -> float: ...


class Square(Shape):
    def area(self) -> float:
        return 4.0


class Registered:
    pass


Shape.register(Registered)


class Meta(type):
    made: typing.ClassVar[list[str]] = []

    def __new__(mcs, name: str, bases: Any, space: Any, **options: Any) -> Any:
        Meta.made.append(name)
        return super().__new__(mcs, name, bases, {**space, "options": options})

    def __call__(cls, *args: Any) -> Any:
        made = super().__call__(*args)
        made.called = True
        return made


class WithMeta(metaclass=Meta, flavour="x"):
    pass


class Plugin:
    seen: typing.ClassVar[list[str]] = []

    def __init_subclass__(cls, *, label: str) -> None:
        cls.seen.append(label)
        cls.label = label  # type: ignore[attr-defined]


class Plug(Plugin, label="one"):
    pass


class SlotPlugin:
    __slots__ = ("v",)

    def __init_subclass__(cls, must: int, **_: Any) -> None: ...


class SlotPlug(SlotPlugin, must=1):
    __slots__ = ("w",)


class Color(enum.Enum):
    RED = 1
    CRIMSON = 1  # noqa: PIE796
    BLUE = "b"

    def shout(self) -> str:
        return self.name + "!"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Perm(enum.Flag):
    R = 1
    W = 2
    RW = 3


class IntPerm(enum.IntFlag):
    R = 1
    W = 2


class Planet(enum.Enum):
    EARTH = (5.9, 6.3)
    MARS = (0.6, 3.3)

    def __init__(self, mass: float, radius: float) -> None:
        self.mass = mass
        self.radius = radius


class Coded(bytes, enum.Enum):
    def __new__(cls, code: int) -> Any:
        obj = bytes.__new__(cls, [code])
        obj._value_ = code
        obj.label = f"code {code}"  # type: ignore[attr-defined]
        return obj

    A = 1
    B = 2


class Name(str, enum.Enum):
    A = "a"

    @classmethod
    def _missing_(cls, value: object) -> Any:
        return cls.A


Dynamic = collections.namedtuple("Dynamic", "p q", defaults=[7])

INSTANCES = {
    "plain": Base(3),
    "derived": Derived(4),
    "dataclass": Point(1, tags=["a"]),
    "frozen slots": Slotted(1, "b"),
    "NamedTuple": Pair(1),
    "namedtuple": Dynamic(1),
    "TypedDict": Movie(name="x"),
    "generic": Box(3),
    "abc": Square(),
    "metaclass": WithMeta(),
    "init_subclass": Plug(),
    "slots": SlotPlug(),
    "registered": Registered(),
}


@pytest.mark.parametrize("name", INSTANCES)
def test_an_instance_comes_back_as_an_instance_of_the_very_class(peer: Any, name: str) -> None:
    value = INSTANCES[name]
    back = peer.call(same, value)
    assert type(back) is type(value) and back is not value
    assert getattr(back, "__dict__", None) == getattr(value, "__dict__", None)


ENUMS: list[Any] = [
    Color.RED, Color.CRIMSON, Color.BLUE, Level.HIGH, Perm.R, Perm.RW, Perm.R | Perm.W, Perm(0),
    IntPerm.R | IntPerm.W, Planet.MARS, Coded.B, Name.A,
]  # fmt: skip


@pytest.mark.parametrize("member", ENUMS, ids=str)
def test_enum_members_keep_their_identity_there_and_back(peer: Any, member: Any) -> None:
    def look(given: Any) -> Any:
        cls = type(given)
        return (
            given,
            cls,
            given.value,
            [m.name for m in cls],
            list(cls.__members__),
            given is cls(given.value),
        )

    back, cls, value, names, aliases, identical = peer.call(look, member)
    assert back is member and cls is type(member) and value == member.value and identical
    assert names == [m.name for m in cls] and aliases == list(cls.__members__)


def test_enums_work_there_as_here(peer: Any) -> None:
    def work() -> Any:
        assert isinstance(Level.LOW, int) and Level.LOW < Level.HIGH and Level(2) is Level.HIGH
        assert (Perm.R | Perm.W) is Perm.RW and Perm.R in Perm.RW and (~Perm.R) == Perm.W
        assert Name("nothing") is Name.A and Name.A == "a" and str.upper(Name.A) == "A"
        assert Coded(2) is Coded.B and bytes(Coded.B) == b"\x02" and isinstance(Coded.A, bytes)
        return (
            Color.RED.shout(),
            Planet.MARS.mass,
            Coded.B.label,
            Color["CRIMSON"] is Color.RED,
            repr(Level.LOW),
        )

    assert peer.call(work) == ("RED!", 0.6, "code 2", True, repr(Level.LOW))


def test_classes_work_there_as_here(peer: Any) -> None:
    def work() -> Any:
        d = Derived(4)
        d.double = 10
        assert isinstance(d, Base) and isinstance(Registered(), Shape) and issubclass(Square, Shape)
        with pytest.raises(TypeError):
            Shape()  # type: ignore[abstract]
        assert Point(1) < Point(2) and dataclasses.replace(Point(1), y=5).y == 5
        assert dataclasses.fields(Point)[1].metadata["unit"] == "m" and dataclasses.fields(Point)[0].default is (
            dataclasses.MISSING
        )
        assert dataclasses.asdict(Point(1)) == {"x": 1, "y": 2, "tags": []}
        with pytest.raises(dataclasses.FrozenInstanceError):
            Slotted(1, "b").a = 2  # type: ignore[misc]
        assert Pair(1).total() == 2 and Pair(1)._replace(a=5) == (5, "b") and Dynamic(1)._asdict() == {"p": 1, "q": 7}
        assert typing.get_type_hints(Movie) and Movie(name="x") == {"name": "x"}
        assert Box[int](3).item == 3 and Box.__parameters__ == (T,)  # type: ignore[attr-defined]
        assert WithMeta().called and WithMeta.options == {"flavour": "x"}  # type: ignore[attr-defined]
        assert Meta.made == ["WithMeta"] and Plugin.seen == ["one"] and Plug.label == "one"  # type: ignore[attr-defined]
        assert Plug.__bases__ == (Plugin,) and SlotPlug.__bases__ == (SlotPlugin,)
        s = SlotPlug()
        s.v = s.w = 1  # type: ignore[attr-defined]
        return d.describe(), d.slow, Derived.__qualname__, Derived.__module__, Derived.__doc__

    assert peer.call(work) == ("*derived 5DerivedDerived", 105, "Derived", Derived.__module__, None)


def test_an_instance_of_a_class_made_by_a_function_comes_back_as_one_of_it(peer: Any) -> None:
    def make() -> Any:
        class Local:
            def __eq__(self, other: object) -> bool:
                return isinstance(other, Local)

            __hash__ = None  # type: ignore[assignment]

        return Local

    one, two = make(), make()
    assert type(peer.call(same, one())) is one and type(peer.call(same, two())) is two
    assert peer.call(lambda a, b: a == b, one(), one()) and not peer.call(lambda a, b: a == b, one(), two())


def test_a_class_that_was_made_there_keeps_its_identity_too(peer: Any) -> None:
    def make() -> Any:
        class There:
            def who(self) -> type:
                return There

        return There

    cls = peer.call(make)
    assert cls().who() is cls
    assert peer.call(same, cls) is cls
    assert type(peer.call(same, cls())) is cls


def test_a_changed_class_changes_there(peer: Any) -> None:
    class Changing:
        value = 1
        table: typing.ClassVar[dict[str, int]] = {}

        def get(self) -> int:
            return self.value

    def look(obj: Any) -> Any:
        return obj.get(), dict(type(obj).table), hasattr(type(obj), "extra")

    assert peer.call(look, Changing()) == (1, {}, False)
    Changing.value = 2
    Changing.table["k"] = 1
    Changing.extra = None  # type: ignore[attr-defined]
    assert peer.call(look, Changing()) == (2, {"k": 1}, True)
    Changing.get = lambda self: 7  # type: ignore[method-assign]
    del Changing.extra  # type: ignore[attr-defined]
    assert peer.call(look, Changing()) == (7, {"k": 1}, False)


def test_what_a_worker_keeps_on_an_unchanged_class_stays(peer: Any) -> None:
    class Cached:
        cache: Any = None

    def use(obj: Any) -> Any:
        found = type(obj).cache
        type(obj).cache = "kept"
        return found

    assert peer.call(use, Cached()) is None
    assert peer.call(use, Cached()) == "kept"
    assert Cached.cache is None


def test_type_variables_and_new_types_keep_their_identity(peer: Any) -> None:
    back, new = peer.call(lambda: (T, UserId))
    assert back is T and new is UserId
    assert peer.call(lambda: (T.__bound__, UserId(3), UserId.__name__)) == (int, 3, "UserId")


def test_a_class_and_its_registry_of_subclasses_travel(peer: Any) -> None:
    class Root:
        registry: typing.ClassVar[dict[str, type]] = {}

    class Leaf(Root):
        pass

    Root.registry["leaf"] = Leaf
    Root.registry["root"] = Root
    assert peer.call(lambda: Root.registry["leaf"].__mro__[1] is Root.registry["root"] is Root)
    assert type(peer.call(same, Leaf())) is Leaf


def test_classes_are_not_kept_alive() -> None:
    class Short:
        def method(self) -> None: ...

    dumps(Short())
    ref = weakref.ref(Short)
    del Short
    deadline = time.monotonic() + 30
    while ref() is not None and time.monotonic() < deadline:
        gc.collect()  # does nothing where a collection is under way, in another thread or around a finalizer
        time.sleep(0.001)
    assert ref() is None


def test_a_class_loaded_where_it_was_defined_is_untouched() -> None:
    before = dict(vars(Derived))
    assert loads(*dumps(Derived)) is Derived and dict(vars(Derived)) == before
    assert copy.copy(Derived(1)).describe() == Derived(1).describe()
