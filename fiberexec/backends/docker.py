"""Jobs as containers of a Docker engine, on this host or another.

    start() ─► create, attach to its stdin, start, write the credentials ─► a container that runs the agent
    watch() ◄─ the engine's events; after an outage, and whenever in doubt, what the engine says of each container

Rules:
- The credentials go through the container's stdin: nothing of them is in its arguments, environment or description.
- An end is reported when the engine has confirmed it. Then the container is removed.
- An engine that is away ends no job. What it ended itself when it went is nobody's fault.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fiberexec import _platform
from fiberexec.backends import _docker_errors as errors
from fiberexec.backends import _docker_options as options
from fiberexec.backends._containers import signed
from fiberexec.backends._docker_engine import Engine, remove, sdk, write
from fiberexec.backends._docker_images import EARLY, Image, Images
from fiberexec.backends._docker_reader import Reader
from fiberexec.backends._docker_watch import Connected, Events, Happened
from fiberexec.backends._image_errors import quoted
from fiberexec.backends.base import Exit, Job, JobEnded, Pool, Resources

_STARTS = 8  # containers that are started at once: more do not come up any sooner
_LINGER = 1.0  # seconds that a container stays when it has ended: who follows its log gets the last lines
_KEPT = 100  # explanations of jobs that have ended
_logger = logging.getLogger("fiberexec")
_STOPPED = (0, 137, 143, 255)  # exit codes of what an engine ends when it goes


class _Known:
    """A job as this backend knows it."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self.image: Image | None = None
        self.started = False  # start() has succeeded: its end is to be reported
        self.unwanted = False  # terminate() has been called
        self.killed = False  # by somebody who asked the engine to
        self.code: int | None = None  # of its end, as an event said
        self.stirred = False  # something happened to it

    def age(self) -> float:
        return time.monotonic() - self.since


