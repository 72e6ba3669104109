"""What can be imported by name, and so travels as a name.

A name is good if a fresh process would find the same: its module is not `__main__`, the import system finds
the module again where it came from, and the attribute path leads to the same object here.
"""

from __future__ import annotations

import os
import sys
import weakref
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_known: dict[str, tuple[weakref.ref[ModuleType], bool]] = {}
_MAINS = frozenset(["__main__", "__mp_main__"])


def module_by_name(name: str | None) -> ModuleType | None:
    """The loaded module `name`, if another process can import the same; else None."""
    if name is None:
        return None
    module = sys.modules.get(name)
    known = _known.get(name)
    if known is not None and known[0]() is module:
        return module if known[1] else None
    if type(module) is not ModuleType and not isinstance(module, ModuleType):
        return None
    good = name not in _MAINS and _findable(name, module)
    try:
        _known[name] = (weakref.ref(module), good)
    except TypeError:
        pass  # a subclass of ModuleType without weak references: asked anew each time
    return module if good else None


def _findable(name: str, module: ModuleType) -> bool:
    spec = getattr(module, "__spec__", None)
    if spec is None:
        return False
    origin = getattr(spec, "origin", None)
    if origin in ("built-in", "frozen") or name in sys.builtin_module_names:
        return True
    parent, _, _ = name.rpartition(".")
    path: Any = None
    if parent:
        package = module_by_name(parent)
        if package is None:
            return False
        path = getattr(package, "__path__", None)
        if path is None:
            return True  # made by its parent as it loads (os.path): importing the parent gives it
    for finder in sys.meta_path:
        try:
            found = finder.find_spec(name, path)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            continue
        if found is not None:
            return origin is None or found.origin == origin or _same_file(found.origin, origin)
    return parent != "" and getattr(sys.modules[parent], "__spec__", None) is not None and origin is None


def _same_file(one: str | None, other: str) -> bool:
    return one is not None and os.path.realpath(one) == os.path.realpath(other)


def by_name(obj: Any, module_name: str | None, qualname: str) -> bool:
    """Whether ``module_name.qualname`` is `obj` in every process that imports the module."""
    module = module_by_name(module_name)
    if module is None:
        return False
    if "." not in qualname:
        return module.__dict__.get(qualname) is obj or getattr(module, qualname, None) is obj
    found: Any = module
    for part in qualname.split("."):
        if part == "<locals>":
            return False
        try:
            found = getattr(found, part)
        except AttributeError:
            return False
    return found is obj


def home_of(namespace: dict[str, Any]) -> str | None:
    """The name of the importable module whose globals are `namespace`, or None."""
    name = namespace.get("__name__")
    if type(name) is not str:
        return None
    module = module_by_name(name)
    return name if module is not None and module.__dict__ is namespace else None
