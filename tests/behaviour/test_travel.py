"""What travels to a worker and back: functions, classes, exceptions."""

from __future__ import annotations

import dataclasses
import enum
import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from fiberexec import FiberExecutor

LIMIT = 60.0
Make = Callable[..., FiberExecutor]
MIB = 1 << 20


def call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


# -- functions


def make_functions() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], Any]]:
    offset = 10

    def nested(x: int) -> int:
        return x + offset

    def recursive(n: int) -> int:
        return 1 if n == 0 else n * recursive(n - 1)

    def even(n: int) -> bool:
        return n == 0 or odd(n - 1)

    def odd(n: int) -> bool:
        return n != 0 and even(n - 1)

    def with_defaults(x: int, y: int = 5, *rest: int, z: int = 7, **named: int) -> int:
        return x + y + sum(rest) + z + sum(named.values())

    class Adder:
        def __init__(self, by: int) -> None:
            self.by = by

        def add(self, x: int) -> int:
            return x + self.by

        def __call__(self, x: int) -> int:
            return x + self.by

        @classmethod
        def made(cls, x: int) -> int:
            return cls(1).add(x)

        @staticmethod
        def plain(x: int) -> int:
            return x + 2

    @functools.lru_cache
    def cached(x: int) -> int:
        return x * 2

    @functools.wraps(nested)
    def wrapped(x: int) -> int:
        return nested(x) * 2

    def generator(n: int) -> int:
        return sum(i * i for i in range(n))

    return {
        "lambda": (lambda x: x * 3, (2,), 6),
        "nested": (nested, (1,), 11),
        "recursive": (recursive, (5,), 120),
        "mutually recursive": (even, (10,), True),
        "defaults": (with_defaults, (1, 2, 3), 13),
        "partial": (functools.partial(pow, 2), (5,), 32),
        "partial of nested": (functools.partial(with_defaults, 1, z=0), (4,), 5),
        "bound method": (Adder(4).add, (1,), 5),
        "callable object": (Adder(5), (1,), 6),
        "class method": (Adder.made, (1,), 2),
        "static method": (Adder.plain, (1,), 3),
        "method of a built-in": ([1, 2, 3].index, (3,), 2),
        "cached": (cached, (4,), 8),
        "wrapped": (wrapped, (1,), 22),
        "generator inside": (generator, (4,), 14),
        "built-in": (len, ("four",), 4),
    }


FUNCTIONS = make_functions()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_travel_as_task_as_argument_and_as_result(executor: FiberExecutor, name: str) -> None:
    function, args, expected = FUNCTIONS[name]
    assert executor.submit(function, *args).result(LIMIT) == expected
    assert executor.submit(call, function, *args).result(LIMIT) == expected
    assert list(executor.map(function, *([arg] * 3 for arg in args))) == [expected] * 3
    assert executor.submit(lambda: function).result(LIMIT)(*args) == expected


def test_a_closure_travels_as_it_is_at_submit(executor: FiberExecutor) -> None:
    box, number = [1], 1

    def look() -> tuple[int, list[int]]:
        return number, list(box)

    first = executor.submit(look).result(LIMIT)
    number, box[0] = 2, 3
    assert (first, executor.submit(look).result(LIMIT)) == ((1, [1]), (2, [3]))


def test_a_global_that_changes_is_seen_by_functions_that_travel_by_value(executor: FiberExecutor) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__", "factor": 2}
    exec("def scale(x): return x * factor", namespace)
    first = executor.submit(namespace["scale"], 5).result(LIMIT)
    namespace["factor"] = 3
    assert (first, executor.submit(namespace["scale"], 5).result(LIMIT)) == (10, 15)


# -- classes


SCRIPT = """
model, cache, level = None, {}, 1

def rebind():
    global model
    model = {"made": 1}

def fill():
    cache["k"] = 1

def unseen():
    globals()["level"] = 5

def use():
    return model

def count():
    model["made"] += 1
    return model["made"]

def look():
    return cache.get("k"), level

def replaced():
    global look
    look = lambda: "replaced"

def call_look():
    return look()
"""


