"""What a pod's object says: how it ended, whose fault that was, and why it has not started. Nothing here asks anybody."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from fiberexec.backends._containers import signed
from fiberexec.backends.base import Exit

WORKER = "worker"  # the name of the container with the agent
_NODE = frozenset("Terminated NodeShutdown Shutdown Preempting NodeLost NodeAffinity UnexpectedAdmissionError".split())
_IMAGE = frozenset(
    "ErrImagePull ImagePullBackOff ErrImageNeverPull InvalidImageName ImageInspectError RegistryUnavailable".split()
)
_CREATE = frozenset("CreateContainerConfigError CreateContainerError RunContainerError PostStartHookError".split())
# Why an image will not come however long one waits. What is not named here may pass: a busy registry, a slow network.
_NO_IMAGE = re.compile(
    r"not found|manifest unknown|pull access denied|insufficient_scope|no match for platform|invalid reference|"
    r"parse image ref|server gave HTTP response",
    re.IGNORECASE,
)
# And why it does not if that lasts: name servers, registries' logins and whoever counts pulls have their moments.
_REFUSED = re.compile(r"unauthorized|authentication required|denied: |no such host|403 Forbidden", re.IGNORECASE)
_NO_ROOT = re.compile(r"runAsNonRoot|run as root")  # of what an image is: it stays so


class Trouble(NamedTuple):
    """Why a pod has not started. ``final``: and will not; where it ``passes`` sometimes: if it lasts."""

    reason: str
    message: str
    final: bool
    passes: bool = False


def worker_of(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    """The status of the container with the agent."""
    found = pod.get("status", {}).get("containerStatuses") or ()
    return next((one for one in found if one.get("name") == WORKER), {})


def is_running(pod: Mapping[str, Any]) -> bool:
    return "running" in (worker_of(pod).get("state") or {})


def is_set_up(pod: Mapping[str, Any]) -> bool:
    """Whether it has its volumes and its network. Where that is the node's, nobody can tell."""
    status = pod.get("status", {})
    return bool(status.get("podIP")) and status["podIP"] != status.get("hostIP")


def has_ended(pod: Mapping[str, Any]) -> bool:
    """Whether nothing of the job runs in it any more: other containers do not count."""
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed") or "terminated" in (worker_of(pod).get("state") or {})


def exit_of(pod: Mapping[str, Any], *, removed: bool = False) -> Exit:
    """How a pod ended that has_ended(), or that was ``removed`` before anybody saw its end."""
    status = pod.get("status", {})
    last = (worker_of(pod).get("state") or {}).get("terminated") or {}
    code = signed(last.get("exitCode"))
    reason, message = str(last.get("reason") or ""), str(last.get("message") or "")
    word, text = str(status.get("reason") or ""), str(status.get("message") or "")
    if reason == "OOMKilled" and last.get("exitCode") == 137:  # with another code it was a child, and the agent lived on
        used = f"took more memory than its limit{_limit(pod)}, all of which was in use"
        return Exit(-9, "OOMKilled", f"pod {name(pod)} {used}: give it more (memory=)\n")
    if reason in ("StartError", "ContainerCannotRun"):
        return Exit(code, reason, f"{message}\n")
    if disrupted := _disruption(pod):
        return Exit(code, disrupted[0], f"{disrupted[1]}\n", infrastructure=True)
    if word in _NODE or word.startswith("OutOf") or reason == "ContainerStatusUnknown":
        return Exit(code, word or reason, f"{text or message}\n", infrastructure=True)
    if word in ("Evicted", "DeadlineExceeded"):
        return Exit(code, word, f"pod {name(pod)}: {text}\n")
    if removed or _was_deleted_first(pod, last):
        return Exit(code, "Deleted", f"pod {name(pod)} was deleted by somebody\n", infrastructure=True)
    if not last and (failed := _failed_before(pod)):
        return failed
    said = message or text
    return Exit(code, "" if reason in ("Error", "Completed") else reason or word, f"{said}\n" if said else "")


