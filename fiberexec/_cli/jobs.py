"""``ps``, ``logs``, ``kill`` and ``clean``: what they do, without how it is printed."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fiberexec import _platform
from fiberexec._cli import processes
from fiberexec._cli.places import LOCAL, PROGRAM, Places, Row
from fiberexec._errors import FiberError
from fiberexec._hub import folder
from fiberexec.backends._kubernetes_api import ApiError

KUBERNETES = "kubernetes"
_ALWAYS = "/tmp"  # where hubs' folders are if that of temporary files has too long a name
_END_TIMEOUT = 10.0  # seconds that a driver may take to end after SIGTERM


class Killed(NamedTuple):
    """What has been ended."""

    target: str
    backend: str
    kind: str  # "job", "program" or "driver"
    number: int  # of jobs; 1 for a driver


def find(places: Places, name: str) -> list[Row]:
    """The rows of a job, a program or a driver. Raises FiberError if there are none."""
    rows = [row for row in places.rows if row.is_called(name)]
    if not rows:
        asked = "; ".join(f"{backend} could not be asked: {why}" for backend, why in places.problems.items())
        raise FiberError(
            f"there is no job, program or driver {name!r}: `fiberexec ps` shows all there are, and what has ended is "
            f"removed{f' ({asked})' if asked else ''}"
        )
    return rows


def logs(places: Places, job: str, follow: bool) -> Iterator[str]:
    """The lines that a job has written. Raises FiberError for what has no log."""
    row = find(places, job)[0]
    if row.id != job:
        ids = ", ".join(each.id for each in find(places, job))
        raise FiberError(f"{job!r} is no job but a program: its jobs are {ids}")
    if row.backend == LOCAL:
        raise FiberError(f"{job} is a process of this host: what it writes is where its driver writes, process {row.driver}")
    try:
        yield from places.backend(row.backend).logs(job, follow)
    except (OSError, ApiError) as error:  # the engine or the API server has gone
        raise FiberError(
            f"the log of {job} broke off: {row.backend} does not answer any more ({error}). What to do: ask again when it does"
        ) from error


def kill(places: Places, name: str) -> tuple[list[Killed], list[str]]:
    """End a job, or a program with its driver; returns what was ended, and what could not be."""
    rows = find(places, name)
    if rows[0].id == name:
        return _kill_job(places, rows[0]), []
    done, warnings = [], []
    drivers = {row.driver: row for row in rows}
    for driver, row in drivers.items():
        process = places.driver(row)
        if process is not None:
            _signal(process, signal.SIGTERM)
            done.append(Killed(driver, row.backend, "driver", 1))
            if not _ends(process):
                warnings.append(f"the driver {driver} has not ended yet; kill -KILL {process.pid} ends it, and its workers")
        elif row.driver_runs is None:
            name = driver or "(unknown)"
            warnings.append(f"whether the driver {name} still runs cannot be known here: if so, it may start more")
    for backend, program in dict.fromkeys((row.backend, row.program) for row in rows if row.backend != LOCAL):
        done.append(Killed(program, backend, "program", places.backend(backend).remove(program)))
    return done, warnings


def _kill_job(places: Places, row: Row) -> list[Killed]:
    if row.backend == LOCAL:
        _signal(places.process(row), signal.SIGKILL, group=True)
    else:
        places.backend(row.backend).terminate([row.id])
    done = [Killed(row.id, row.backend, "job", 1)]
    if row.role == PROGRAM:  # a driver, whose workers nobody else ends at once
        near = [each for each in places.rows if each.backend == row.backend and each.id != row.id]
        for program in sorted({each.program for each in near if each.driver.partition("@")[2] == row.id}):
            done.append(Killed(program, row.backend, "program", places.backend(row.backend).remove(program)))
    return done


def _signal(process: processes.Process, number: signal.Signals, group: bool = False) -> None:
    """Raises FiberError for somebody else's process."""
    try:
        if processes.same(process):
            (os.killpg if group else os.kill)(process.pid, number)
    except ProcessLookupError:
        pass
    except PermissionError:
        owner = _platform.user_name(process.user)
        raise FiberError(f"process {process.pid} belongs to {owner}: only {owner} or root may end it") from None


def _ends(process: processes.Process) -> bool:
    deadline = time.monotonic() + _END_TIMEOUT
    while processes.same(process):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class Removed(NamedTuple):
    """What `clean` has removed, or would."""

    backend: str
    program: str  # or the folder
    driver: str
    number: int  # of jobs; 1 for a folder


def clean(places: Places, everything: bool, pretend: bool, local: bool) -> tuple[list[Removed], list[Row]]:
    """Remove what dead drivers have left; returns that, and what was spared because nobody can know about its driver.

    ``everything``: whoever made it. ``local``: folders of this host too.
    """
    found: dict[tuple[str, str], list[Row]] = {}
    for row in places.rows:
        if row.backend != LOCAL:
            found.setdefault((row.backend, row.program), []).append(row)
    removed, spared = [], []
    for (backend, program), rows in found.items():
        # A program's processes may have launchers each; all must have gone.
        # What `fiberexec run` has started stays until somebody has seen how it ended.
        dead = all(row.driver_runs is False and row.role != PROGRAM for row in rows)
        if program and (dead or everything):
            count = len(rows) if pretend else places.backend(backend).remove(program)
            removed.append(Removed(backend, program, rows[0].driver, count))
        elif not any(row.driver_runs for row in rows):
            spared += rows
    if everything and places.answered(KUBERNETES):
        removed += _clean_jobs({program for backend, program in found if backend == KUBERNETES}, places.namespace, pretend)
    if local:
        removed += _clean_folders(pretend)
    return removed, spared


def _clean_jobs(seen: Collection[str], namespace: str | None, pretend: bool) -> Sequence[Removed]:
    """The Jobs of programs: those whose pods have been ``seen`` are no news."""
    from fiberexec._cli.run_kubernetes import KubernetesPlace

    place = KubernetesPlace(namespace)
    try:
        names = place.names()
        if not pretend:
            for name in names:
                place.remove(name)
        return [Removed(KUBERNETES, name, f"1@{name}", 1) for name in names if name not in seen]
    finally:
        place.close()


def _clean_folders(pretend: bool) -> Sequence[Removed]:
    found: list[Removed] = []
    for parent in dict.fromkeys((tempfile.gettempdir(), _ALWAYS)):
        before = {path for path in _hub_folders(parent) if not pretend or _is_left(path)}
        if not pretend:
            folder.sweep(parent)
            before -= _hub_folders(parent)
        found += [Removed(LOCAL, str(path), "", 1) for path in sorted(before)]
    return found


def _hub_folders(parent: str) -> set[Path]:
    return set(Path(parent).glob(f"{folder._PREFIX}*"))


def _is_left(path: Path) -> bool:
    """Whether a sweep would remove a folder."""
    try:
        if path.lstat().st_uid != os.geteuid():
            return False
        lock = folder._lock(str(path))
    except OSError:
        return False  # it is in use, or has gone, or nobody can know
    try:
        return not folder._listens(str(path / folder.SOCKET))
    finally:
        os.close(lock)