class DockerBackend:
    """See base.JobBackend. A job is a container, as ``image``, ``cpu``, ``memory``, ``gpu`` and ``backend_options`` say."""

    name = "docker"
    idle_timeout: float | None = 60.0

    def __init__(self, settings: Any, max_workers: int | None = None) -> None:
        self._options = options.check(settings)
        self._size = Resources(settings.cpu or 0, settings.memory or 0)
        self.default_workers = _platform.cpu_count()
        self.largest = Pool(
            "docker",
            Resources(
                _platform.cpu_count() if settings.cpu is None else settings.cpu,
                _platform.memory_total() if settings.memory is None else settings.memory,
                settings.gpu or 0,
            ),
            tuple(map(str, range(settings.gpu or 0))),
        )
        self._driver = f"{os.getpid()}@{_platform.host_name()}"
        self._lock = threading.Lock()
        self._jobs: dict[str, _Known] = {}
        self._leftover: set[str] = set()  # containers of starts that failed because the engine went away
        self._leaving: dict[str, float] = {}  # containers that have ended, and when they are removed
        self._explained: dict[str, str] = {}
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._slots = threading.BoundedSemaphore(_STARTS)
        self._engine = Engine(_STARTS)
        self._reader = Reader(self._engine)
        self._images = Images(self._options)
        self._watching = False

    def advertise(self) -> tuple[str, ...]:
        """The address of the engine's bridge where the engine is here; else it must be given."""
        return self._options.advertise or self._engine.gateway(self._options.host.get("network_mode", "bridge"))

    def reach(self, port: int, program: str) -> tuple[str, ...]:
        """Every address is reached directly."""
        return tuple(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in self.advertise())

    # -- starting

    def start(self, job: Job) -> None:
        """Start a container. Raises LaunchError."""
        known = _Known()
        with self._lock:
            self._jobs[job.id] = known
        image = self._options.image or ""
        try:
            with self._slots:
                client = self._engine.client()
                self._engine.must_hold(self._size)
                known.image = self._images.ready(client)
                image = known.image.name
                self._run(client, job, known.image)
        except BaseException as error:
            with self._lock:
                del self._jobs[job.id]
            if not isinstance(error, Exception):
                raise
            if isinstance(error, sdk().ImageNotFound):
                self._images.forget()  # the next start looks for it again
            raise self._engine.failed(error, f"starting container {job.id}", image, job.id) from error
        known.since = time.monotonic()
        known.started = True
        if known.stirred or known.unwanted:
            self._queue.put(Happened(job.id, "", {}))

    def _run(self, client: Any, job: Job, image: Image) -> None:
        wanted = self._options
        command = [wanted.python or job.command[0], *job.command[1:]]
        entrypoint = None if wanted.entrypoint is None else [*wanted.entrypoint, *command]
        environment = {"FIBEREXEC_IMAGE": image.name}
        if image.user and wanted.user is None:
            environment.update(HOME="/tmp", USER="fiberexec")
        container = {"working_dir": image.folder, **wanted.container}
        api = client.api
        made = api.create_container(
            image.name,
            command if entrypoint is None else None,
            entrypoint=entrypoint,
            name=job.id,
            user=image.user,
            environment=environment,
            stdin_open=True,
            labels={**wanted.labels, **self._labels(job)},
            host_config=api.create_host_config(**wanted.host),
            **container,
        )["Id"]
        try:
            stdin = api.attach_socket(made, params={"stdin": 1, "stream": 1})
            try:
                api.start(made)
                write(stdin, job.credentials)
            finally:
                getattr(stdin, "_response", stdin).close()  # the SDK hangs the whole connection on its socket
        except BaseException:
            self._discard(client, job.id)
            raise

    def _labels(self, job: Job) -> dict[str, str]:
        return {
            "fiberexec.program": job.program,
            "fiberexec.job": job.id,
            "fiberexec.user": _platform.user_name(os.getuid()),
            "fiberexec.started": str(int(time.time())),
            "fiberexec.driver": self._driver,
            "fiberexec.space": _platform.pid_space(),
        }

    def _discard(self, client: Any, job: str) -> None:
        """Remove a container; one that the engine cannot remove now is removed when it is back."""
        try:
            remove(client, job)
        except Exception:
            self._remove_later(job)

    def terminate(self, jobs: Sequence[str]) -> None:
        """Kill and remove containers. One that is being started follows when it has been."""
        for job in jobs:
            with self._lock:
                known = self._jobs.get(job)
                if known is not None:
                    known.unwanted = True
                if job in self._leaving or (known is not None and not known.started):
                    continue
            try:
                remove(self._engine.client(), job)
            except Exception as error:
                if not errors.is_outage(error):
                    raise self._engine.failed(error, f"removing container {job}", name=job) from error
                self._remove_later(job)

    def _remove_later(self, job: str) -> None:
        with self._lock:
            self._leftover.add(job)
        self._queue.put(Happened(job, "", {}))

    # -- watching

    def watch(self, report: Callable[[list[JobEnded]], None]) -> None:
        """Report ends until close()."""
        self._watching = True
        events = Events(self._engine.client, f"fiberexec.driver={self._driver}", self._queue)
        doubtful: dict[str, bool] = {}  # jobs that have to be looked at, and whether an outage lies between
        try:
            while True:
                try:
                    item = self._queue.get(timeout=0.5 if doubtful or self._leaving else None)
                except queue.Empty:
                    item = Happened("", "", {})
                if item is None:
                    return
                self._note(item, doubtful)
                if self._queue.empty():
                    ended = self._look_at(doubtful)
                    if ended:
                        report(ended)
                    self._see_off(time.monotonic())
        finally:
            self._watching = False
            events.close()
            self._engine.drop()

    def _note(self, item: Connected | Happened, doubtful: dict[str, bool]) -> None:
        with self._lock:
            if isinstance(item, Connected):
                doubtful.update({job: item.again for job, known in self._jobs.items() if known.started})
                doubtful.update(dict.fromkeys(self._leftover, False))
                for one in self._jobs.values():
                    one.stirred = True  # start() has those looked at that it is about to hand over
                return
            known = self._jobs.get(item.job)
            if item.job in self._leftover:
                doubtful.setdefault(item.job, False)
            if known is None:
                return
            if item.action == "kill":
                known.killed = known.killed or item.attributes.get("signal") in ("9", "15")
                return
            known.stirred = True
            if item.attributes.get("exitCode", "").isdecimal():
                known.code = int(item.attributes["exitCode"])
            if known.started:
                doubtful.setdefault(item.job, False)

    def _look_at(self, doubtful: dict[str, bool]) -> list[JobEnded]:
        """Ask the engine about jobs; those that it answers for are no longer in doubt."""
        ended: list[JobEnded] = []
        for job, outage in list(doubtful.items()):
            with self._lock:
                known = self._jobs.get(job)
                unwanted = job in self._leftover or (known is not None and known.unwanted)
            try:
                if unwanted:
                    remove(self._engine.client(), job)
                    with self._lock:
                        self._leftover.discard(job)
                if known is not None and known.killed and not (unwanted or outage):
                    doubtful[job] = outage = True  # was it somebody, or is the engine being stopped?
                    self._engine.must_be_open()
                    outage = False
                end = self._end_of(job, known, outage) if known is not None else None
            except Exception as error:
                _logger.debug("Docker does not say how %s is: %r", job, error)
                if errors.is_outage(error):
                    break  # all of them stay in doubt
                continue
            del doubtful[job]
            if end is not None:
                with self._lock:
                    self._jobs.pop(job, None)
                ended.append(end)
        return ended

    def _end_of(self, job: str, known: _Known, outage: bool) -> JobEnded | None:
        """A job's end, None if it has not ended. Its container is removed."""
        try:
            state = self._reader.state(job)
        except sdk().NotFound:
            text = "" if known.unwanted else "its container was removed by somebody"
            self._remember(job, text)
            return JobEnded(job, Exit(signed(known.code), "" if known.unwanted else "Removed", text))
        if state.get("Running") or state.get("Paused") or state.get("Restarting") or state.get("Status") == "created":
            return None
        code = int(state.get("ExitCode", 0))
        log = self._reader.tail(job)
        with self._lock:
            self._leaving[job] = time.monotonic() + _LINGER
        # A child's death for want of memory leaves the same mark as the first process's own.
        if code == 137 and state.get("OOMKilled") and not (known.unwanted or known.killed):
            limit = f" of {self._size.memory / 2**20:g} MiB" if self._size.memory else ""
            text = f"container {job} took more memory than its limit{limit}: the whole job was killed; give it more (memory=)"
            self._remember(job, text)
            return JobEnded(job, Exit(-9, "OOMKilled", f"{log}{text}\n"))
        if outage and code in _STOPPED and not known.unwanted:
            self._remember(job, "the Docker engine was stopped")
            return JobEnded(job, Exit(signed(code), "EngineStopped", log, infrastructure=True))
        reason = self._judge(job, known, code, log, bool(state.get("OOMKilled")))
        if not reason:
            return JobEnded(job, Exit(signed(code), "", log))
        return JobEnded(job, Exit(signed(code), "", f"{log}{reason}\n"), f"Docker: {self._explained[job]}")

    def _see_off(self, now: float) -> None:
        """Remove the containers that have been there for long enough since they ended."""
        with self._lock:
            due = [job for job, when in self._leaving.items() if when <= now]
        for job in due:
            try:
                remove(self._engine.client(), job)
            except Exception as error:
                _logger.debug("container %s cannot be removed now: %r", job, error)
                if errors.is_outage(error):
                    return
                continue
            with self._lock:
                self._leaving.pop(job, None)  # close() may have been faster

    def _judge(self, job: str, known: _Known, code: int, log: str, memory: bool) -> str:
        """Why no other container of its image can do better than one that ended by itself; "" if one may."""
        image = known.image
        if image is None or known.unwanted:
            return ""
        with self._lock:
            others = any(other.started and other.image == image and other.age() >= EARLY for other in self._jobs.values())
        reason = self._images.judge(image, job, code, log, memory=memory, lived=known.age(), others=others)
        story = f"container {job} (image {image.name}) ended with exit code {code}{quoted(log)}"
        self._remember(job, f"{reason}. {story}" if reason else story)
        return reason

    def _remember(self, job: str, text: str) -> None:
        self._explained[job] = text
        while len(self._explained) > _KEPT:
            del self._explained[next(iter(self._explained))]

    # -- what else is asked

    def explain(self, job: str) -> str:
        """What is known of a job that has not shown up."""
        if job in self._explained:
            return self._explained[job]
        if self._images.doing:
            return self._images.doing
        try:
            status = str(self._reader.state(job).get("Status", "unknown"))
            log = self._reader.tail(job)
        except Exception as error:
            return str(self._engine.failed(error, f"looking at container {job}", name=job))
        text = f"container {job} is {status}"
        if status != "running" or log:
            return text + quoted(log)
        where = " or ".join(self._options.advertise) or "the driver's address on its network"
        return (
            f"{text} and has said nothing; if that lasts, it cannot reach {where}: open the firewall for it, or give another "
            "address (advertise_address)"
        )

    def list(self) -> list[dict[str, Any]]:
        """Every container of fiberexec on this engine."""
        return self._reader.jobs()

    def logs(self, job: str, follow: bool = False) -> Iterator[str]:
        """The lines that a job has written; with ``follow`` until it ends. Raises FiberError for an unknown one."""
        return self._reader.lines(job, follow)

    def remove(self, program: str) -> int:
        """Kill and remove all containers of a program; returns how many there were."""
        from concurrent.futures import ThreadPoolExecutor

        try:
            client = self._engine.client()
            found = client.api.containers(all=True, quiet=True, filters={"label": f"fiberexec.program={program}"})
            with ThreadPoolExecutor(_STARTS) as pool:
                list(pool.map(lambda one: remove(client, one["Id"]), found))
        except Exception as error:
            raise self._engine.failed(error, f"removing the containers of {program}") from error
        return len(found)

    def close(self) -> None:
        """End watch(), and remove what has ended."""
        self._queue.put(None)
        self._see_off(math.inf)
        if not self._watching:
            self._engine.drop()
