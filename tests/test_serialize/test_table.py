from __future__ import annotations

import functools
import gc
import importlib
import os.path
import sys
import threading
import types
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fiberexec._serialize import FunctionTable, PicklingError, loads

__spec__ = None  # as in a script: nothing here can be imported, so all of it travels by value


def load(ref: Any) -> Any:
    return loads(ref.data, [b if type(b) is bytes else bytearray(b) for b in ref.buffers])


def namespace(source: str, **values: Any) -> dict[str, Any]:
    space = {"__name__": "__main__", **values}
    exec(source, space)
    return space


@pytest.fixture
def table() -> FunctionTable:
    return FunctionTable()


CALLABLES: list[Any] = [
    len, os.path.join, int, dict.fromkeys, "a".upper, str.upper, functools.partial(int, base=2), lambda: 1,
    np.sum, np.add, types.SimpleNamespace, functools.lru_cache(len),
]  # fmt: skip


@pytest.mark.parametrize("fn", CALLABLES, ids=repr)
def test_equal_content_is_the_same_ref(table: FunctionTable, fn: Any) -> None:
    ref = table.lookup(fn)
    assert table.lookup(fn) is ref and type(ref.id) is int and type(ref.data) is bytes and type(ref.name) is str
    assert callable(load(ref))


def test_different_functions_have_different_ids_and_names_are_telling(table: FunctionTable) -> None:
    refs = [table.lookup(fn) for fn in (len, max, functools.partial(len), load)]
    assert len({ref.id for ref in refs}) == 4
    assert [ref.name for ref in refs] == ["len", "max", "partial(len)", "load"]


def test_two_bound_methods_of_equal_objects_are_one_content(table: FunctionTable) -> None:
    assert table.lookup("a".upper) is table.lookup("a".upper)
    assert table.lookup("a".upper) is not table.lookup("b".upper)


