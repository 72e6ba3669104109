from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fiberexec._serialize import FunctionTable, PicklingError, dumps, dumps_call, dumps_result

__spec__ = None  # as in a script: nothing here can be imported, so all of it travels by value


class Thing:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


class Slotted:
    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


class Raises:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


def message(args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> str:
    with pytest.raises(PicklingError) as info:
        dumps_call(args, kwargs or {})
    return str(info.value)


def numbers() -> Iterator[int]:
    yield 1


LOCK = threading.Lock()
PATHS: list[tuple[Any, str]] = [
    (LOCK, "args[1]"),
    ([1, [LOCK]], "args[1][1][0]"),
    ({"a": {"b": LOCK}}, "args[1]['a']['b']"),
    (Thing(config={"lock": LOCK}), "args[1].config['lock']"),
    (Slotted(Thing(x=LOCK)), "args[1].held.x"),
    (functools.partial(int, LOCK), "args[1].args[0]"),
    (functools.partial(int, base=LOCK), "args[1].keywords['base']"),
    (Thing(a=Thing(b=(1, Thing(c=LOCK)))), "args[1].a.b[1].c"),
    (Thing(a=LOCK).__init__, "args[1].__self__.a"),  # type: ignore[misc]
]


@pytest.mark.parametrize(("value", "path"), PATHS, ids=[path for _, path in PATHS])
def test_the_message_names_the_path_to_what_cannot_travel(value: Any, path: str) -> None:
    assert message((1, value)).startswith(f"cannot send {path} (a _thread.lock) to another process: TypeError: ")


def test_the_path_begins_where_the_value_does() -> None:
    assert "kwargs['k'][0] (a _thread.lock)" in message((), {"k": [LOCK]})
    with pytest.raises(PicklingError, match=r"cannot send the result\[0\] \(a _thread.lock\)"):
        dumps_result([LOCK])
    with pytest.raises(PicklingError, match=r"cannot send the object\.a \(a _thread.lock\)"):
        dumps(Thing(a=LOCK))


def test_the_path_leads_through_functions() -> None:
    lock = LOCK
    namespace = {"__name__": "__main__", "shared": [LOCK]}
    exec("def by_global(): return shared", namespace)
    table = FunctionTable()
    with pytest.raises(PicklingError, match=r"<lambda>\.__closure__\['lock'\] \(a _thread.lock\)"):
        table.lookup(lambda: lock)
    with pytest.raises(PicklingError, match=r"by_global\.__globals__\['shared'\]\[0\] \(a _thread.lock\)"):
        table.lookup(namespace["by_global"])
    with pytest.raises(PicklingError, match=r"\.__defaults__\[0\] \(a _thread.lock\)"):
        table.lookup(lambda x=lock: x)


def test_what_nobody_should_copy_is_refused_at_once(tmp_path: Path) -> None:
    class Pointer(ctypes.Structure):
        _fields_ = [("p", ctypes.c_char_p)]

    running = numbers()
    with open(tmp_path / "f", "w") as file, open(tmp_path / "f", "rb") as raw:
        refused = [
            (LOCK, "lock"), (threading.RLock(), "RLock"), (threading.Condition(), "lock"),
            (file, "TextIOWrapper"),
            (raw, "BufferedReader"), (running, "generator"), (threading.local(), "local"),
            (ctypes.pointer(ctypes.c_int(1)), "c_int"), (Pointer(b"x"), "Pointer"), (ctypes.CFUNCTYPE(None), "ctypes"),
            (threading.current_thread(), "_thread"),
        ]  # fmt: skip
        for value, kind in refused:
            text = message(([value],))
            assert "args[0][0]" in text and kind in text, text


@pytest.mark.parametrize(
    "error", [ValueError("mine"), SystemExit(3), GeneratorExit(), MemoryError("m"), RuntimeError()]
)
def test_what_pickling_raises_is_the_cause(error: BaseException) -> None:
    with pytest.raises(PicklingError) as info:
        dumps_call((Thing(inner=Raises(error)),), {})
    assert info.value.__cause__ is error
    assert "args[0].inner" in str(info.value) and type(error).__name__ in str(info.value)


def test_a_keyboard_interrupt_while_pickling_goes_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        dumps_call((Raises(KeyboardInterrupt()),), {})


def test_endless_nesting_gets_a_message_of_its_own() -> None:
    deep: Any = None
    for _ in range(100_000):
        deep = [deep]
    assert "nested too deeply" in message((deep,))

    class Endless:
        def __reduce__(self) -> Any:
            return Endless, (Endless(),)

    assert "nested too deeply" in message((Endless(),))
    while deep is not None:  # taken apart by hand: freeing it whole would nest as deeply
        deep = deep[0]


def test_errors_with_hostile_texts_are_reported_all_the_same() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    assert "Mute" in message((Raises(Mute()),))


def test_finding_the_path_in_a_large_value_is_bounded() -> None:
    import time

    value = [list(range(2000)) for _ in range(1000)]
    began = time.monotonic()
    message((value, LOCK))
    assert time.monotonic() - began < 5


def test_the_error_is_a_pickling_error_of_the_standard_too() -> None:
    import pickle

    with pytest.raises(pickle.PicklingError):
        dumps(LOCK)
