"""`fiberexec doctor --backend NAME`: whether jobs can be started there, and reach this host.

    a job that runs the probe ── its log ─► Python, fiberexec, clock, routes, TLS
    then an executor, with one task: everything there is

All that is asked of a backend is what base.JobBackend says.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import fiberexec
from fiberexec import _config
from fiberexec import _messages as messages
from fiberexec._cli import show
from fiberexec._cli.doctor import BROKEN, OK, SKIPPED, WARNING, Finding, new_program, reported, run_task, source
from fiberexec._cli.listener import Listening
from fiberexec._cli.places import Places
from fiberexec._errors import FiberError, LaunchError
from fiberexec.backends import registry
from fiberexec.backends.base import Job, JobBackend, JobEnded

_LINGER = 120.0  # seconds that a probe stays, so that its log can be read
_SAYS_NOTHING = 60.0  # seconds after which a job that has started must have said something
_PAUSE = 0.2  # seconds
_SKEW, _LONG_SKEW = 60.0, 86400.0  # seconds; certificates hold from a day ago


def examine(settings: _config.Settings) -> Iterator[Finding]:
    """The findings about the settings' backend."""
    backend = None
    try:
        backend = registry.create_jobs(settings.backend, settings)
        yield from _examine(backend, settings)
    except (FiberError, ValueError) as error:
        yield Finding(settings.backend, BROKEN, str(error), "correct the setting that it names")
    except Exception as error:  # a defect of the backend, or an image that says nonsense
        yield Finding(settings.backend, BROKEN, f"{type(error).__name__}: {error}")
    finally:
        if backend is not None:
            backend.close()


def _examine(backend: JobBackend, settings: _config.Settings) -> Iterator[Finding]:
    name = backend.name
    reachable = _reachable(backend)
    yield reachable
    if reachable.status == BROKEN:
        yield Finding("job", SKIPPED, f"{name} cannot be reached")
        return
    yield from _leftovers(name)
    try:
        hosts = backend.advertise()
    except Exception as error:
        yield Finding("route", BROKEN, str(error), 'say how jobs reach this host: backend_options={"advertise_address": ...}')
        return
    try:
        listening = Listening(hosts[0])
    except OSError as error:
        yield Finding(
            "route", BROKEN, f"nothing can listen on {hosts[0]}, where jobs are to reach this host: {error}",
            'name an address that this host has: backend_options={"advertise_address": ...}',
        )  # fmt: skip
        return
    with listening:
        trial = _Trial(backend, settings)
        try:
            urls = [f"tls+tcp://{address}" for address in backend.reach(listening.port, trial.program)]
            begun = time.time()
            report = trial.run(listening, urls)
        except FiberError as error:
            yield Finding("job", BROKEN, str(error))
            return
        finally:
            trial.close()
    findings = list(_judged(report, begun, time.time(), urls, settings, hosts))
    yield from findings
    if any(finding.status == BROKEN for finding in findings):
        yield Finding("task", SKIPPED, "what is broken above would keep it from running")
    else:
        yield _task(settings)


def _reachable(backend: JobBackend) -> Finding:
    try:
        count = len(backend.list())
    except LaunchError as error:  # it says what to do
        return Finding(backend.name, BROKEN, str(error))
    except Exception as error:
        return Finding(backend.name, BROKEN, f"{type(error).__name__}: {error}")
    return Finding(backend.name, OK, f"it answers; jobs of fiberexec that are there: {count}")


def _leftovers(name: str) -> Iterator[Finding]:
    places = Places([name])
    places.close()
    left = [row for row in places.rows if row.driver_runs is False]
    if left:
        ids = ", ".join(row.id for row in left[:5]) + (", ..." if len(left) > 5 else "")
        remedy = f"fiberexec clean --backend {name}"
        yield Finding("leftovers", WARNING, f"{len(left)} jobs whose driver has ended: {ids}", remedy)


