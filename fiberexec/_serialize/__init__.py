"""Everything that crosses a process boundary becomes bytes here, and objects again.

``dumps``, ``dumps_call``, ``dumps_result`` and ``loads`` are for values, `FunctionTable` for the functions
of tasks, ``dump_exception`` and ``load_exception`` for what tasks raise. A worker loads `_fast` alone until
it needs more.
"""

from __future__ import annotations

from ._fast import PLAIN, Buffer, PicklingError, dumps, dumps_call, dumps_pieces, dumps_plain, dumps_result, is_plain, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ._exceptions import RemoteTraceback
    from ._table import FunctionRef, FunctionTable

__all__ = [
    "PLAIN",
    "Buffer",
    "FunctionRef",
    "FunctionTable",
    "PicklingError",
    "RemoteTraceback",
    "dump_exception",
    "dumps",
    "dumps_call",
    "dumps_pieces",
    "dumps_plain",
    "dumps_result",
    "is_plain",
    "load_exception",
    "loads",
    "register",
]
_LATER = {"RemoteTraceback": "_exceptions", "FunctionTable": "_table", "FunctionRef": "_table"}


def dump_exception(exc: BaseException, traceback_text: str | None = None) -> bytes:
    """Pickle `exc` with its causes, notes and traceback; never raises.

    ``traceback_text`` is what the receiver shows as the remote traceback; by default that of `exc` itself.
    """
    from ._exceptions import dump_exception

    return dump_exception(exc, traceback_text)


def load_exception(data: Buffer) -> BaseException:
    """The exception that `dump_exception` pickled, or the nearest thing to it that can be had; never
    raises."""
    from ._exceptions import load_exception

    return load_exception(data)


def register(kind: type, reduce: Callable[[Any, Any], Any]) -> None:
    """Let ``reduce(pickler, obj)`` say how instances of exactly `kind` are pickled, as their ``__reduce__`` would."""
    from ._reducers import REDUCERS

    REDUCERS[kind] = reduce


def __getattr__(name: str) -> Any:
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
