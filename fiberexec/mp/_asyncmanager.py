"""AsyncManager: a manager whose objects work at once, since every method of a proxy returns a Future.

    caller ── request ──► connection of the proxy ──► its thread in the manager's process
      ▲ Future                     │                        one call after the other
      └──────── reader thread ◄────┴── replies, in that order

Each proxy has a connection of its own: the calls of one proxy run in the order in which they were made, those of different
proxies at once (and those of different managers on different CPUs). Arguments are pickled before the method returns.
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
from fiberexec.mp._proxies import AutoProxy, BaseProxy, lost, own_error, reaching, standard
from fiberexec.mp.managers import BaseManager, register_standard

__all__ = ["AsyncBaseProxy", "AsyncManager"]


class Line:
    """The connection of a proxy, the calls that wait for their replies, and a thread that reads those."""

    def __init__(self, conn: Any, address: Any) -> None:
        self._conn = conn
        self._address = address
        self._lock = threading.Lock()  # requests go out in the order of their futures; none after the end
        self._waiting: collections.deque[tuple[Future[Any], AsyncBaseProxy]] = collections.deque()
        self._error: Exception | None = None
        threading.Thread(target=self._read, name="fiberexec-async", daemon=True).start()

    def call(self, proxy: AsyncBaseProxy, request: Any) -> Future[Any]:
        """Send the request of a proxy, which is kept until the reply has come. What fails is in the future."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._error is not None:
                future.set_exception(self._error)
                return future
            self._waiting.append((future, proxy))
            try:
                self._conn.send(request)
            except OSError:
                pass  # the manager has gone, and the reader hears it too
            except PicklingError as error:  # nothing has been sent
                self._waiting.pop()
                future.set_exception(own_error(error))
        return future

    def _read(self) -> None:
        while True:
            try:
                reply = self._conn.recv()
            except (EOFError, OSError) as error:
                return self._end(error)
            except Exception as error:  # unpickling; the reply has been read whole
                reply = "#ERROR", error
            future, proxy = self._waiting.popleft()
            try:
                future.set_result(proxy._outcome(*reply))
            except Exception as error:
                future.set_exception(error)
            del future, proxy, reply  # this thread keeps nothing alive while it waits

    def _end(self, error: Exception) -> None:
        with self._lock:
            self._error = lost(self._address, error)
            self._conn.close()
        for future, _ in self._waiting:
            future.set_exception(self._error)
        self._waiting.clear()

    def close(self) -> None:
        """Let the reader end; no call is waiting."""
        with self._lock, contextlib.suppress(OSError):
            if self._conn.by_hub:
                self._conn.close()
            elif not self._conn.closed:
                with socket.fromfd(self._conn.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                    sock.shutdown(socket.SHUT_RDWR)


class AsyncBaseProxy(BaseProxy):
    """Base class of an AsyncManager's proxies: methods return a Future; operators (``p[0]``, ``len(p)``) wait."""

    _line: Line | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        self._opening = threading.Lock()
        super().__init__(*args, **options)

    def _callmethod(self, methodname: str, args: Iterable[Any] = (), kwds: Mapping[str, Any] = {}) -> Any:
        """Call a method of the object: a Future of what BaseProxy's method returns or raises."""
        try:
            future = self._open().call(self, (self._token.id, methodname, args, kwds))
        except Exception as error:
            future = Future()
            future.set_exception(error)
        return future.result() if methodname.startswith(("__", "#")) else future

    def _open(self) -> Line:
        with self._opening:
            if self._line is None:
                with reaching(self._token.address):
                    conn = self._Client(self._token.address, authkey=self._authkey)
                    standard.dispatch(conn, None, "accept_connection", (current_process().name,))
                self._line = Line(conn, self._token.address)
                weakref.finalize(self, self._line.close).atexit = False
            return self._line

    def _after_fork(self) -> None:
        if self._holder != os.getpid():
            self._line, self._opening = None, threading.Lock()
        super()._after_fork()

    def __enter__(self) -> Any:
        entered = super().__enter__()  # type: ignore[misc]
        return entered.result() if isinstance(entered, Future) else entered

    def __exit__(self, *exc_info: object) -> None:  # a future is true: to return it would swallow what the block raised
        left = super().__exit__(*exc_info)  # type: ignore[misc]
        if isinstance(left, Future):
            left.result()

    @classmethod
    def _auto(cls) -> Callable[..., Any]:
        return AsyncAutoProxy


def AsyncAutoProxy(*args: Any, **options: Any) -> Any:
    """A proxy with a method for each that the object exposes; the arguments are BaseProxy's."""
    return AutoProxy(*args, base=AsyncBaseProxy, **options)


class AsyncConditionProxy(AsyncBaseProxy, standard.ConditionProxy):  # type: ignore[misc]
    """Proxy of a condition. ``wait_for`` waits: its predicate is called here."""

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        waiting = types.SimpleNamespace(wait=lambda timeout: self.wait(timeout).result())
        return standard.ConditionProxy.wait_for(waiting, predicate, timeout)


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

    def _create(self, typeid: str, /, *args: Any, **kwds: Any) -> Any:
        if self._state.value == standard.State.INITIAL:
            self.start()
        return super()._create(typeid, *args, **kwds)


register_standard(AsyncManager, AsyncBaseProxy, globals(), "Async")
