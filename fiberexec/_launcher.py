"""The launcher: the thread of a driver that starts jobs, and hears how they end, for everybody who asks the hub for some.

    hub ── start, terminate, code ─► launcher ─ JobBackend ─► docker, kubernetes, ...
        ◄─ failed, ended, answer ──

Rules:
- There is one in each process of this host that uses jobs, from the first use to the process' end. Processes in jobs have
  none: what they want is started by the launcher that started them.
- What may take its time is done by threads of its own, so that one slow job holds up no other.
- The keys of the program are made here, and never touch a disk of this host.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from typing import Any

from fiberexec import _messages as messages
from fiberexec import _platform
from fiberexec._errors import HubLost, LaunchError
from fiberexec._hub import client, launch
from fiberexec._hub.wire import HUB
from fiberexec._remote import restored
from fiberexec.backends import registry
from fiberexec.backends.base import Job, JobBackend, JobEnded

SERVER = "hub"  # the name on the hub's certificate
ENDED = ("exited", "dead", "succeeded", "failed")  # states of jobs of which nothing runs any more
_AT_ONCE = 16  # calls of backends
_LAST = 2.0  # seconds in which what is left of jobs is to be removed at the end; then it is the hub's affair
_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # seconds after which a backend that failed to watch its jobs is asked again
_logger = logging.getLogger("fiberexec")


class _Place:
    """A backend with the settings that its jobs have."""

    def __init__(self, backend: JobBackend, settings: Any) -> None:
        self.backend = backend
        self.settings = settings
        self.port = 0  # of the hub's that its jobs come by
        self.lock = threading.Lock()  # guards port: the hub is asked once
        self.failed = ""  # how its watch ended the last time that it did


class Launcher:
    """See the module's description."""

    def __init__(self) -> None:
        from fiberexec._tls import Authority

        self.program = f"fx-{os.urandom(5).hex()}"
        self._authority = Authority()
        self._hub = launch.start()
        self.id: int = client.call("new", HUB, "launcher", self.program, hub=self._hub)
        self._channel = client.subscribe(self._hub, ("events", self.id, ()))
        self._lock = threading.Lock()  # guards what follows
        self._cleared = threading.Condition(self._lock)
        self._places: dict[str, _Place] = {}  # by settings
        self._jobs: dict[str, _Place] = {}  # that were started and have not ended
        self._leaving: set[str] = set()  # that have ended, and of which something may be left
        self._wanted: set[str] = set()  # jobs that the hub has asked for, and not given up
        self._preparing: set[str] = set()  # jobs for which the way to the hub is being made, which may take its time
        self._closed = False
        self._ending = threading.Event()  # wakes those that wait before they try again
        self._starts = threading.Semaphore(_AT_ONCE)
        self._others = threading.Semaphore(_AT_ONCE)  # they wait for no start
        self._thread = threading.Thread(target=self._run, name="fiberexec-launcher", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End, and return when that is done. Jobs that are left are the hub's affair."""
        with self._lock:
            self._closed = True
            self._ending.set()
            places = list(self._places.values())
            self._cleared.wait_for(lambda: not self._leaving, _LAST)
            left = self._jobs or self._leaving
        if not left:
            try:
                client.post(self._hub, ("leave", self.id, ()))
            except HubLost:
                pass
        self._channel.shutdown()
        for place in places:
            place.backend.close()
        if self._thread is not threading.current_thread():
            self._thread.join()

    # -- the thread

    def _run(self) -> None:
        try:
            while True:
                _, body, _ = self._channel.stream.receive_one()
                verb, *args = messages.decode(body)
                if verb == "start":
                    self._wanted.add(args[0])
                elif verb == "terminate":
                    self._wanted.discard(args[0])
                self._in_thread(getattr(self, "_" + verb), *args)
        except (OSError, EOFError):
            pass
        finally:
            self._channel.close()
            if not self._closed:  # the hub has died: nobody can reach the jobs any more
                for job in list(self._jobs):
                    self._in_thread(self._terminate, job)

    def _in_thread(self, call: Any, *args: Any) -> None:
        room = self._starts if call == self._start else self._others

        def guarded() -> None:
            with room:
                try:
                    call(*args)
                except HubLost:
                    pass
                except Exception as error:
                    _logger.warning("%s", error, exc_info=None if isinstance(error, LaunchError) else error)

        try:
            threading.Thread(target=guarded, name="fiberexec-launcher-call", daemon=True).start()
        except RuntimeError:  # the interpreter is ending, and starts no thread then from Python 3.12 on
            guarded()

    def _start(self, job: str, told: tuple[str, dict[str, Any]]) -> None:
        try:
            if job not in self._wanted:
                raise LaunchError("it was given up")
            place = self._place(told)
            with self._lock:
                self._jobs[job] = place
            self._preparing.add(job)
            try:
                urls = self._urls(place, told)
            finally:
                self._preparing.discard(job)
            if job not in self._wanted:
                raise LaunchError("it was given up")
            certificate, key = self._authority.certificate(job)
            settings = place.settings
            credentials = {
                "job": job,
                "hub": urls,
                "address": (self._hub.path, self._hub.token.hex()),
                "server": SERVER,
                "ca": self._authority.ca,
                "certificate": certificate,
                "key": key,
                "driver_timeout": settings.driver_timeout,
                "env": {**_same_place(told), **settings.env},
                "shipped": "".join(settings.ship),
                "workers": settings.workers_per_job,
            }
            command = "python", "-m", "fiberexec._agent", "-"
            place.backend.start(Job(job, self.program, command, json.dumps(credentials).encode()))
            if job not in self._wanted:  # nobody could end it before
                place.backend.terminate([job])
        except Exception as error:
            self._jobs.pop(job, None)
            self._wanted.discard(job)
            final = isinstance(error, (LaunchError, ValueError)) and getattr(error, "final", True)
            text = str(error) if isinstance(error, (LaunchError, ValueError)) else f"{type(error).__name__}: {error}"
            self._post("failed", job, text, final)

    def _terminate(self, job: str) -> None:
        if job in self._preparing:
            self._post("failed", job, "it was given up", False)
            return  # _start() sees that nobody wants it
        place = self._jobs.get(job)
        if place is not None:
            place.backend.terminate([job])

    def _explain(self, job: str) -> None:
        """Why is a job not there yet?"""
        place = self._jobs.get(job)
        try:
            text = place.backend.explain(job) or place.failed if place is not None else "its start is being prepared"
            if not text and job in self._preparing:
                text = "the way by which jobs reach this host is being made"
        except Exception as error:
            text = repr(error)
        self._post("explained", job, text)

    def _code(self, request: int, name: str) -> None:
        from fiberexec import _bundle

        try:
            digest, archive = _bundle.bundle(name) or ("", b"")
        except Exception as error:  # a defect; the worker must not wait for ever
            digest, archive = "", f"the driver could not pack it: {error!r}".encode()
        client.call("answer", self.id, request, digest, buffers=(archive,), hub=self._hub)

    def _ended(self, found: list[JobEnded]) -> None:
        """What watch() of a backend reports."""
        for job, exit, final in found:
            with self._lock:
                place = self._jobs.pop(job, None)
                if place is not None:
                    self._leaving.add(job)
            self._wanted.discard(job)
            if place is not None:
                self._post("ended", job, tuple(exit), final)
                self._in_thread(self._clear, place, job)

    def _clear(self, place: _Place, job: str) -> None:
        """Remove what is left of a job that has ended."""
        try:
            place.backend.terminate([job])
        except Exception:
            with self._lock:
                self._jobs[job] = place
            raise
        finally:
            with self._lock:
                self._leaving.discard(job)
                self._cleared.notify_all()

    def _post(self, op: str, *args: object) -> None:
        try:
            client.post(self._hub, (op, self.id, args))
        except HubLost:
            pass

    def _place(self, told: tuple[str, dict[str, Any]]) -> _Place:
        key = json.dumps(told, sort_keys=True)
        with self._lock:
            place = self._places.get(key)
            if place is None:
                name, settings = restored(told)
                backend = registry.create_jobs(name, settings)
                place = _Place(backend, settings)
                threading.Thread(target=self._watch, args=(place,), name="fiberexec-launcher-watch", daemon=True).start()
                self._places[key] = place
        return place

    def _watch(self, place: _Place) -> None:
        backend = place.backend
        self._in_thread(_sweep, backend)
        pause = _PAUSE
        while True:
            began = time.monotonic()
            try:
                backend.watch(self._ended)
                error: Exception = RuntimeError("it has stopped telling")
            except Exception as found:
                error = found
            if self._closed:
                return
            # Agents are heard of on their own, and their silence too. Others' ends may have gone unheard.
            place.failed = text = f"backend {backend.name!r} failed to say how jobs end: {error!r}"
            _logger.warning("%s; it is asked again", text, exc_info=error)
            for job in [job for job, where in list(self._jobs.items()) if where is place]:
                self._post("unwatched", job, f"{text}; so job {job}, which had not shown up, is given up")
            pause = _PAUSE if time.monotonic() > began + _LONGEST_PAUSE else min(2 * pause, _LONGEST_PAUSE)
            if self._ending.wait(pause):
                return

    def _urls(self, place: _Place, told: tuple[str, dict[str, Any]]) -> list[str]:
        with place.lock:
            if not place.port:
                certificate, key = self._authority.certificate(SERVER, server=True)
                hosts = place.backend.advertise()
                tls = self._authority.ca, certificate, key
                path = [folder for folder in sys.path if folder]
                try:
                    place.port = client.call("listen", self.id, hosts[0], tls, path, told, hub=self._hub)
                except HubLost:
                    raise
                except OSError as error:
                    raise LaunchError(
                        f"{error}. What to do: the first advertise_address must be one of this host's own; behind it may be "
                        "others, by which jobs reach this host",
                        final=True,
                    ) from error
        return [f"tls+tcp://{address}" for address in place.backend.reach(place.port, self.program)]


def _same_place(told: tuple[str, dict[str, Any]]) -> dict[str, str]:
    """The variables by which what a task starts runs where its own job does, unless it says otherwise."""
    name, values = told
    found = {"FIBEREXEC_BACKEND": name}
    if values.get("image"):
        found["FIBEREXEC_IMAGE"] = values["image"]
    if values.get("backend_options"):
        found["FIBEREXEC_BACKEND_OPTIONS"] = json.dumps(values["backend_options"])
    return found


def _sweep(backend: JobBackend) -> None:
    """Remove what is left of programs of this host that were killed together with their hub: their jobs have ended since."""
    left: dict[str, bool] = {}  # by program
    space = _platform.pid_space()
    try:
        for job in backend.list():
            labels = job.get("labels", {})
            pid, _, host = labels.get("fiberexec.driver", "").partition("@")
            here = host == _platform.host_name() and labels.get("fiberexec.space", space) == space
            gone = here and pid.isdecimal() and not _exists(int(pid))
            left[job["program"]] = left.get(job["program"], True) and gone and job["state"].lower() in ENDED
        for program, is_left in left.items():
            if is_left:
                backend.remove(program)
    except Exception as error:
        _logger.debug("what other programs have left in backend %r could not be removed: %r", backend.name, error)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


_lock = threading.Lock()  # guards _launcher
_launcher: Launcher | None = None


def get() -> int:
    """The id of this process' launcher, which is started if there is none."""
    global _launcher
    with launch._lock, _lock:  # in the order of launch.close(), which calls close() below
        if _launcher is None:
            _launcher = Launcher()
        return _launcher.id


def close() -> None:
    """End this process' launcher, if it has one."""
    global _launcher
    with _lock:
        launcher, _launcher = _launcher, None
    if launcher is not None:
        launcher.close()


def _in_child() -> None:
    global _lock, _launcher
    _lock = threading.Lock()
    _launcher = None


launch.at_close.insert(0, close)
os.register_at_fork(after_in_child=_in_child)
