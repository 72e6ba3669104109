"""Enum classes by value: members are rebuilt from their values, without the class's own `__new__` and
`__init__`."""

from __future__ import annotations

import enum

from ._classes import _NEVER, class_state
from ._identity import adopt, find, is_own, token_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PLAIN_BASES = (int, float, str, bytes, tuple, complex, bytearray)
_KEPT = frozenset(["_generate_next_value_", "_missing_", "_ignore_", "_new_member_", "_use_args_", "_numeric_repr_"])


class _Member:
    """Carries a member through the class statement of the rebuilt Enum."""

    def __init__(self, value: Any, base_args: tuple[Any, ...]) -> None:
        self.value = value
        self.base_args = base_args


def reduce_member(member: Any) -> Any:
    """A named member travels as its class and name, any other (a combined flag) as Enum pickles it."""
    cls = type(member)
    name = getattr(member, "_name_", None)
    if type(name) is str and cls._member_map_.get(name) is member:
        return load_member, (cls, name)
    if isinstance(member, enum.Flag):
        return cls, (member._value_,)
    return NotImplemented


def load_member(cls: Any, name: str) -> Any:
    try:
        return cls._member_map_[name]
    except KeyError:
        raise AttributeError(f"{cls.__qualname__} has no member {name}") from None


def reduce_enum(cls: Any) -> Any:
    base = cls._member_type_
    members = []
    for name, member in cls._member_map_.items():
        value = member._value_
        args: tuple[Any, ...] = ()
        for plain in _PLAIN_BASES:
            if issubclass(base, plain):
                # the plain part of the member itself: __new__ may have made it from something else
                args = (plain.__str__(member),) if plain is str else (plain(member),)
                break
        else:
            if base is not object:
                args = value if type(value) is tuple else (value,)
        members.append((name, value, args))
    boundary = getattr(cls, "_boundary_", None)
    args = (
        token_of(cls),
        type(cls),
        cls.__name__,
        cls.__bases__,
        cls.__module__,
        cls.__qualname__,
        members,
        None if boundary is None else boundary.name,
    )
    _, attrs, _ = class_state(cls)
    kept = {key: value for key, value in attrs.items() if _travels(cls, key)}
    state = kept, {name: dict(vars(member)) for name, member in cls._member_map_.items()}
    return make_enum, args, state, None, None, fill_enum


def _travels(cls: Any, key: str) -> bool:
    if key in cls._member_map_ or key in _NEVER or key == "__new__":
        return False
    sunder = key.startswith("_") and key.endswith("_") and not key.startswith("__")
    return not sunder or key in _KEPT


def make_enum(
    token: str,
    meta: Any,
    name: str,
    bases: tuple[type, ...],
    module: str,
    qualname: str,
    members: list[tuple[str, Any, tuple[Any, ...]]],
    boundary: str | None,
) -> Any:
    known = find(token)
    if known is not None:
        return known

    def __new__(cls: Any, carried: Any) -> Any:
        base = cls._member_type_
        if not isinstance(carried, _Member):
            carried = _Member(carried, () if base is object else (carried,))
        args = () if base.__new__ is object.__new__ else carried.base_args
        member = base.__new__(cls, *args)
        member._value_ = carried.value
        return member

    space = enum.EnumMeta.__prepare__(name, bases)
    space["__module__"] = module
    space["__qualname__"] = qualname
    if members:
        space["__new__"] = __new__
        space["__init__"] = lambda self, *args: None
    for member, value, base_args in members:
        space[member] = _Member(value, base_args)
    options: dict[str, Any] = {} if boundary is None else {"boundary": vars(enum)["FlagBoundary"][boundary]}
    return adopt(enum.EnumMeta.__new__(meta, name, bases, space, **options), token)


def fill_enum(cls: Any, state: tuple[dict[str, Any], dict[str, dict[str, Any]]]) -> None:
    attrs, members = state
    if is_own(cls):
        return
    for key in ("__init__", "__new_member__"):
        if members and key in cls.__dict__ and key not in attrs:
            type.__delattr__(cls, key)
    for key, value in attrs.items():
        type.__setattr__(cls, key, value)
    for name, own in members.items():
        vars(cls._member_map_[name]).update(own)
