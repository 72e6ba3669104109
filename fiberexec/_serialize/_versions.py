"""Modules edited and reloaded between calls: a task function carries digests of the user's code that it
reaches, by module.

A worker that loaded another version of one of those modules reloads it once, if its file changed since. The
standard library and installed packages are taken as they are.
"""

from __future__ import annotations

import functools
import os
import sys
import time
import types
import weakref

from ._byname import by_name, module_by_name
from ._fast import PLAIN
from ._functions import references

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

Versions = tuple[
    tuple[str, tuple[str, ...], str], ...
]  # module, qualified names, digest; what is imported first, first

_BEGAN = time.time()
_MOST = 2000  # functions and classes looked at for one task function
_STDLIB = os.path.dirname(os.path.realpath(os.__file__)) + os.sep
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")

_user_modules: dict[str, tuple[Any, bool]] = {}
_tried: set[tuple[str, str]] = set()
# what the modules' files were when they were loaded; None: not known
_stamps: dict[str, tuple[int, int] | None] = {}
_PYTHON = repr(sys.version_info[:2])


def user_module(name: Any) -> types.ModuleType | None:
    """The importable module `name` if its file is the user's own."""
    if type(name) is not str:
        return None
    module = module_by_name(name)
    if module is None:
        return None
    file = getattr(module, "__file__", None)
    known = _user_modules.get(name)
    if known is None or known[0] != file:
        real = os.path.realpath(file) if type(file) is str else ""
        own = real.endswith(".py") and not real.startswith(_STDLIB) and not any(part in real for part in _INSTALLED)
        known = _user_modules[name] = (file, own and not name.startswith("fiberexec."))
    return module if known[1] else None


def versions_of(root: Any) -> tuple[Versions, list[types.ModuleType]]:
    """What `root` reaches of the user's modules, and the modules themselves."""
    reached: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    waiting = [root]
    while waiting and len(seen) < _MOST:
        obj = waiting.pop()
        if id(obj) in seen:
            continue
        seen.add(id(obj))
        if isinstance(obj, (types.FunctionType, type)):
            module = user_module(obj.__module__)
            if module is not None and by_name(obj, obj.__module__, obj.__qualname__):
                names = reached.setdefault(obj.__module__, {})
                names[obj.__qualname__] = obj
            elif isinstance(obj, type) and module is None and module_by_name(obj.__module__) is not None:
                continue  # the standard library's
        waiting.extend(_leads(obj))
    modules = [sys.modules[name] for name in reversed(reached)]
    return tuple((name, tuple(sorted(reached[name])), _digest(reached[name])) for name in reversed(reached)), modules


def _leads(obj: Any) -> list[Any]:
    """The functions, classes and user modules' members that `obj` may use."""
    if isinstance(obj, functools.partial):
        return [obj.func]
    if isinstance(obj, types.MethodType):
        return [obj.__func__, type(obj.__self__)]
    if isinstance(obj, type):
        return [*obj.__bases__, *map(_unwrap, list(vars(obj).values()))] if _is_user_class(obj) else []
    if not isinstance(obj, types.FunctionType):
        return [type(obj)] if _is_user_class(type(obj)) else []
    if user_module(obj.__module__) is None and module_by_name(obj.__module__) is not None:
        return []
    globals_, every = references(obj.__code__)
    found = [obj.__globals__[name] for name in globals_ if name in obj.__globals__]
    for module in [value for value in found if isinstance(value, types.ModuleType)]:
        if user_module(module.__name__) is module:
            found.extend(value for name, value in list(vars(module).items()) if name in every)
    for cell in obj.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:
            continue
    return [
        value for value in found if isinstance(value, (types.FunctionType, type, functools.partial, types.MethodType))
    ]


def _is_user_class(cls: type) -> bool:
    return user_module(cls.__module__) is not None or module_by_name(cls.__module__) is None


def _unwrap(value: Any) -> Any:
    if isinstance(value, property):
        return value.fget
    return getattr(value, "__func__", value) if isinstance(value, (classmethod, staticmethod)) else value


