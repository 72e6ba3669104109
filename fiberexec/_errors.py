"""The exception tree. Each class says what happened; each message says to which task, where, and what to do next."""

from __future__ import annotations

import concurrent.futures


class FiberError(Exception):
    """Base class of the exceptions that fiberexec raises; ``PicklingError`` alone is the standard's and no more."""


class ConfigError(FiberError, ValueError):
    """A setting or an argument has a wrong name, type or value. The message names its source."""


class ResourceError(FiberError, ValueError):
    """A task asks for more cpu, memory or gpu than the backend can ever give. Raised by ``submit()`` and ``map()``."""


class ForkedError(FiberError, RuntimeError):
    """An executor was used in a forked child of the process that made it. Make a new executor in the child."""


class LaunchError(FiberError, RuntimeError):
    """A backend could not start a worker.

    ``final`` is true when trying again cannot help (a missing image, a refused permission).
    """

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class BrokenExecutor(FiberError, concurrent.futures.BrokenExecutor):
    """The executor cannot go on: no worker can be started, an initializer failed, or its workers were terminated.

    ``__cause__`` holds the reason. The standard's ``BrokenExecutor`` is a base class.
    """


class TaskTimeout(FiberError, TimeoutError):
    """One attempt of a task ran longer than its ``timeout``; the worker that ran it has been stopped.

    ``task_id`` names the task (the same across attempts), ``timeout`` is the limit in seconds.
    """

    def __init__(self, message: str, task_id: int = 0, timeout: float = 0.0) -> None:
        super().__init__(message)
        self.task_id = task_id
        self.timeout = timeout

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (*self.args, self.task_id, self.timeout)


class WorkerLost(FiberError, RuntimeError):
    """The workers that executed a task died ``max_worker_losses`` times. The executor itself is not broken.

    ``task_id``, ``host``, ``pid``, ``exitcode`` (negative: the signal's number; None: unknown), ``reason`` and
    ``log`` (the last lines that the worker wrote to stderr) describe the last loss, ``losses`` counts them.
    """

    def __init__(
        self,
        message: str,
        *,
        task_id: int = 0,
        host: str = "",
        pid: int = 0,
        exitcode: int | None = None,
        reason: str = "",
        log: str = "",
        losses: int = 1,
    ) -> None:
        super().__init__(message)
        self.task_id = task_id
        self.host = host
        self.pid = pid
        self.exitcode = exitcode
        self.reason = reason
        self.log = log
        self.losses = losses

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, dict(self.__dict__))


class HubLost(FiberError, ConnectionError):
    """The hub, which holds what a program's processes share (queues, locks, ...), has gone, and so have these objects."""


class HubFull(FiberError, MemoryError):
    """The hub holds as many bytes as it may, because consumers do not keep up. Give the queue a ``maxsize``."""


def _rebuild(cls: type[BaseException], args: tuple[object, ...], state: dict[str, object]) -> BaseException:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error
