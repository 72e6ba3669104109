"""multiprocessing's Pool, on the executor.

    apply, map, ... ─► FiberExecutor's machinery: one task an item ─► ApplyResult, MapResult
    imap            ─► a thread that takes items as long as there is room for them ─► IMapIterator

What the executor promises, a pool promises: a worker that dies costs nothing but the time of the item that it was executing,
an item whose result has arrived never runs again, and nobody waits for what will not come.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.pool
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import util
from multiprocessing.context import TimeoutError
from multiprocessing.pool import ThreadPool
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from fiberexec import _map
from fiberexec._errors import BrokenExecutor
from fiberexec._scheduler import events as ev
from fiberexec._serialize import RemoteTraceback
from fiberexec._stats import WorkerInfo
from fiberexec.executor import FiberExecutor
from fiberexec.mp._results import (
    ApplyResult,
    AsyncResult,
    Callback,
    IMapIterator,
    IMapUnorderedIterator,
    MapResult,
    MaybeEncodingError,
)
from fiberexec.mp.context import FiberContext, backend_of

__all__ = [
    "ApplyResult",
    "AsyncResult",
    "IMapIterator",
    "IMapUnorderedIterator",
    "MapResult",
    "MaybeEncodingError",
    "Pool",
    "RemoteTraceback",
    "ThreadPool",
    "TimeoutError",
]
T = TypeVar("T")
P = TypeVar("P", bound="Pool")
It = TypeVar("It", bound=IMapIterator[Any])
INIT, RUN, CLOSE, TERMINATE = "INIT", "RUN", "CLOSE", "TERMINATE"
AHEAD_ITEMS = 1 << 16  # items of an imap() that have been sent and have no outcome, at most,
AHEAD_BYTES = 1 << 24  # and bytes of them; but always enough for every worker
_START_TIMEOUT = 60.0  # seconds


_Standard: Any = multiprocessing.pool.Pool


class Pool(_Standard):  # type: ignore[misc]  # nothing of it is used: libraries ask what a pool is an instance of
    """A pool of processes, as ``multiprocessing.pool.Pool``, wherever the backend puts them.

    - ``processes``: how many workers; by default as many as ``FiberExecutor`` takes.
    - ``initializer``, ``initargs``: called in every worker before its first item; if it raises, the pool is broken.
    - ``maxtasksperchild``: calls of functions after which a worker is replaced. (An item is one call, whatever the chunks.)
    - ``context``: if it is fiberexec's, and named after a backend, that is the pool's backend.
    - ``options``: those of ``FiberExecutor``, by name: ``backend``, ``image``, ``retry``, ``timeout``, ``cpu``, ...

    Workers start with the pool where idle ones cost nothing, as on this machine, and otherwise when there is work for them.
    Then ``@meta`` of the first function sizes their jobs, unless ``cpu``, ``memory`` or ``gpu`` do.

    ``size`` is the number of workers. A pool that is no longer needed must be ended: by ``close()`` and ``join()``, or by
    ``terminate()``, which ``with`` does. Raises ValueError or TypeError for arguments that make no sense.
    """

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
        **options: Any,
    ) -> None:
        self._state = INIT
        if processes is not None and processes < 1:
            raise ValueError("Number of processes must be at least 1")
        if maxtasksperchild is not None and (not isinstance(maxtasksperchild, int) or maxtasksperchild < 1):
            raise ValueError("maxtasksperchild must be a positive int or None")
        if isinstance(context, FiberContext) and options.get("backend") is None:
            options["backend"] = backend_of(context.get_start_method() or "")
        self._has_initializer = initializer is not None
        self._make = functools.partial(
            _Workers, processes, None, initializer, tuple(initargs), max_tasks_per_child=maxtasksperchild, **options
        )
        self._executor = self._make()
        self._unused = True  # no function has been seen yet
        self._made_to_measure = (
            not self._executor.starts_at_once
            and not {"cpu", "memory", "gpu"} & options.keys()
            and isinstance(options.get("backend"), (str, type(None)))
        )
        self._processes = self._executor._max_workers
        self._lock = threading.Lock()  # guards the end, and the first use
        self._feeders: dict[threading.Thread, IMapIterator[Any]] = {}  # each sends the items of an imap()
        self._finalizer = util.Finalize(None, _terminate, (weakref.ref(self),), exitpriority=15)
        self._state = RUN

    @property
    def size(self) -> int:
        """How many workers the pool has when all are there."""
        return self._processes

    # -- calls

    def apply(self, func: Callable[..., T], args: Iterable[Any] = (), kwds: Mapping[str, Any] = {}) -> T:
        """Return ``func(*args, **kwds)``, or raise what it raises."""
        return self.apply_async(func, args, kwds).get()

    def apply_async(
        self,
        func: Callable[..., T],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] = {},
        callback: Callback | None = None,
        error_callback: Callback | None = None,
    ) -> ApplyResult[T]:
        """As apply(), but return at once. One of the callbacks is called with the outcome, before it is ready.

        Callbacks share one thread: they should return soon, and must not wait for other results of the pool.
        """
        executor = self._executor_for(func)
        result: ApplyResult[T] = ApplyResult(executor._manager, callback, error_callback)
        executor._send(result, func, tuple(args), dict(kwds))
        return result

    def map(self, func: Callable[[Any], T], iterable: Iterable[Any], chunksize: int | None = None) -> list[T]:
        """Return the results of ``func`` over the items, when all are there.

        ``chunksize`` limits how many items travel together; by default that is adapted to what they measure. If items raise,
        the first exception that arrives is raised when every item is done.
        """
        return self._map_async(func, iterable, chunksize, True, None, None).get()

    def map_async(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
    ) -> MapResult[T]:
        """As map(), but return when the items have been taken; for the callbacks see apply_async()."""
        return self._map_async(func, iterable, chunksize, True, callback, error_callback)

    def starmap(self, func: Callable[..., T], iterable: Iterable[Iterable[Any]], chunksize: int | None = None) -> list[T]:
        """As map(), but each item is all of the function's arguments: ``func(*item)``."""
        return self._map_async(func, map(tuple, iterable), chunksize, False, None, None).get()

    def starmap_async(
        self,
        func: Callable[..., T],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
    ) -> MapResult[T]:
        """As map_async(), with the items of starmap()."""
        return self._map_async(func, map(tuple, iterable), chunksize, False, callback, error_callback)

    def imap(self, func: Callable[[Any], T], iterable: Iterable[Any], chunksize: int = 1) -> IMapIterator[T]:
        """Return an iterator over the results, in order; the items may be endless.

        Another thread takes the items, no more of them ahead of their results than a few times what the workers can hold.
        Those of a sequence travel in groups as map()'s do, others in groups of ``chunksize``.
        """
        executor = self._executor_for(func)
        return self._imap(executor, IMapIterator(executor._manager), func, iterable, chunksize)

    def imap_unordered(
        self, func: Callable[[Any], T], iterable: Iterable[Any], chunksize: int = 1
    ) -> IMapUnorderedIterator[T]:
        """As imap(), but the results come as they arrive."""
        executor = self._executor_for(func)
        return self._imap(executor, IMapUnorderedIterator(executor._manager), func, iterable, chunksize)

    # -- the end

    def close(self) -> None:
        """Take no more calls; the workers go when everything is done."""
        with self._lock:
            if self._state != RUN:
                return
            self._state = CLOSE
            if self._has_initializer and self._unused:
                with contextlib.suppress(RuntimeError):  # the pool is broken
                    self._executor.submit(bool)  # it runs all the same
            if not self._feeders:
                self._executor.shutdown(wait=False)

    def terminate(self) -> None:
        """Stop what runs, cancel what waits, and return when the workers have gone.

        Results that are not there by then never come: get() raises ``CancelledError`` or ``BrokenExecutor``.
        """
        self._state = TERMINATE
        manager = self._executor._manager
        reason = BrokenExecutor("the pool was ended by terminate()")
        manager.cancel()
        manager.tell(ev.Broken(reason, kill=False))
        manager.close(wait=True)
        for results in list(self._feeders.values()):  # the items of some may never come
            results.end(reason)
        self._finalizer.cancel()

    def join(self) -> None:
        """Wait until everything is done and the workers have gone. Raises ValueError before close() or terminate()."""
        if self._state == RUN:
            raise ValueError("Pool is still running")
        for feeder in list(self._feeders) if self._state == CLOSE else ():
            feeder.join()
        self._executor.shutdown(wait=True)
        self._finalizer.cancel()

    def __enter__(self: P) -> P:
        self._check_running()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        self.terminate()

    def __del__(self) -> None:
        if self._state == RUN:
            warnings.warn(f"unclosed running multiprocessing pool {self!r}", ResourceWarning, 1, self)
        if self._state != INIT:
            try:
                self._finalizer.cancel()
            except TypeError:
                pass  # late in the interpreter's end

    def __reduce__(self) -> NoReturn:
        raise NotImplementedError("pool objects cannot be passed between processes or pickled")

    def __repr__(self) -> str:
        cls = type(self)
        size = self._processes if self._state != INIT else 0
        return f"<{cls.__module__}.{cls.__qualname__} state={self._state} pool_size={size}>"

    # -- inside

    def _check_running(self) -> None:
        if self._state != RUN:
            raise ValueError("Pool not running")

    def _executor_for(self, func: Callable[..., Any]) -> _Workers:
        """The executor, its jobs of the first function's size if they are made for this pool."""
        self._check_running()
        if self._unused:
            with self._lock:
                cpu, memory, gpu = getattr(func, "__fiberexec_meta__", (None, None, None))
                if self._unused and self._made_to_measure and (cpu, memory, gpu) != (None, None, None):
                    self._executor.shutdown(wait=False)  # nothing of it has started
                    self._executor = self._make(cpu=cpu, memory=None if memory is None else str(memory), gpu=gpu)
                self._unused = False
        executor = self._executor
        executor._manager.check_open()
        if not callable(func):
            raise TypeError(f"{func!r} is not callable")
        return executor

    def _mapping(
        self, executor: _Workers, func: Callable[..., Any], items: Iterable[Any], single: bool, sink: Any, first: int | None
    ) -> _map.Mapping:
        ref = executor._functions.lookup(func)
        profile = executor._profiles.of(func, ref.id, ref.name)
        return _map.Mapping(executor._manager, func, ref, profile, iter(items), single, sink, first)

    def _map_async(
        self,
        func: Callable[..., T],
        iterable: Iterable[Any],
        chunksize: int | None,
        single: bool,
        callback: Callback | None,
        error_callback: Callback | None,
    ) -> MapResult[T]:
        executor = self._executor_for(func)
        step = _map.GROUP_LIMIT if chunksize is None else _checked(chunksize)
        items = iterable if isinstance(iterable, (tuple, range)) else list(iterable)  # its length must not change
        manager = executor._manager
        first = manager.new_ids(len(items))
        result: MapResult[T] = MapResult(manager, first, len(items), callback, error_callback)
        mapping = self._mapping(executor, func, items, single, result, first)
        try:
            while mapping.submit(step):
                pass
        except BaseException:
            manager.drop(result)
            raise
        return result

    def _imap(
        self, executor: _Workers, results: It, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int
    ) -> It:
        step = _checked(chunksize)
        if step == 1 and isinstance(iterable, Sequence):
            step = _map.GROUP_LIMIT  # the next item is there already: nothing is gained by sending one before
        mapping = self._mapping(executor, func, iterable, True, results, None)
        feeder = threading.Thread(target=self._feed, args=(mapping, results, step), name="fiberexec-imap", daemon=True)
        with self._lock:
            self._check_running()
            feeder.start()
            self._feeders[feeder] = results
        return results

    def _feed(self, mapping: _map.Mapping, results: IMapIterator[Any], step: int) -> None:
        """Send the items of an imap(), as long as there is room for them; ends with the pool, which then takes none."""
        error = None
        try:
            while mapping.submit(step):
                average = mapping.size // mapping.taken + 1  # bytes
                results.wait_for_room(max(4 * self._processes, min(AHEAD_ITEMS, AHEAD_BYTES // average)))
        except BaseException as reason:  # of the items, or of the pool
            error = reason
        results.end(error)
        with self._lock:
            del self._feeders[threading.current_thread()]
            if self._state != RUN and not self._feeders:
                self._executor.shutdown(wait=False)

    @property
    def _pool(self) -> list[_Member]:
        """The workers, for programs that look at them. Where they start at once, wait for them; others may have no pid."""
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            there = [info for info in self._executor.workers() if info.pid]
            lacking = self._processes - len(there)
            if lacking <= 0 or not self._executor.starts_at_once or self._state != RUN or time.monotonic() > deadline:
                return [_Member(self._executor, info) for info in [*there, *[None] * lacking]]
            time.sleep(0.005)

    def _repopulate_pool(self) -> None:
        """Nothing: workers that have gone are replaced at once."""


class _Workers(FiberExecutor):
    """A pool's executor: where idle workers cost nothing, all start at once and stay; the pool says when it ends."""

    starts_at_once = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._manager.waits_at_exit = False

    def _least(self, min_workers: int, idle_timeout: float | None) -> int:
        self.starts_at_once = idle_timeout is None
        return self._max_workers if self.starts_at_once else min_workers


class _Member:
    """A pool's worker, in the terms of multiprocessing.Process."""

    daemon = True

    def __init__(self, executor: FiberExecutor, info: WorkerInfo | None) -> None:
        self._executor = executor
        self._id = info.id if info else None  # None: it has not started
        self.pid = self.ident = info.pid if info else None
        self.host = info.host if info else None
        self.name = f"PoolWorker-{self.pid}"

    def is_alive(self) -> bool:
        return any(info.id == self._id for info in self._executor.workers())


def _checked(chunksize: int) -> int:
    if chunksize < 1:
        raise ValueError(f"Chunksize must be 1+, not {chunksize}")
    return chunksize


def _terminate(pool: weakref.ref[Pool]) -> None:
    """What becomes of a pool that nobody has ended when the process ends."""
    found = pool()
    if found is not None:
        found.terminate()