def _failed_before(pod: Mapping[str, Any]) -> Exit | None:
    """How an init container failed, without which the worker did not start."""
    for one in pod.get("status", {}).get("initContainerStatuses") or ():
        ended = (one.get("state") or {}).get("terminated") or {}
        if code := signed(ended.get("exitCode")):
            reason, said = str(ended.get("reason") or ""), str(ended.get("message") or "")
            more = (f" ({reason})" if reason not in ("", "Error") else "") + (f": {said}" if said else "")
            return Exit(code, "", f"init container {one.get('name')!r} ended with exit code {code}{more}\n")
    return None


def _disruption(pod: Mapping[str, Any]) -> tuple[str, str] | None:
    """Why the cluster ended it on its own behalf."""
    for one in pod.get("status", {}).get("conditions") or ():
        if one.get("type") == "DisruptionTarget" and one.get("status") == "True":
            reason = str(one.get("reason") or "DisruptionTarget")
            if reason != "TerminationByKubelet":  # which may be for what the job itself has taken: see the pod's own reason
                return reason, f"pod {name(pod)}: {one.get('message') or reason}"
    return None


def _was_deleted_first(pod: Mapping[str, Any], last: Mapping[str, Any]) -> bool:
    """Whether somebody had asked for its deletion before it ended."""
    meta = pod.get("metadata", {})
    if not meta.get("deletionTimestamp"):
        return False
    try:
        asked = _time(meta["deletionTimestamp"]) - timedelta(seconds=int(meta.get("deletionGracePeriodSeconds") or 0))
        return _time(last["finishedAt"]) >= asked
    except (KeyError, TypeError, ValueError):
        return True


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def trouble_of(pod: Mapping[str, Any]) -> Trouble | None:
    """What keeps a pod from starting, as far as its object says."""
    status = pod.get("status", {})
    for one in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
        waiting = (one.get("state") or {}).get("waiting") or {}
        reason, message = str(waiting.get("reason") or ""), str(waiting.get("message") or "")
        if reason in _IMAGE:
            final = reason in ("ErrImageNeverPull", "InvalidImageName") or bool(_NO_IMAGE.search(message))
            passes = not final and bool(_REFUSED.search(message))
            return Trouble(reason, message or f"the image cannot be had: {image(pod)}", final or passes, passes)
        if reason in _CREATE:  # a kubelet that has just started, or is busy, fails by itself, and tries again
            return Trouble(reason, message, True, not _NO_ROOT.search(message))
        if reason == "CrashLoopBackOff":
            # A sidecar, since the others are not started again: it may wait for what comes later than the pod.
            return Trouble(reason, f"container {one.get('name')!r} ends again and again: {message}", False)
    for one in status.get("conditions") or ():
        if one.get("type") == "PodScheduled" and one.get("status") == "False":
            return Trouble(str(one.get("reason") or "Unschedulable"), str(one.get("message") or ""), False)
    return None


def is_terse(trouble: Trouble) -> bool:
    """Whether it only says that there was trouble: older kubelets tell why at each attempt, and not between them."""
    return trouble.reason == "ImagePullBackOff" and bool(re.fullmatch(r'Back-off pulling image "[^"]*"', trouble.message))


def name(pod: Mapping[str, Any]) -> str:
    return str(pod["metadata"]["name"])


def node(pod: Mapping[str, Any]) -> str:
    return str(pod.get("spec", {}).get("nodeName") or "")


def image(pod: Mapping[str, Any]) -> str:
    containers = pod.get("spec", {}).get("containers") or ()
    return next((str(one.get("image")) for one in containers if one.get("name") == WORKER), "")


def _limit(pod: Mapping[str, Any]) -> str:
    for one in pod.get("spec", {}).get("containers") or ():
        if one.get("name") == WORKER and (limit := (one.get("resources") or {}).get("limits", {}).get("memory")):
            return f" of {_readable(str(limit))}"
    return ""


def _readable(quantity: str) -> str:
    return f"{int(quantity) / 2**20:g} MiB" if quantity.isdecimal() else quantity


def events(found: list[dict[str, Any]], kinds: tuple[str, ...] = ("Warning",)) -> list[tuple[str, str]]:
    """(reason, message) of what events say, the newest last, each once."""
    ordered = sorted(found, key=lambda one: str(one.get("lastTimestamp") or one.get("eventTime") or ""))
    pairs = [(str(one.get("reason")), str(one.get("message"))) for one in ordered if one.get("type") in kinds]
    return list(dict.fromkeys(pairs))
