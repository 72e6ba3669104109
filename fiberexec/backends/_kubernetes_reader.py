"""What there is in a namespace, and what its pods have said: calls that change nothing."""

from __future__ import annotations

import logging
from typing import Any

from fiberexec.backends import _kubernetes_pods as pods
from fiberexec.backends._kubernetes_api import Api, ApiError
from fiberexec.backends._kubernetes_config import Setup
from fiberexec.backends._kubernetes_watch import PAGE

_TAIL = 30  # lines of a pod's log that are kept
_EVENTS = 5  # of a pod that are told
_logger = logging.getLogger("fiberexec")


class Reader:
    """Reads a namespace: the given one, else that of the configuration. Any thread may call."""

    def __init__(self, api: Api, namespace: str | None) -> None:
        self._api = api
        self._wanted = namespace

    def namespace(self) -> str:
        """Raises Setup."""
        return self._wanted or self._api.namespace()

    def path(self, kind: str = "pods", name: str = "") -> str:
        """Where the API has objects of a kind, or one of them."""
        return f"/api/v1/namespaces/{self.namespace()}/{kind}{'/' if name else ''}{name}"

    def pods(self, selector: str, patience: float | None = None) -> list[dict[str, Any]]:
        """All pods with these labels. ``patience``: see Api.call()."""
        query: dict[str, Any] = {"labelSelector": selector, "limit": PAGE}
        found: list[dict[str, Any]] = []
        while True:
            page = self._api.call("GET", self.path(), query, patience=patience)
            found += page["items"]
            query["continue"] = page["metadata"].get("continue")
            if not query["continue"]:
                return found

    def tail(self, job: str) -> str:
        """The last lines that a job has written; "" where they cannot be had."""
        try:
            query = {"container": pods.WORKER, "tailLines": _TAIL}
            return str(self._api.call("GET", self.path("pods", f"{job}/log"), query, patience=0.0, read=5.0))
        except (ApiError, Setup) as error:
            _logger.debug("the log of %s cannot be read: %s", job, error)
            return ""

    def log(self, job: str, follow: bool) -> Any:
        """All that a job has written, as a stream."""
        query = {"container": pods.WORKER, "follow": "true" if follow else "false"}
        return self._api.stream(self.path("pods", f"{job}/log"), query, read=3600.0 if follow else 30.0)

    def events(self, job: str) -> list[tuple[str, str]]:
        """(reason, message) of the warnings about a pod, the newest last; none where they cannot be had."""
        try:
            query = {"fieldSelector": f"involvedObject.name={job}", "limit": 50}
            return pods.events(self._api.call("GET", self.path("events"), query, patience=0.0, read=5.0)["items"])
        except (ApiError, Setup) as error:
            _logger.debug("the events of %s cannot be read: %s", job, error)
            return []

    def story(self, job: str) -> str:
        """The last warnings about a pod, one a line."""
        return "\n".join(f"{reason}: {message}" for reason, message in self.events(job)[-_EVENTS:])


def described(pod: dict[str, Any]) -> dict[str, Any]:
    """A pod as the command line shows it."""
    meta = pod["metadata"]
    exact = {name: text for name, text in meta.get("annotations", {}).items() if name.startswith("fiberexec.")}
    labels = {**meta["labels"], "fiberexec.driver": "", **exact}
    state = str(pod["status"].get("phase", "")).lower()
    if meta.get("deletionTimestamp"):
        state = "terminating"
    elif state == "running" and pods.has_ended(pod):  # another container, such as a mesh's proxy, goes on
        state = "failed" if pods.exit_of(pod).code else "succeeded"
    return {
        "id": pods.name(pod) if labels.get("fiberexec.role") == "outpost" else labels["fiberexec.job"],
        "program": labels.get("fiberexec.program", ""),
        "state": state,
        "host": pods.node(pod),
        "image": pods.image(pod),
        "started": int(labels.get("fiberexec.started", 0)),
        "labels": labels,
    }
