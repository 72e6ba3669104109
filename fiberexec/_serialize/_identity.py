"""Identity across processes, for what travels by value: the process that defines a class mints a token for
it, and every process keeps token and object both ways. What comes back is the very object that left.
"""

from __future__ import annotations

import os
import weakref
from _thread import RLock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_tokens: dict[int, tuple[weakref.ref[Any], str, bool]] = {}  # id -> (object, token, whether minted here)
_objects: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_lock = RLock()  # guards both; a finalizer may pickle while it is held


def _record(obj: Any, token: str, own: bool) -> None:
    key = id(obj)
    _tokens[key] = (weakref.ref(obj, lambda _: _tokens.pop(key, None)), token, own)
    _objects[token] = obj


def token_of(obj: Any) -> str:
    """The token of `obj`, minted now if it has none."""
    with _lock:
        known = _tokens.get(id(obj))
        if known is not None and known[0]() is obj:
            return known[1]
        token = os.urandom(12).hex()
        _record(obj, token, True)
        return token


def find(token: str) -> Any:
    """The object of this process that `token` names, or None."""
    return _objects.get(token)


def adopt(obj: Any, token: str) -> Any:
    """Name `obj`, made from what another process sent; gives the object that has the name already, if one
    has."""
    with _lock:
        known = _objects.get(token)
        if known is not None:
            return known
        _record(obj, token, False)
        return obj


def is_own(obj: Any) -> bool:
    """Whether this process defined `obj`, so that what others send about it is no news."""
    known = _tokens.get(id(obj))
    return known is not None and known[0]() is obj and known[2]