CHANGES = {
    "global": ("def f(): return g", {"g": 1}, "g = 2"),
    "mutable global": ("def f(): return g[0]", {"g": [1]}, "g[0] = 2"),
    "helper": ("def h(): return 1\ndef f(): return h()", {}, "def h(): return 2"),
    "global of a helper": ("def h(): return g\ndef f(): return h()", {"g": 1}, "g = 2"),
    "class": ("class C:\n  v = 1\ndef f(): return C.v", {}, "C.v = 2"),
    "method": (
        "class C:\n  def m(self): return 1\ndef f(): return C().m()", {}, "C.m = lambda self: 2"
    ),
    "global of a method": ("class C:\n  def m(self): return g\ndef f(): return C().m()", {"g": 1}, "g = 2"),
    "base class": ("class B: v = 1\nclass C(B): pass\ndef f(): return C.v", {}, "B.v = 2"),
    "list of a class": ("class C: v = [1]\ndef f(): return C.v[0]", {}, "C.v[0] = 2"),
    "default": ("def f(x=1): return x", {}, "f.__defaults__ = (2,)"),
    "keyword default": ("def f(*, x=1): return x", {}, "f.__kwdefaults__['x'] = 2"),
    "code": ("def f(): return 1\ndef k(): return 2", {}, "f.__code__ = k.__code__"),
    "attribute": ("def f(): return f.v\nf.v = 1", {}, "f.v = 2"),
    "new attribute": ("def f(): return getattr(f, 'v', 1)", {}, "f.v = 2"),
    "equal but of another type": ("def f(): return type(g) is int and 1 or 2", {"g": 1}, "g = True"),
    "global that appears": ("def f():\n  try: return g\n  except NameError: return 1", {}, "g = 2"),
    "array": ("def f(): return int(g[0])", {"g": np.ones(10_000)}, "g[0] = 2"),
    "instance": ("class C: v = 1\no = C()\ndef f(): return o.v", {}, "o.v = 2"),
    "closure": (
        "def make():\n  x = 1\n  def set(v):\n    nonlocal x\n    x = v\n  return (lambda: x), set\n"
        "f, set = make()",
        {},
        "set(2)",
    ),
    "partial": ("import functools\ng = [1]\nf = functools.partial(lambda x: x[0], g)", {}, "g[0] = 2"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_captured_is_pickled_again_when_it_changed(peer: Any, table: FunctionTable, change: str) -> None:
    source, values, then = CHANGES[change]
    space = namespace(source, **values)
    first = table.lookup(space["f"])
    assert table.lookup(space["f"]) is first
    assert peer.call(space["f"]) == 1
    exec(then, space)
    second = table.lookup(space["f"])
    assert second.id != first.id
    assert peer.call(space["f"]) == 2


def test_a_ref_keeps_the_content_that_its_id_names(table: FunctionTable) -> None:
    array = np.ones(100_000)
    ref = table.lookup(lambda: array[0])
    array[0] = 5
    assert load(ref)() == 1


def test_an_unchanged_closure_is_not_pickled_again(table: FunctionTable) -> None:
    k = 3

    class Counted:
        reduced = 0

        def __reduce__(self) -> Any:
            Counted.reduced += 1
            return Counted, ()

    held = Counted()

    def stable() -> int:
        return k

    def unstable() -> Any:
        return held

    ref = table.lookup(stable)
    table._pickle = None  # type: ignore[assignment,method-assign]
    assert table.lookup(stable) is ref
    other = FunctionTable()
    other.lookup(unstable)
    before = Counted.reduced
    other.lookup(unstable)
    assert Counted.reduced == before + 1


def test_functions_and_classes_are_not_kept_alive(table: FunctionTable) -> None:
    class Local:
        def get(self) -> type:
            return Local

    def recursive(n: int) -> Any:
        return recursive(n - 1) if n else Local().get()

    table.lookup(recursive)
    table.lookup(Local)
    assert table.lookup(recursive) is table.lookup(recursive)
    refs = [weakref.ref(recursive), weakref.ref(Local)]
    recursive = Local = None  # type: ignore[assignment,misc]
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    assert not table._entries


def test_a_closure_that_refers_to_itself_is_not_kept_alive(table: FunctionTable) -> None:
    def make() -> Any:
        def again(n: int) -> int:
            return again(n - 1) if n else 0

        return again

    space = namespace("def f(): return f")
    made = [make(), space["f"]]
    assert [table.lookup(fn) for fn in made] == [table.lookup(fn) for fn in made]
    assert len(table._entries) == 2
    refs = [weakref.ref(fn) for fn in made]
    made.clear()
    space.clear()
    gc.collect()
    assert refs[0]() is None and len(table._entries) <= 1


@pytest.mark.parametrize("kind", ["plain", "dataclass", "enum", "generic"])
def test_a_function_that_uses_an_unchanged_class_is_not_pickled_again(table: FunctionTable, kind: str) -> None:
    source = {
        "plain": "class C:\n  def m(self): return super().__repr__()",
        "dataclass": "import dataclasses\n@dataclasses.dataclass(order=True)\nclass C:\n  x: list[int]\n  y: int = 1",
        "enum": "import enum\nclass C(enum.Enum):\n  A = 1",
        "generic": "import typing\nT = typing.TypeVar('T')\nclass C(typing.Generic[T]):\n  x: 'T'",
    }[kind]
    space = namespace(source + "\ndef f(): return C")
    ref = table.lookup(space["f"])
    assert id(space["f"]) in table._entries
    assert table.lookup(space["f"]) is ref
    assert FunctionTable().lookup(space["f"]).data == ref.data


def test_an_id_is_never_used_again(table: FunctionTable) -> None:
    seen = set()
    for i in range(3000):
        ref = table.lookup(eval(f"lambda: {i}"))
        assert ref.id not in seen
        seen.add(ref.id)
    assert len(table._contents) <= 1024


def test_a_callable_that_cannot_travel_raises_at_once(table: FunctionTable) -> None:
    lock = threading.Lock()
    for _ in range(2):
        with pytest.raises(PicklingError, match="lock"):
            table.lookup(lambda: lock)


def test_threads_that_look_up_at_once_agree(table: FunctionTable) -> None:
    space = namespace("def f(): return g", g=[1])
    found: list[int] = []
    barrier = threading.Barrier(8)

    def look() -> None:
        barrier.wait()
        for _ in range(50):
            found.append(table.lookup(space["f"]).id)

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 400 and len(set(found)) == 1


def test_a_name_that_now_means_another_function_is_noticed(
    peer_module: Any, table: FunctionTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mod_rebound.py").write_text("def f(): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import mod_rebound  # type: ignore[import-not-found]

    old = mod_rebound.f
    ref = table.lookup(old)
    assert len(ref.data) < 300
    mod_rebound.f = lambda: 2
    assert table.lookup(old).id != ref.id
    assert load(table.lookup(old))() == 1
    sys.modules.pop("mod_rebound")


def edit(path: Path, text: str) -> None:
    """Write and make sure that compiled files of the old text are not taken for the new."""
    path.write_text(text)
    importlib.invalidate_caches()


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", "") and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_a_living_worker_runs_the_code_of_a_module_that_was_edited_and_reloaded(
    peer_module: Any, modules: Path
) -> None:
    edit(modules / "mod_edited.py", "def f(): return 1\n")
    import mod_edited  # type: ignore[import-not-found]

    with peer_module.Peer() as peer:
        assert peer.call(mod_edited.f) == 1
        assert peer.call(lambda: mod_edited.f()) == 1
        edit(modules / "mod_edited.py", "def f(): return 1 + 1  # edited\n")
        importlib.reload(mod_edited)
        assert peer.call(mod_edited.f) == 2
        assert peer.call(lambda: mod_edited.f()) == 2


def test_an_edited_helper_is_noticed_in_another_module_too(peer_module: Any, modules: Path) -> None:
    edit(modules / "mod_low.py", "LIMIT = 1\ndef helper(): return LIMIT\n")
    edit(
        modules / "mod_high.py",
        "from mod_low import helper\nimport mod_low\ndef f(): return helper(), mod_low.helper()\n",
    )
    import mod_high  # type: ignore[import-not-found]
    import mod_low  # type: ignore[import-not-found]

    with peer_module.Peer() as peer:
        assert peer.call(mod_high.f) == (1, 1)
        edit(modules / "mod_low.py", "LIMIT = 2  # edited\ndef helper(): return LIMIT\n")
        importlib.reload(mod_low)
        assert peer.call(mod_high.f) == (1, 2) or peer.call(mod_high.f) == (2, 2)
        importlib.reload(mod_high)
        assert peer.call(mod_high.f) == (2, 2)


def test_a_module_that_was_not_edited_is_not_reloaded(peer_module: Any, modules: Path) -> None:
    edit(
        modules / "mod_kept.py",
        "count = 0\ndef f():\n    global count\n    count += 1\n    return count\ndef g(): return count\n",
    )
    import mod_kept  # type: ignore[import-not-found]

    with peer_module.Peer() as peer:
        assert peer.call(mod_kept.f) == 1
        assert peer.call(mod_kept.g) == 1
        importlib.reload(mod_kept)
        assert peer.call(mod_kept.f) == 2


def test_standard_library_functions_carry_no_digest(table: FunctionTable) -> None:
    assert len(table.lookup(os.path.join).data) < 60
