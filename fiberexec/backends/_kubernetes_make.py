"""What is created for a job: a pod, and a Secret that belongs to it."""

from __future__ import annotations

import base64
import logging
import os
import re
import socket
import threading
import time
from typing import Any

from fiberexec import _platform
from fiberexec._errors import LaunchError
from fiberexec.backends import _kubernetes_options as options
from fiberexec.backends import _kubernetes_pods as pods
from fiberexec.backends._kubernetes_api import Api, ApiError
from fiberexec.backends._kubernetes_reader import Reader
from fiberexec.backends.base import Job

_GRACE = 1  # seconds: with 0 the object would go at once, and its processes live on
_PROXIES = ("istio-proxy", "linkerd-proxy")
_PATIENCE = 5.0  # seconds for which the driver's own pod is asked for
_logger = logging.getLogger("fiberexec")


class Maker:
    """Makes the pods of one backend. Any thread may call."""

    def __init__(self, api: Api, reader: Reader, wanted: options.Options) -> None:
        self._api = api
        self._reader = reader
        self._wanted = wanted
        self._driver = f"{os.getpid()}@{_platform.host_name()}"
        self._lock = threading.Lock()
        self._own: dict[str, Any] | None = None  # the driver's pod; {}: none that could own anything
        self._failed: tuple[float, ApiError] | None = None  # the last attempt to look at it, and when it ended
        self._warned = False
        self.owner: dict[str, Any] | None = None  # of all pods that are made, where that is not the driver's

    def pod(self, name: str, program: str, command: list[str]) -> dict[str, Any]:
        """The pod of a job. Raises ApiError, Setup and LaunchError."""
        wanted = self._wanted
        command = [wanted.python or command[0], *command[1:]]
        labels = {
            "fiberexec.program": program,
            "fiberexec.job": name,
            "fiberexec.user": str(os.getuid()),
            "fiberexec.started": str(int(time.time())),
            "fiberexec.driver": _label(self._driver),
            "fiberexec.space": _platform.pid_space(),
        }
        # What may hold what no label may.
        exact = {"fiberexec.driver": self._driver, "fiberexec.user": _platform.user_name(os.getuid())}
        own = self._own_pod()
        image = wanted.image or ("" if wanted.template else _image_of(own))
        try:
            body = options.pod(wanted, image, name, command, labels, exact)
        except (OSError, ValueError) as error:
            raise LaunchError(f"backend_options: pod_template={wanted.template!r}: {error}", final=True) from error
        if own and own["metadata"]["namespace"] == self._reader.namespace():
            body["metadata"]["ownerReferences"] = [_owner(own)]
        elif own:
            self._warn(f"it is in namespace {own['metadata']['namespace']}, and they are in {self._reader.namespace()}")
        if self.owner is not None:
            body["metadata"]["ownerReferences"] = [self.owner]
        return body

    def make(self, job: Job) -> str:
        """Create a pod, and its Secret; returns its image. Raises ApiError, Setup and LaunchError."""
        command = list(job.command)
        if command[-1] == "-":
            command[-1] = options.CREDENTIALS
        body = self.pod(job.id, job.program, command)
        made = self._post("pods", body, job)
        # After the pod, which owns it: it is there before the kubelet looks.
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "Opaque",
            "immutable": True,
            "metadata": {"name": job.id, "labels": body["metadata"]["labels"], "ownerReferences": [_owner(made)]},
            "data": {os.path.basename(options.CREDENTIALS): base64.b64encode(job.credentials).decode()},
        }
        self._post("secrets", secret, job)
        return pods.image(body)

    def unmake(self, job: str, patience: float | None = None) -> None:
        """Delete a pod; its Secret goes with it. ``patience``: see Api.call(). Raises ApiError and Setup."""
        body = {"gracePeriodSeconds": _GRACE, "propagationPolicy": "Background"}
        self._api.call("DELETE", self._reader.path("pods", job), body=body, patience=patience)

    def _post(self, kind: str, body: Any, job: Job) -> Any:
        try:
            return self._api.call("POST", self._reader.path(kind), body=body)
        except ApiError as error:
            if error.status != 409 or error.reason != "AlreadyExists":
                raise
            if kind == "secrets":
                return body  # no name is used twice: this is an earlier attempt, whose answer was lost
            found = self._api.call("GET", self._reader.path(kind, job.id))
            if found["metadata"].get("labels", {}).get("fiberexec.program") != job.program:
                raise
            return found

    def _own_pod(self) -> dict[str, Any]:
        """The pod in which this program is, {} for none. Raises ApiError for what passes, and where its image is needed."""
        asked = time.monotonic()
        with self._lock:
            if self._own is None:
                if self._failed is not None and self._failed[0] > asked:
                    raise self._failed[1]  # who has waited for that attempt has waited long enough
                try:
                    self._own = self._looked_at() if self._api.in_cluster else {}
                except ApiError as error:
                    if error.passing or not (self._wanted.image or self._wanted.template):
                        self._failed = time.monotonic(), error
                        raise
                    self._own = {}
                    hint = " (a host name that is not the pod's: hostNetwork?)" if error.status == 404 else ""
                    self._warn(f"it cannot be looked at: {error}{hint}")
                self._failed = None
            return self._own

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            _logger.warning(
                "Kubernetes: the pods of this program's workers do not belong to its own: if it is killed together with its "
                "janitor, they stay, ended, until somebody removes them (fiberexec clean --all). Why: %s",
                why,
            )

    def _looked_at(self) -> dict[str, Any]:
        """The pod of this host's name, as most are called; else that of its address. Raises ApiError."""
        path, own = f"/api/v1/namespaces/{self._api.namespace()}/pods", self._api.own_address()
        found: dict[str, Any] | None = None
        try:
            found = self._api.call("GET", f"{path}/{socket.gethostname()}", patience=_PATIENCE)
        except ApiError as error:
            if error.status != 404 or not own:
                raise
        if own and (found is None or found["status"].get("podIP", own) != own):
            try:
                found = self._at(path, own) or found
            except ApiError:
                if found is None:
                    raise
        if found is None:
            raise ApiError(404, "NotFound", f"there is no pod {socket.gethostname()!r}, nor one with the address {own}", "")
        return found

    def _at(self, path: str, address: str) -> dict[str, Any] | None:
        """The pod that has an address of its own: it is not the node's, nor was it that of one that has ended."""
        listed = self._api.call("GET", path, {"fieldSelector": f"status.podIP={address}"}, patience=_PATIENCE)["items"]
        return next((one for one in listed if not (one["spec"].get("hostNetwork") or pods.has_ended(one))), None)


def _owner(pod: dict[str, Any]) -> dict[str, Any]:
    meta = pod["metadata"]
    return {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]}


def _image_of(own: dict[str, Any]) -> str:
    """The image of a pod's main container: the one that it names, else the first; a mesh may put its proxy before that."""
    containers = own.get("spec", {}).get("containers") or ()
    main = own.get("metadata", {}).get("annotations", {}).get("kubectl.kubernetes.io/default-container")
    ordered = sorted(containers, key=lambda one: (one["name"] != main, one["name"] in _PROXIES))
    return str(ordered[0]["image"]) if ordered else ""


def _label(text: str) -> str:
    """Text as the value of a label."""
    return re.sub(r"[^A-Za-z0-9_.-]", ".", text)[:63].strip("._-")
