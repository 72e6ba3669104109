"""What all services share: a folder, a lock, programs that are installed when missing, and daemons that outlive us."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# Sockets lie in it, whose paths have at most 107 bytes: it must stay short.
STATE = Path(os.environ.get("TEST_SERVICES_FOLDER") or "/tmp/fiberexec-test-services")
# What is worth keeping when the machine was restarted: images.
KEPT = Path("/var/lib/fiberexec-test-services")

# A user's PATH often lacks the folders where daemons and network tools are.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


class ServiceError(Exception):
    """A service cannot be started or stopped; the message says why and what to do."""


def say(text: str) -> None:
    print(f"services: {text}", file=sys.stderr, flush=True)


def need_root(purpose: str) -> None:
    if os.geteuid() != 0:
        raise ServiceError(f"{purpose} needs root: this is user {os.geteuid()}; try it with sudo")


@contextmanager
def locked(name: str, seconds: float = 900) -> Iterator[None]:
    """Hold the lock of one family of services, so that test runs may all start it at once."""
    STATE.mkdir(mode=0o755, parents=True, exist_ok=True)
    with open(STATE / f"{name}.lock", "a") as file:
        if not wait_until(lambda: _lock(file.fileno()), seconds):
            raise ServiceError(f"somebody else has been at work on {name} for {seconds:.0f} s")
        yield


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_until(done: Callable[[], bool], seconds: float) -> bool:
    """Whether it became true within that time."""
    deadline = time.monotonic() + seconds
    pause = 0.02
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    return True


def run(*command: str | Path, seconds: float = 600, stdin: bytes | None = None) -> str:
    """What the command printed; `ServiceError` with the end of its complaint where it failed."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceError(f"{error}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise ServiceError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{said[-3000:]}")
    return done.stdout.decode(errors="replace")


def succeeds(*command: str | Path, seconds: float = 10) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=seconds).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def install(programs: dict[str, str]) -> None:
    """Install, by apt, the packages of those programs that are not there: {"dockerd": "docker.io"}."""
    packages = sorted({package for program, package in programs.items() if not shutil.which(program)})
    if not packages:
        return
    need_root(f"installing {', '.join(packages)}")
    if not shutil.which("apt-get"):
        raise ServiceError(f"please install {', '.join(packages)}: there is no apt-get here to do it")
    say(f"installing {', '.join(packages)}")
    command = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *packages]
    with _no_service_starts():
        try:
            _apt(command)
        except ServiceError:  # a fresh machine has no package lists, an old one has stale ones
            _apt(["apt-get", "update", "--quiet"])
            _apt(command)


def _apt(command: Sequence[str]) -> None:
    run("env", "DEBIAN_FRONTEND=noninteractive", *command, "-o", "DPkg::Lock::Timeout=600", seconds=1200)


@contextmanager
def _no_service_starts() -> Iterator[None]:
    """Packages start their daemons as they are installed; ours are started here, with options of our own."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink(missing_ok=True)


@dataclass(frozen=True)
class Daemon:
    """A program in the background, found again by later calls."""

    name: str
    folder: Path = STATE

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def _note(self) -> Path:
        return self.folder / f"{self.name}.pid"

    def start(self, *command: str | Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # A session of its own: Ctrl-C at the test run is not meant for it.
        with open(self.log, "ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self._note.write_text(f"{process.pid} {_birth(process.pid)}")

    def pid(self) -> int | None:
        """Its process, or None where it is not running (any more)."""
        try:
            pid, birth = self._note.read_text().split()
        except (OSError, ValueError):
            return None
        return int(pid) if birth == _birth(int(pid)) else None

    def wait(self, answers: Callable[[], bool], seconds: float = 60) -> None:
        """Return when it answers, raise when it has died or does not within that time."""
        wait_until(lambda: self.pid() is None or answers(), seconds)
        if self.pid() is None or not answers():
            state = "runs but does not answer" if self.pid() else "ended at once"
            raise ServiceError(f"{self.name} {state}; the end of {self.log}:\n{self._tail()}")

    def _tail(self) -> str:
        with suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        return "(no log)"

    def stop(self, how: signal.Signals = signal.SIGTERM, seconds: float = 20) -> None:
        """End it, gently at first; nothing happens where it has ended already."""
        for each in (how, signal.SIGKILL):
            pid = self.pid()
            if pid is None:
                break
            with suppress(ProcessLookupError):
                os.kill(pid, each)
            wait_until(lambda: self.pid() is None, seconds)
        self._note.unlink(missing_ok=True)


def _birth(pid: int) -> str:
    """When a process started: a pid is given out again, the pair of both is not. Empty for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # a zombie has ended, whenever it is collected
