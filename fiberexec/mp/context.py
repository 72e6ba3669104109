"""Contexts: multiprocessing's, whose start methods are names of backends as well."""

from __future__ import annotations

import multiprocessing.context
import multiprocessing.util
from collections.abc import Callable, Iterable
from multiprocessing.context import AuthenticationError, BaseContext, BufferTooShort, ProcessError, TimeoutError
from typing import Any

from fiberexec.mp.process import Process

__all__ = [
    "AuthenticationError",
    "BaseContext",
    "BufferTooShort",
    "FiberContext",
    "Process",
    "ProcessError",
    "TimeoutError",
    "default_context",
]
standard: Any = multiprocessing.context  # what it has is not all declared
util: Any = multiprocessing.util
# multiprocessing's own names: each stands for the backend of the settings, and a child starts as clean as a spawned one.
METHODS = ("spawn", "fork", "forkserver")


def backend_of(method: str) -> str | None:
    """The backend that a start method names; None: the settings say which."""
    return None if method in METHODS else method


def shares_host(method: str | None = None) -> bool:
    """Whether the processes of a start method are on one host with this one, and with whoever hears from them.

    None: the default context's start method.
    """
    from fiberexec import _config
    from fiberexec._hub import launch

    if launch.in_job():
        return False  # others may be anywhere
    if method is None:
        method = default_context.get_start_method(allow_none=True) or METHODS[0]
    return (backend_of(method) or _config.load().backend) == "local"


class FiberContext(BaseContext):
    """``multiprocessing``'s API, bound to a start method: one of multiprocessing's own, or a backend's name."""

    Process = Process

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce__(self) -> Any:
        return get_context, (self._name,)

    def get_context(self, method: str | None = None) -> FiberContext:  # type: ignore[override]
        """The context of a start method; this one for None. Raises ValueError for one that there is not."""
        return self if method is None else get_context(method)

    def get_start_method(self, allow_none: bool = False) -> str | None:  # type: ignore[override]
        """The name that this context was asked for by."""
        return self._name

    def get_all_start_methods(self) -> list[str]:
        """multiprocessing's names; those of the backends are as good."""
        return list(METHODS)

    def Manager(self) -> Any:
        """A started ``SyncManager``."""
        from fiberexec.mp.managers import SyncManager

        manager = SyncManager(ctx=self.get_context())
        manager.start()
        return manager

    def Pipe(self, duplex: bool = True) -> tuple[Any, Any]:
        """Two connections, the ends of one pipe; not ``duplex``: the first receives, the second sends."""
        from fiberexec.mp.connection import make_pipe

        return make_pipe(duplex, self.get_start_method(allow_none=True))

    def Lock(self) -> Any:
        """A lock that is not recursive."""
        from fiberexec.mp.synchronize import Lock

        return Lock(ctx=self.get_context())

    def RLock(self) -> Any:
        """A recursive lock."""
        from fiberexec.mp.synchronize import RLock

        return RLock(ctx=self.get_context())

    def Condition(self, lock: Any = None) -> Any:
        """A condition, of ``lock`` or of a new RLock."""
        from fiberexec.mp.synchronize import Condition

        return Condition(lock, ctx=self.get_context())

    def Semaphore(self, value: int = 1) -> Any:
        """A semaphore."""
        from fiberexec.mp.synchronize import Semaphore

        return Semaphore(value, ctx=self.get_context())

    def BoundedSemaphore(self, value: int = 1) -> Any:
        """A semaphore that is never released more often than acquired."""
        from fiberexec.mp.synchronize import BoundedSemaphore

        return BoundedSemaphore(value, ctx=self.get_context())

    def Event(self) -> Any:
        """An event."""
        from fiberexec.mp.synchronize import Event

        return Event(ctx=self.get_context())

    def Barrier(self, parties: int, action: Callable[[], object] | None = None, timeout: float | None = None) -> Any:
        """A barrier for ``parties`` processes."""
        from fiberexec.mp.synchronize import Barrier

        return Barrier(parties, action, timeout, ctx=self.get_context())

    def Queue(self, maxsize: int = 0) -> Any:
        """A queue."""
        from fiberexec.mp.queues import Queue

        return Queue(maxsize, ctx=self.get_context())

    def JoinableQueue(self, maxsize: int = 0) -> Any:
        """A queue with ``task_done()`` and ``join()``."""
        from fiberexec.mp.queues import JoinableQueue

        return JoinableQueue(maxsize, ctx=self.get_context())

    def SimpleQueue(self) -> Any:
        """A queue with put, get and empty alone."""
        from fiberexec.mp.queues import SimpleQueue

        return SimpleQueue(ctx=self.get_context())

    def Pool(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        **options: Any,
    ) -> Any:
        """A pool of processes; ``options`` are those of `fiberexec.mp.pool.Pool`."""
        from fiberexec.mp.pool import Pool

        return Pool(processes, initializer, initargs, maxtasksperchild, context=self.get_context(), **options)

    def RawValue(self, typecode_or_type: Any, *args: Any) -> Any:
        """A ctypes object in shared memory."""
        from fiberexec.mp.sharedctypes import RawValue

        return RawValue(typecode_or_type, *args, ctx=self.get_context())

    def RawArray(self, typecode_or_type: Any, size_or_initializer: Any) -> Any:
        """A ctypes array in shared memory."""
        from fiberexec.mp.sharedctypes import RawArray

        return RawArray(typecode_or_type, size_or_initializer, ctx=self.get_context())

    def Value(self, typecode_or_type: Any, *args: Any, lock: Any = True) -> Any:
        """A ctypes object in shared memory, with a lock."""
        from fiberexec.mp.sharedctypes import Value

        return Value(typecode_or_type, *args, lock=lock, ctx=self.get_context())

    def Array(self, typecode_or_type: Any, size_or_initializer: Any, *, lock: Any = True) -> Any:
        """A ctypes array in shared memory, with a lock."""
        from fiberexec.mp.sharedctypes import Array

        return Array(typecode_or_type, size_or_initializer, lock=lock, ctx=self.get_context())

    def set_forkserver_preload(self, module_names: list[str]) -> None:
        """Name modules, of installed packages, that a backend which forks may load once for all processes.

        It counts for what is started when no process has been started yet. Raises TypeError for what is no list of str.
        """
        super().set_forkserver_preload(module_names)
        from fiberexec.mp import _jobs

        _jobs.preload = tuple(module_names)

    def allow_connection_pickling(self) -> None:
        """Nothing: connections can always be pickled."""


