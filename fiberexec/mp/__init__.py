"""fiberexec.mp: multiprocessing's API, its processes wherever the backend puts them.

    from fiberexec import mp as multiprocessing

The names are those of the default context's methods, of `Ring` and `AsyncManager`, and of the submodules. Each is loaded
when it is first used; what is not made anew here (``util``, ``dummy``, ...) is multiprocessing's own module.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from fiberexec.mp.context import AuthenticationError as AuthenticationError
    from fiberexec.mp.context import BufferTooShort as BufferTooShort
    from fiberexec.mp.context import ProcessError as ProcessError
    from fiberexec.mp.context import TimeoutError as TimeoutError
    from fiberexec.mp.managers import AsyncManager as AsyncManager
    from fiberexec.mp.process import Process as Process
    from fiberexec.mp.process import active_children as active_children
    from fiberexec.mp.process import current_process as current_process
    from fiberexec.mp.process import parent_process as parent_process
    from fiberexec.mp.ring import Ring as Ring

_METHODS = (  # of the default context
    "Array", "AuthenticationError", "Barrier", "BoundedSemaphore", "BufferTooShort", "Condition", "Event", "JoinableQueue",
    "Lock", "Manager", "Pipe", "Pool", "Process", "ProcessError", "Queue", "RLock", "RawArray", "RawValue", "Semaphore",
    "SimpleQueue", "TimeoutError", "Value", "active_children", "allow_connection_pickling", "cpu_count", "current_process",
    "freeze_support", "get_all_start_methods", "get_context", "get_logger", "get_start_method", "log_to_stderr",
    "parent_process", "reducer", "set_executable", "set_forkserver_preload", "set_start_method",
)  # fmt: skip
_CLASSES = {"AsyncManager": "managers", "Ring": "ring"}
_MODULES = (
    "connection", "context", "dummy", "heap", "managers", "pool", "process", "queues", "reduction", "resource_sharer",
    "resource_tracker", "ring", "shared_memory", "sharedctypes", "synchronize", "util",
)  # fmt: skip
SUBDEBUG = 5  # levels of get_logger()
SUBWARNING = 25
__all__ = [*_METHODS, *_CLASSES]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _METHODS:
        value = getattr(import_module("fiberexec.mp.context").default_context, name)
        if name == "reducer":
            return value  # it may be set
    elif name in _CLASSES:
        value = getattr(import_module(f"fiberexec.mp.{_CLASSES[name]}"), name)
    elif name in _MODULES:
        return import_module(f"fiberexec.mp.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
