"""Programs as Jobs of a Kubernetes cluster, whose workers are pods beside theirs.

    run ─► build and push the image, create a Job ─► its pod: run_first, which waits
        ─► send the code and what is to be run  ──► the program, which makes pods by its service account's rights
        ◄─ its log, its exit code; then the Job is removed

Nothing of the program's code or variables is in the Job: they go into its pod when that is there.
"""

from __future__ import annotations

import base64
import json
import os
import posixpath
import signal
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from fiberexec._cli import run_code, run_files, run_job
from fiberexec._cli.run_base import DRIVER, MARK, ROLE, Fate, Put, Wanted, followed, variables
from fiberexec._cli.run_exec import Exec
from fiberexec._cli.run_log import PodLog
from fiberexec._errors import ConfigError, FiberError
from fiberexec.backends import _kubernetes_errors as errors
from fiberexec.backends import _kubernetes_options as options
from fiberexec.backends import _kubernetes_pods as pods
from fiberexec.backends._kubernetes_api import Api, ApiError, lines
from fiberexec.backends._kubernetes_config import Setup
from fiberexec.backends._kubernetes_jobs import Known
from fiberexec.backends._kubernetes_reader import Reader

_PAUSE = 0.5  # seconds between looks at a pod
_AWAY = 120.0  # seconds that the API server may be away


class _Gone(FiberError):
    """The Job of a program that starts is not there any more."""


