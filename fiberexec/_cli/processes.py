"""The workers of this host, and the drivers that they belong to, as the system's table of processes shows them.

Nothing is written down anywhere when an executor starts: a fork server is known by its command line, its children are
workers, and its parent is the driver. So what is shown is there, and nothing of a killed program stays behind.
"""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from fiberexec import _platform
from fiberexec._errors import FiberError

_FORK_SERVER = "from fiberexec._forkserver import main"  # see LocalBackend
_AGENT = "fiberexec._agent"  # what is below one belongs to a job, which another backend shows
_TOLERANCE = 2.0  # seconds: how exactly anybody knows when something started


class Process(NamedTuple):
    """A process of this host."""

    pid: int
    parent: int
    group: int
    user: int
    started: float  # seconds since the epoch
    ended: bool  # nobody has collected it yet
    command: str


Table = dict[int, Process]


def table() -> Table:
    """Every process that this one may see. Raises FiberError where the system does not tell."""
    found = _from_proc() if _platform.LINUX else _from_ps()
    return {process.pid: process for process in found}


def _from_proc() -> list[Process]:
    ticks = os.sysconf("SC_CLK_TCK")
    with open("/proc/uptime") as file:
        boot = time.time() - float(file.read().split()[0])
    found = []
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        folder = f"/proc/{name}"
        try:
            user = os.stat(folder).st_uid
            with open(f"{folder}/stat", encoding="utf-8", errors="replace") as file:
                words = file.read().rpartition(")")[2].split()
            with open(f"{folder}/cmdline", "rb") as file:
                command = file.read().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has ended meanwhile
        started = boot + int(words[19]) / ticks
        found.append(Process(int(name), int(words[1]), int(words[2]), user, started, words[0] in "ZX", command))
    return found


def _from_ps() -> list[Process]:
    import subprocess

    columns = ("pid", "ppid", "pgid", "uid", "etime", "stat", "command")
    command = ["ps", "-axww", *(word for column in columns for word in ("-o", f"{column}="))]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        raise FiberError(f"the processes of this host cannot be listed: {error}") from None
    now = time.time()
    found = []
    for line in done.stdout.decode(errors="replace").splitlines():
        words = line.split(None, len(columns) - 1)
        if len(words) == len(columns):
            pid, parent, group, user = map(int, words[:4])
            started = now - _seconds(words[4])
            found.append(Process(pid, parent, group, user, started, words[5].startswith("Z"), words[6].strip()))
    return found


def _seconds(elapsed: str) -> float:
    """What ps calls etime: [[days-]hours:]minutes:seconds."""
    days, _, clock = elapsed.rpartition("-")
    total = 0
    for part in clock.split(":"):
        total = 60 * total + int(part)
    return 86400.0 * int(days or 0) + total


def workers(processes: Table) -> list[tuple[Process, Process]]:
    """(worker, driver) of every worker that a driver of this host has started on it."""
    roles: dict[int, str] = {}

    def role(pid: int) -> str:
        """What a process is to us: "server", "worker", "" for neither. Their command lines are the same, by fork."""
        if pid not in roles:
            process = processes.get(pid)
            if process is None or _FORK_SERVER not in process.command or process.group != pid:
                roles[pid] = ""
            else:
                roles[pid] = "worker" if role(process.parent) == "server" else "server"
        return roles[pid]

    found = []
    for process in processes.values():
        if role(process.pid) == "worker":
            driver = processes.get(processes[process.parent].parent)
            if driver is not None and not _is_init(driver) and not _in_job(processes, driver):
                found.append((process, driver))
    return found


def _is_init(process: Process) -> bool:
    """Whether this is what adopts the children of the dead, rather than a container's first process that is a driver."""
    return process.pid == 1 and "python" not in process.command


def _in_job(processes: Table, process: Process | None) -> bool:
    while process is not None:
        if _AGENT in process.command:
            return True
        process = processes.get(process.parent)
    return False


def runs(driver: str, since: float, processes: Table, space: str = "") -> bool | None:
    """Whether a driver ("pid@host") that has made something at ``since`` still runs; None if nobody can know here.

    ``space``: what _platform.pid_space() is for the driver, "" if nobody knows.
    """
    number, _, host = driver.partition("@")
    if host != _platform.host_name() or not number.isdecimal() or space not in ("", _platform.pid_space()):
        return None
    pid = int(number)
    process = processes.get(pid)
    if process is not None:
        # One that started later has got the same number, unless the clock has been set meanwhile.
        return False if process.ended else True if process.started <= since + _TOLERANCE else None
    if _exists(pid) or any(pid in _inner(other) for other in processes):
        return None  # it is hidden, or a container that calls itself like this host has one of that number
    return False


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _inner(pid: int) -> list[int]:
    """The numbers that a process has in the containers that it is in."""
    if _platform.LINUX:
        try:
            with open(f"/proc/{pid}/status", errors="replace") as file:
                for line in file:
                    if line.startswith("NSpid:"):
                        return list(map(int, line.split()[2:]))
        except OSError:
            pass
    return []


def same(process: Process) -> bool:
    """Whether a process of the table still runs."""
    now = table().get(process.pid)
    return now is not None and not now.ended and abs(now.started - process.started) <= _TOLERANCE
