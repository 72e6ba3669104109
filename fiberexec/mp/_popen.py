"""A process as its parent holds it: what multiprocessing's Process asks of a ``_popen``."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Mapping
from functools import partial
from multiprocessing import process
from typing import TYPE_CHECKING, Any

from fiberexec import _config
from fiberexec import _messages as messages
from fiberexec._hub import launch as hub
from fiberexec._output import log_levels
from fiberexec._serialize import dumps, dumps_call
from fiberexec._stream import Buffer
from fiberexec.backends.base import Exit
from fiberexec.mp import _child, _job, _jobs
from fiberexec.mp.context import standard, util

if TYPE_CHECKING:
    from fiberexec.mp.process import Process

_PATIENCE = 1.0  # seconds that start() waits for a launch, to raise its error
_RUN = 1  # the number of the child's only function
_environ = dict(os.environ)  # as backends may know it already
_changed: set[str] = set()  # names of what has ever been different since


class Popen:
    """Launches the process when it is made. Raises LaunchError, ConfigError or PicklingError when that cannot be."""

    method = "fiberexec"

    def __init__(self, process_obj: Process, size: _job.Size, method: str | None) -> None:
        util._flush_std_streams()
        self.returncode: int | None = None
        self._job = job = _job.Job(size)
        self.at_end = job.at_end  # for what is pickled for this process alone
        self.sentinel = job.sentinel
        self._finalizer = util.Finalize(self, os.close, (job.sentinel,))
        try:
            call = dumps_call(self._pickle(process_obj), {})
            self._jobs = _jobs.get()
            self._jobs.start(job, partial(_setup, method, size.backend), partial(_task, *call))
        except BaseException:
            job.finish(Exit())
            self.close()
            raise
        if job.launched.wait(_PATIENCE) and job.pid is None and job.error is not None:
            self.close()
            raise job.error

    def _pickle(self, process_obj: Process) -> tuple[Buffer, ...]:
        standard.set_spawning_popen(self)
        try:
            data, buffers = dumps(process_obj)
        finally:
            standard.set_spawning_popen(None)
        return data, *buffers

    @property
    def job(self) -> _job.Job:
        """The job, once it is known whether it runs."""
        self._job.launched.wait()
        return self._job

    @property
    def pid(self) -> int | None:
        return self._job.pid

    @property
    def exit(self) -> Exit | None:
        return self._job.exit

    def poll(self) -> int | None:
        exit = self.exit
        if exit is not None:
            self.returncode = 255 if exit.code is None else exit.code
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the exit code, or None after ``timeout`` seconds."""
        if self.poll() is None:
            waiting = select.poll()
            waiting.register(self.sentinel, select.POLLIN)
            try:
                waiting.poll(None if timeout is None else max(0, timeout) * 1000)
            except KeyboardInterrupt:
                self._jobs.interrupt()
                raise
        return self.poll()

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def interrupt(self) -> None:
        self._signal(signal.SIGINT)

    def _signal(self, number: int) -> None:
        self._jobs.signal(self._job, number)

    def close(self) -> None:
        self._finalizer()

    # What multiprocessing's own connections and sockets ask for when they are pickled for a child.

    def duplicate_for_child(self, fd: int) -> int:
        return fd

    def DupFd(self, fd: int) -> Any:
        from multiprocessing import resource_sharer

        return resource_sharer.DupFd(fd)


def _setup(method: str | None, backend: str | None, same_host: bool) -> tuple[bytes, list[Buffer]]:
    """The SETUP frame: see Worker._setup, and prepare() in the child."""
    settings = _config.load(backend=backend)
    _changed.update(name for name in {*os.environ, *_environ} if os.environ.get(name) != _environ.get(name))
    told = {
        "authkey": bytes(process.current_process().authkey),
        "hub": tuple(hub.address()),
        "environ": {name: os.environ.get(name) for name in list(_changed)} | ({} if same_host else _variables(settings)),
        "interruptible": signal.getsignal(signal.SIGINT) is not signal.SIG_IGN,
        "log_level": util._logger and util._logger.getEffectiveLevel(),
        "log_to_stderr": util._log_to_stderr,
        "method": method,
    }
    data, buffers = dumps((_child.prepare, (told,)))
    try:
        directory = os.getcwd()
    except OSError:
        directory = "/"
    message = {
        "argv": list(getattr(sys, "argv", [])),
        "cwd": directory if same_host else None,
        "env": dict(settings.env),
        "log_levels": log_levels(),
        "prefix": settings.prefix_output,
        "initializer": data,
    }
    if same_host:
        message["path"] = list(sys.path)
    return messages.encode(message), buffers


def _variables(settings: _config.Settings) -> dict[str, str]:
    """The settings that apply here, for a child on another host, which starts its own processes in the same way.

    Neither the file that they may come from is there, nor this process' environment.
    """
    found = {"backend": settings.backend}
    for name, source in settings.sources.items():
        value = getattr(settings, name)
        if source in (_config.DEFAULT, _config.ARGUMENT):
            continue
        elif name == "memory":
            found[name] = f"{value >> 10}Ki"
        elif isinstance(value, Mapping):
            found[name] = json.dumps(dict(value))
        elif isinstance(value, tuple):
            found[name] = os.pathsep.join(value)
        else:
            found[name] = str(value)
    return {_config.PREFIX + name.upper(): text for name, text in found.items()}


def _task(data: bytes, buffers: list[Buffer], devices: str | None) -> tuple[bytes, list[Buffer]]:
    """The TASKS frame: one function, one call of it."""
    function, _ = dumps(_child.run)
    extra = None if devices is None else {"devices": devices}
    unit = (1, 0, 1, _RUN, 0, 1, messages.CALL, data, len(buffers), extra)
    return messages.encode(([(_RUN, function, 0)], [], [unit], None)), buffers
