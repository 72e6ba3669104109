"""The types that programs make with ctypes, by value: structures, unions, arrays, pointers. Loaded when one is sent."""

from __future__ import annotations

import ctypes
import sys
from _ctypes import CFuncPtr

from ._classes import _NEVER
from ._fast import PicklingError
from ._identity import adopt, find, is_own, token_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_Field: Any = type(type("", (ctypes.Structure,), {"_fields_": [("x", ctypes.c_int)]}).x)  # type: ignore[attr-defined]
_NATIVE, _SWAPPED = ("__ctype_le__", "__ctype_be__") if sys.byteorder == "little" else ("__ctype_be__", "__ctype_le__")
_OMITTED = _NEVER | {_NATIVE, _SWAPPED}
_LAYOUT = frozenset(["_align_", "_anonymous_", "_layout_", "_pack_", "_type_"])  # what counts before there are fields


def reduce_type(cls: Any) -> Any:
    """How a type of ctypes travels that cannot be imported."""
    if issubclass(cls, ctypes.Array) and ctypes.Array in cls.__bases__:
        return make_array, (cls._type_, cls._length_)
    if issubclass(cls, ctypes._Pointer) and ctypes._Pointer in cls.__bases__:
        return ctypes.POINTER, (cls._type_,)
    if vars(cls).get(_SWAPPED) is cls:
        return getattr, (getattr(cls, _NATIVE), _SWAPPED)
    if issubclass(cls, CFuncPtr):
        raise PicklingError(f"the function type {cls.__qualname__} of ctypes cannot travel by value: put it into a module")
    attributes = {
        key: value
        for key, value in vars(cls).items()
        if key not in _OMITTED and not isinstance(value, _Field) and getattr(value, "__objclass__", None) is not cls
    }
    skeleton = {key: attributes.pop(key) for key in _LAYOUT & attributes.keys()}
    skeleton.update(__module__=cls.__module__, __qualname__=cls.__qualname__)
    args = (token_of(cls), cls.__name__, cls.__bases__, skeleton)
    return make_type, args, attributes, None, None, fill_type


def make_array(kind: Any, length: int) -> Any:
    return kind * length


def make_type(token: str, name: str, bases: tuple[Any, ...], skeleton: dict[str, Any]) -> Any:
    known = find(token)
    return adopt(type(bases[0])(name, bases, skeleton), token) if known is None else known


def fill_type(cls: Any, attributes: dict[str, Any]) -> None:
    """Set the attributes, once: the layout of a type that has fields is final."""
    if not is_own(cls) and not attributes.keys() <= vars(cls).keys():
        for key, value in attributes.items():
            setattr(cls, key, value)


def reduce_instance(obj: Any) -> Any:
    """What keeps an object's memory says how it travels, if it is shared; otherwise as ctypes does, by value."""
    reduce = getattr(getattr(obj, "_wrapper", None), "reduce_ctype", None)
    return NotImplemented if reduce is None else reduce(obj)