class DefaultContext(FiberContext):
    """The context behind the module's functions: its start method can be set, once."""

    def __init__(self) -> None:
        self._actual: FiberContext | None = None

    def __reduce__(self) -> Any:
        return "default_context"

    def get_context(self, method: str | None = None) -> FiberContext:  # type: ignore[override]
        """The context of a start method; for None the one that is set, "spawn" if none is."""
        if method is not None:
            return get_context(method)
        if self._actual is None:
            self._actual = get_context("spawn")
        return self._actual

    def set_start_method(self, method: str | None, force: bool = False) -> None:
        """Set the start method: multiprocessing's "spawn", "fork" or "forkserver", or a backend's name.

        Raises RuntimeError if it has been set, unless ``force``; ValueError for a name that there is not.
        """
        if self._actual is not None and not force:
            raise RuntimeError("context has already been set")
        self._actual = None if method is None and force else self.get_context(method)

    def get_start_method(self, allow_none: bool = False) -> str | None:  # type: ignore[override]
        """The name of the start method that is set; if none is, None when that is allowed, and otherwise "spawn"."""
        if self._actual is None and allow_none:
            return None
        return self.get_context()._name


class SpawnProcess(Process):
    """A process of the context "spawn"."""

    _context_name = "spawn"


class SpawnContext(FiberContext):
    """The context "spawn"."""

    Process = SpawnProcess


class ForkProcess(Process):
    """A process of the context "fork"."""

    _context_name = "fork"


class ForkContext(FiberContext):
    """The context "fork"."""

    Process = ForkProcess


class ForkServerProcess(Process):
    """A process of the context "forkserver"."""

    _context_name = "forkserver"


class ForkServerContext(FiberContext):
    """The context "forkserver"."""

    Process = ForkServerProcess


_contexts: dict[str, FiberContext] = {
    "spawn": SpawnContext("spawn"),
    "fork": ForkContext("fork"),
    "forkserver": ForkServerContext("forkserver"),
}


def get_context(method: str) -> FiberContext:
    """The context of a start method; the same each time. Raises ValueError for one that there is not."""
    context = _contexts.get(method)
    if context is None:
        from fiberexec.backends import registry

        if method not in registry.names():
            raise ValueError(f"cannot find context for {method!r}")
        context = FiberContext(method)
        context.Process = _process_class(method)
        context = _contexts.setdefault(method, context)
    return context


def _process_class(method: str) -> type[Process]:
    """The class of a backend's processes, which other processes find under the same name: see __getattr__()."""
    name = f"{method.capitalize()}Process"
    cls = type(
        name, (Process,), {"_context_name": method, "__module__": __name__, "__doc__": f"A process of backend {method!r}."}
    )
    return globals().setdefault(name, cls)  # type: ignore[no-any-return]


def __getattr__(name: str) -> Any:
    if name.endswith("Process"):
        try:
            return get_context(name.removesuffix("Process").lower()).Process
        except ValueError:
            pass
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


default_context: DefaultContext = DefaultContext()