def _digest(named: dict[str, Any]) -> str:
    import hashlib

    digest = hashlib.blake2b(_PYTHON.encode(), digest_size=8)
    for name in sorted(named):
        digest.update(f"{name}={_describe(named[name], 0)};".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _describe(obj: Any, depth: int) -> str:
    """Text that is equal in two processes which loaded the same source."""
    if depth > 20:
        return "..."
    if isinstance(obj, types.CodeType):
        consts = ",".join(_describe(const, depth + 1) for const in obj.co_consts)
        return f"{obj.co_name}:{obj.co_code.hex()}:{obj.co_names}:{obj.co_varnames}:[{consts}]"
    if isinstance(obj, types.FunctionType):
        parts = [_describe(obj.__code__, depth + 1), _describe(obj.__defaults__, depth + 1)]
        for name in references(obj.__code__)[0]:
            value = obj.__globals__.get(name)
            if type(value) in PLAIN:
                parts.append(f"{name}={value!r}")
        for cell in obj.__closure__ or ():
            try:
                if isinstance(cell.cell_contents, types.FunctionType):
                    parts.append(_describe(cell.cell_contents.__code__, depth + 1))
            except ValueError:
                continue
        return "|".join(parts)
    if isinstance(obj, type):
        members = {name: _unwrap(value) for name, value in vars(obj).items()}
        return "|".join(
            f"{name}:{_describe(members[name], depth + 1)}"
            for name in sorted(members)
            if isinstance(members[name], types.FunctionType) or (type(members[name]) in PLAIN and name[:2] != "__")
        )
    if type(obj) in (tuple, frozenset):
        parts = [_describe(part, depth + 1) for part in obj]
        return f"{type(obj).__name__}({','.join(parts if type(obj) is tuple else sorted(parts))})"
    return repr(obj) if type(obj) in PLAIN else type(obj).__name__


# -- the two ends --------------------------------------------------------------------------------------------


class Versioned:
    """A task function on its way: the modules are brought up to date before any name in it is looked up."""

    def __init__(self, versions: Versions, fn: Any) -> None:
        self.versions = versions
        self.fn = fn

    def __reduce__(self) -> Any:
        return second, (_Refresh(self.versions), self.fn)


class _Refresh:
    def __init__(self, versions: Versions) -> None:
        self.versions = versions

    def __reduce__(self) -> Any:
        return refresh, self.versions


def second(_: Any, fn: Any) -> Any:
    return fn


def refresh(*versions: tuple[str, tuple[str, ...], str]) -> None:
    """Reload those of this process's modules that differ from the sender's and whose file changed since."""
    reloaded = False
    for name, qualnames, wanted in versions:
        loaded = name in sys.modules
        if not loaded:
            __import__(name)  # it would be now in any case; so the file is known that it came from
        module = sys.modules[name]
        stamp = _stamp(module)
        known = _stamps.setdefault(name, None if loaded and _is_new(stamp) else stamp)
        if not loaded or getattr(module, "__spec__", None) is None:
            continue
        if not reloaded and (known == stamp or _digest_here(module, qualnames) == wanted):
            continue
        if (name, wanted) in _tried:
            continue
        _tried.add((name, wanted))
        import importlib

        importlib.invalidate_caches()
        importlib.reload(module)
        _stamps[name] = stamp
        reloaded = True


def _digest_here(module: types.ModuleType, qualnames: tuple[str, ...]) -> str:
    found = {}
    for qualname in qualnames:
        obj: Any = module
        for part in qualname.split("."):
            obj = getattr(obj, part, None)
        found[qualname] = obj
    return _digest(found)


def _stamp(module: types.ModuleType) -> tuple[int, int] | None:
    try:
        stat = os.stat(str(module.__file__))
    except (AttributeError, OSError):
        return None
    return stat.st_mtime_ns, stat.st_size


def _is_new(stamp: tuple[int, int] | None) -> bool:
    """Whether a file may have changed after this process loaded it, as far as its time says."""
    return stamp is not None and stamp[0] > (_BEGAN - 2) * 1e9  # some file systems keep two seconds


_cache: dict[int, tuple[weakref.ref[Any], list[tuple[Any, Any]], Versions]] = {}


def cached_versions(fn: Any) -> tuple[Versions, list[tuple[Any, Any]]]:
    """`versions_of`, once per function object and load of the modules; and the modules' specs, which a
    reload replaces."""
    while isinstance(fn, (functools.partial, types.MethodType)):  # made anew for each call, as a rule
        fn = fn.func if isinstance(fn, functools.partial) else fn.__func__
    if not isinstance(fn, (types.FunctionType, type)):
        fn = type(fn)
    key = id(fn)
    known = _cache.get(key)
    if known is not None and known[0]() is fn and all(mod.__dict__.get("__spec__") is spec for mod, spec in known[1]):
        return known[2], known[1]
    versions, modules = versions_of(fn)
    specs = [(module, module.__spec__) for module in modules]
    try:
        _cache[key] = (weakref.ref(fn, lambda _: _cache.pop(key, None)), specs, versions)
    except TypeError:
        pass
    return versions, specs