class KubernetesPlace:
    """See run_base.Place. Raises ConfigError without Kubernetes' SDK."""

    name = "kubernetes"

    def __init__(self, namespace: str | None) -> None:
        from fiberexec import _config

        settings = _config.load(backend="kubernetes")
        given = settings.backend_options if settings.sources["backend_options"] != _config.DEFAULT else {}
        context, configured = given.get("context"), given.get("namespace")
        options.check(_config.Settings(backend="kubernetes", backend_options={"namespace": namespace}))
        self.where = f"--namespace {namespace} " if namespace else ""
        self._context = context
        self._api = Api(context)
        self._reader = Reader(self._api, namespace or configured)
        self._killed: set[str] = set()  # by this process

    def _failed(self, error: Exception, doing: str) -> FiberError:
        try:
            namespace = self._reader.namespace()
        except Setup:
            namespace = ""
        return errors.explained(error, doing, namespace, rules=errors.RUN)

    def _jobs(self, name: str = "") -> str:
        return f"/apis/batch/v1/namespaces/{self._reader.namespace()}/jobs{'/' if name else ''}{name}"

    def start(self, wanted: Wanted, said: Callable[[str], None]) -> None:
        checked = options.check(wanted.size)
        wanted = _portable(wanted)
        image = run_job.pushed(wanted, said)
        try:
            account = wanted.service_account or run_job.ACCOUNT
            run_job.ensure_account(self._api, self._reader.namespace(), account, said)
            job = self._created(run_job.job(wanted, checked, image, account))
        except (ApiError, Setup) as error:
            raise self._failed(error, f"creating Job {wanted.name}") from error
        try:
            pod = self._running(wanted, image, said, job["metadata"]["uid"])
            spec = {"command": wanted.command, "env": self._variables(wanted, image), "folder": run_job.folder_of(wanted)}
            with run_code.packed(wanted.code, json.dumps(spec).encode()) as archive:
                self._receive(pod, archive, "/")
        except _Gone:
            raise  # what has its name now is another's
        except BaseException:
            self.remove(wanted.name)
            raise

    def _created(self, job: dict[str, Any]) -> dict[str, Any]:
        """The Job, which the cluster has made. Raises ConfigError if there is another of its name."""
        name = job["metadata"]["name"]
        try:
            try:
                made: dict[str, Any] = self._api.call("POST", self._jobs(), body=job)
                return made
            except ApiError as error:
                if error.status != 409 and not error.passing:
                    raise
                found = self._own(job)
                if found is not None:
                    return found  # the server had made it, and its answer was lost
                if error.status != 409:
                    raise
                raise ConfigError(f"there is a Job {name!r} already: give another --name") from None
        except (ApiError, ConfigError):
            raise
        except BaseException:  # a signal, while nobody knew whether there is one
            if self._own(job) is not None:
                self.remove(name)
            raise

    def _own(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """What the cluster has of this very Job; another one may have its name."""
        meta = job["metadata"]
        try:
            found: dict[str, Any] = self._api.call("GET", self._jobs(meta["name"]))
        except ApiError:
            return None
        mark = found["metadata"].get("annotations", {}).get(MARK)
        return found if mark == meta["annotations"][MARK] else None

    def _variables(self, wanted: Wanted, image: str) -> dict[str, str]:
        given = {name: value for name, value in wanted.settings.backend_options.items() if name != "context"}
        given["namespace"] = self._reader.namespace()
        sources = {**wanted.settings.sources, "backend_options": "--namespace"}
        settings = wanted.settings._replace(backend_options=given, sources=sources)
        return variables(wanted._replace(settings=settings), image)

    def _running(self, wanted: Wanted, image: str, said: Callable[[str], None], job: str) -> dict[str, Any]:
        """The pod of a Job, given by its uid, when it runs. Raises FiberError with the cluster's words if it will not."""
        end = time.monotonic() + wanted.settings.startup_timeout
        known = Known()
        told = ""
        while True:
            pod = self._pod(wanted.name, job)
            if pod is not None:
                if pods.is_running(pod):
                    return pod
                if pods.has_ended(pod):
                    raise self._ended_at_once(pod, image)
                known.see(pod, False)
                if known.trouble is not None:
                    text = errors.stuck(known.trouble, pods.name(pod), image, self._reader.namespace())
                    if known.hopeless:
                        raise FiberError(f"Kubernetes: {text}")
                    if text != told:
                        said(told := text)
            else:
                for reason, message in self._reader.events(f"{wanted.name},involvedObject.uid={job}"):
                    if reason == "FailedCreate":
                        raise FiberError(run_job.refused(wanted.name, message, self._reader.namespace()))
                self._must_be_there(wanted.name, job)
            if time.monotonic() > end:
                raise FiberError(
                    f"Kubernetes: {wanted.name} has not started within {wanted.settings.startup_timeout:g} seconds"
                    f"{f': {told}' if told else ''}"
                )
            time.sleep(_PAUSE)

    def _must_be_there(self, name: str, job: str) -> None:
        try:
            if self._api.call("GET", self._jobs(name))["metadata"]["uid"] == job:
                return
        except ApiError as error:
            if error.status != 404:
                return
        raise _Gone(f"Kubernetes: {name} was removed by somebody before it had started")

    def _ended_at_once(self, pod: dict[str, Any], image: str) -> FiberError:
        exit = pods.exit_of(pod)
        log = self._reader.tail(pods.name(pod)) + exit.log
        reason = errors.ended_early(exit._replace(log=log), pods.name(pod), image, "kubernetes")
        return FiberError(f"Kubernetes: {reason or f'pod {pods.name(pod)} ended at once'}\n{log}".rstrip())

    def _pod(self, name: str, job: str = "") -> dict[str, Any] | None:
        """The program's pod, None if there is none. One of its name that has been deleted may still be there, so the newest
        counts, or that of a Job given by its uid.
        """
        try:
            found = self._reader.pods(f"fiberexec.job={name},{ROLE}={DRIVER}")
        except (ApiError, Setup) as error:
            raise self._failed(error, f"looking for the pod of {name}") from error
        if job:
            found = [pod for pod in found if any(one["uid"] == job for one in pod["metadata"].get("ownerReferences", ()))]
        return max(found, key=_newness, default=None)

    # -- a program that is there

    def follow(self, name: str, put: Put) -> Fate:
        fate = self._follow(name, put)
        return Fate(137) if name in self._killed else fate  # its pod says SIGTERM, which came first

    def _follow(self, name: str, put: Put) -> Fate:
        log = PodLog(self._api)
        away, over = 0.0, False
        while True:
            try:
                pod = self._pod(name)
                if pod is None:
                    return Fate(137, f"the pod of {name} was deleted before it had ended")
                over = pods.has_ended(pod)
                if over or pods.is_running(pod):
                    for line in log.read(self._reader.path("pods", f"{pods.name(pod)}/log"), over):
                        put(1, line)
                        away = 0.0
                away = 0.0
            except (ApiError, FiberError) as error:
                refusal = error if isinstance(error, ApiError) else error.__cause__
                if over and pod is not None and isinstance(refusal, ApiError) and refusal.status in (400, 404):
                    return run_job.fate(name, pod, f"what else it wrote has gone with its container ({refusal})")
                away = away or time.monotonic()
                passes = isinstance(refusal, ApiError) and (refusal.passing or refusal.status == 404)  # its pod has gone
                if not passes or time.monotonic() > away + _AWAY:
                    raise self._failed(error, f"reading the log of {name}") from error
                over = False
            if over and pod is not None:
                return run_job.fate(name, pod)
            time.sleep(_PAUSE)

    def lines(self, name: str, follow: bool) -> Iterator[str]:
        if follow:
            yield from followed(self, name)
            return
        pod = self._pod(name)
        try:
            for line in lines(self._reader.log(pods.name(pod), False)) if pod is not None else ():
                yield line.decode("utf-8", "replace")
        except ApiError as error:
            raise self._failed(error, f"reading the log of {name}") from error

    def signal(self, name: str, number: int) -> None:
        if number == signal.SIGKILL:
            self._killed.add(name)
            self._delete(name, 1)
            return
        pod = self._pod(name)
        if pod is not None and pods.is_running(pod):
            try:
                self._exec(pod, "signal", str(number))
            except FiberError as error:
                if "container not found" not in str(error):  # else it has just ended
                    raise

    def remove(self, name: str) -> None:
        self._delete(name, 1)

    def _delete(self, name: str, grace: int) -> None:
        """Delete the Job and, at once, its pod, whose pods and Secrets the cluster then collects."""
        try:
            pod = self._pod(name)
            for path in (self._jobs(name), *([self._reader.path("pods", pods.name(pod))] if pod else [])):
                body = {"propagationPolicy": "Background", "gracePeriodSeconds": grace}
                try:
                    self._api.call("DELETE", path, body=body)
                except ApiError as error:
                    if error.status != 404:
                        raise
        except (ApiError, Setup) as error:
            raise self._failed(error, f"removing {name}") from error

    def has(self, name: str) -> bool:
        pod = self._pod(name)  # one that remove() has deleted stays until the cluster has counted it
        return pod is not None and not ("deletionTimestamp" in pod["metadata"] and pods.has_ended(pod))

    def names(self) -> list[str]:
        """Of all Jobs, programs' and outposts', which a quota may give no pod; none where they may not be listed."""
        try:
            found = self._api.call("GET", self._jobs(), {"labelSelector": ROLE})
        except (ApiError, Setup) as error:
            if isinstance(error, ApiError) and error.status == 403:
                return []
            raise self._failed(error, "listing Jobs") from error
        return [str(one["metadata"]["name"]) for one in found["items"]]

    # -- files

    def fetch(self, name: str, path: str) -> IO[bytes]:
        import tempfile

        pod, where = self._where(name, path)
        file = tempfile.TemporaryFile()
        begun: list[bytes] = []  # of a line

        def take(data: bytes) -> bool:
            first, *others = data.split(b"\n")
            begun.append(first)
            for other in others:
                file.write(base64.b64decode(b"".join(begun)))
                begun[:] = [other]
            return begun[-1] == run_files.END

        self._exec(pod, "give", where, take=take)
        if b"".join(begun) != run_files.END:
            raise FiberError(f"the connection to {name} broke while {where} was copied")
        file.seek(0)
        return file

    def send(self, name: str, path: str, source: str) -> None:
        pod, where = self._where(name, path)
        base = os.path.basename(os.path.abspath(source))
        kind = b"folder" if path.endswith("/") else self._exec(pod, "kind", where)
        if kind not in run_files.KINDS:
            raise FiberError(f"the connection to {name} broke while {where} was looked at")
        if kind == run_files.KINDS[0]:
            folder = where
        else:
            folder, base = posixpath.split(where)
        with run_code.archive(run_code.tree(source, base)) as archive:
            self._receive(pod, archive, folder)

    def _where(self, name: str, path: str) -> tuple[dict[str, Any], str]:
        pod = self._pod(name)
        if pod is None or not pods.is_running(pod):
            raise FiberError(f"{name} does not run")
        start = pod["metadata"].get("annotations", {}).get("fiberexec.folder") or "."
        return pod, posixpath.normpath(posixpath.join(start, path or "."))

    def _receive(self, pod: dict[str, Any], archive: IO[bytes], folder: str) -> None:
        size = archive.seek(0, os.SEEK_END)
        archive.seek(0)
        self._exec(pod, "receive", folder, str(size), stdin=archive)

    def _exec(
        self, pod: dict[str, Any], *arguments: str, stdin: IO[bytes] | None = None, take: Callable[[bytes], bool] | None = None
    ) -> bytes:
        started = next((one.get("command") for one in pod["spec"]["containers"] if one["name"] == pods.WORKER), None)
        command = [(started or ["python"])[0], "-m", run_files.__name__, *arguments]
        execute = Exec(self._context, self._reader.namespace())
        return execute.run(pods.name(pod), pods.WORKER, command, stdin, take)

    def close(self) -> None:
        self._api.close()


def _portable(wanted: Wanted) -> Wanted:
    """The same without paths of this host, which the program could not read. Raises ConfigError."""
    given = dict(wanted.settings.backend_options)
    path = given.get("pod_template")
    if not isinstance(path, str) or "\n" in path or ":" in path:  # YAML
        return wanted
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            given["pod_template"] = f"{file.read()}\n"
    except (OSError, ValueError) as error:
        raise ConfigError(f"backend_options: pod_template={path!r}: {error}") from None
    return wanted._replace(settings=wanted.settings._replace(backend_options=given))


def _newness(pod: dict[str, Any]) -> tuple[bool, str]:
    meta = pod["metadata"]
    return "deletionTimestamp" not in meta, meta.get("creationTimestamp", "")
