"""The functions of tasks: pickled once, sent once per worker, pickled again when what they capture may have
changed.

    lookup(fn) ─► known, by id? ─► still importable there / captures unchanged? ─► its FunctionRef     (the
    hot path)
                      └─ no ─► pickle it ─► content known? that one's FunctionRef : a new one

What a function captures (globals, cells, defaults, through captured functions) is remembered by identity.
If all of it is atoms, modules, importable or likewise unchanged, the function needs no second look; if
something mutable is among it, the function is pickled each time and only new content gets a new id. Entries
hold no function, class or module.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
import weakref
from collections import OrderedDict

from ._byname import by_name, home_of, module_by_name
from ._classes import revision_of
from ._fast import PLAIN, Buffer, PicklingError
from ._functions import captured_globals, references
from ._reducers import DATACLASS_MARKS
from ._versions import Versioned, cached_versions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    # where a value lives, by name or number; the value if it is frozen; else a weak reference to it
    _Held = tuple[Any, Any, Any]

_MOST_CONTENTS = 1024
_LARGE_KEY = 64 * 1024
_MOST_CAPTURED = 200  # beyond this many checks pickling again is no slower
_MISSING = object()
_modules = sys.modules


class FunctionRef:
    """A pickled function: ``id`` (int, never reused) names the content, ``data`` and ``buffers`` are for
    `loads`, ``name`` is for messages."""

    __slots__ = ("__weakref__", "buffers", "data", "id", "name")

    def __init__(self, id: int, data: bytes, buffers: list[Buffer], name: str) -> None:
        self.id = id
        self.data = data
        self.buffers = buffers
        self.name = name

    def __repr__(self) -> str:
        return f"<FunctionRef {self.id} {self.name}>"


class _Entry:
    """What is known of one function object; `holds` says whether it still stands. Refers to no namespace: one
    could hold the function."""

    __slots__ = ("captures", "key", "module", "owner", "ref", "specs")

    def __init__(self, owner: weakref.ref[Any], ref: FunctionRef, captures: _Captures | None) -> None:
        self.owner = owner
        self.ref = ref
        self.captures = captures  # by value
        self.module = ""  # by name: its module ...
        self.key = ""  # ... and its name there
        self.specs: list[tuple[str, Any]] = []  # the user's modules that it reaches; a reload replaces the spec

    def holds(self, fn: Any) -> bool:
        if self.captures is not None:
            if not self.captures.unchanged():
                return False
        else:
            module = _modules.get(self.module)
            if module is None or module.__dict__.get(self.key) is not fn:
                return False
        for name, spec in self.specs:
            if getattr(_modules.get(name), "__spec__", None) is not spec:
                return False
        return True


class _Captures:
    """What a by-value function and the functions that it captures captured."""

    __slots__ = ("classes", "functions", "seen")

    def __init__(self) -> None:
        self.functions: list[tuple[Any, ...]] = []  # see add_function
        self.classes: list[tuple[Any, str]] = []
        self.seen: set[int] = set()

    def unchanged(self) -> bool:
        for owner, code, defaults, names, cells, others in self.functions:
            fn = owner()
            if fn is None or fn.__code__ is not code or fn.__defaults__ is not defaults:
                return False
            if (fn.__kwdefaults__ or fn.__dict__ or others) and not _same_others(fn, others):
                return False
            get = fn.__globals__.get
            for name, value, weak in names:
                if get(name, _MISSING) is not (value if weak is None else weak()):
                    return False
            for place, value, weak in cells:
                try:
                    if fn.__closure__[place].cell_contents is not (value if weak is None else weak()):
                        return False
                except ValueError:
                    return False
        for weak, revision in self.classes:
            cls = weak()
            if cls is None or revision_of(cls) != revision:
                return False
        return True

    def add_function(self, fn: types.FunctionType) -> bool:
        """Remember `fn` and what it captures; False if something among it may change unseen."""
        if id(fn) in self.seen:
            return True
        self.seen.add(id(fn))
        if len(self.seen) > _MOST_CAPTURED or not _is_frozen(fn.__defaults__):
            return False
        names: list[_Held] = []
        cells: list[_Held] = []
        others: list[_Held] = []
        self.functions.append((weakref.ref(fn), fn.__code__, fn.__defaults__, names, cells, others))
        home = home_of(fn.__globals__)
        if home is None:
            captured = captured_globals(fn)
            for name in references(fn.__code__)[0]:
                if name in captured:
                    if not self._add(names, name, captured[name]):
                        return False
                elif name not in fn.__globals__:
                    names.append((name, _MISSING, None))  # a built-in, until it is hidden
        for place, cell in enumerate(fn.__closure__ or ()):
            if home in ("dataclasses", "reprlib") and fn.__code__.co_freevars[place] == "repr_running":
                continue  # the set of what a dataclass's __repr__ is busy with: no matter elsewhere
            try:
                value = cell.cell_contents
            except ValueError:
                return False
            if not self._add(cells, place, value):
                return False
        return all(self._add(others, key, value) for key, value in _others(fn))

    def _add(self, into: list[_Held], place: Any, value: Any) -> bool:
        if _is_frozen(value):
            into.append((place, value, None))
            return True
        try:
            weak = weakref.ref(value)
        except TypeError:
            return False
        into.append((place, None, weak))
        if isinstance(value, types.ModuleType):
            return module_by_name(value.__name__) is value
        if type(value) is types.GenericAlias or type(value).__module__ == "typing":
            return True
        if not isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
            return False
        if by_name(value, value.__module__, value.__qualname__):
            return True
        if isinstance(value, types.FunctionType):
            return self.add_function(value)
        return isinstance(value, type) and self._add_class(value)

    def _add_class(self, cls: type) -> bool:
        for one in [*cls.__mro__, *type.mro(type(cls))]:
            if id(one) in self.seen or by_name(one, one.__module__, one.__qualname__):
                continue
            self.seen.add(id(one))
            self.classes.append((weakref.ref(one), revision_of(one)))
            for value in list(vars(one).values()):
                parts: tuple[Any, ...]
                if isinstance(value, property):
                    parts = (value.fget, value.fset, value.fdel)
                else:
                    parts = (getattr(value, "__func__", value),)
                for part in parts:
                    if isinstance(part, types.FunctionType) and not self.add_function(part):
                        return False
        return True


def _others(fn: types.FunctionType) -> list[tuple[tuple[str, str], Any]]:
    found = [(("k", name), value) for name, value in (fn.__kwdefaults__ or {}).items()]
    found.extend((("d", name), value) for name, value in fn.__dict__.items())
    return found


def _same_others(fn: types.FunctionType, others: list[_Held]) -> bool:
    now = _others(fn)
    return len(now) == len(others) and all(
        key == known and value is (frozen if weak is None else weak())
        for (key, value), (known, frozen, weak) in zip(now, others)
    )


def _is_frozen(value: Any) -> bool:
    kind = type(value)
    if kind in PLAIN or (kind.__module__ == "dataclasses" and kind.__name__ in DATACLASS_MARKS):
        return True
    return (kind is tuple or kind is frozenset) and len(value) <= 100 and all(map(_is_frozen, value))


class FunctionTable:
    """Driver side: which content a function is, so that each worker receives it once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _contents and _next_id; _entries is only touched by single operations
        self._entries: dict[int, _Entry] = {}
        self._contents: OrderedDict[Any, FunctionRef] = OrderedDict()
        self._next_id = 1

    def lookup(self, fn: Any) -> FunctionRef:
        """The `FunctionRef` of `fn` as it is now. Raises `PicklingError` for a callable that cannot
        travel."""
        entry = self._entries.get(id(fn))
        if entry is not None and entry.owner() is fn and entry.holds(fn):
            return entry.ref
        return self._pickle(fn)

    def _pickle(self, fn: Any) -> FunctionRef:
        from ._pickler import dump

        captures: _Captures | None = None
        stable = False
        if isinstance(fn, (types.FunctionType, types.BuiltinFunctionType, type)):
            name = fn.__qualname__
            if by_name(fn, fn.__module__, name):
                stable = "." not in name
            elif isinstance(fn, types.FunctionType):
                captures = _Captures()  # before it is pickled: a change meanwhile is noticed at the next look
                stable = captures.add_function(fn)
        else:
            name = _name(fn)
        versions, specs = cached_versions(fn)
        try:
            data, buffers = dump(Versioned(versions, fn) if versions else fn, "function")
        except PicklingError:
            if not versions:
                raise
            data, buffers = dump(fn, "function")  # the same failure, with the path from the function
        ref = self._content(data, [_copy(buffer) for buffer in buffers], name)
        if stable:
            key = id(fn)
            entries = self._entries
            try:
                owner = weakref.ref(fn, lambda _: entries.pop(key, None))
            except TypeError:
                return ref
            entry = _Entry(owner, ref, captures)
            if captures is None:
                entry.module, entry.key = fn.__module__, name
            entry.specs = [(module.__name__, spec) for module, spec in specs]
            entries[key] = entry
        return ref

    def _content(self, data: bytes, buffers: list[Buffer], name: str) -> FunctionRef:
        key: Any = data
        if buffers or len(data) > _LARGE_KEY:
            import hashlib

            digest = hashlib.blake2b(data)
            for buffer in buffers:
                digest.update(len(buffer).to_bytes(8, "little"))
                digest.update(buffer)
            key = digest.digest()
        with self._lock:
            ref = self._contents.get(key)
            if ref is None:
                ref = self._contents[key] = FunctionRef(self._next_id, data, buffers, name)
                self._next_id += 1
                if len(self._contents) > _MOST_CONTENTS:
                    self._contents.popitem(last=False)
            else:
                self._contents.move_to_end(key)
            return ref


def _copy(buffer: Buffer) -> Buffer:
    """Content must not change under its id."""
    return buffer if type(buffer) is bytes else bytearray(buffer)


def _name(fn: Any) -> str:
    if isinstance(fn, functools.partial):
        return f"partial({_name(fn.func)})"
    name = getattr(fn, "__qualname__", None)
    return name if type(name) is str else type(fn).__qualname__
