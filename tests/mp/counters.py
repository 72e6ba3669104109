"""A class whose objects managers serve, for several test modules."""

from __future__ import annotations

import os
import threading
from multiprocessing.managers import AcquirerProxy
from multiprocessing.process import current_process
from typing import Any

from fiberexec.mp.managers import AsyncManager, BaseManager


def _fail(kind: type[BaseException], padding: bytes) -> None:
    raise kind("of unpickling")


class Broken:
    """What raises an exception when it is unpickled."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __reduce__(self) -> tuple[object, ...]:
        return _fail, self.args


class Counter:
    def __init__(self, start: int = 0) -> None:
        self.count = start

    def add(self, n: int) -> int:
        self.count += n
        return self.count

    def fail(self) -> None:
        raise ConnectionResetError("not the manager's")

    def broken(self, kind: type[BaseException], padding: int) -> Broken:
        return Broken(kind, bytes(padding))

    def pid(self) -> int:
        return os.getpid()

    def wait(self) -> None:
        threading.Event().wait()

    def end(self) -> None:
        """Let the manager's server end: this thread of it at once, the process within a second."""
        server: Any = current_process()._manager_server  # type: ignore[attr-defined]
        server.stop_event = threading.Event()
        server.stop_event.set()


class Counters(BaseManager):
    pass


class AsyncCounters(AsyncManager):
    pass


Counters.register("Counter", Counter)
Counters.register("RLock", threading.RLock, AcquirerProxy)
AsyncCounters.register("Counter", Counter)
AsyncCounters.register("Event", threading.Event)


def start(manager: Any) -> Any:
    manager.start()
    return manager


def kill(manager: Any) -> None:
    manager._process.kill()
