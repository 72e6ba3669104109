"""A driver outside the cluster: its outpost there, to which agents connect, and the program that holds the way to it.

    agents ─ TLS ─► outpost: a pod ═ stream, through the API server's port-forward ═► link: a process of this host ─► the hub

The outpost passes on what it cannot read (see _tunnel), so it has no key. It is the pod of a Job, which owns every pod of the
program: when nothing has been heard of the link for driver_timeout and a margin, the outpost ends, the cluster removes the
Job, which has finished, and with it all that it owns. That takes no rights in the cluster, and nobody outside.

The link is a process of its own: whatever the driver does, it is heard of. It makes the Job, and removes it when the driver
ends, however it ends.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from fiberexec import _tunnel
from fiberexec._errors import LaunchError
from fiberexec.backends import _kubernetes_link as link
from fiberexec.backends import _kubernetes_pods as pods
from fiberexec.backends._kubernetes_api import Api
from fiberexec.backends._kubernetes_jobs import Verdicts
from fiberexec.backends._kubernetes_make import Maker
from fiberexec.backends._kubernetes_options import Options
from fiberexec.backends._kubernetes_reader import Reader

MARGIN = 10.0  # seconds beyond driver_timeout
ROLE = "fiberexec.role"  # the label by which it is told from workers' pods
_CLOSE = 5.0  # seconds that one which is being made may take to go
_POLL = 0.05  # seconds
_STAYS = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
# A mesh's proxy beside the outpost would outlive it, and so would the Job; what passes there is encrypted anyway.
_ALONE = {"sidecar.istio.io/inject": "false", "linkerd.io/inject": "disabled"}
_TTL = 10  # seconds that a Job which has ended stays: its log may say why
_SIZE = {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}}


_ENDED = '{"failed": "Kubernetes: the process that connects with it has ended", "final": false}'
_logger = logging.getLogger("fiberexec")


class Way:
    """How agents reach this host: directly, or by an outpost, which is made when it is needed first, or gone."""

    def __init__(
        self, api: Api, maker: Maker, reader: Reader, verdicts: Verdicts, wanted: Options, timeout: float, patience: float
    ) -> None:
        self._api = api
        self._given = wanted.advertise
        self._maker = maker
        self._reader = reader
        self._verdicts = verdicts
        self._told = wanted.context, timeout, patience
        self._lock = threading.Lock()  # guards _outpost: one is made, and the others wait for it
        self._outpost: Outpost | None = None
        self._coming: Outpost | None = None  # that is being made
        self._failed: tuple[float, LaunchError] | None = None  # the last attempt, and when it ended
        self._made = 0.0  # when the last one was
        self._closed = False
        self.trouble = ""  # why the one that is being made is not there yet, as far as that is known

    def advertise(self) -> tuple[str, ...]:
        """See JobBackend. Raises Setup and LaunchError."""
        if self._given:
            return self._given
        if not self._api.in_cluster:
            return ("127.0.0.1",)
        address = self._api.own_address()
        if not address:
            raise LaunchError(
                "Kubernetes: this pod has no address under which others could reach it: say one, "
                'backend_options={"advertise_address": ...}',
                final=True,
            )
        return (address,)

    def reach(self, port: int, program: str) -> tuple[str, ...]:
        """Where agents dial. Raises ApiError, Setup and LaunchError."""
        if self._given or self._api.in_cluster:
            return tuple(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in self.advertise())
        return (self._outpost_for(port, program),)

    def _outpost_for(self, port: int, program: str) -> str:
        asked = time.monotonic()
        with self._lock:
            if self._closed:
                raise LaunchError("the backend is closed", final=True)
            if self._outpost is None or not self._outpost.alive:
                self._verdicts.check()
                if self._failed is not None and self._failed[0] > asked:
                    raise self._failed[1]  # who has waited for that attempt has waited long enough
                if self._outpost is not None:
                    self._outpost.close()
                    self._outpost = None
                name = f"{program}-outpost-{os.urandom(2).hex()}"
                body = job(self._maker.pod(name, program, ["python"]), self._told[1])
                try:
                    known = bool(self._made)
                    self._coming = Outpost(body, self._reader.namespace(), port, *self._told, known)
                    self._coming.connect(self._warn)
                    self._outpost = self._coming
                except LaunchError as error:
                    self._failed = time.monotonic(), error
                    if error.final:
                        self._verdicts.settle(str(error))
                    raise
                finally:
                    self._coming = None
                    self.trouble = ""
                self._maker.owner = self._outpost.owner
                self._made = time.monotonic()
            return self._outpost.address

    def _warn(self, text: str) -> None:
        self.trouble = text
        _logger.warning("%s", text)

    def serves(self, since: float) -> bool:
        """Whether agents that were started then can still come by it, or never needed it."""
        outpost = self._outpost
        return not self._made or (outpost is not None and outpost.alive and self._made <= since)

    def close(self) -> None:
        """Remove the outpost, and with it everything that it owns."""
        self._closed = True
        end = time.monotonic() + _CLOSE
        while not self._lock.acquire(timeout=_POLL):
            coming = self._coming
            if coming is not None:
                coming.stop()
            if time.monotonic() > end:
                return  # the API server does not answer, and the link goes when it does
        outpost, self._outpost = self._outpost, None
        self._lock.release()
        if outpost is not None:
            outpost.close()


class Outpost:
    """An outpost, and the process with the link to it, which makes it."""

    address: str  # "host:port"
    owner: dict[str, Any]  # of all pods, as an ownerReference

    def __init__(
        self,
        body: dict[str, Any],
        namespace: str,
        port: int,
        context: str | None,
        timeout: float,
        patience: float,
        known: bool,
    ) -> None:
        """``body``: of the Job; ``port``: of the hub here; ``timeout``: driver_timeout; ``known``: whether the API server has
        ever answered.
        """
        self._told = {
            "job": body,
            "context": context,
            "namespace": namespace,
            "port": port,
            "timeout": timeout,
            "known": known,
            "deadline": time.monotonic() + patience,  # the clock is the host's
            "parent": os.getpid(),
            "path": [folder for folder in sys.path if folder],
        }
        package = __package__.partition(".")[0]
        root = str(sys.modules[package].__path__[0])[: -len(package)]
        path = f"sys.path[:] = [p for p in sys.path if p]; sys.path.insert(0, {root!r})"
        code = f"import sys; {path}; from {link.__name__} import main; main()"
        pipe = subprocess.PIPE
        # A session of its own: Ctrl-C is for the driver, which needs the link to end its workers.
        self._process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, start_new_session=True)

    def connect(self, warn: Callable[[str], None]) -> None:
        """Wait until both are there; ``warn`` is told why it takes long. Raises LaunchError."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(self._told).encode() + b"\n")
            self._process.stdin.flush()
            found: dict[str, Any] = {"warning": ""}
            while "warning" in found:
                if found["warning"]:
                    warn(found["warning"])
                found = json.loads(self._process.stdout.readline() or _ENDED)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise LaunchError(f"Kubernetes: the process that connects with it has ended: {error}") from error
            raise
        if "failed" in found:
            self.close()
            raise LaunchError(found["failed"], final=found["final"])
        self.address, self.owner = found["address"], found["owner"]
        self._process.stdout.close()

    @property
    def alive(self) -> bool:
        """Whether agents can still come by it."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Have it removed. Any thread may ask; connect() raises then, if it has not returned."""
        self._process.terminate()

    def close(self) -> None:
        """Remove it, with everything that it owns."""
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()  # the link removes the Job when it sees that
            except OSError:
                pass
        self.stop()  # the same, where a forked child of this process holds stdin open
        if self._process.stdout is not None:
            self._process.stdout.close()
        try:
            self._process.wait(link.CONNECT + 5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the outpost finds out by itself
            self._process.wait()


def job(pod: dict[str, Any], timeout: float) -> dict[str, Any]:
    """The Job whose pod is the outpost, made of a pod for workers: the same image, rights and place, nothing else of it."""
    meta, spec = pod["metadata"], dict(pod["spec"])
    container = next(dict(one) for one in spec["containers"] if one["name"] == pods.WORKER)
    python = container["command"][0]
    told = link.AGENTS, link.STREAM, timeout + MARGIN, _tunnel.beat(timeout)
    container["command"] = [python, "-m", "fiberexec._tunnel", *(f"{each:g}" for each in told)]
    container["resources"] = _SIZE
    for name in ("volumeMounts", "volumeDevices", "ports", "lifecycle", "livenessProbe", "readinessProbe", "startupProbe"):
        container.pop(name, None)
    container.pop("envFrom", None)
    container["env"] = [one for one in container.get("env") or () if "value" in one]  # nothing that may be secret
    for name in ("volumes", "initContainers", "activeDeadlineSeconds", "hostNetwork", "resourceClaims"):
        spec.pop(name, None)
    spec |= {"containers": [container], "automountServiceAccountToken": False}
    labels = {**meta["labels"], ROLE: "outpost"}
    template = {
        "metadata": {"labels": {**labels, **_ALONE}, "annotations": {**meta.get("annotations", {}), **_STAYS, **_ALONE}},
        "spec": spec,
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": meta["name"], "labels": labels, "annotations": meta.get("annotations", {})},
        "spec": {
            "backoffLimit": 0,
            "ttlSecondsAfterFinished": _TTL,
            "template": template,
        },
    }
