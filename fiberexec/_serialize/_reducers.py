"""How each kind of value travels that pickle alone refuses, sends by a name that means nothing elsewhere,
or copies."""

from __future__ import annotations

import functools
import pickle
import sys
import types
import weakref
from collections.abc import Callable

from ._byname import by_name, module_by_name
from ._classes import reduce_class
from ._fast import PROTOCOL
from ._functions import reduce_cell, reduce_code, reduce_function
from ._identity import adopt, find, is_own, token_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

IN_BAND_ARRAY = 16 * 1024


# -- Python's own kinds --------------------------------------------------------------------------------------


def _reduce_method(pickler: Any, method: types.MethodType) -> Any:
    fn, owner = method.__func__, method.__self__
    name: Any = getattr(fn, "__name__", None)
    for cls in owner.__mro__ if isinstance(owner, type) else type(owner).__mro__:
        held = cls.__dict__.get(name)
        if held is not None:
            if held is fn or getattr(held, "__func__", None) is fn:
                return NotImplemented  # getattr(owner, name) gives it again
            break
    return types.MethodType, (fn, owner)


def _reduce_module(pickler: Any, module: types.ModuleType) -> Any:
    name = module.__name__
    if module_by_name(name) is module or (sys.modules.get(name) is module and name == "__main__"):
        return import_module, (name,)
    spec = getattr(module, "__spec__", None)
    if spec is not None and sys.modules.get(name) is module:
        # found by a loader that a worker may have too: its own message is the better one if not
        return import_module, (name,)
    space = {key: value for key, value in vars(module).items() if key not in _MODULE_OWN}
    return make_module, (name, module.__doc__, token_of(module)), space, None, None, fill_module


_MODULE_OWN = frozenset(["__builtins__", "__loader__", "__spec__", "__name__", "__doc__"])


def import_module(name: str) -> types.ModuleType:
    __import__(name)
    return sys.modules[name]


def make_module(name: str, doc: str | None, token: str) -> Any:
    known = find(token)
    return adopt(types.ModuleType(name, doc), token) if known is None else known


def fill_module(module: types.ModuleType, space: dict[str, Any]) -> None:
    if not is_own(module):
        vars(module).update(space)


def _reduce_wrapped(pickler: Any, obj: Any) -> Any:
    return type(obj), (obj.__func__,)


def _reduce_property(pickler: Any, obj: property) -> Any:
    return property, (obj.fget, obj.fset, obj.fdel, obj.__doc__)


def _reduce_cached_property(pickler: Any, obj: Any) -> Any:
    state = {key: value for key, value in vars(obj).items() if key != "lock"}
    return make_cached_property, (), state, None, None, _fill_dict


def make_cached_property() -> Any:
    return functools.cached_property(_nothing)


def _nothing(self: Any) -> None:
    """Stands in for the function of a cached property until it is filled."""


def _fill_dict(obj: Any, state: dict[str, Any]) -> None:
    vars(obj).update(state)


def _reduce_lru_cache(pickler: Any, obj: Any) -> Any:
    if by_name(obj, getattr(obj, "__module__", None), getattr(obj, "__qualname__", "")):
        return NotImplemented
    return make_lru_cache, (obj.__wrapped__, obj.cache_parameters())


