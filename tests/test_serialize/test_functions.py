from __future__ import annotations

import functools
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fiberexec._serialize import PicklingError, dumps, loads

__spec__ = None  # as in a script: nothing here can be imported, so all of it travels by value

LIMIT = 10
SHARED: list[int] = []


def same(value: Any) -> Any:
    return value


def factorial(n: int) -> int:
    return 1 if n < 2 else n * factorial(n - 1)


def is_even(n: int) -> bool:
    return n == 0 or is_odd(n - 1)


def is_odd(n: int) -> bool:
    return n != 0 and is_even(n - 1)


def test_lambdas_closures_and_nested_functions_run_there(peer: Any) -> None:
    k = 3

    def outer(x: int) -> int:
        def inner(y: int) -> int:
            return y + k

        return inner(x) * LIMIT

    assert peer.call(lambda x: x + k, 1) == 4
    assert peer.call(outer, 2) == 50


def test_recursive_and_mutually_recursive_functions_run_there(peer: Any) -> None:
    def fib(n: int) -> int:
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    def ping(n: int) -> str:
        return "ping" if n == 0 else pong(n - 1)

    def pong(n: int) -> str:
        return "pong" if n == 0 else ping(n - 1)

    assert peer.call(factorial, 10) == 3628800
    assert peer.call(is_even, 10) is True
    assert peer.call(fib, 10) == 55
    assert peer.call(ping, 3) == "pong"


def test_functions_pickled_together_share_their_cells_and_globals(peer: Any) -> None:
    count = 0

    def up() -> int:
        nonlocal count
        count += 1
        SHARED.append(count)
        return count

    def read() -> tuple[int, list[int]]:
        return count, SHARED

    def use(pair: Any) -> Any:
        pair[0]()
        pair[0]()
        return pair[1]()

    assert peer.call(use, (up, read)) == (2, [1, 2])
    assert count == 0 and SHARED == []


def test_an_attribute_name_does_not_drag_the_global_of_that_name_along(peer: Any) -> None:
    namespace: dict[str, Any] = {"data": open(os.devnull), "__name__": "__main__"}
    try:
        exec("def f(x): return x.data\ndef g(): return data", namespace)
        assert peer.call(namespace["f"], (memoryview(b"").obj and None) or types.SimpleNamespace(data=3)) == 3
        with pytest.raises(PicklingError, match="data"):
            dumps(namespace["g"])
    finally:
        namespace["data"].close()


def test_globals_of_nested_code_and_class_bodies_travel(peer: Any) -> None:
    def make() -> Any:
        class Local:
            limit = LIMIT
            parts = [LIMIT + i for i in range(2)]  # noqa: RUF012

        return Local.limit, Local.parts, [LIMIT for _ in range(1)]

    assert peer.call(make) == (10, [10, 11], [10])


def test_many_globals_are_found_behind_long_arguments(peer: Any) -> None:
    names = [f"g{i}" for i in range(600)]
    namespace: dict[str, Any] = {name: i for i, name in enumerate(names)}
    namespace["__name__"] = "__main__"
    exec(f"def f(): return {'+'.join(names)}", namespace)
    assert peer.call(namespace["f"]) == sum(range(600))


def test_a_later_pickle_updates_globals(peer: Any) -> None:
    namespace: dict[str, Any] = {"value": 1, "__name__": "__main__"}
    exec("def f(): return value\ndef g(): return value", namespace)
    assert peer.call(namespace["f"]) == 1
    namespace["value"] = 2
    assert peer.call(namespace["g"]) == 2
    assert peer.call(namespace["f"]) == 2


def test_everything_about_a_function_arrives() -> None:
    def original(a: int, b: str = "b", *, c: list[int] = [1]) -> str:  # noqa: B006
        """What it says."""
        return f"{a}{b}{c}"

    original.extra = {"k": original}  # type: ignore[attr-defined]
    copy = loads(*dumps(original))
    assert copy is not original and copy.__code__ == original.__code__
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "__defaults__", "__kwdefaults__"):
        assert getattr(copy, name) == getattr(original, name)
    assert copy.__annotations__ == original.__annotations__
    assert copy.extra["k"] is copy and copy(1) == "1b[1]"


def test_partials_of_lambdas_and_methods_of_local_classes_travel(peer: Any) -> None:
    class Adder:
        def __init__(self, k: int) -> None:
            self.k = k

        def add(self, x: int) -> int:
            return x + self.k

        def __call__(self, x: int) -> int:
            return x * self.k

        @classmethod
        def named(cls) -> str:
            return cls.__name__

        @staticmethod
        def double(x: int) -> int:
            return 2 * x

        def __secret(self) -> str:
            return "hidden"

        def secret(self) -> Any:
            return self.__secret

    assert peer.call(functools.partial(lambda a, b: a - b, b=1), 3) == 2
    assert peer.call(Adder(5).add, 1) == 6
    assert peer.call(Adder(5), 2) == 10
    assert peer.call(Adder.named) == "Adder"
    assert peer.call(Adder.double, 4) == 8
    assert peer.call(Adder(1).secret()) == "hidden"


