"""Jobs as pods of a Kubernetes cluster.

    start() ─► a pod, and a Secret that it owns, with the credentials ─► a container that runs the agent
    watch() ◄─ one watch over all pods of the program: what happened to each

Rules:
- The Secret belongs to the pod, and the pod to the driver's where that is a pod: what owns nothing any more is collected by
  the cluster itself.
- An end is reported when the cluster says that nothing of the job runs. An API server that is away ends no job.
- A pod that cannot start is removed and reported with the cluster's own words, and so is the next start.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fiberexec._errors import ConfigError, FiberError, LaunchError
from fiberexec._session import UNREACHABLE
from fiberexec.backends import _kubernetes_errors as errors
from fiberexec.backends import _kubernetes_options as options
from fiberexec.backends import _kubernetes_pods as pods
from fiberexec.backends import _kubernetes_watch as watches
from fiberexec.backends._image_errors import quoted
from fiberexec.backends._kubernetes_api import Api, ApiError, lines
from fiberexec.backends._kubernetes_config import Setup, in_cluster, must_have_token
from fiberexec.backends._kubernetes_jobs import Known, Verdicts
from fiberexec.backends._kubernetes_make import Maker
from fiberexec.backends._kubernetes_outpost import Way
from fiberexec.backends._kubernetes_reader import Reader, described
from fiberexec.backends.base import Exit, Job, JobEnded, Pool, Resources

_STARTS = 10  # pods that are created at once
_WORKERS = 8  # where the user does not say how many
_ASKED = 5.0  # seconds for which who asks what there is waits for a server that is busy or away
_LINGER = 5.0  # seconds that processes of a pod may live whose object somebody has removed by force
_SOON = 0.1  # seconds until what has happened is looked at
_LOOK = 5.0  # seconds between looks at the events of a pod that does not start
_SETUP = ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox")  # events that no pod's own state tells
_logger = logging.getLogger("fiberexec")


class KubernetesBackend:
    """See base.JobBackend. A job is a pod, as ``image``, ``cpu``, ``memory``, ``gpu`` and ``backend_options`` say."""

    name = "kubernetes"
    idle_timeout: float | None = 60.0

    def __init__(self, settings: Any, max_workers: int | None = None) -> None:
        self._options = wanted = options.check(settings)
        must_have_token(wanted.context)
        if not (wanted.image or wanted.template or in_cluster()):
            raise ConfigError(
                "backend 'kubernetes' needs image=, the name of an image with Python and fiberexec that the cluster can pull; "
                "only inside a cluster it is that of the driver's own pod"
            )
        self.default_workers = _WORKERS
        count = float(settings.workers_per_job)  # nobody knows what a node has: a task gets what the user has asked for
        self.largest = Pool(
            self.name,
            Resources(settings.cpu or count, settings.memory or 0, settings.gpu or 0),
            tuple(map(str, range(settings.gpu or 0))),
        )
        self._patience = 0.8 * settings.startup_timeout  # before nobody waits any more, and a generic reason is told
        self._lock = threading.Lock()
        self._jobs: dict[str, Known] = {}
        self._verdicts = Verdicts()
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._slots = threading.BoundedSemaphore(_STARTS)
        self._api = Api(wanted.context)
        self._reader = Reader(self._api, wanted.namespace)
        self._maker = Maker(self._api, self._reader, wanted)
        self._way = Way(self._api, self._maker, self._reader, self._verdicts, wanted, settings.driver_timeout, self._patience)
        self._watch: watches.Watch | None = None
        self._answered = False
        self._watching = False  # watch() is at work
        self._closed = False
        self._due: float | None = None  # when watch() has to _look()
        self._looked = 0.0
        self._warned: set[str] = set()

    @property
    def _namespace(self) -> str:
        return self._reader.namespace()

    def _failed(self, error: Exception, doing: str) -> LaunchError:
        try:
            namespace = self._namespace
        except Setup:
            namespace = ""
        return errors.explained(error, doing, namespace, new=not self._answered)

    def advertise(self) -> tuple[str, ...]:
        """The address given, or the pod's own. Outside the cluster the hub listens for this host alone: see reach()."""
        try:
            return self._way.advertise()
        except Exception as error:
            raise self._failed(error, "looking for the cluster") from error

    def reach(self, port: int, program: str) -> tuple[str, ...]:
        """Addresses in the cluster are reached directly, a driver outside by an outpost, which is made here."""
        try:
            return self._way.reach(port, program)
        except Exception as error:
            raise self._failed(error, "making an outpost") from error

    # -- starting

    def start(self, job: Job) -> None:
        """Create a pod, and its Secret. Raises LaunchError."""
        self._verdicts.check()
        known = Known()
        known.starting = True
        with self._lock:
            self._jobs[job.id] = known
        creating = False
        try:
            self._watched(job.program)
            with self._slots:
                creating = True
                known.image = self._maker.make(job)
        except BaseException as error:
            known.starting = False
            if creating and not (isinstance(error, ApiError) and error.reason == "AlreadyExists"):  # that pod is not ours
                self.terminate([job.id])
            else:
                with self._lock:
                    del self._jobs[job.id]
            if isinstance(error, Exception):
                raise self._failed(error, f"creating pod {job.id}") from error
            raise
        known.since = time.monotonic()
        with self._lock:
            known.starting, known.started = False, True
        self._queue.put(job.id)  # what has happened to it meanwhile

    def _watched(self, program: str) -> None:
        with self._lock:
            if self._watch is None:
                if self._closed:
                    raise LaunchError("the backend is closed", final=True)
                self._watch = watches.acquire(self._options.context, self._namespace, program, self._queue)
            watch = self._watch
        watch.wait(watches.PATIENCE)
        self._answered = True

    def terminate(self, jobs: Sequence[str]) -> None:
        """Delete pods; their Secrets go with them. One that is being created follows when it has been."""
        for job in jobs:
            with self._lock:
                known = self._jobs.setdefault(job, Known())  # a new one: it has ended, and its object is left
                known.unwanted = True
                if known.starting:
                    continue
            self._discard(job, known)
            self._queue.put(job)

    def _discard(self, job: str, known: Known) -> None:
        """Delete a pod; one that cannot be deleted now is deleted later, by watch()."""
        try:
            self._maker.unmake(job, 0.0)
            known.deleted = True
        except (ApiError, Setup) as error:
            if isinstance(error, ApiError) and error.status == 404:
                known.gone = True
            else:
                _logger.log(
                    logging.DEBUG if isinstance(error, ApiError) and error.passing else logging.WARNING,
                    "%s",
                    self._failed(error, f"deleting pod {job}"),
                )
        if not known.started:
            with self._lock:
                if known.deleted or known.gone:
                    self._jobs.pop(job, None)

    def template(self, check: bool = True) -> dict[str, Any]:
        """The pod that a job would be. ``check``: if the API server would not take it, raise LaunchError."""
        try:
            body = self._maker.pod("fx-example-1", "fx-example", ["python", "-m", "fiberexec._agent", options.CREDENTIALS])
            if check:
                self._api.call("POST", self._reader.path(), {"dryRun": "All"}, body)
        except Exception as error:
            raise self._failed(error, "trying the pod") from error
        return body

    # -- watching

    def watch(self, report: Callable[[list[JobEnded]], None]) -> None:
        """Report ends until close(). After an error it may be called again."""
        with self._lock:
            self._watching = True
            for job in self._jobs:
                self._queue.put(job)
        try:
            while True:
                try:
                    item = self._queue.get(timeout=None if self._due is None else max(0.0, self._due - time.monotonic()))
                except queue.Empty:
                    item = ""
                if item is None:
                    return
                ended = self._take(item) if item else []
                now = time.monotonic()
                if self._due is not None and now >= self._due:
                    ended += self._look(now)
                elif item:  # soon, but not after each of a thousand
                    self._due = min(self._due or now + _SOON, now + _SOON)
                if ended:
                    report(ended)
        finally:
            with self._lock:
                self._watching = False
            if self._closed:
                self._release()

    def _release(self) -> None:
        with self._lock:
            watch, self._watch = self._watch, None
        if watch is not None:
            watches.release(watch, self._queue)
        self._api.close()

    def _take(self, item: Any) -> list[JobEnded]:
        """Note what has been seen; returns the ends that are certain by it."""
        with self._lock:
            jobs = dict(self._jobs) if not isinstance(item, (watches.Seen, str)) else {}
            if isinstance(item, watches.Seen):
                name = pods.name(item.pod)
                jobs = {name: self._jobs[name]} if name in self._jobs else {}
            elif item in self._jobs:
                jobs = {item: self._jobs[item]}
        ended = []
        for job, known in jobs.items():
            if isinstance(item, watches.Seen):
                known.see(item.pod, item.gone)
            elif isinstance(item, watches.Listed):
                if job not in item.names and known.started and known.since < item.asked:
                    known.gone = True
            elif isinstance(item, watches.Back):
                known.deleted = False
            if known.started and known.over(_LINGER):
                ended.append(self._end(job, known))
        return ended

    def _look(self, now: float) -> list[JobEnded]:
        """See to what takes long: pods that must go, removed ones whose processes may live, and those that do not start."""
        with self._lock:
            owed = [(job, known) for job, known in self._jobs.items() if known.owed]
            lingering = [(job, known) for job, known in self._jobs.items() if known.lingers]
            waiting = [(job, known) for job, known in self._jobs.items() if known.waits and known.started]
            running = {known.image for known in self._jobs.values() if known.runs} if waiting else set()
        self._due = now + 0.5 if lingering else now + _LOOK if waiting or owed else None
        if waiting and self._due is not None:
            self._due = min(self._due, max(now + _SOON, min(known.asked for _, known in waiting) + self._patience))
        for job, known in owed:
            self._discard(job, known)
            if known.owed:
                break  # nor could the others be deleted
        ended = [self._end(job, known) for job, known in lingering if known.over(_LINGER)]
        for job, known in waiting:
            trouble = known.trouble
            if trouble is not None and known.hopeless and known.image not in running and not self._verdicts.works(known.image):
                self._give_up(job, known, trouble)
            elif now >= known.asked + self._patience:
                if trouble is None:
                    trouble = pods.Trouble("Pending", self._reader.story(job) or "the cluster does not say why", False)
                self._give_up(job, known, trouble)  # and no other is tried: startup_timeout is spent
            elif trouble is not None:
                self._warn(job, trouble)
        mute = [(job, known) for job, known in waiting if known.mute and now > known.since + _LOOK]
        if mute and now > self._looked + _LOOK:  # one of them is enough: they are all alike
            self._looked = now
            job, known = min(mute, key=lambda each: each[1].since)
            for reason, message in self._reader.events(job):
                # The Secret with the credentials is ours, and on its way.
                if reason in _SETUP and options.CREDENTIALS_VOLUME not in message:
                    known.hear(reason, message)
        return ended

    def _warn(self, job: str, trouble: pods.Trouble) -> None:
        text = f"{trouble.reason}: {re.sub(re.escape(job), 'a pod', trouble.message)}"
        if text not in self._warned and time.monotonic() > self._jobs[job].since + 1.0:
            self._warned.add(text)
            _logger.warning("%s", errors.stuck(trouble, job, self._jobs[job].image, self._namespace))

    def _give_up(self, job: str, known: Known, trouble: pods.Trouble) -> None:
        """Remove a pod that does not start; its end is reported when it is gone."""
        text = errors.stuck(trouble, job, known.image, self._namespace)
        story = "" if self._verdicts.hold else self._reader.story(job)  # one of many is enough
        told = trouble.message, options.CREDENTIALS_VOLUME  # what is said already; and that our own Secret came a moment later
        happened = "".join(f"\n    {line}" for line in story.splitlines() if not any(each in line for each in told))
        text += f". Its events:{happened}" if happened else ""
        self._verdicts.settle(f"Kubernetes: {text}")
        known.exit = Exit(None, trouble.reason, f"{text}\n")
        known.unwanted = True
        self._discard(job, known)

    def _end(self, job: str, known: Known) -> JobEnded:
        """A job has ended: how."""
        with self._lock:
            self._jobs.pop(job, None)
        if known.exit is not None:
            self._verdicts.renew()  # who hears of this end may try again at once: not for the same
            return JobEnded(job, known.exit, self._verdicts.text)
        exit = pods.exit_of(known.pod, removed=known.gone) if known.pod else Exit(None, "Deleted", "", infrastructure=True)
        if known.unwanted:
            return JobEnded(job, Exit(exit.code))
        if exit.infrastructure or exit.code == 0:
            return JobEnded(job, exit)
        exit, happened = exit._replace(log=self._reader.tail(job) + exit.log), self._reader.story(job)
        if exit.code == UNREACHABLE and not self._way.serves(known.since):
            return JobEnded(job, exit._replace(infrastructure=True))  # no fault of its own: the outpost has gone
        with self._lock:
            others = any(other.ran for other in self._jobs.values())
        reason, final = errors.ended_early(exit, job, known.image), ""
        if self._verdicts.learn(known.image, known.seconds, exit, reason, others):
            last = "" if reason else quoted(exit.log)
            reason = reason or f"pods of image {known.image!r} end at once. Pod {job} ended with exit code {exit.code}"
            final = f"Kubernetes: {reason}{last}" + (f". Its events:\n{happened}" if happened else "")
            self._verdicts.settle(final)
        told = (f"{reason}\n" if reason else "") + (f"events of pod {job}:\n{happened}\n" if happened else "")
        return JobEnded(job, exit._replace(log=exit.log + told), final)

    # -- what else is asked

    def explain(self, job: str) -> str:
        """What is known of a job that has not shown up."""
        with self._lock:
            known = self._jobs.get(job)
        if known is None or not known.pod:
            return (self._verdicts.text if self._verdicts.hold else "") or self._way.trouble
        if known.trouble is not None:
            return errors.stuck(known.trouble, job, known.image, self._namespace)
        node = pods.node(known.pod)
        if not node:  # the scheduler may have told why by an event, before it notes that in the pod
            for reason, message in reversed(self._reader.events(job)):
                if reason == "FailedScheduling":
                    return errors.stuck(pods.Trouble("Unschedulable", message, False), job, known.image, self._namespace)
            return f"pod {job} waits for the scheduler to find a node"
        if not pods.is_running(known.pod):
            return "\n".join(filter(None, (f"pod {job} is being started on node {node}", self._reader.story(job))))
        tail = self._reader.tail(job)
        if tail:
            return f"pod {job} is running on node {node}{quoted(tail)}"
        where = " or ".join(self._options.advertise) or "the driver's address"
        return (
            f"pod {job} is running on node {node} and has said nothing; if that lasts, it cannot reach {where}: open the "
            'firewall for it, give another address (backend_options={"advertise_address": ...}), or run the program in the '
            "cluster"
        )

    def list(self) -> list[dict[str, Any]]:
        """Every pod of fiberexec in the namespace."""
        try:
            return [described(pod) for pod in self._reader.pods("fiberexec.job", _ASKED)]
        except Exception as error:
            raise self._failed(error, "listing pods") from error

    def logs(self, job: str, follow: bool = False) -> Iterator[str]:
        """The lines that a job has written; with ``follow`` until it ends. Raises FiberError for an unknown one."""
        try:
            for line in lines(self._reader.log(job, follow)):  # which ends the stream when nobody reads on
                yield line.decode("utf-8", "replace")
        except ApiError as error:
            if error.status == 404:
                raise FiberError(f"there is no job {job!r} in namespace {self._namespace}") from None
            raise self._failed(error, f"reading the log of {job}") from error

    def remove(self, program: str) -> int:
        """Delete all pods of a program, and with them their Secrets; returns how many there were."""
        from concurrent.futures import ThreadPoolExecutor

        try:
            found = self._reader.pods(f"fiberexec.program={program}")
        except Exception as error:
            raise self._failed(error, f"removing the pods of {program}") from error
        with ThreadPoolExecutor(_STARTS) as pool:
            list(pool.map(lambda pod: self._removed(pods.name(pod)), found))
        return len(found)

    def _removed(self, job: str) -> None:
        try:
            self._maker.unmake(job)
        except ApiError as error:
            if error.status != 404:
                raise self._failed(error, f"removing pod {job}") from error

    def close(self) -> None:
        """End watch()."""
        with self._lock:
            self._closed = True
            watching = self._watching
        self._queue.put(None)
        if not watching:
            self._release()
        self._way.close()
