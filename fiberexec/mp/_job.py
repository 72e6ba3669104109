"""One process that was started, as the jobs thread and whoever waits for it share it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

from fiberexec._connection import Connection
from fiberexec._retry import LaunchDelay
from fiberexec._stream import Buffer
from fiberexec.backends.base import Backend, Exit

Task = Callable[[str | None], tuple[bytes, list[Buffer]]]  # the TASKS frame, given the devices that the job has


class Size(NamedTuple):
    """Where a job runs, and what it has there; None: the settings say it. ``memory`` is in bytes."""

    backend: str | None = None
    cpu: float | None = None
    memory: int | None = None
    gpu: int | None = None


class Job:
    """One process. The jobs thread writes everything, and nothing again after ``exit``."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.backend: Backend  # this, setup and task from Jobs.start() on
        self.setup: tuple[bytes, list[Buffer]]  # the SETUP frame
        self.task: Task | None = None  # until it is sent
        self.number = 0  # the worker's, among all processes
        self.connection: Connection | None = None  # while it runs
        self.launched = threading.Event()  # or refused, or ended
        self.ready = False
        self.waiting: list[int] = []  # signals, until it is ready
        self.interrupted = False
        self.delay: LaunchDelay | None = None  # once a launch has failed
        self.failures = 0
        self.given_up = 0  # the signal that ended it before it had started
        self.pid: int | None = None
        self.host = ""
        self.id = ""  # the backend's name of the job
        self.devices: tuple[str, ...] = ()
        self.exit: Exit | None = None
        self.error: BaseException | None = None  # why it was not launched
        self.at_end: list[Callable[[], None]] = []  # called by the jobs thread when the process has ended
        self.sentinel, self._end = os.pipe()

    def finish(self, exit: Exit) -> None:
        """The process has ended, or will never start."""
        self.exit = exit
        self.task = None
        try:
            os.write(self._end, b"x")  # closing would not do: a forked child may have a copy
        except OSError:
            pass  # nobody waits
        os.close(self._end)
        self.launched.set()
        for call in self.at_end:
            guarded(call)


def guarded(call: Callable[[], object]) -> None:
    """Call what belongs to others: its exceptions must not end the thread."""
    try:
        call()
    except Exception:
        sys.excepthook(*sys.exc_info())