def test_a_decorated_function_travels_with_what_it_wraps(peer: Any) -> None:
    def twice(fn: Any) -> Any:
        @functools.wraps(fn)
        def wrapper(*args: Any) -> Any:
            return fn(*args) * 2

        return wrapper

    @twice
    def f(x: int) -> int:
        return x + 1

    assert peer.call(f, 2) == 6
    assert loads(*dumps(f)).__wrapped__(2) == 3


def test_generator_and_coroutine_functions_travel(peer: Any) -> None:
    def numbers(n: int) -> Any:
        yield from range(n)

    async def later() -> int:
        return LIMIT

    def run() -> tuple[list[int], int]:
        import asyncio

        return list(numbers(3)), asyncio.run(later())

    assert peer.call(run) == ([0, 1, 2], 10)


def test_a_function_that_was_sent_can_be_sent_back_and_on(peer: Any) -> None:
    back = peer.call(same, factorial)
    assert back is not factorial and back(5) == 120
    assert back.__globals__ is factorial.__globals__
    assert peer.call(lambda f: f(5), back) == 120
    made = peer.call(lambda k: lambda x: x + k + LIMIT, 5)
    assert made(1) == 16 and peer.call(made, 1) == 16


def test_functions_that_come_back_leave_this_process_globals_alone(peer: Any) -> None:
    namespace: dict[str, Any] = {"count": 0, "__name__": "__main__"}
    exec("def bump():\n    global count\n    count += 1\n    return bump, count", namespace)
    back, count = peer.call(namespace["bump"])
    assert count == 1 and namespace["count"] == 0
    assert back.__globals__ is namespace


def test_submodules_that_code_reaches_are_imported_there(peer: Any) -> None:
    import xml.dom.minidom

    assert peer.call(lambda: xml.dom.minidom.parseString("<a/>").documentElement.tagName) == "a"


def test_a_module_made_by_hand_travels_by_value(peer: Any) -> None:
    module = types.ModuleType("made_by_hand")
    exec("K = 4\ndef f(x): return x * K", module.__dict__)
    assert peer.call(lambda: module.f(2) + module.K) == 12
    assert loads(*dumps(module)) is module


def test_a_function_with_free_variables_not_yet_set_travels() -> None:
    def outer() -> Any:
        def inner() -> Any:
            return later

        copy = loads(*dumps(inner))
        with pytest.raises(NameError):
            copy()
        later = 1
        return inner

    assert outer()() == 1


def test_other_python_versions_get_a_clear_error() -> None:
    from fiberexec._serialize._functions import dump_code, load_code

    with pytest.raises(PicklingError, match=r"comes from 2\.7, this process runs 3\."):
        load_code(dump_code(same.__code__), (2, 7))


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from peer import Peer
import dataclasses, enum
print("ran")
FACTOR = 3
class Color(enum.Enum):
    RED = 1
@dataclasses.dataclass
class Point:
    x: int
    def far(self): return self.x * FACTOR
class Oops(Exception):
    def __init__(self, a, b): super().__init__(a); self.b = b
def work(p, c):
    assert __name__ == "__main__" and type(p).__module__ == "__main__"
    assert c is Color.RED
    if p.x < 0: raise Oops(1, 2)
    return Point(p.far()), Color.RED, work
with Peer() as peer:
    point, color, fn = peer.call(work, Point(2), Color.RED)
    assert type(point) is Point and point == Point(6) and color is Color.RED, (point, color)
    assert fn.__module__ == "__main__"
    try: peer.call(fn, Point(-1), Color.RED)
    except Oops as error: assert error.b == 2 and error.args == (1,)
    else: raise AssertionError
    FACTOR = 5
    assert peer.call(work, Point(2), Color.RED)[0].x == 10
    class Point(Point):
        def far(self): return 1
    assert type(peer.call(work, Point(2), Color.RED)[0]) is Point
print("done")
"""


@pytest.mark.parametrize("how", ["file", "-c", "stdin"])
def test_functions_of_main_run_there_without_running_the_script(tmp_path: Path, how: str) -> None:
    script = SCRIPT.format(folder=str(Path(__file__).parent))
    path = tmp_path / "script.py"
    path.write_text(script)
    command = {"file": [str(path)], "-c": ["-c", script], "stdin": ["-"]}[how]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    given = script if how == "stdin" else ""
    out = subprocess.run([sys.executable, *command], input=given, env=env, capture_output=True, text=True, timeout=60)
    assert out.stdout == "ran\ndone\n", out.stderr