@pytest.fixture
def script() -> dict[str, Any]:
    """A program's namespace: its functions travel by value, as those of ``__main__`` do."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(SCRIPT, namespace)
    return namespace


def test_what_an_initializer_binds_is_there_for_every_task(make_executor: Make, script: dict[str, Any]) -> None:
    with make_executor(1, initializer=script["rebind"]) as ex:
        assert ex.submit(script["use"]).result(LIMIT) == {"made": 1}
        assert [ex.submit(script["count"]).result(LIMIT) for _ in range(3)] == [2, 3, 4]
        assert ex.submit(script["use"]).result(LIMIT) == {"made": 4}
        script["model"] = "another"
        assert ex.submit(script["use"]).result(LIMIT) == "another", "what changes in the driver is seen"


def test_what_an_initializer_fills_stays_until_it_changes_in_the_driver(make_executor: Make, script: dict[str, Any]) -> None:
    with make_executor(1, initializer=script["fill"]) as ex:
        assert ex.submit(script["look"]).result(LIMIT) == (1, 1)
        script["level"] = 2
        assert ex.submit(script["look"]).result(LIMIT) == (1, 2)
        script["cache"]["j"] = 1
        assert ex.submit(script["look"]).result(LIMIT) == (None, 2)


def test_an_initializer_may_bind_names_behind_everybodys_back(make_executor: Make, script: dict[str, Any]) -> None:
    with make_executor(1, initializer=script["unseen"]) as ex:
        assert ex.submit(script["look"]).result(LIMIT) == (None, 5)
        script["level"] = 9
        assert ex.submit(script["look"]).result(LIMIT) == (None, 9)


def test_an_initializer_may_replace_a_function(make_executor: Make, script: dict[str, Any]) -> None:
    with make_executor(1, initializer=script["replaced"]) as ex:
        assert ex.submit(script["call_look"]).result(LIMIT) == "replaced"


def test_a_class_keeps_its_identity_there_and_back(executor: FiberExecutor) -> None:
    class Base:
        pass

    class Point(Base):
        count = 0

        def __init__(self, x: int) -> None:
            self.x = x

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Point) and other.x == self.x

        __hash__ = None  # type: ignore[assignment]

    def there(point: Any, kind: type) -> tuple[bool, bool, Any, type]:
        return type(point) is kind, isinstance(point, Point), Point(point.x + 1), kind

    same, known, back, kind = executor.submit(there, Point(1), Point).result(LIMIT)
    assert same and known and kind is Point
    assert type(back) is Point and isinstance(back, Base) and back == Point(2)
    for result in executor.map(Point, range(20)):
        assert type(result) is Point


def test_a_redefined_class_is_another(executor: FiberExecutor) -> None:
    def define(version: int) -> Any:
        class Thing:
            def version(self) -> int:
                return version

        return Thing

    old, new = define(1), define(2)
    assert [executor.submit(lambda t: t.version(), kind()).result(LIMIT) for kind in (old, new, old)] == [1, 2, 1]
    assert type(executor.submit(call, new).result(LIMIT)) is new


def test_dataclasses_enums_and_named_tuples(executor: FiberExecutor) -> None:
    from typing import NamedTuple

    class Color(enum.Enum):
        RED = "r"
        GREEN = "g"

    class Flags(enum.IntFlag):
        A = 1
        B = 2

    @dataclasses.dataclass(frozen=True)
    class Item:
        name: str
        color: Color
        tags: list[str] = dataclasses.field(default_factory=list)

    class Pair(NamedTuple):
        left: int
        right: Item

    def there(color: Any, pair: Any) -> Any:
        return color is Color.RED, isinstance(pair, Pair) and pair.right.color is Color.GREEN, color, pair, Flags.A | Flags.B

    pair = Pair(1, Item("a", Color.GREEN, ["x"]))
    first, second, color, back, flags = executor.submit(there, Color.RED, pair).result(LIMIT)
    assert first and second and color is Color.RED
    assert type(back) is Pair and back == pair and type(back.right) is Item and back.right.color is Color.GREEN
    assert flags is Flags.A | Flags.B


# -- exceptions


class Picky(Exception):
    def __init__(self, code: int, *, unit: str) -> None:
        super().__init__(f"{code} {unit}")
        self.code, self.unit = code, unit


class Holding(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()
        self.text = text


def test_exceptions_of_every_shape_arrive(executor: FiberExecutor) -> None:
    def picky() -> None:
        raise Picky(7, unit="mm")

    def chained() -> None:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise Picky(1, unit="s") from error

    def in_context() -> None:
        try:
            raise KeyError("first")
        except KeyError:
            raise ValueError("second")  # noqa: B904

    def holding() -> None:
        raise Holding("cannot be pickled")

    error: Any = executor.submit(picky).exception(LIMIT)
    assert type(error) is Picky and (error.code, error.unit, str(error)) == (7, "mm", "7 mm")
    error = executor.submit(chained).exception(LIMIT)
    assert type(error) is Picky
    shown = "".join(__import__("traceback").format_exception(error))
    assert "KeyError: 'first'" in shown
    error = executor.submit(in_context).exception(LIMIT)
    shown = "".join(__import__("traceback").format_exception(error))
    assert isinstance(error, ValueError) and "KeyError: 'first'" in shown
    error = executor.submit(holding).exception(LIMIT)
    assert "cannot be pickled" in str(error)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with Python 3.11")
def test_exception_groups_and_notes_arrive(executor: FiberExecutor) -> None:
    def group() -> None:
        error = Picky(1, unit="kg")
        error.add_note("seen on the scale")  # type: ignore[attr-defined]
        raise ExceptionGroup("several", [error, ExceptionGroup("inner", [KeyError("k")])])  # type: ignore[name-defined]  # noqa: F821

    error: Any = executor.submit(group).exception(LIMIT)
    assert type(error).__name__ == "ExceptionGroup" and error.message == "several"
    picky, inner = error.exceptions
    assert type(picky) is Picky and picky.unit == "kg" and picky.__notes__ == ["seen on the scale"]
    assert isinstance(inner.exceptions[0], KeyError)


def test_an_exception_that_is_a_result_or_an_argument_is_just_a_value(executor: FiberExecutor) -> None:
    assert isinstance(executor.submit(lambda e: e, ValueError("x")).result(LIMIT), ValueError)