def make_lru_cache(fn: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(fn)


def _reduce_weakref(pickler: Any, obj: Any) -> Any:
    return make_weakref, (obj(),)


def make_weakref(target: Any) -> Any:
    return weakref.ref(_Gone() if target is None else target)


class _Gone:
    """The target of a weak reference that was dead when it was sent."""


def _reduce_mapping_proxy(pickler: Any, obj: Any) -> Any:
    return types.MappingProxyType, (dict(obj),)


def _reduce_memoryview(pickler: Any, view: memoryview) -> Any:
    if not view.c_contiguous:
        return make_view, (bytearray(view.tobytes()), view.format, view.shape, view.readonly)
    return make_view, (pickle.PickleBuffer(view), view.format, view.shape, view.readonly)


def make_view(data: Any, format: str, shape: tuple[int, ...], readonly: bool) -> memoryview:
    view = memoryview(data).cast("B")
    if format != "B" or len(shape) != 1:
        view = view.cast(format, shape)  # type: ignore[call-overload]
    return view.toreadonly() if readonly else view


def _reduce_type_alias(kind: str) -> Callable[[Any, Any], Any]:
    def reduce(pickler: Any, obj: Any) -> Any:
        if by_name(obj, getattr(obj, "__module__", None), obj.__name__):
            return NotImplemented
        if kind == "TypeAliasType":
            return make_type_alias, (obj.__name__, obj.__value__, obj.__type_params__)
        if kind == "NewType":
            return make_new_type, (token_of(obj), obj.__module__, obj.__qualname__, obj.__supertype__)
        options = {
            key: getattr(obj, f"__{key}__")
            for key in ("bound", "covariant", "contravariant", "infer_variance")
            if kind != "TypeVarTuple" and getattr(obj, f"__{key}__", None)
        }
        return make_type_var, (
            token_of(obj),
            kind,
            obj.__module__,
            obj.__name__,
            getattr(obj, "__constraints__", ()),
            options,
        )

    return reduce


def make_type_var(
    token: str,
    kind: str,
    module: str | None,
    name: str,
    constraints: tuple[Any, ...],
    options: dict[str, Any],
) -> Any:
    known = find(token)
    if known is not None:
        return known
    import typing

    made = getattr(typing, kind)(name, *constraints, **options)
    made.__module__ = module
    return adopt(made, token)


def make_type_alias(name: str, value: Any, parameters: tuple[Any, ...]) -> Any:
    import typing

    alias: Any = vars(typing)["TypeAliasType"]
    return alias(name, value, type_params=parameters)


def make_new_type(token: str, module: str, qualname: str, supertype: Any) -> Any:
    known = find(token)
    if known is not None:
        return known
    import typing

    new_type: Any = typing.NewType
    made = new_type(qualname, supertype)
    made.__module__ = module
    return adopt(made, token)


_TYPING = frozenset(["TypeVar", "ParamSpec", "TypeVarTuple", "NewType", "TypeAliasType"])
DATACLASS_MARKS = frozenset(["_MISSING_TYPE", "_FIELD_BASE", "_HAS_DEFAULT_FACTORY_CLASS", "_KW_ONLY_TYPE"])


def _reduce_dataclass_mark(pickler: Any, obj: Any) -> Any:
    """dataclasses compares its marks by identity: they travel by name."""
    for name, value in vars(sys.modules["dataclasses"]).items():
        if value is obj:
            return name
    return NotImplemented


# -- numpy ---------------------------------------------------------------------------------------------------


class _Unlocked:
    """Reduces a read-only buffer so that a writable one arrives."""

    __slots__ = ("buffer",)

    def __init__(self, buffer: pickle.PickleBuffer) -> None:
        self.buffer = buffer

    def __reduce__(self) -> Any:
        return unlock, (self.buffer,)


def unlock(view: Any) -> Any:
    """The writable buffer behind a read-only view of one that arrived; of bytes, a copy."""
    owner = view.obj if type(view) is memoryview else view
    return owner if type(owner) is bytearray else bytearray(view)


def _reduce_array(pickler: Any, array: Any) -> Any:
    if array.nbytes < IN_BAND_ARRAY or array.dtype.hasobject:
        if array.flags.writeable or array.dtype.hasobject:
            return NotImplemented
    elif not array.flags.forc:
        array = array.copy("K")
        if not array.flags.forc:
            array = array.copy("C")
    reduced = array.__reduce_ex__(PROTOCOL)
    if array.flags.writeable:
        return reduced
    make, args = reduced[0], reduced[1]
    if args and type(args[0]) is pickle.PickleBuffer:
        return (make, (_Unlocked(args[0]), *args[1:]), *reduced[2:])
    return reduced


# -- by kind -------------------------------------------------------------------------------------------------

REDUCERS: dict[type, Callable[[Any, Any], Any]] = {
    types.FunctionType: reduce_function,
    type: reduce_class,
    types.CellType: reduce_cell,
    types.CodeType: reduce_code,
    types.MethodType: _reduce_method,
    types.ModuleType: _reduce_module,
    types.MappingProxyType: _reduce_mapping_proxy,
    classmethod: _reduce_wrapped,
    staticmethod: _reduce_wrapped,
    property: _reduce_property,
    functools.cached_property: _reduce_cached_property,
    functools._lru_cache_wrapper: _reduce_lru_cache,
    weakref.ref: _reduce_weakref,
    memoryview: _reduce_memoryview,
}


def reduce_other(pickler: Any, obj: Any) -> Any:
    """For what `REDUCERS` does not list and is no ordinary instance: classes of a metaclass, instances of
    one's class."""
    kind = type(obj)
    if issubclass(kind, type):
        return reduce_class(pickler, obj)
    enum = sys.modules.get("enum")
    if enum is not None and isinstance(obj, enum.Enum) and kind.__reduce_ex__ is enum.Enum.__reduce_ex__:
        from ._enums import reduce_member

        return reduce_member(obj)
    ctypes = sys.modules.get("_ctypes")
    if ctypes is not None and isinstance(obj, ctypes._SimpleCData.__base__):
        from ._ctypes import reduce_instance

        return reduce_instance(obj)
    return NotImplemented


def learn(kind: type) -> bool:
    """Add the reducer for a kind that belongs to a module not loaded until something of it is sent."""
    module, name = kind.__module__, kind.__name__
    if module == "numpy" and name == "ndarray":
        REDUCERS[kind] = _reduce_array
    elif module == "typing" and name in _TYPING:
        REDUCERS[kind] = _reduce_type_alias(name)
    elif module == "dataclasses" and name in DATACLASS_MARKS:
        REDUCERS[kind] = _reduce_dataclass_mark
    else:
        return False
    return True
