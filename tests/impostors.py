"""Agents that are none: what tests tell a hub in the name of one."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tenacity import Retrying, wait_none

from fiberexec import FiberExecutor
from fiberexec import _messages as messages
from fiberexec._session import CONTROL, Session, encode

VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"


class Mine:
    """What would say that somebody has unpickled it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def joined(session: Session) -> bytes:
    return b"".join(session.take())


def message(*control: Any, body: bytes | None = None) -> bytes:
    session = Session(b"s" * 16)
    session.push(CONTROL, 0, encode(*control) if body is None else body)
    return joined(session)


def fake(connect: Any, told: Any) -> tuple[Any, Session]:
    """An agent that is none, with a session."""
    client = connect(told["hub"][0], told["ca"], told["certificate"], told["key"])
    client.greet()
    return client, Session(os.urandom(16))


def hello(session: Session, version: int = messages.VERSION, python: str = VERSION) -> bytes:
    session.push(CONTROL, 0, encode("hello", version, python, 1, "elsewhere", ""))
    return joined(session)


class Impostors:
    """Jobs without end, the test plays whose agents."""

    def __init__(self, jobs: Any, until: Callable[..., Any]) -> None:
        self._jobs, self._until = jobs, until
        jobs.silent = True
        self._used = len(jobs.started)
        self._executor: FiberExecutor | None = None
        self._ending: list[FiberExecutor] = []  # they wait for agents that were never there

    def next(self) -> Any:
        """The credentials of a job that has just been started: the last one has failed, or is given up now."""
        deadline = time.monotonic() + 0.5
        while len(self._jobs.started) <= self._used:
            if self._executor is None or self._future.done() or time.monotonic() > deadline:
                self._end()
                again = Retrying(wait=wait_none())
                self._executor = FiberExecutor(1, backend="agents", launch_retry=again, driver_timeout=30)
                self._future = self._executor.submit(int)
                self._until(lambda: len(self._jobs.started) > self._used, 120)
            time.sleep(0.001)
        self._used = len(self._jobs.started)
        return self._jobs.started[-1]

    def _end(self) -> None:
        if self._executor is not None:
            self._executor.kill_workers()
            self._executor.shutdown(wait=False)
            self._ending.append(self._executor)
        while len(self._ending) > 20:
            self._ending.pop(0).shutdown()

    def close(self) -> None:
        self._end()
        for executor in self._ending:
            executor.shutdown()
