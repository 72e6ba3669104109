"""What runs where: one row a worker of this host, or a job elsewhere, of every driver, on every backend that answers.

    registry ─► JobBackend.list() of each, at once ─┐
    the table of processes ─► workers of this host ─┴─► rows; a backend that does not answer is a problem, and no more
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from fiberexec import _config, _platform
from fiberexec._cli import processes, run_base
from fiberexec._errors import FiberError
from fiberexec.backends import registry
from fiberexec.backends.base import JobBackend

T = TypeVar("T")
LOCAL = "local"
WORKER, PROGRAM = "worker", "program"
_IMAGE = "fiberexec"  # some backends want one; nothing is started with it
_ENDED = ("exited", "dead", "succeeded", "failed")
_PATIENCE = 15.0  # seconds that a backend may take for an answer


class Row(NamedTuple):
    """A worker of this host, or a job. The names of these are those of ``--json``."""

    id: str
    backend: str
    state: str
    driver: str  # "pid@host", "" if nobody knows
    driver_runs: bool | None  # None: nobody can know here
    program: str  # what its jobs have in common; that of local workers is their driver
    user: str
    host: str
    image: str
    started: float | None  # seconds since the epoch
    command: str  # of the driver, where this host runs it; of a program that `fiberexec run` has started
    role: str  # "worker", or "program" for what `fiberexec run` has started

    def is_called(self, name: str) -> bool:
        """Whether that is the name of it, of its program or of its driver."""
        return name in (self.id, self.program, self.driver)

    def has_ended(self) -> bool:
        """Whether nothing of the job runs any more."""
        return self.state.lower() in _ENDED


class Places:
    """The backends, and what they run. ``problems`` says, by backend, why one could not be asked."""

    def __init__(self, names: Iterable[str] | None = None, namespace: str | None = None) -> None:
        """Ask these, by default all that can be had; in a cluster this namespace. Raises FiberError for wrong settings."""
        settings = _config.load()
        self.namespace = namespace
        self.problems: dict[str, str] = {}
        self.rows: list[Row] = []
        self._backends: dict[str, JobBackend] = {}
        self._table: processes.Table = {}
        names = registry.names() if names is None else list(names)
        found = _all_at_once({name: _lister(name, settings, namespace) for name in names if name != LOCAL}, self._backends)
        try:
            self._table = processes.table()
            if LOCAL in names:
                self.rows = [*(_local(*pair) for pair in processes.workers(self._table)), *_programs()]
        except (FiberError, OSError) as error:
            self.problems[LOCAL] = str(error)
        for name, jobs in found.items():
            if isinstance(jobs, list):
                self.rows += [self._row(name, job) for job in jobs]
            else:
                self.problems[name] = _said(jobs)
        # A process of this host may be called as such a job is, and has no other program's workers.
        programs = {(row.backend, row.id): row for row in self.rows if row.role == PROGRAM and row.backend != LOCAL}
        # Drivers that are jobs themselves call their host as the job is called; whose they are, their own host does not know.
        for number, row in enumerate(self.rows):
            if (led := programs.get((row.backend, row.driver.partition("@")[2]))) is not None:
                self.rows[number] = row._replace(driver_runs=False if led.has_ended() else row.driver_runs, user=led.user)
        self.rows.sort(key=lambda row: (row.backend, row.started or 0.0, row.id))

    def backend(self, name: str) -> JobBackend:
        """One that has been asked."""
        return self._backends[name]

    def answered(self, name: str) -> bool:
        """Whether a backend has been asked, and said what it runs."""
        return name in self._backends and name not in self.problems

    def driver(self, row: Row) -> processes.Process | None:
        """The process of a row's driver, if it runs on this host."""
        return self._table.get(int(row.driver.partition("@")[0])) if row.driver_runs else None

    def process(self, row: Row) -> processes.Process:
        """The process of a worker of this host."""
        return self._table[int(row.id.rpartition("-")[2])]

    def close(self) -> None:
        """Close what is open to backends."""
        for backend in self._backends.values():
            backend.close()

    def _row(self, name: str, job: Mapping[str, Any]) -> Row:
        labels = job.get("labels") or {}
        driver = str(labels.get("fiberexec.driver", ""))
        started = float(job["started"]) if job.get("started") else None
        since, space = time.time() if started is None else started, str(labels.get("fiberexec.space", ""))
        runs = processes.runs(driver, since, self._table, space) if driver else None
        user = str(labels.get("fiberexec.user", ""))
        if user.isdecimal() and driver.partition("@")[2] == _platform.host_name():
            user = _platform.user_name(int(user))
        command = self._table[int(driver.partition("@")[0])].command if runs else str(labels.get(run_base.COMMAND, ""))
        told = {key: str(job.get(key) or "") for key in ("id", "state", "program", "host", "image")}
        role = PROGRAM if labels.get(run_base.ROLE) == run_base.DRIVER else WORKER
        known = {"backend": name, "driver": driver, "user": user, "command": command, "role": role}
        return Row(**told, **known, driver_runs=runs, started=started)


def _local(worker: processes.Process, driver: processes.Process) -> Row:
    host = _platform.host_name()
    name = f"{driver.pid}@{host}"
    user = _platform.user_name(worker.user)
    job = f"local-{worker.pid}"  # as the executor calls it
    return Row(job, LOCAL, "running", name, True, name, user, host, "", worker.started, driver.command, WORKER)


def _programs() -> list[Row]:
    """What `fiberexec run` has started on this host."""
    from fiberexec._cli.run_local import LocalPlace

    host = _platform.host_name()
    user = _platform.user_name(os.getuid())
    return [
        Row(name, LOCAL, "running" if runs else "exited", "", None, name, user, host, "", started, command, PROGRAM)
        for name, runs, started, command in LocalPlace().list()
    ]


def _settings_for(name: str, settings: _config.Settings, namespace: str | None) -> _config.Settings:
    """What a backend needs to find its jobs: of the settings, what is meant for it."""
    options = settings.backend_options if settings.backend == name else {}
    if namespace is not None and name == "kubernetes":
        options = {**options, "namespace": namespace}
    return _config.Settings(backend=name, image=settings.image or _IMAGE, backend_options=options)


def _lister(
    name: str, settings: _config.Settings, namespace: str | None
) -> Callable[[dict[str, JobBackend]], list[dict[str, Any]]]:
    def ask(made: dict[str, JobBackend]) -> list[dict[str, Any]]:
        made[name] = backend = registry.create_jobs(name, _settings_for(name, settings, namespace))
        return backend.list()

    return ask


def _all_at_once(calls: Mapping[str, Callable[[Any], T]], made: Any) -> dict[str, T | BaseException]:
    """What the calls return or raise. One that takes too long is given up."""
    found: dict[str, T | BaseException] = {}

    def run(name: str, call: Callable[[Any], T]) -> None:
        try:
            found[name] = call(made)
        except BaseException as error:
            found[name] = error

    threads = {
        name: threading.Thread(target=run, args=(name, call), name=f"fiberexec-ask-{name}", daemon=True)
        for name, call in calls.items()
    }
    for thread in threads.values():
        thread.start()
    end = time.monotonic() + _PATIENCE
    for thread in threads.values():
        thread.join(max(0.0, end - time.monotonic()))
    late = FiberError(f"it has not answered within {_PATIENCE:g} seconds")
    return {name: found.get(name, late) for name in calls}


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, (FiberError, ValueError)) else f"{type(error).__name__}: {error}"
