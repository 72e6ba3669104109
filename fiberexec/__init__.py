"""fiberexec: a concurrent.futures executor whose workers are processes here or on a cluster.

Importing this package defines names and does nothing else; each is loaded when it is first used.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost a worker more than everything else here
if TYPE_CHECKING:
    from typing import Any

    from fiberexec._errors import (
        BrokenExecutor,
        ConfigError,
        FiberError,
        ForkedError,
        HubFull,
        HubLost,
        LaunchError,
        ResourceError,
        TaskTimeout,
        WorkerLost,
    )
    from fiberexec._futures import FiberFuture
    from fiberexec._options import meta
    from fiberexec._serialize import PicklingError
    from fiberexec._stats import Stats, WorkerInfo
    from fiberexec._task import TaskInfo, current_task
    from fiberexec.executor import ExecutorView, FiberExecutor

__version__ = "0.1.0"
_WHERE = {
    "_errors": (
        "BrokenExecutor",
        "ConfigError",
        "FiberError",
        "ForkedError",
        "HubFull",
        "HubLost",
        "LaunchError",
        "ResourceError",
        "TaskTimeout",
        "WorkerLost",
    ),
    "_futures": ("FiberFuture",),
    "_options": ("meta",),
    "_serialize": ("PicklingError",),
    "_stats": ("Stats", "WorkerInfo"),
    "_task": ("TaskInfo", "current_task"),
    "executor": ("ExecutorView", "FiberExecutor"),
    "mp": (  # as in the ancestor, these can be had here as well
        "AsyncManager",
        "JoinableQueue",
        "Manager",
        "Pipe",
        "Pool",
        "Process",
        "Queue",
        "Ring",
        "SimpleQueue",
        "active_children",
        "cpu_count",
        "current_process",
        "get_context",
    ),
}
_HOME = {name: module for module, names in _WHERE.items() for name in names}
__all__ = [
    "BrokenExecutor",
    "ConfigError",
    "ExecutorView",
    "FiberError",
    "FiberExecutor",
    "FiberFuture",
    "ForkedError",
    "HubFull",
    "HubLost",
    "LaunchError",
    "PicklingError",
    "ResourceError",
    "Stats",
    "TaskInfo",
    "TaskTimeout",
    "WorkerInfo",
    "WorkerLost",
    "current_task",
    "meta",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "mp":
        return import_module("fiberexec.mp")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"fiberexec.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "mp"})
