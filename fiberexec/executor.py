"""FiberExecutor: the standard's Executor in front of the manager.

    submit(fn, *args) ─► FunctionTable + dumps_call ─► Payload ─► Task ─► Manager.submit ─► FiberFuture
    map(fn, *items)   ─► groups of items, one Payload each ─► the same, into one MapResults

Arguments are pickled here, in the caller's thread, before submit() returns: pickling that hangs or kills harms nobody else.
"""

from __future__ import annotations

import concurrent.futures
import operator
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, TypeVar

from fiberexec import _config, _retry
from fiberexec import _messages as messages
from fiberexec._connection import Payload, surroundings
from fiberexec._errors import BrokenExecutor, ConfigError
from fiberexec._futures import FiberFuture
from fiberexec._initargs import share_locks
from fiberexec._manager import Manager
from fiberexec._map import submit_map
from fiberexec._options import Profiles, TaskOptions
from fiberexec._output import log_levels
from fiberexec._scheduler import Limits, Task
from fiberexec._scheduler import events as ev
from fiberexec._serialize import FunctionTable, dumps, dumps_call
from fiberexec._worker import Stopped
from fiberexec.backends import registry
from fiberexec.backends.base import Backend

if TYPE_CHECKING:
    from fiberexec._stats import Stats, WorkerInfo

T = TypeVar("T")
_unset: Any = object()


