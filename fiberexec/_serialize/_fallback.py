"""The second attempt at a value that pickle refuses: dill may know the kind."""

from __future__ import annotations

import io
import pickle
import sys
import types

from ._fast import PROTOCOL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Kinds of Python's own that dill copies well. Not among them, though dill would: locks and files, whose
# copy is another lock and another file.
_MODULES = frozenset(["builtins", "types", "weakref", "_weakref", "functools", "_functools", "collections"])
_NEVER = frozenset(["generator", "coroutine", "async_generator", "frame", "traceback", "PyCapsule"])
_BY_NAME = (types.FunctionType, types.BuiltinFunctionType, type)


def reduce_with_dill(obj: Any) -> Any:
    """How dill pickles an object that pickle refuses; NotImplemented for all others."""
    kind = type(obj)
    if issubclass(kind, _BY_NAME):
        return NotImplemented  # pickle knows these as names, without asking them
    try:
        obj.__reduce_ex__(PROTOCOL)
        return NotImplemented
    except (TypeError, pickle.PicklingError):
        pass
    if kind.__module__ not in _MODULES or kind.__name__ in _NEVER or isinstance(obj, io.IOBase):
        return NotImplemented
    dill = _import_dill()
    return load_with_dill, (dill.dumps(obj, PROTOCOL, recurse=True),)


def load_with_dill(data: bytes) -> Any:
    return _import_dill().loads(data)


def _import_dill() -> Any:
    """dill, without the changes that importing it makes to the pickle of everybody else in this process."""
    first = "dill" not in sys.modules
    import dill  # type: ignore[import-untyped]

    if first:
        dill.extend(use_dill=False)
    return dill
