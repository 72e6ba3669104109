from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
import zipfile
from typing import Any

import pytest

from fiberexec._serialize import RemoteTraceback, dump_exception, load_exception

__spec__ = None  # as in a script: nothing here can be imported, so all of it travels by value


class Extra(Exception):
    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"code {code}")
        self.code = code
        self.detail = detail


class Path2(OSError):
    def __init__(self, path: str) -> None:
        super().__init__(2, "no such thing", path)


class NoArgs(ValueError):
    def __init__(self) -> None:
        super().__init__("fixed")


class Holder(RuntimeError):
    def __init__(self, thing: Any) -> None:
        super().__init__("holds", thing)
        self.thing = thing
        self.fine = 3


class Told(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(a)
        self.a, self.b = a, b

    def __reduce__(self) -> Any:
        return Told, (self.a, self.b)


class Liar(Exception):
    def __reduce__(self) -> Any:
        return int, ("3",)


class Killer(KeyError):
    def __reduce__(self) -> Any:
        raise SystemExit(3)


class Rebel(LookupError):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Slotted(Exception):
    __slots__ = ("where",)


def there(peer: Any, exc: BaseException) -> BaseException:
    """`exc` as it is after it went to another process and was raised there."""
    with pytest.raises(BaseException) as info:
        peer.call(_raise_loaded, dump_exception(exc))
    return info.value


def _raise_loaded(data: bytes) -> None:
    raise load_exception(data)


def back(exc: BaseException, text: str = "") -> BaseException:
    return load_exception(dump_exception(exc, text))


BUILT_IN = [
    ValueError("a", 1), KeyError("k"), OSError(2, "No such file", "/x"),
    FileNotFoundError(2, "m", "/a", None, "/b"),
    StopIteration(3), SystemExit(4), KeyboardInterrupt(), GeneratorExit(), ZeroDivisionError(), Exception(),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), SyntaxError("bad", ("f", 1, 2, "text")),
    ImportError("m", name="n", path="p"), json.JSONDecodeError("bad", "{", 0), zipfile.BadZipFile("z"),
    subprocess.CalledProcessError(3, ["cmd"], b"out", b"err"), subprocess.TimeoutExpired("c", 3), Slotted(1),
    pickle.PicklingError("p"), RecursionError("deep"), MemoryError(), UserWarning("w"),
]  # fmt: skip


@pytest.mark.parametrize("exc", [*BUILT_IN, Extra(3, detail="d"), Path2("/p"), NoArgs(), Told(1, 2)], ids=repr)
def test_an_exception_comes_back_of_its_class_with_all_that_it_has(peer: Any, exc: BaseException) -> None:
    got = there(peer, exc)
    assert type(got) is type(exc) and got.args == exc.args
    assert vars(got) == vars(exc) and str(got) == str(exc) and repr(got) == repr(exc)
    for name in (
        "filename",
        "filename2",
        "errno",
        "value",
        "code",
        "name",
        "path",
        "object",
        "start",
        "text",
        "lineno",
    ):
        assert getattr(got, name, None) == getattr(exc, name, None)


def test_init_is_not_called_again() -> None:
    calls = []

    class Counting(Exception):
        def __init__(self) -> None:
            calls.append(1)

    assert type(back(Counting())) is Counting and calls == [1]


def test_the_remote_traceback_is_the_cause_and_the_original_cause_follows(peer: Any) -> None:
    def fail() -> None:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error

    with pytest.raises(ValueError, match="second") as info:
        peer.call(fail)
    remote = info.value.__cause__
    assert type(remote) is RemoteTraceback and str(remote) == f'\n"""\n{remote.tb}"""'
    assert 'raise ValueError("second") from error' in remote.tb and "KeyError: 'first'" in remote.tb
    assert type(remote.__cause__) is KeyError


def test_a_given_text_is_the_remote_traceback() -> None:
    got = load_exception(dump_exception(ValueError(1), "the text"))
    assert isinstance(got.__cause__, RemoteTraceback) and got.__cause__.tb == "the text"


def test_contexts_suppression_and_notes_are_kept() -> None:
    def fail() -> None:
        try:
            try:
                raise KeyError("context")
            except KeyError:
                raise ValueError("middle") from None
        except ValueError:
            raise RuntimeError("last")  # noqa: B904

    try:
        fail()
    except RuntimeError as error:
        error.__notes__ = ["a note"]  # type: ignore[attr-defined]
        got: Any = back(error)
    assert got.__cause__ is None and got.__notes__ == ["a note"] and not got.__suppress_context__
    assert type(got.__context__) is ValueError and got.__context__.__suppress_context__
    assert type(got.__context__.__context__) is KeyError


