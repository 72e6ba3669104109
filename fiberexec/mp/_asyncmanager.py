"""A manager whose objects work at once, since every method of a proxy returns a Future.

    caller ── request ──► its line of the proxy ──► a thread in the manager's process
      ▲ Future                     │                        one call after the other
      └──────── reader thread ◄────┴── replies, in that order

Each thread has a connection of its own for each proxy that it uses: its calls of one proxy run in the order in which it made
them; those of different threads or proxies at once (and those of different managers on different CPUs). So the thread in the
manager's process stands for the one that calls, and may own a lock. Arguments are pickled before the method returns.
"""

from __future__ import annotations

import collections
import contextlib
import os
import socket
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from multiprocessing.process import current_process
from typing import Any

from fiberexec._serialize import PicklingError
from fiberexec.mp._proxies import AutoProxy, BaseProxy, has_read, lost, own_error, reaching, standard
from fiberexec.mp.managers import BaseManager, register_standard, util

__all__ = ["AsyncBaseProxy", "AsyncManager"]


class Line:
    """A connection of a proxy, the calls that wait for their replies, and a thread that reads those."""

    def __init__(self, conn: Any, address: Any) -> None:
        self._conn = conn
        self._address = address
        self._pid = os.getpid()
        self._lock = threading.RLock()  # requests go out in the order of their futures; none after the end
        self._caller = 0  # the thread that is in call()
        self._waiting: collections.deque[tuple[Future[Any], AsyncBaseProxy, Hold]] = collections.deque()
        self._error: Exception | None = None
        Reader(target=self._read, name="fiberexec-async", daemon=True).start()

    @property
    def usable(self) -> bool:
        """Whether calls may take it: not after its end, in a child of the process that opened it, or within a call by it."""
        return self._error is None and self._pid == os.getpid() and self._caller != threading.get_ident()

    def call(self, proxy: AsyncBaseProxy, hold: Hold, request: Any) -> Future[Any]:
        """Send a request of a proxy. Both are kept until the reply has come. What fails is in the future."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._error is not None:
                future.set_exception(self._error)
                return future
            self._waiting.append((future, proxy, hold))
            self._caller = threading.get_ident()
            try:
                self._conn.send(request)
            except OSError as error:
                self._give_up(lost(self._address, error))
            except Exception as error:  # nothing has been sent
                self._waiting.pop()
                future.set_exception(own_error(error) if isinstance(error, PicklingError) else error)
            except BaseException:  # half of the request may be on its way, and what follows would be taken for the rest
                self._give_up(ConnectionAbortedError("a later call of this proxy was interrupted, and its connection closed"))
                raise
            finally:
                self._caller = 0
        return future

    def _read(self) -> None:
        while True:
            try:
                reply = self._conn.recv()
            except BaseException as error:
                if isinstance(error, (EOFError, OSError)) and not has_read(self._conn):
                    return self._end(error)
                reply = "#ERROR", error
            future, proxy, hold = self._waiting.popleft()
            try:
                future.set_result(proxy._outcome(*reply))
            except BaseException as error:
                future.set_exception(error)
            del future, proxy, hold, reply  # this thread keeps nothing alive while it waits

    def _end(self, error: Exception) -> None:
        with self._lock:
            self._error = self._error or lost(self._address, error)
            self._conn.close()
        for future, *_ in self._waiting:
            future.set_exception(self._error)
        self._waiting.clear()

    def close(self) -> None:
        """Let the reader end; no call is waiting."""
        if self.usable:
            with self._lock:
                self._give_up(EOFError())

    def _give_up(self, error: Exception) -> None:
        """Let the reader end, and those who wait hear why."""
        self._error = self._error or error
        with contextlib.suppress(OSError):
            if getattr(self._conn, "by_hub", False):
                self._conn.close()
            else:
                with socket.fromfd(self._conn.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                    sock.shutdown(socket.SHUT_RDWR)


class Reader(threading.Thread):
    """Reads the replies of a line, and runs the callbacks of their futures."""


class Hold:
    """That a thread may call by a line, which ends with it."""

    def __init__(self, line: Line) -> None:
        self.line = line
        weakref.finalize(self, line.close).atexit = False


class AsyncBaseProxy(BaseProxy):
    """Base class of an AsyncManager's proxies: methods return a Future; operators (``p[0]``, ``len(p)``) wait."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._lines = threading.local()  # hold: of the line of this thread
        self._callbacks = types.SimpleNamespace()  # the same for all readers: each callback may lead to the next one
        self._opening = util.ForkAwareThreadLock()  # guards it
        super().__init__(*args, **options)

    def _callmethod(self, methodname: str, args: Iterable[Any] = (), kwds: Mapping[str, Any] = {}) -> Any:
        """Call a method of the object: a Future of what BaseProxy's method returns or raises."""
        waits, reader = methodname.startswith(("__", "#")), isinstance(threading.current_thread(), Reader)
        if waits and reader:  # who waited for a line would wait for a reader, perhaps itself
            return super()._callmethod(methodname, args, kwds)
        try:
            with self._opening if reader else contextlib.nullcontext():
                hold = self._hold(self._callbacks if reader else self._lines)
            future = hold.line.call(self, hold, (self._token.id, methodname, args, kwds))
        except Exception as error:
            future = Future()
            future.set_exception(error)
        return future.result() if waits else future

    def _hold(self, lines: Any) -> Hold:
        hold: Hold | None = getattr(lines, "hold", None)
        if hold is None or not hold.line.usable:
            with reaching(self._token.address):
                conn = self._Client(self._token.address, authkey=self._authkey)
                standard.dispatch(conn, None, "accept_connection", (current_process().name,))
            hold = lines.hold = Hold(Line(conn, self._token.address))
        return hold

    @classmethod
    def _auto(cls) -> Callable[..., Any]:
        return AsyncAutoProxy


