"""Classes by value, in two steps like functions: a skeleton under a token of its own, then its attributes.

The hooks of the class statement (a metaclass's `__new__`, `__init_subclass__`, `__set_name__`) ran where
the class was defined; what they made is among the attributes, so they do not run again.
"""

from __future__ import annotations

import os
import pickle
import sys
import types
import weakref
from _thread import RLock

from ._byname import by_name
from ._fast import PLAIN, PROTOCOL
from ._identity import adopt, find, is_own, token_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HEAP, _IMMUTABLE = 1 << 9, 1 << 8
_NEVER = frozenset(
    [
        "__dict__",
        "__weakref__",
        "__module__",
        "__qualname__",
        "__slots__",
        "_abc_impl",
        "__annotations_cache__",
    ]
)
_C_MADE = (types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType)

# class -> (what its attributes were, the name for that state): by id, cleared as the class goes
_revisions: dict[int, tuple[weakref.ref[type], dict[str, Any], str]] = {}
_lock = RLock()  # guards it; a finalizer may pickle while it is held


def reduce_class(pickler: Any, cls: type) -> Any:
    """How the class `cls` travels: NotImplemented if by name."""
    name, module = cls.__qualname__, cls.__module__
    if by_name(cls, module, name):
        return NotImplemented
    if not cls.__flags__ & _HEAP or cls.__flags__ & _IMMUTABLE or _made_in_c(cls):
        for alias, value in vars(types).items():
            if value is cls:
                return getattr, (types, alias)
        return NotImplemented
    if any(base.__module__ == "_ctypes" for base in type.mro(type(cls))):
        from ._ctypes import reduce_type

        return reduce_type(cls)
    enum = sys.modules.get("enum")
    if enum is not None and isinstance(cls, enum.EnumMeta):
        from ._enums import reduce_enum

        return reduce_enum(cls)
    skeleton = {"__module__": module, "__qualname__": name}
    if "__slots__" in cls.__dict__:
        skeleton["__slots__"] = _slots(cls)
    args = (token_of(cls), type(cls), cls.__name__, cls.__bases__, skeleton)
    return make_class, args, class_state(cls), None, None, fill_class


def _made_in_c(cls: type) -> bool:
    return any(
        isinstance(value, _C_MADE) and getattr(value, "__objclass__", None) is cls for value in vars(cls).values()
    )


def _slots(cls: type) -> Any:
    slots = cls.__dict__["__slots__"]
    if isinstance(slots, (str, tuple, list, dict)):
        return slots
    return tuple(  # an iterator, used up by the class statement
        key
        for key, value in vars(cls).items()
        if type(value) in (types.MemberDescriptorType, types.GetSetDescriptorType)
    )


def attributes(cls: type) -> dict[str, Any]:
    """What `cls` itself holds and a skeleton does not."""
    found = {}
    for key, value in cls.__dict__.items():
        kind = type(value)
        if key in _NEVER or kind is types.MemberDescriptorType or kind is types.GetSetDescriptorType:
            if key in _NEVER or getattr(value, "__objclass__", None) is cls:
                continue
        found[key] = value
    if "_abc_impl" in cls.__dict__:
        found.pop("__abstractmethods__", None)
    return found


def class_state(cls: type) -> tuple[str, dict[str, Any], list[type] | None]:
    """The revision, the attributes and, of an ABC, the registered virtual subclasses."""
    registered = None
    if "_abc_impl" in cls.__dict__:
        from _abc import _get_dump  # type: ignore[import-not-found]

        registered = [one for one in (ref() for ref in _get_dump(cls)[0]) if one is not None]
    return revision_of(cls), attributes(cls), registered


# -- revisions: attributes are applied when the class changed, not with every instance that arrives ----------


def revision_of(cls: type) -> str:
    """A name for the present attributes of `cls`; a new one after any change, in a list or dictionary too."""
    pins = _pins(cls)
    with _lock:
        known = _revisions.get(id(cls))
        if known is not None and known[0]() is cls and known[1] == pins:
            return known[2]
        revision = os.urandom(8).hex()
        _set_revision(cls, pins, revision)
        return revision


def _set_revision(cls: type, pins: dict[str, Any], revision: str) -> None:
    key = id(cls)
    _revisions[key] = (weakref.ref(cls, lambda _: _revisions.pop(key, None)), pins, revision)


def _pins(cls: type) -> dict[str, Any]:
    return {
        key: id(value) if key.startswith("__dataclass_") else _pin(value)  # those never change, and pickle slowly
        for key, value in attributes(cls).items()
    }


def _pin(value: Any) -> Any:
    """Something that stays equal as long as `value` is unchanged, and keeps no function or class alive."""
    kind = type(value)
    if kind in PLAIN:
        return kind, value
    if kind is types.FunctionType:
        return weakref.ref(value), weakref.ref(value.__code__)
    if isinstance(value, type):
        return _Ref(value)
    if kind is classmethod or kind is staticmethod:
        return kind, _pin(value.__func__)
    if kind is property:
        return kind, _pin(value.fget), _pin(value.fset), _pin(value.fdel)
    if kind.__module__ not in ("dataclasses", "typing"):
        try:  # it may be changed in place; classes and functions in it count by their names
            return pickle.dumps(value, PROTOCOL)
        except KeyboardInterrupt:
            raise
        except BaseException:
            pass
    return kind, id(value)


class _Ref:
    """A weak reference that compares by identity, whatever the metaclass says."""

    __slots__ = ("ref",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, target: Any) -> None:
        self.ref = weakref.ref(target)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Ref) and self.ref() is not None and self.ref() is other.ref()


# -- receiving -----------------------------------------------------------------------------------------------


def make_class(token: str, meta: type, name: str, bases: tuple[type, ...], skeleton: dict[str, Any]) -> Any:
    known = find(token)
    if known is not None:
        return known
    if any("__init_subclass__" in vars(base) for one in bases for base in one.__mro__ if base is not object):
        try:
            cls: Any = type.__new__(meta, name, (_silencer(bases), *bases), dict(skeleton))
            cls.__bases__ = bases
            return adopt(cls, token)
        except TypeError:
            pass  # a layout that does not allow it: then the hooks do run, on the skeleton
    return adopt(type.__new__(meta, name, bases, dict(skeleton)), token)


def _silencer(bases: tuple[type, ...]) -> type:
    """A first base whose `__init_subclass__` does nothing, laid out so that it can be taken away again."""
    slots: dict[str, Any] = {} if any(base.__dictoffset__ for base in bases) else {"__slots__": ()}
    return type("_Silencer", (), {"__init_subclass__": classmethod(lambda cls, **_: None), **slots})


def fill_class(cls: type, state: tuple[str, dict[str, Any], list[type] | None]) -> None:
    revision, attrs, registered = state
    if is_own(cls):
        return
    known = _revisions.get(id(cls))
    if known is not None and known[0]() is cls and known[2] == revision:
        return
    for key in attributes(cls).keys() - attrs.keys() - {"__doc__", "__abstractmethods__"}:
        type.__delattr__(cls, key)
    for key, value in attrs.items():
        type.__setattr__(cls, key, value)
    if registered is not None:
        from _abc import _abc_init, _abc_register

        _abc_init(cls)
        for one in registered:
            _abc_register(cls, one)
    _set_revision(cls, _pins(cls), revision)
