"""After a failure: which part of a value could not be pickled, as the path that leads to it.

The value is pickled once more, by Python's slow pickler, which shows what it is busy with when the failure
comes. Bounded in steps and in time; runs no code of the user's that the first attempt did not run.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import time
import types

from ._fast import PROTOCOL, PicklingError
from ._pickler import Pickler

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MOST_STEPS = 200_000
MOST_SECONDS = 0.5
_SOURCES = {
    "call": "the arguments",
    "result": "the result",
    "function": "the function",
    "object": "the object",
}


class _Enough(Exception):
    """The search has taken its share."""


_Slow: Any = pickle._Pickler


class _Tracer(_Slow):  # type: ignore[misc]
    # Python's own table: that of the class is open to all, and dill for one rewrites it
    dispatch: Any = {  # noqa: RUF012
        type(None): _Slow.save_none,
        bool: _Slow.save_bool,
        int: _Slow.save_long,
        float: _Slow.save_float,
        bytes: _Slow.save_bytes,
        bytearray: _Slow.save_bytearray,
        pickle.PickleBuffer: _Slow.save_picklebuffer,
        str: _Slow.save_str,
        tuple: _Slow.save_tuple,
        list: _Slow.save_list,
        dict: _Slow.save_dict,
        set: _Slow.save_set,
        frozenset: _Slow.save_frozenset,
        types.FunctionType: _Slow.save_global,
        type: _Slow.save_type,
    }
    shallow: set[int] | None = None
    undo: Any = ()
    reducer_override = Pickler.reducer_override

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), PROTOCOL, buffer_callback=lambda _: False)
        self.trail: list[Any] = []
        self.failed: list[Any] = []
        self.descriptors: list[int] = []  # so that none is left anywhere
        self.steps = 0
        self.deadline = time.monotonic() + MOST_SECONDS

    def digests(self, namespace: dict[str, Any], captured: dict[str, Any]) -> dict[str, int]:
        return {}

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        self.steps += 1
        if self.steps > MOST_STEPS or (not self.steps & 255 and time.monotonic() > self.deadline):
            raise _Enough
        self.trail.append(obj)
        try:
            super().save(obj, save_persistent_id)
        except _Enough:
            raise
        except BaseException:
            self.failed = self.failed or list(self.trail)
            raise
        self.trail.pop()


def explain(root: Any, what: str, error: BaseException) -> PicklingError:
    """The `PicklingError` to raise for `error`, which pickling `root` met."""
    source = _SOURCES.get(what, what)
    if isinstance(error, RecursionError):
        return PicklingError(
            f"cannot send {source} to another process: nested too deeply to be pickled (a long chain of "
            "objects, or a __reduce__ or __getstate__ without end)"
        )
    trail = _trail(root)
    path, culprit = _path(trail, what)
    reason = f"{type(error).__name__}: {_text(error)}" if _text(error) else type(error).__name__
    if culprit is None:
        return PicklingError(f"cannot send {source} to another process: {reason}")
    return PicklingError(f"cannot send {path} ({_kind(culprit)}) to another process: {reason}")


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(an exception without a text)"


def _kind(obj: Any) -> str:
    kind = obj if isinstance(obj, type) else type(obj)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(obj, type):
        return f"the class {name}"
    return ("an " if name[:1] in "aeiouAEIOU" else "a ") + name


def _trail(root: Any) -> list[Any]:
    tracer = _Tracer()
    try:
        tracer.dump(root)
    except (Exception, SystemExit, GeneratorExit):
        pass
    for undo in tracer.undo:
        undo()
    for fd in tracer.descriptors:
        os.close(fd)
    return tracer.failed


def _path(trail: list[Any], what: str) -> tuple[str, Any]:
    if not trail:
        return "", None
    path, at, culprit = _SOURCES.get(what, what), 0, trail[0]
    if what == "call":
        if len(trail) < 3:
            return path, None
        path, at, culprit = ("args" if trail[1] is trail[0][0] else "kwargs"), 1, trail[1]
    elif what == "function":
        path = getattr(trail[0], "__qualname__", None) or path
    while at < len(trail) - 1:
        for later in range(at + 1, len(trail)):
            step = _step(trail[at], trail[later])
            if step is not None:
                path, at, culprit = path + step, later, trail[later]
                break
        else:
            break
    return path, culprit


def _step(parent: Any, child: Any) -> str | None:
    """How `parent` holds `child`, as Python would write it; None if it does not."""
    if isinstance(parent, (list, tuple)):
        for index, value in enumerate(tuple.__iter__(parent) if isinstance(parent, tuple) else list.__iter__(parent)):
            if value is child:
                return f"[{index}]"
    elif isinstance(parent, dict):
        for key, value in dict.items(parent):
            if value is child:
                return f"[{_key(key)}]"
            if key is child:
                return f" (key {_kind(key)})"
    elif isinstance(parent, (set, frozenset)):
        return " (member)" if any(value is child for value in set(parent)) else None
    if isinstance(parent, types.FunctionType):
        return _function_step(parent, child)
    if isinstance(parent, types.MethodType):
        return ".__self__" if parent.__self__ is child else ".__func__" if parent.__func__ is child else None
    if isinstance(parent, functools.partial):
        if parent.func is child:
            return ".func"
        for name in ("args", "keywords"):
            step = _step(getattr(parent, name), child)
            if step:
                return f".{name}{step}"
    if isinstance(parent, type):
        return _named(vars(parent), child)
    try:
        held = object.__getattribute__(parent, "__dict__")
    except Exception:
        held = {}
    return _named(held, child) or _slot(parent, child)


def _key(key: Any) -> str:
    return repr(key) if type(key) in (str, int, float, bool, bytes, type(None)) else f"<{_kind(key)}>"


def _named(held: Any, child: Any) -> str | None:
    for name, value in list(held.items()):
        if value is child:
            return f".{name}"
    return None


def _slot(parent: Any, child: Any) -> str | None:
    for cls in type(parent).__mro__:
        for name, descriptor in vars(cls).items():
            if type(descriptor) is types.MemberDescriptorType:
                try:
                    value = descriptor.__get__(parent)
                except Exception:
                    continue
                if value is child:
                    return f".{name}"
    return None


def _function_step(fn: types.FunctionType, child: Any) -> str | None:
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or ()):
        try:
            if cell.cell_contents is child:
                return f".__closure__[{name!r}]"
        except ValueError:
            continue
    for name in ("__defaults__", "__kwdefaults__"):
        step = _step(getattr(fn, name) or (), child)
        if step:
            return f".{name}{step}"
    for name in fn.__code__.co_names:
        if fn.__globals__.get(name) is child:
            return f".__globals__[{name!r}]"
    return _named(fn.__dict__, child) or next(
        (f".__globals__[{name!r}]" for name, value in list(fn.__globals__.items()) if value is child), None
    )
