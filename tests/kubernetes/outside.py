"""A driver outside the cluster: a program on a host that no pod reaches, and that reaches nothing but the API server."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import services
from clusters import get

import fiberexec

LIMIT = 90.0  # seconds, for what takes a few where nothing else runs
PRELUDE = """
import json, os, platform, signal, sys, time
from fiberexec import FiberExecutor, current_task
def say(value): print(json.dumps(value), flush=True)
def where(seconds=0.0, number=0):
    time.sleep(seconds)
    return number, platform.node(), os.getpid(), current_task().attempt
"""


class Driver:
    """A program on that host. It says and hears lines."""

    def __init__(self, host: str, code: str, folder: Path, space: str, kubeconfig: str, image: str) -> None:
        self._folder = tempfile.mkdtemp(
            prefix="fx", dir="/tmp"
        )  # a hub that is killed leaves its own; sockets want short paths
        file = folder / "program.py"
        file.write_text(code)
        environ = {name: value for name, value in os.environ.items() if not name.startswith("FIBEREXEC_")}
        environ |= {
            "KUBECONFIG": kubeconfig,
            "PYTHONPATH": str(Path(fiberexec.__file__).parents[1]),
            "FIBEREXEC_BACKEND": "kubernetes",
            "FIBEREXEC_IMAGE": image,
            "TMPDIR": self._folder,
            "FIBEREXEC_BACKEND_OPTIONS": json.dumps({"namespace": space}),
        }
        command = services.in_host(host, sys.executable, "-u", str(file))
        self.host = host
        self.space = space
        self.said: list[str] = []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
        )
        self._changed = threading.Condition()
        self._over = False
        self.errors = ""
        self._threads = [threading.Thread(target=run) for run in (self._read, self._read_errors)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.said.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors += line

    def says(self, number: int, seconds: float = LIMIT) -> Any:
        """The value that it says as its so-manieth, from 0."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.said) > number or self._over, seconds), self.errors
            assert len(self.said) > number, self.errors
            return json.loads(self.said[number])

    def tell(self, text: str = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()

    def end(self, seconds: float = LIMIT) -> int:
        """Its exit code."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it does not end: {self.said} {self.errors}")
        for thread in self._threads:
            thread.join(LIMIT)
        return code

    def processes(self) -> list[int]:
        """The driver, and all that it has started: its hub, and its link."""
        found = subprocess.run(["ip", "netns", "pids", self.host], capture_output=True, text=True, check=True).stdout
        return [int(pid) for pid in found.split()]

    def link(self) -> int:
        """The process with the link to the outpost."""
        for pid in self.processes():
            with contextlib.suppress(OSError):  # it has ended
                if "_kubernetes_link" in Path(f"/proc/{pid}/cmdline").read_text():
                    return pid
        raise AssertionError("there is no link")

    def close(self) -> None:
        for pid in self.processes() if self.process.poll() is None else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join(LIMIT)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass
        shutil.rmtree(self._folder, ignore_errors=True)


Outside = Callable[..., Driver]


def left(space: str) -> list[str]:
    """What of fiberexec is in a namespace."""
    return [one["metadata"]["name"] for one in get("-n", space, "pods,secrets,jobs", "-l", "fiberexec.program")["items"]]
