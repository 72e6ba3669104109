"""What tests of fiberexec.mp have in common."""

from __future__ import annotations

import fcntl
import os
import platform
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

import fiberexec
from fiberexec import mp

LIMIT = 90.0 if os.environ.get("TEST_BACKENDS") else 30.0  # seconds after which a test that waits gives up
LONG = 1000.0  # seconds that somebody sleeps whom somebody ends
MIB = 1 << 20
SHORT = 0.05  # seconds that something is given to happen which must not


def eventually(fact: Callable[[], Any], limit: float = LIMIT) -> Any:
    """What a function returns, once it is true."""
    deadline = time.monotonic() + limit
    while not (found := fact()):
        assert time.monotonic() < deadline, "it did not become so"
        time.sleep(0.002)
    return found


def process(target: Callable[..., object], *args: Any) -> mp.Process:
    started = mp.Process(target=target, args=args)
    started.start()
    return started


def ended(*processes: mp.Process) -> list[int | None]:
    for each in processes:
        each.join(LIMIT)
    return [each.exitcode for each in processes]


def exit_code(process: mp.Process) -> int | None:
    """The exit code of a process, which must end by itself."""
    process.join(LIMIT)
    assert not process.is_alive()
    return process.exitcode


def run(target: Callable[..., object], *args: Any, **options: Any) -> mp.Process:
    """Run a target in a process, to its end."""
    process = mp.Process(target=target, args=args, **options)
    process.start()
    exit_code(process)
    return process


def in_thread(target: Callable[..., object], *args: Any) -> threading.Thread:
    started = threading.Thread(target=target, args=args)
    started.start()
    return started


def sending(end: Any, *values: object) -> threading.Thread:
    """Send values on a connection, in a thread."""

    def send() -> None:
        for value in values:
            end.send(value)

    return in_thread(send)


def close(*ends: Any) -> None:
    for end in ends:
        end.close()


def killed(pid: int) -> None:
    """Kill a child that was forked."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def forked(*calls: Callable[[], object]) -> int:
    pid = os.fork()
    if not pid:
        signal.alarm(60)
        try:
            for call in calls:
                call()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    return pid


def say(path: Path, *words: object) -> None:
    """Write words into a file that appears with its content."""
    part = path.with_suffix(".part")
    part.write_text(" ".join(map(str, words)))
    part.rename(path)


def heard(path: Path) -> list[str]:
    """The words in a file, once it is there."""
    deadline = time.monotonic() + LIMIT
    while not path.exists():
        assert time.monotonic() < deadline, f"nobody wrote {path.name}"
        time.sleep(0.002)
    return path.read_text().split()


def gone(pid: int) -> bool:
    """Whether a process ends within the limit."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.002)
    return False


def stay(path: str | Path) -> int:
    """Be on a file until this process has ended, and all that has inherited the descriptor, which is returned."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def deserted(path: str | Path) -> bool:
    """Whether all that were on a file have ended. Unlike a pid, a file is the same for processes in containers."""
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def kill(process: Any) -> None:
    """Kill a process, which may be in a container of this machine, behind the back of its backend."""
    assert process.pid
    os.kill(process.pid if process.host == platform.node() else _pid_here(process.host, process.pid), signal.SIGKILL)


def _pid_here(host: str, pid: int) -> int:
    """What a process is called here that has this pid in the container with this name."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
            names = status.partition("\nNSpid:")[2].partition("\n")[0].split()
            if len(names) > 1 and int(names[-1]) == pid and (folder / "root/etc/hostname").read_text().strip() == host:
                return int(folder.name)
        except OSError:
            continue  # it has ended
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        import pytest

        pytest.skip("a pod does not see the processes of others")
    raise ProcessLookupError(f"no process {pid} of {host}")


def script(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    return path


def start_script(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(fiberexec.__file__).parent.parent)},
    )


def run_script(path: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a program."""
    with start_script(path) as program:
        out, err = program.communicate(timeout=LIMIT)
    return program.returncode, out, err


class Gate:
    """Children wait at it until the test opens it for some of them."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = str(path)
        self._fd = os.open(path, os.O_RDWR)

    def open(self, count: int = 1) -> None:
        os.write(self._fd, bytes(count))

    def close(self) -> None:
        os.close(self._fd)


def wait_at(gate: str) -> None:
    os.read(os.open(gate, os.O_RDONLY), 1)


class Log:
    """Lines in a file, in the order in which processes have written them."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.write()

    def write(self, *lines: object) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for line in lines:
            os.write(fd, f"{line}\n".encode())
        os.close(fd)

    def lines(self) -> list[str]:
        return Path(self.path).read_text().split("\n")[:-1]

    def wait(self, count: int) -> list[str]:
        return list(eventually(lambda: len(lines := self.lines()) >= count and lines))


class Unloadable:
    def __reduce__(self) -> tuple[object, ...]:
        return int, ("not a number",)
