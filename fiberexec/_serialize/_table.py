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
import threading
import types
import weakref
from collections import OrderedDict

from ._byname import by_name, home_of, module_by_name
from ._fast import PLAIN, Buffer, PicklingError
from ._functions import captured_globals, references
from ._versions import Versioned, cached_versions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MOST_CONTENTS = 1024
_LARGE_KEY = 64 * 1024
_MOST_CAPTURED = 200  # beyond this many checks pickling again is no slower
_MISSING = object()


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
    """What is known of one function object; `holds` says whether it still stands."""

    __slots__ = ("captures", "home", "key", "owner", "ref", "specs")

    def __init__(self, owner: weakref.ref[Any], ref: FunctionRef) -> None:
        self.owner = owner
        self.ref = ref
        self.home: dict[str, Any] | None = None  # by name: the globals of its module ...
        self.key = ""  # ... and its name there
        self.captures: _Captures | None = None  # by value
        self.specs: list[tuple[Any, Any]] = []

    def holds(self, fn: Any) -> bool:
        if self.captures is not None:
            if not self.captures.unchanged():
                return False
        elif self.home is None or self.home.get(self.key) is not fn:
            return False
        for space, spec in self.specs:
            if space.get("__spec__") is not spec:
                return False
        return True


class _Captures:
    """What a by-value function captured, flat: where each value lives and what it was."""

    __slots__ = ("cells", "classes", "functions", "items", "seen")

    def __init__(self) -> None:
        # (dictionary, name, value or None, weak reference or None)
        self.items: list[tuple[dict[str, Any], str, Any, Any]] = []
        self.cells: list[tuple[Any, Any, Any]] = []
        self.functions: list[tuple[Any, Any, Any, Any, int]] = []
        self.classes: list[tuple[Any, str]] = []
        self.seen: set[int] = set()

    def unchanged(self) -> bool:
        for space, name, value, weak in self.items:
            if space.get(name, _MISSING) is not (value if weak is None else weak()):
                return False
        for cell, value, weak in self.cells:
            try:
                if cell.cell_contents is not (value if weak is None else weak()):
                    return False
            except ValueError:
                return False
        for weak, code, defaults, kwdefaults, attributes in self.functions:
            fn = weak()
            if fn is None or fn.__code__ is not code or fn.__defaults__ is not defaults:
                return False
            if fn.__kwdefaults__ is not kwdefaults or len(fn.__dict__) != attributes:
                return False
        if self.classes:
            from ._classes import revision_of

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
        if len(self.seen) > _MOST_CAPTURED:
            return False
        if fn.__kwdefaults__ or fn.__dict__ or not _is_frozen(fn.__defaults__):
            return False
        self.functions.append((weakref.ref(fn), fn.__code__, fn.__defaults__, fn.__kwdefaults__, 0))
        if home_of(fn.__globals__) is None:
            captured = captured_globals(fn)
            for name in references(fn.__code__)[0]:
                if name not in captured and name not in fn.__globals__:
                    self.items.append(
                        (fn.__globals__, name, _MISSING, None)
                    )  # a built-in, until it is hidden
                elif name in captured and not self._add(self.items, fn.__globals__, name, captured[name]):
                    return False
        for cell in fn.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:
                return False
            if not self._add(self.cells, cell, None, value):
                return False
        return True

    def _add(self, into: list[Any], place: Any, name: str | None, value: Any) -> bool:
        where = (place,) if name is None else (place, name)
        if _is_frozen(value):
            into.append((*where, value, None))
            return True
        try:
            weak = weakref.ref(value)
        except TypeError:
            return False
        into.append((*where, None, weak))
        if isinstance(value, types.ModuleType):
            return module_by_name(value.__name__) is value
        if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)) and by_name(
            value, value.__module__, value.__qualname__
        ):
            return True
        if isinstance(value, types.FunctionType):
            return self.add_function(value)
        return isinstance(value, type) and self._add_class(value)

    def _add_class(self, cls: type) -> bool:
        from ._classes import revision_of

        for one in cls.__mro__:
            if id(one) in self.seen or by_name(one, one.__module__, one.__qualname__):
                continue
            self.seen.add(id(one))
            self.classes.append((weakref.ref(one), revision_of(one)))
            for value in list(vars(one).values()):
                parts = (
                    (value.fget, value.fset, value.fdel)
                    if isinstance(value, property)
                    else (getattr(value, "__func__", value),)
                )
                for part in parts:
                    if isinstance(part, types.FunctionType) and not self.add_function(part):
                        return False
        return type(cls) is type or by_name(type(cls), type(cls).__module__, type(cls).__qualname__)


def _is_frozen(value: Any) -> bool:
    kind = type(value)
    if kind in PLAIN or value is None:
        return True
    return (kind is tuple or kind is frozenset) and len(value) <= 100 and all(map(_is_frozen, value))


class FunctionTable:
    """Driver side: which content a function is, so that each worker receives it once."""

    def __init__(self) -> None:
        self._lock = (
            threading.Lock()
        )  # guards _contents and _next_id; _entries is only touched by single operations
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

        captures = None
        stable = False
        home: dict[str, Any] | None = None
        if isinstance(fn, (types.FunctionType, types.BuiltinFunctionType, type)):
            name = fn.__qualname__
            if by_name(fn, fn.__module__, name):
                module = module_by_name(fn.__module__)
                assert module is not None
                home, stable = vars(module), "." not in name
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
            entry = _Entry(owner, ref)
            entry.home, entry.key, entry.captures = home, name, captures
            entry.specs = [(vars(module), spec) for module, spec in specs]
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