class _Trial:
    """A job that runs the probe."""

    def __init__(self, backend: JobBackend, settings: _config.Settings) -> None:
        self._backend = backend
        self._patience = settings.startup_timeout
        self.program = new_program()
        self._job = f"{self.program}-1"
        self._ended: queue.SimpleQueue[JobEnded] = queue.SimpleQueue()
        self._watch = threading.Thread(target=backend.watch, args=(self._report,), name="fiberexec-doctor-watch", daemon=True)
        self._started: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def _report(self, ended: list[JobEnded]) -> None:
        for each in ended:
            self._ended.put(each)

    def run(self, listening: Listening, urls: Sequence[str]) -> dict[str, Any]:
        """What the probe says. Raises LaunchError, which says why it says nothing."""
        credentials = listening.told(self._job, urls, _LINGER)
        job = Job(self._job, self.program, ("python", "-c", source(), "-"), credentials)
        self._watch.start()
        threading.Thread(target=self._start, args=(job,), name="fiberexec-doctor-start", daemon=True).start()
        self._wait_for_start()
        deadline = time.monotonic() + min(self._patience, _SAYS_NOTHING)
        while time.monotonic() < deadline:
            report = reported("\n".join(line.rstrip("\n") for line in self._log()))
            if report is not None:
                return report
            try:
                exit = self._ended.get(timeout=_PAUSE).exit
            except queue.Empty:
                continue
            report = reported(exit.log)
            if report is not None:
                return report
            how = " ".join(filter(None, (f"exit code {exit.code}", exit.reason)))
            raise LaunchError(f"the job ended before it could say anything ({how}): {exit.log.strip() or 'no log'}")
        why = self._backend.explain(self._job) or "no reason is known"
        raise LaunchError(f"the job has said nothing for {_SAYS_NOTHING:g} s: {why}")

    def _start(self, job: Job) -> None:
        try:
            self._backend.start(job)
            self._started.put(None)
        except BaseException as error:
            self._started.put(error)

    def _wait_for_start(self) -> None:
        """A start may build or pull an image: say so."""
        said = ""
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            try:
                error = self._started.get(timeout=2.0)
            except queue.Empty:
                doing = self._backend.explain(self._job)
                if doing != said:
                    show.note(f"... {doing}")
                    said = doing
                continue
            if error is not None:
                raise error if isinstance(error, FiberError) else LaunchError(f"{type(error).__name__}: {error}")
            return
        raise LaunchError(f"the job has not started within {self._patience:g} s: {said}")

    def _log(self) -> list[str]:
        try:
            return list(self._backend.logs(self._job))
        except FiberError:
            return []  # it has gone, or is not there yet

    def close(self) -> None:
        """Remove what has been made."""
        try:
            self._backend.terminate([self._job])
            self._backend.remove(self.program)
        except Exception as error:
            show.note(f"the trial job {self._job} could not be removed: {error}")


def _judged(
    report: dict[str, Any],
    begun: float,
    read: float,
    urls: Sequence[str],
    settings: _config.Settings,
    hosts: Sequence[str],  # addresses of this host
) -> Iterator[Finding]:
    image = f"image {settings.image!r}" if settings.image else "the image"
    ours, theirs = ".".join(map(str, sys.version_info[:2])), ".".join(map(str, report["python"]))
    line = f"RUN pip install fiberexec=={fiberexec.__version__}"
    if theirs.split(".")[:2] == ours.split("."):
        yield Finding("image", OK, f"a job runs, as user {report.get('user')}, with Python {theirs}")
    else:
        remedy = f"start the image from Python {ours} (FROM python:{ours}-slim), or use Python {theirs} here"
        found = f"{image} has Python {theirs}, this host {ours}: code does not travel between them"
        yield Finding("image", BROKEN, found, remedy)
    if "lacks" in report:
        yield Finding("image's fiberexec", BROKEN, f"{image}: {report['lacks']}", f"add this line to its Dockerfile: {line}")
    elif report["protocol"] != messages.VERSION:
        theirs = f"fiberexec {report['fiberexec']}"
        found = f"{image} has {theirs}, this host {fiberexec.__version__}: they do not understand each other"
        yield Finding("image's fiberexec", BROKEN, found, f"install the same in both: {line}")
    elif report["fiberexec"] != fiberexec.__version__:
        found = f"{image} has fiberexec {report['fiberexec']}, this host {fiberexec.__version__}; they understand each other"
        yield Finding("image's fiberexec", WARNING, found, f"install the same in both: {line}")
    else:
        yield Finding("image's fiberexec", OK, str(report["fiberexec"]))
    routes: dict[str, str] = report["routes"]
    good = [url for url in urls if not routes[url]]
    bad = "; ".join(f"{url}: {routes[url]}" for url in urls if routes[url])
    if not good:
        remedy = (
            "open the firewall of this host for connections from there (any port of this address), or name another address of "
            'this host: backend_options={"advertise_address": ...}'
        )
        yield Finding("route", BROKEN, f"a job cannot reach this host: {bad}", remedy)
    else:
        host = good[0].partition("//")[2].rpartition(":")[0]
        way = "directly" if host.strip("[]") in hosts else "by an outpost, which takes connections for it there"
        yield Finding("route", OK, f"a job reaches this host {way}: {host}")
    skew = max(begun - report["time"], report["time"] - read, 0.0)
    if skew > _SKEW:
        status = BROKEN if skew > _LONG_SKEW else WARNING
        found = f"the clocks of here and there differ by {show.age(skew)}"
        yield Finding("clock", status, found, "set them by NTP (chrony, systemd-timesyncd)")
    else:
        yield Finding("clock", OK, "those of here and there agree")
    if "tls" in report:
        if report["tls"]:
            remedy = "see whether something between here and there terminates TLS; the clocks must agree within a day"
            yield Finding("link", BROKEN, f"a job cannot link up with this host: {report['tls']}", remedy)
        else:
            yield Finding("link", OK, "a job has linked up with mutual TLS")
    else:
        yield Finding("link", SKIPPED, "it needs a route and fiberexec in the image")


def _task(settings: _config.Settings) -> Finding:
    started = time.monotonic()
    options = dict(settings.backend_options)
    try:
        executor = fiberexec.FiberExecutor(
            1, backend=settings.backend, image=settings.image, backend_options=options, startup_timeout=_SAYS_NOTHING
        )
        run_task(executor, 2 * _SAYS_NOTHING)
    except Exception as error:
        cause = error.__cause__ or error
        return Finding("task", BROKEN, f"a task could not be run: {cause}")
    return Finding("task", OK, f"an executor has started, run a task and ended in {time.monotonic() - started:.1f} s")
