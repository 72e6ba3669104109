"""The link of a driver outside the cluster: a process that makes the outpost, and holds the stream to it.

See _kubernetes_outpost, which starts it. What it is told comes as a line on stdin; it says on stdout, in lines, what becomes
of it: {"address": ..., "owner": ...}, {"warning": ...} or {"failed": ..., "final": ...}.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import threading
import time
from importlib import import_module
from typing import Any

from fiberexec import _tunnel
from fiberexec._errors import LaunchError
from fiberexec._relay import IN
from fiberexec._session import KEY_SIZE
from fiberexec.backends import _kubernetes_errors as errors
from fiberexec.backends import _kubernetes_pods as pods
from fiberexec.backends._kubernetes_api import Api, ApiError
from fiberexec.backends._kubernetes_config import Setup
from fiberexec.backends._kubernetes_jobs import Known
from fiberexec.backends._kubernetes_reader import Reader

AGENTS, STREAM = 4711, 4712  # ports of the outpost's pod
CONNECT = 10.0  # seconds that the stream may take to be made
_PATIENCE = 30.0  # seconds that the first one may take
_LOST = 20.0  # seconds beyond driver_timeout without a word of the outpost, which has ended itself by then
_LOW = 8  # descriptors that are kept for the stream: the SDK uses select(), which takes none above 1023
_POLL = 0.25  # seconds between looks at a pod that starts
_LATE = 2.0  # seconds without a pod, after which the cluster's reason is looked for


class Gone(Exception):
    """There is no outpost any more."""


class Link:
    """The link's program."""

    def __init__(self, told: dict[str, Any]) -> None:
        self._told = told
        self._namespace: str = told["namespace"]
        self._name: str = told["job"]["metadata"]["name"]
        self._api = Api(told["context"], 2)
        self._reader = Reader(self._api, self._namespace)
        self._jobs = f"/apis/batch/v1/namespaces/{self._namespace}/jobs"
        self._pod = ""
        self._forward: Any = None  # the SDK's end of the stream
        self._warned: set[str] = set()
        self._low: list[int] = []
        self._over = False
        self._known: bool = told["known"]  # the server has answered: if it does not now, it may again
        self._tunnel = _tunnel.InnerEnd(os.urandom(KEY_SIZE), told["port"], self._connect)
        self._tunnel.beat = _tunnel.beat(told["timeout"])

    @property
    def over(self) -> bool:
        """Whether the driver has gone, or does not want this any more."""
        return self._over or os.getppid() != self._told["parent"]

    def run(self) -> None:
        """Make the Job, connect, say so, and serve until the driver ends."""
        signal.signal(signal.SIGTERM, lambda *_: self._end())
        threading.excepthook = self._broken
        self._tunnel.follow(0, IN, lambda events: self._end())  # nothing comes on stdin any more, but its end
        doing = f"making {self._name}, by which pods reach this host"
        made = False
        try:
            made = True  # even where the answer is lost
            found = self._make()
            doing = f"connecting with pod {self._pod or self._name}"
            self._first()
            owner = {"apiVersion": "batch/v1", "kind": "Job", "name": self._name, "uid": found["metadata"]["uid"]}
            _say({"address": self._address, "owner": owner})
            self._tunnel.told = time.monotonic()
            while not self.over:
                self._turn()
        except Gone as error:
            _say({"failed": f"Kubernetes: {error}", "final": False})
        except (ApiError, Setup, LaunchError) as error:
            failed = self._failed(error, doing)
            _say({"failed": str(failed), "final": failed.final})
        finally:
            if made:
                self._remove()

    def _turn(self) -> None:
        self._tunnel.turn()
        if time.monotonic() > self._tunnel.told + self._told["timeout"] + _LOST:  # its node may be lost, and its pod be kept
            raise Gone(f"pod {self._pod} has not been heard of for too long, nor can have been any pod of the program")

    def _end(self) -> None:
        self._over = True

    def _failed(self, error: Exception, doing: str) -> LaunchError:
        return errors.explained(error, doing, self._namespace, new=not self._known)

    # -- the Job

    def _make(self) -> Any:
        try:
            found = self._api.call("POST", self._jobs, body=self._told["job"])
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
            found = self._api.call("GET", f"{self._jobs}/{self._name}")  # the answer to an earlier attempt was lost
        self._known = True
        since = time.monotonic()
        known = Known()
        while True:
            pod = self._look()
            if pod is not None and pod.get("status", {}).get("podIP") and pods.is_running(pod):
                host = pod["status"]["podIP"]
                self._pod = pods.name(pod)
                self._address = f"[{host}]:{AGENTS}" if ":" in host else f"{host}:{AGENTS}"
                return found
            self._check(pod, known, time.monotonic() - since)
            if time.monotonic() > self._told["deadline"]:
                raise LaunchError(f"Kubernetes: pod {self._name} did not start: {self._story(pod)}", final=True)
            if self.over:
                raise Gone("it is not wanted any more")
            time.sleep(_POLL)

    def _look(self) -> dict[str, Any] | None:
        """Its pod, if there is one."""
        return next(iter(self._reader.pods(f"job-name={self._name}")), None)

    def _check(self, pod: dict[str, Any] | None, known: Known, waited: float) -> None:
        """Raise for what will not get better."""
        if pod is None:
            if waited > _LATE:
                for reason, message in reversed(self._reader.events(self._name)):
                    if reason == "FailedCreate":  # what the API server said to the Job's controller
                        raise ApiError(403, "Forbidden", message, self._api.server().url)
            return
        image = pods.image(pod)
        if pods.has_ended(pod):
            exit = pods.exit_of(pod)
            exit = exit._replace(log=self._reader.tail(pods.name(pod)) + exit.log)
            why = errors.ended_early(exit, pods.name(pod), image)
            why = why or f"pod {pods.name(pod)} ended with exit code {exit.code}: {exit.log}"
            raise LaunchError(f"Kubernetes: {why}", final=not exit.infrastructure)
        known.see(pod, False)
        trouble = known.trouble
        if trouble is not None:
            text = f"Kubernetes: {errors.stuck(trouble, pods.name(pod), image, self._namespace)}"
            if known.hopeless:
                raise LaunchError(text, final=True)
            if trouble.reason not in self._warned and waited > 1.0:
                self._warned.add(trouble.reason)
                _say({"warning": text})

    def _story(self, pod: dict[str, Any] | None) -> str:
        trouble = pods.trouble_of(pod) if pod is not None else None
        if pod is not None and trouble is not None:
            return errors.stuck(trouble, pods.name(pod), pods.image(pod), self._namespace)
        return self._reader.story(pods.name(pod) if pod is not None else self._name) or "the cluster does not say why"

    def _remove(self) -> None:
        """Remove the Job, and with it everything that it owns. What cannot be removed now goes when the outpost ends."""
        try:
            self._api.call("DELETE", f"{self._jobs}/{self._name}", body={"propagationPolicy": "Background"}, patience=CONNECT)
        except (ApiError, Setup) as error:
            never = isinstance(error, Setup) and not self._known  # was there anything to remove
            if not never and not (isinstance(error, ApiError) and error.status == 404):
                print(f"fiberexec: {self._failed(error, f'removing {self._name}')}", file=sys.stderr)

    # -- the stream

    def _first(self) -> None:
        """Connect for the first time. Raises ApiError for what is wrong for good."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                self._tunnel.attach(self._forwarded(CONNECT))
                return
            except ApiError as error:
                if not error.passing or time.monotonic() > deadline or self.over:
                    raise
            time.sleep(_POLL)

    def _connect(self) -> Any:
        """The stream, made again. Raises OSError, and Gone."""
        try:
            return self._forwarded(CONNECT)
        except (ApiError, Setup) as error:
            if isinstance(error, ApiError) and error.status == 0:
                raise OSError(str(error)) from error
            try:
                pod = self._look()
            except (ApiError, Setup) as again:
                raise OSError(str(again)) from error
            if pod is None or pods.has_ended(pod) or pod["metadata"].get("deletionTimestamp"):
                raise Gone(f"pod {self._pod} has gone, and with it every pod of the program") from error
            raise OSError(str(error)) from error

    def _forwarded(self, limit: float) -> Any:
        """A socket whose other end is the outpost's port for the stream. Raises ApiError and Setup."""
        client: Any = import_module("kubernetes.client")
        stream: Any = import_module("kubernetes.stream")
        websocket: Any = import_module("websocket")
        websocket.setdefaulttimeout(limit)
        # Credentials that are renewed are read again; and the SDK changes the client that it is given.
        api = Api(self._told["context"], 1)
        while self._low:
            os.close(self._low.pop())
        try:
            server = api.server()
            core = client.CoreV1Api(client.ApiClient(server.configuration))
            self._forward = forward = stream.portforward(
                core.connect_get_namespaced_pod_portforward, self._pod, self._namespace, ports=str(STREAM)
            )
        except client.ApiException as error:
            raise _refusal(str(error.reason), api) from error
        finally:
            api.close()
            self._low = [os.open(os.devnull, os.O_RDONLY) for _ in range(_LOW)]
        return forward.socket(STREAM)._socket

    def _broken(self, told: Any) -> None:
        """A thread of the SDK has found the stream broken, and would keep that to itself."""
        forward = self._forward
        if forward is not None and told.thread is not None and "port forward" in told.thread.name:
            for port in forward.local_ports.values():
                port.python.close()


def _refusal(said: str, api: Api) -> ApiError:
    """What the SDK says of a stream that the server does not make."""
    status = re.search(r"Handshake status (\d+)", said)
    message = re.search(r'"message":\s*("(?:[^"\\]|\\.)*")', said)
    text = said
    if message is not None:
        try:
            text = json.loads(message[1])
        except ValueError:
            text = message[1]
    return ApiError(int(status[1]) if status is not None else 0, "", str(text), api.server().url)


def _say(told: dict[str, Any]) -> None:
    try:
        os.write(1, json.dumps(told).encode() + b"\n")
    except OSError:
        pass  # it has been said before, or nobody is there


def main() -> None:
    """The link's program: what it is told comes as a line on stdin."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 1 << 16)
        if not part:
            return
        line += part
    told = json.loads(line)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one connection for each agent, and for each door
    sys.path += [folder for folder in told["path"] if folder not in sys.path]
    Link(told).run()