def AsyncAutoProxy(*args: Any, **options: Any) -> Any:
    """A proxy with a method for each that the object exposes; the arguments are BaseProxy's."""
    return AutoProxy(*args, base=AsyncBaseProxy, **options)


class AsyncAcquirerProxy(AsyncBaseProxy, standard.AcquirerProxy):  # type: ignore[misc]
    """Proxy of a lock. A ``with`` block waits for it, and until it is free again."""

    def __enter__(self) -> Any:
        return self.acquire().result()

    def __exit__(self, *exc_info: object) -> None:
        self.release().result()


class AsyncConditionProxy(AsyncAcquirerProxy, standard.ConditionProxy):  # type: ignore[misc]
    """Proxy of a condition. ``wait_for`` waits: its predicate is called here."""

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        waiting = types.SimpleNamespace(wait=lambda timeout: self.wait(timeout).result())
        return standard.ConditionProxy.wait_for(waiting, predicate, timeout)


class AsyncPoolProxy(AsyncBaseProxy, standard.PoolProxy):  # type: ignore[misc]
    """Proxy of a pool. Leaving its ``with`` block waits until it has been terminated."""

    def __exit__(self, *exc_info: object) -> None:
        self.terminate().result()


class AsyncListProxy(AsyncBaseProxy, standard.ListProxy):  # type: ignore[misc]
    """Proxy of a list."""

    def __iadd__(self, value: Any) -> AsyncListProxy:
        self.extend(value).result()
        return self


class AsyncValueProxy(AsyncBaseProxy, standard.ValueProxy):  # type: ignore[misc]
    """Proxy of a value. ``get()`` and ``set()`` return a Future, the attribute ``value`` waits."""

    value = property(lambda self: self.get().result(), lambda self, value: self.set(value).result())


class AsyncManager(BaseManager):
    """A manager as ``SyncManager`` is, whose proxies return a Future from every method; it starts when it is first used.

    Register the classes of simulators and the like with a subclass::

        class Simulators(AsyncManager):
            pass

        Simulators.register("Simulator", Simulator)
        simulators = [Simulators().Simulator(seed) for seed in range(8)]       # 8 processes
        results = [f.result() for f in [simulator.step() for simulator in simulators]]
    """

    _auto = staticmethod(AsyncAutoProxy)

    def __init__(self, *args: Any, **options: Any) -> None:
        """The arguments are BaseManager's."""
        super().__init__(*args, **options)
        self._starting = util.ForkAwareThreadLock()  # held by who starts its process

    def _create(self, typeid: str, /, *args: Any, **kwds: Any) -> Any:
        with self._starting:
            if self._state.value == standard.State.INITIAL:
                self.start()
        return super()._create(typeid, *args, **kwds)


register_standard(AsyncManager, AsyncBaseProxy, globals(), "Async")