def test_chains_with_a_cycle_and_long_chains_end() -> None:
    one, two = ValueError(1), KeyError(2)
    one.__cause__, two.__context__ = two, one
    got: Any = back(one)
    assert got.__cause__.__context__ is got
    root = last = ValueError(0)
    for i in range(3000):
        last.__context__ = ValueError(i)
        last = last.__context__
    got = back(root)
    assert type(got.__context__.__context__) is ValueError


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with Python 3.11")
def test_groups_come_back_with_their_members(peer: Any) -> None:
    inner = ExceptionGroup("inner", [Extra(1, detail="x"), KeyError(2)])  # type: ignore[name-defined]  # noqa: F821
    group = ExceptionGroup("outer", [ValueError(1), inner])  # type: ignore[name-defined]  # noqa: F821
    inner.exceptions[0].__cause__ = group.exceptions[0]
    got: Any = there(peer, group)
    assert type(got) is type(group) and got.message == "outer" and str(got) == str(group)
    assert got.exceptions[1].exceptions[0].detail == "x"
    assert got.exceptions[1].exceptions[0].__cause__ is got.exceptions[0]
    assert got.subgroup(KeyError).exceptions[0].exceptions[0].args == (2,)

    class Mine(ExceptionGroup):  # type: ignore[name-defined,misc]  # noqa: F821
        def __new__(cls, members: Any, extra: int) -> Any:
            made = super().__new__(cls, "mine", members)
            made.extra = extra
            return made

        def derive(self, excs: Any) -> Any:
            return Mine(excs, self.extra)

    got = there(peer, Mine([ValueError(1)], 5))
    assert type(got) is Mine and got.extra == 5 and got.exceptions[0].args == (1,)
    mixed = BaseExceptionGroup("b", [KeyboardInterrupt()])  # type: ignore[name-defined]  # noqa: F821
    assert type(back(mixed)) is type(mixed)


def test_what_an_exception_holds_and_cannot_travel_is_shown_instead(peer: Any) -> None:
    got: Any = there(peer, Holder(threading.Lock()))
    assert type(got) is Holder and got.fine == 3
    assert "lock" in got.thing and "lock" in got.args[1]


@pytest.mark.parametrize("exc", [Liar("x"), Killer("k"), Rebel("r")], ids=lambda exc: type(exc).__name__)
def test_an_exception_that_resists_keeps_its_class(peer: Any, exc: BaseException) -> None:
    got = there(peer, exc)
    assert type(got) is type(exc) and got.args == exc.args


def test_a_class_that_cannot_travel_is_stood_in_for_by_its_nearest_base(peer: Any) -> None:
    lock = threading.Lock()

    class Stuck(FileNotFoundError):
        held = lock

        def __str__(self) -> str:
            return "stuck!"

    got = there(peer, Stuck(2, "x"))
    assert type(got) is not Stuck and isinstance(got, FileNotFoundError)
    assert type(got).__name__ == "Stuck" and str(got) == "stuck!" and "Stuck" in repr(got)
    again = back(got)
    assert isinstance(again, FileNotFoundError) and str(again) == "stuck!"


def test_a_class_that_cannot_be_imported_there_is_stood_in_for(peer: Any, tmp_path: Any) -> None:
    (tmp_path / "only_here.py").write_text("class Here(LookupError):\n    pass\n")
    sys.path.insert(0, str(tmp_path))
    try:
        import only_here  # type: ignore[import-not-found]

        data = dump_exception(only_here.Here("lost"))
        code = f"from fiberexec._serialize import load_exception; e = load_exception({data!r})\n"
        code += "print(isinstance(e, LookupError), type(e).__name__, e, e.__cause__.tb)"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd="/")
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("only_here", None)
    assert out.stdout.startswith("True Here lost only_here.Here: lost"), out.stderr


@pytest.mark.parametrize("data", [b"", b"junk", pickle.dumps(3), pickle.dumps(("", [])), pickle.dumps(("", [{}]))])
def test_reading_garbage_gives_an_exception_and_raises_none(data: bytes) -> None:
    assert isinstance(load_exception(data), BaseException)


def test_an_exception_that_is_hostile_in_every_way_arrives_as_something() -> None:
    class Hostile(Exception):
        def __reduce__(self) -> Any:
            raise KeyboardInterrupt

        def __str__(self) -> str:
            raise SystemExit

        __repr__ = __str__

        @property
        def __dict__(self) -> Any:  # type: ignore[override]
            raise ValueError

    got = back(Hostile())
    assert isinstance(got, Exception) and "Hostile" in type(got).__qualname__ + str(got)
