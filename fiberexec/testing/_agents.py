"""Jobs as processes of this machine: all that a job elsewhere has, its agent, link and keys, without any service."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fiberexec import _platform
from fiberexec._errors import ConfigError, LaunchError
from fiberexec.backends.base import Exit, Job, JobEnded, Pool, Resources

_PREFIX = "fiberexec-agents-"
_TAIL = 2048  # bytes of an agent's output that are told


class AgentBackend:
    """See base.JobBackend: ``FiberExecutor(backend="agents")``.

    ``backend_options``: ``python``, the interpreter that jobs run; ``prefix``, words in front of the command (such as
    ``["ip", "netns", "exec", "host1"]``); ``address``, what agents dial.
    """

    name = "agents"
    idle_timeout: float | None = None

    def __init__(self, settings: Any, max_workers: int | None = None) -> None:
        options = {"python": sys.executable, "prefix": [], "address": "127.0.0.1", **settings.backend_options}
        if len(options) > 3:
            raise ConfigError(f"backend 'agents' has the options python, prefix and address, not {sorted(options)}")
        self._options = options
        count = _platform.cpu_count()
        self.default_workers = count
        machine = Resources(count, _platform.memory_total(), len(_platform.gpu_devices()))
        size = Resources(
            settings.cpu or machine.cpu,
            settings.memory or machine.memory,
            machine.gpu if settings.gpu is None else settings.gpu,
        )
        if size.cpu > machine.cpu or size.memory > machine.memory or size.gpu > machine.gpu:
            raise ConfigError(f"a job of {size} does not fit this machine, which has {machine}")
        self.largest = Pool(self.name, size)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ended: queue.Queue[JobEnded | None] = queue.Queue()

    def advertise(self) -> tuple[str, ...]:
        return (self._options["address"],)

    def reach(self, port: int, program: str) -> tuple[str, ...]:
        """The address is this host's own."""
        return tuple(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in self.advertise())

    def start(self, job: Job) -> None:
        folder = _folder(job.id)
        folder.mkdir(mode=0o700)
        root = str(Path(__file__).parents[2])
        environ = {**os.environ, "PYTHONPATH": root, "TMPDIR": str(folder)}
        command = [*self._options["prefix"], self._options["python"], *job.command[1:]]
        try:
            with open(folder / "output", "wb") as output:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    cwd=folder,
                    env=environ,
                    start_new_session=True,
                )
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise LaunchError(f"no agent could be started on this machine: {error}") from error
        self._processes[job.id] = process
        threading.Thread(target=self._wait, args=(job.id, process), daemon=True).start()
        assert process.stdin is not None
        try:
            process.stdin.write(job.credentials)
            process.stdin.close()
        except OSError:
            pass  # its end is about to be reported

    def _wait(self, job: str, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        log = "".join(self.logs(job))[-_TAIL:]
        self._ended.put(JobEnded(job, Exit(code, log=log)))

    def watch(self, report: Callable[[list[JobEnded]], None]) -> None:
        while (ended := self._ended.get()) is not None:
            report([ended])

    def terminate(self, jobs: Sequence[str]) -> None:
        for job in jobs:
            process = self._processes.get(job)
            if process is not None:
                _kill(process.pid)
                process.wait()
                shutil.rmtree(_folder(job), ignore_errors=True)
                self._processes.pop(job, None)  # not before: close() must find what another thread is busy with

    def explain(self, job: str) -> str:
        return "".join(self.logs(job))[-_TAIL:]

    def list(self) -> list[dict[str, Any]]:
        return [{"id": job, "program": job.rpartition("-")[0], "state": "running"} for job in self._processes]

    def logs(self, job: str, follow: bool = False) -> Iterator[str]:
        try:
            with open(_folder(job) / "output", encoding="utf-8", errors="replace") as file:
                yield from file
        except OSError:
            return

    def remove(self, program: str) -> int:
        """Agents end by themselves when the hub says so, or is silent; what they leave is a folder."""
        found = list(Path(tempfile.gettempdir()).glob(f"{_PREFIX}{program}-*"))
        deadline = time.monotonic() + 1.0
        for folder in found:
            while folder.exists() and time.monotonic() < deadline:
                shutil.rmtree(folder, ignore_errors=True)
        return len(found)

    def close(self) -> None:
        self.terminate(list(self._processes))
        self._ended.put(None)


def _folder(job: str) -> Path:
    return Path(tempfile.gettempdir()) / f"{_PREFIX}{job}"


def _kill(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except OSError:
        pass