class _Submitter(concurrent.futures.Executor):
    """What FiberExecutor and its views have in common: submit() and map() with one set of task options."""

    _manager: Manager
    _functions: FunctionTable
    _profiles: Profiles
    _max_workers: int

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> FiberFuture[T]:
        """Schedule ``fn(*args, **kwargs)`` and return its future.

        Arguments are pickled before this returns; what cannot be pickled fails the future, not the call. Raises TypeError
        for a ``fn`` that cannot be called, RuntimeError after ``shutdown()``, BrokenExecutor, ForkedError in a forked
        child, and ResourceError for a task that can never fit.
        """
        manager = self._manager
        manager.check_open()
        if not callable(fn):
            raise TypeError(f"the first argument of submit() must be callable, got {fn!r}")
        future: FiberFuture[T] = FiberFuture()
        self._send(future, fn, args, kwargs)
        return future

    def _send(self, sink: Any, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Submit one call, its outcome to go to this sink."""
        try:
            ref = self._functions.lookup(fn)
            data, buffers = dumps_call(args, kwargs)
        except Exception as error:
            sink.fail(None, error)
            return
        manager = self._manager
        profile = self._profiles.of(fn, ref.id, ref.name)
        task = Task(manager.new_ids(1), profile, Payload(ref, messages.CALL, data, buffers), sink)
        if profile.retry is not None:
            task.retry_state = _retry.begin(profile.retry, fn, args, kwargs)
        sink._task = task
        sink._manager = manager
        manager.submit([task])

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | None = None,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Return the results of ``fn`` over the items, in order, as ``concurrent.futures.Executor.map`` does.

        ``timeout`` (seconds) limits the whole, from this call on. ``buffersize`` limits how many items are taken from the
        iterables ahead of the results; without it all are taken at once. ``chunksize`` limits how many items are pickled
        together; by default that is adapted to what items measure. Whatever the transport, each item is a task of its
        own: it fails, is retried and is timed alone.
        """
        if not callable(fn):
            raise TypeError(f"the first argument of map() must be callable, got {fn!r}")
        chunksize, buffersize = _count("chunksize", chunksize), _count("buffersize", buffersize)
        if timeout is not None:
            timeout = _config.number_of(timeout, f"timeout must be a number of seconds or None, got {timeout!r}")
            if timeout != timeout:
                raise ValueError("timeout must be a number of seconds or None, got nan")
        self._manager.check_open()
        deadline = None if timeout is None or timeout > _config.MAX_SECONDS else time.monotonic() + timeout
        if "submit" in self.__dict__ and buffersize is None:  # somebody (tqdm) wants to see every task that is submitted
            return super().map(fn, *iterables, timeout=timeout)
        ref = self._functions.lookup(fn)
        profile = self._profiles.of(fn, ref.id, ref.name)
        return submit_map(self._manager, fn, ref, profile, iterables, deadline, chunksize, buffersize)

    def options(
        self,
        *,
        timeout: float | None = _unset,
        retry: Any = _unset,
        priority: int = _unset,
        cpu: float | str | None = _unset,
        memory: int | str | None = _unset,
        gpu: int | None = _unset,
        max_worker_losses: int = _unset,
    ) -> ExecutorView:
        """A view of this executor, itself an Executor, whose tasks have these options; those not named stay as they are.

        ``timeout``: seconds that one attempt of a task may take, from unpickling its arguments to its result being written.
        ``retry``: a ``tenacity.Retrying`` that decides about every attempt's outcome; None: no retries. ``priority``: tasks of
        a higher one are sent first. ``cpu``, ``memory``, ``gpu``: what each task needs; it runs when that is free.
        ``max_worker_losses``: workers that may die executing a task before it fails with WorkerLost; 1 turns re-running off.

        Raises ConfigError for values that make no sense.
        """
        given = {"timeout": timeout, "retry": retry, "priority": priority, "cpu": cpu, "memory": memory, "gpu": gpu}
        given["max_worker_losses"] = max_worker_losses
        return ExecutorView(self, {name: value for name, value in given.items() if value is not _unset})

    def __reduce__(self) -> Any:
        raise TypeError(
            "an executor cannot be sent to another process; make one there, FiberExecutor(backend='local') works in a task"
        )


class FiberExecutor(_Submitter):
    """An executor whose workers are processes: on this machine, or wherever ``backend`` puts them.

    The positional arguments are those of ``concurrent.futures.ProcessPoolExecutor``:

    - ``max_workers``: workers at most; by default the CPUs that this process may use.
    - ``mp_context``: accepted for compatibility; checked, and otherwise without effect.
    - ``initializer``, ``initargs``: called in every worker before its first task; if it raises, the executor is broken.
    - ``max_tasks_per_child``: tasks after which a worker is replaced.

    The others by name; a setting that is not given comes from ``FIBEREXEC_*``, then ``fiberexec.toml`` or
    ``[tool.fiberexec]``, then the default:

    - ``backend``: a backend's name ("local"), or an object that is one.
    - ``image``, ``env``, ``ship``, ``workers_per_job``, ``driver_timeout``, ``backend_options``: for the backend.
    - ``cpu`` (cores), ``memory`` (MiB, or "4Gi"), ``gpu`` (devices): what one job has, and so what its tasks can be promised;
      on this machine, by default, all that it has.
    - ``min_workers``: workers that are there, and stay, without a task.
    - ``retry``, ``timeout``, ``max_worker_losses``: defaults of the tasks, see ``options()``.
    - ``idle_timeout``: seconds after which an idle worker goes; None: it stays.
    - ``startup_timeout``: seconds that a worker may take to become ready.
    - ``launch_retry``: a ``tenacity.Retrying`` that decides how often, and when, a failed launch is tried again; by default
      after 0.1 s, doubled up to 10 s, until ``startup_timeout`` is spent.

    Raises ConfigError (a ValueError) or TypeError for arguments that make no sense.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        backend: str | Backend | None = None,
        image: str | None = None,
        cpu: float | str | None = None,
        memory: int | str | None = None,
        gpu: int | None = None,
        min_workers: int | None = None,
        workers_per_job: int | None = None,
        retry: Any = None,
        timeout: float | None = None,
        max_worker_losses: int | None = None,
        idle_timeout: float | EllipsisType | None = ...,
        startup_timeout: float | None = None,
        driver_timeout: float | None = None,
        launch_retry: Any = None,
        ship: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        backend_options: Mapping[str, Any] | None = None,
    ) -> None:
        _check_standard(mp_context, initializer, initargs)
        max_tasks_per_child = _count("max_tasks_per_child", max_tasks_per_child)
        _check_backend(backend)
        named = {
            "max_workers": max_workers, "min_workers": min_workers, "image": image, "cpu": cpu, "memory": memory, "gpu": gpu,
            "workers_per_job": workers_per_job, "timeout": timeout, "max_worker_losses": max_worker_losses,
            "startup_timeout": startup_timeout, "driver_timeout": driver_timeout, "ship": ship, "env": env,
            "backend_options": backend_options, "backend": None if isinstance(backend, Backend) else backend,
        }  # fmt: skip
        _retry.check("launch_retry", launch_retry)
        settings = _config.load(idle_timeout=idle_timeout, **named)
        if not isinstance(backend, Backend):
            backend = registry.create(settings.backend, settings, settings.max_workers)
        options = TaskOptions(timeout=settings.timeout, max_worker_losses=settings.max_worker_losses)
        if retry is not None:
            options = options.changed({"retry": retry})
        self._max_workers = settings.max_workers or backend.default_workers
        if settings.min_workers > self._max_workers:
            raise ConfigError(f"min_workers={settings.min_workers} is more than max_workers={self._max_workers}")
        patience = backend.idle_timeout if settings.idle_timeout is ... else settings.idle_timeout
        limits = Limits(
            max_workers=self._max_workers,
            min_workers=self._least(settings.min_workers, patience),
            max_tasks_per_child=max_tasks_per_child,
            idle_timeout=patience,
            startup_timeout=settings.startup_timeout,
        )
        setup = _Setup(settings, initializer, initargs, backend.same_host)
        delay = _retry.LaunchDelay(launch_retry, settings.startup_timeout)
        self._functions = FunctionTable()
        self._profiles = Profiles(options, backend.largest)
        self._manager = manager = Manager(backend, limits, setup, delay)
        self._gone = weakref.ref(self, lambda _: manager.abandon())
        if limits.min_workers:
            manager.tell(ev.Tick())  # starts them

    def _least(self, min_workers: int, idle_timeout: float | None) -> int:
        """How many workers start at once, and stay; for subclasses."""
        return min_workers

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks. ``wait``: return when all have their outcome and no worker is left; otherwise at once.

        ``cancel_futures`` cancels what has not been sent to a worker.
        """
        self._manager.close(wait=False)
        if cancel_futures:
            self._manager.cancel()
        if wait:
            self._manager.close(wait=True)

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        if exc_type is not None and issubclass(exc_type, (KeyboardInterrupt, Stopped)):
            self._manager.terminate_all()
        self.shutdown(wait=True)

    def terminate_workers(self) -> None:
        """Send SIGTERM to every worker and shut down: what waits is cancelled, what runs ends in BrokenExecutor."""
        self._force("terminate_workers", kill=False)

    def kill_workers(self) -> None:
        """As terminate_workers(), with SIGKILL."""
        self._force("kill_workers", kill=True)

    def _force(self, name: str, kill: bool) -> None:
        self.shutdown(wait=False, cancel_futures=True)
        self._manager.tell(ev.Broken(BrokenExecutor(f"the workers were ended by {name}()"), kill))

    def stats(self) -> Stats:
        """What is happening, in numbers."""
        from fiberexec import _stats

        return _stats.stats(self._manager)

    def workers(self) -> list[WorkerInfo]:
        """The workers that are there now."""
        from fiberexec import _stats

        return _stats.workers(self._manager)


class ExecutorView(_Submitter):
    """An executor's tasks with other options; made by ``options()``. It has the executor's workers, and its end."""

    def __init__(self, executor: _Submitter, changes: dict[str, Any]) -> None:
        self._executor = executor  # or a view of it
        self._manager = executor._manager
        self._functions = executor._functions
        self._max_workers = executor._max_workers
        self._profiles = Profiles(executor._profiles.options.changed(changes), executor._manager.backend.largest)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shut the whole executor down."""
        self._executor.shutdown(wait, cancel_futures=cancel_futures)

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        self._executor.__exit__(exc_type, exc_val, exc_tb)


class _Setup:
    """What every new worker is told first."""

    def __init__(
        self, settings: Any, initializer: Callable[..., Any] | None, initargs: tuple[Any, ...], same_host: bool
    ) -> None:
        self._settings = settings
        self._same_host = same_host
        self._initializer: tuple[bytes, list[Any]] = (b"", [])
        self._has_initializer = initializer is not None
        if initializer is not None:
            self._initializer = dumps((initializer, share_locks(initargs)))

    def __call__(self) -> tuple[bytes, list[Any]]:
        data, buffers = self._initializer
        try:
            directory = os.getcwd()
        except OSError:
            directory = "/"
        message = {
            **surroundings(self._same_host),
            "argv": list(getattr(sys, "argv", [])),
            "cwd": directory if self._same_host else None,
            "env": dict(self._settings.env or {}),
            "log_levels": log_levels(),
            "prefix": self._settings.prefix_output,
            "initializer": data if self._has_initializer else None,
        }
        return messages.encode(message), buffers


def _check_backend(backend: Any) -> None:
    if backend is None or isinstance(backend, (str, Backend)):
        return
    members = [name for name in (*Backend.__annotations__, *vars(Backend)) if not name.startswith("_")]
    lacking = [name for name in members if not hasattr(backend, name)]
    raise ConfigError(f"backend must be a str, a backend's name, or a Backend object; {backend!r} lacks {', '.join(lacking)}")


def _check_standard(mp_context: Any, initializer: Any, initargs: Any) -> None:
    if mp_context is not None:
        from multiprocessing.context import BaseContext

        if not isinstance(mp_context, BaseContext):
            raise TypeError(f"mp_context must be a multiprocessing context or None, got {mp_context!r}")
    if initializer is not None and not callable(initializer):
        raise TypeError("initializer must be a callable")
    if not isinstance(initargs, tuple):
        raise TypeError(f"initargs must be a tuple, got {initargs!r}")


def _count(name: str, value: Any) -> int | None:
    """The value as an int, or None. Raises as the standard does: TypeError for what is none, ValueError for less than 1."""
    if value is None:
        return None
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer or None, got {value!r}")
    number = operator.index(value)
    if number < 1:
        raise ValueError(f"{name} must be None or > 0, got {number}")
    return number
