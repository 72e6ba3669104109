"""What the fault tests share: waiting for a fact, and finding processes by a mark in their environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

BOUND = 20.0  # seconds after which what should have happened never will
GONE = 15.0  # seconds that processes may outlive what they belong to


def _until(fact: Callable[[], object], within: float = BOUND) -> bool:
    deadline = time.monotonic() + within
    while not fact():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def until() -> Callable[..., bool]:
    """``until(fact, within=20.0)`` polls until the fact is true, and says whether it became so in time."""
    return _until


class Mark:
    """A word in the environment of processes, by which they are found wherever they are."""

    NAME = "TEST_OF_FAULTS"

    def __init__(self) -> None:
        self.word = uuid.uuid4().hex

    @property
    def variables(self) -> dict[str, str]:
        return {self.NAME: self.word}

    def processes(self) -> dict[int, str]:
        """Command lines of the live processes with this mark, by pid."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    if self.word.encode() in (folder / "environ").read_bytes():
                        line = (folder / "cmdline").read_bytes()
                        found[int(folder.name)] = line.replace(b"\0", b" ").decode()
                except OSError:
                    continue  # it ended while we looked, or it is not ours
        return found

    def left(self) -> dict[int, str]:
        """Those that are still there after GONE seconds."""
        _until(lambda: not self.processes(), GONE)
        return self.processes()


@pytest.fixture
def mark() -> Iterator[Mark]:
    mark = Mark()
    yield mark
    for pid in mark.processes():
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def package_root() -> str:
    """The folder that holds the package under test."""
    import fiberexec

    return str(Path(fiberexec.__file__).resolve().parent.parent)


BEGIN = """
import os, resource, sys, time, warnings
from fiberexec import BrokenExecutor, FiberExecutor, LaunchError

def square(n):
    return n * n

def limit(name, number):
    resource.setrlimit(getattr(resource, name), (number, resource.getrlimit(getattr(resource, name))[1]))

def descriptors():
    return len(os.listdir("/proc/self/fd"))
"""


@pytest.fixture
def run(tmp_path: Path, package_root: str) -> Callable[..., str]:
    """``run(source, before=[...], **environment)`` runs a program to its end and returns what it printed."""

    def run_program(
        source: str,
        before: list[str] | None = None,
        user: int | None = None,
        python: str = sys.executable,
        **environment: str,
    ) -> str:
        program = tmp_path / "program.py"
        program.write_text(BEGIN + source)
        path = os.pathsep.join([*filter(None, [environment.pop("first", "")]), package_root])
        done = subprocess.run(
            [*(before or []), python, "-W", "error::ResourceWarning", str(program)],
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            cwd="/",
            user=user,
        )
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    return run_program
