"""What a pod's object means, for cases that one small cluster does not show."""

from __future__ import annotations

from typing import Any

import pytest

from fiberexec.backends._kubernetes_make import _image_of
from fiberexec.backends._kubernetes_outpost import job
from fiberexec.backends._kubernetes_pods import exit_of, has_ended, trouble_of
from fiberexec.backends._kubernetes_reader import described


def pod(
    phase: str = "Failed", code: int | None = 137, worker: str = "Error", disruption: str = "", **status: Any
) -> dict[str, Any]:
    state = {} if code is None else {"terminated": {"exitCode": code, "reason": worker}}
    conditions = [{"type": "DisruptionTarget", "status": "True", "reason": disruption}] if disruption else []
    containers = [{"name": "worker", "state": state}]
    return {
        "metadata": {"name": "p"},
        "spec": {"containers": [{"name": "worker", "resources": {"limits": {"memory": "1Gi"}}}]},
        "status": {"phase": phase, "containerStatuses": containers, "conditions": conditions, **status},
    }


@pytest.mark.parametrize("reason", ["PreemptionByScheduler", "DeletionByTaintManager", "DeletionByPodGC"])
def test_what_the_cluster_does_on_its_own_behalf_is_nobodys_fault(reason: str) -> None:
    exit = exit_of(pod(disruption=reason))
    assert exit.infrastructure and exit.reason == reason


@pytest.mark.parametrize(
    ("found", "reason", "infrastructure"),
    [
        (pod(disruption="TerminationByKubelet", reason="Evicted", message="The node was low on memory"), "Evicted", False),
        (pod(disruption="TerminationByKubelet", reason="Terminated", message="node shutdown"), "Terminated", True),
        (pod(disruption="TerminationByKubelet", reason="Preempting", message="for a critical pod"), "Preempting", True),
        (pod(reason="DeadlineExceeded", message="active on the node longer than"), "DeadlineExceeded", False),
        (pod(code=None, reason="OutOfcpu", message="Node didn't have enough resource: cpu"), "OutOfcpu", True),
        (pod(code=None, reason="NodeAffinity", message="predicate failed"), "NodeAffinity", True),
        (pod(worker="ContainerStatusUnknown"), "ContainerStatusUnknown", True),
        (pod(worker="OOMKilled", disruption="EvictionByEvictionAPI"), "OOMKilled", False),
        (pod(code=0, phase="Succeeded", worker="OOMKilled"), "OOMKilled", False),
        (pod(code=3), "", False),
    ],
)
def test_a_reason_tells_whose_fault_it_was(found: dict[str, Any], reason: str, infrastructure: bool) -> None:
    exit = exit_of(found)
    assert (exit.reason, exit.infrastructure) == (reason, infrastructure)


def test_a_deletion_after_the_end_excuses_nothing() -> None:
    found = pod(code=3)
    found["status"]["containerStatuses"][0]["state"]["terminated"]["finishedAt"] = "2030-01-01T00:00:00Z"
    found["metadata"].update(deletionTimestamp="2030-01-01T00:01:00Z", deletionGracePeriodSeconds=30)
    assert not exit_of(found).infrastructure
    found["metadata"].update(deletionTimestamp="2030-01-01T00:00:20Z")
    assert exit_of(found).infrastructure


def test_the_limit_of_memory_is_named() -> None:
    assert "its limit of 1Gi" in exit_of(pod(worker="OOMKilled")).log


@pytest.mark.parametrize("phase", ["Pending", "Running", "Unknown"])
def test_a_pod_whose_node_is_silent_has_not_ended(phase: str) -> None:
    assert not has_ended(pod(phase=phase, code=None))


@pytest.mark.parametrize(
    ("message", "final"),
    [
        ("rpc error: code = NotFound desc = failed to pull: docker.io/library/nope:1: not found", True),
        ("failed to authorize: failed to fetch anonymous token: 401 Unauthorized", True),
        ("dial tcp: lookup registry.example: no such host", True),
        ("toomanyrequests: You have reached your pull rate limit", False),
        ("dial tcp 192.0.2.1:443: i/o timeout", False),
        ("Back-off pulling image", False),
    ],
)
def test_a_pull_that_may_yet_succeed_is_waited_for(message: str, final: bool) -> None:
    waiting = {"waiting": {"reason": "ErrImagePull", "message": message}}
    status = {"phase": "Pending", "containerStatuses": [{"name": "worker", "state": waiting}]}
    found = {"metadata": {"name": "p"}, "status": status}
    trouble = trouble_of(found)
    assert trouble is not None and (trouble.reason, trouble.final) == ("ErrImagePull", final)


def test_a_scheduled_pod_is_in_no_trouble() -> None:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes"}
    found: dict[str, Any] = {"metadata": {"name": "p"}, "status": {"phase": "Pending", "conditions": [condition]}}
    trouble = trouble_of(found)
    assert trouble is not None and not trouble.final
    condition["status"] = "True"
    assert trouble_of(found) is None


# -- meshes, and other containers beside the own one


def test_a_sidecar_that_is_started_again_and_again_may_yet_come_up() -> None:
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}
    status = {"phase": "Pending", "initContainerStatuses": [{"name": "proxy", "state": waiting}]}
    trouble = trouble_of({"metadata": {"name": "p"}, "status": status})
    assert trouble is not None and not trouble.final and "container 'proxy' ends again and again" in trouble.message


@pytest.mark.parametrize(
    ("phase", "code", "state"),
    [("Running", 0, "succeeded"), ("Running", 3, "failed"), ("Running", None, "running"), ("Failed", None, "failed")],
)
def test_a_pod_whose_own_container_has_ended_is_shown_as_ended(phase: str, code: int | None, state: str) -> None:
    found = pod(phase=phase, code=code)
    found["metadata"]["labels"] = {"fiberexec.job": "p"}
    assert described(found)["state"] == state


def test_no_mesh_has_a_part_in_an_outpost() -> None:
    found = pod()
    found["metadata"].update(labels={"fiberexec.job": "p"}, annotations={"a": "b"})
    found["spec"]["containers"][0]["command"] = ["python"]
    meta = job(found, 60)["spec"]["template"]["metadata"]
    assert meta["labels"]["sidecar.istio.io/inject"] == "false" and meta["labels"]["fiberexec.job"] == "p"
    assert meta["annotations"]["linkerd.io/inject"] == "disabled" and meta["annotations"]["a"] == "b"


@pytest.mark.parametrize(
    ("names", "main", "image"),
    [("mine other", "", "mine"), ("linkerd-proxy mine", "", "mine"), ("istio-proxy other mine", "mine", "mine"), ("", "", "")],
)
def test_the_image_of_a_program_is_not_that_of_a_proxy(names: str, main: str, image: str) -> None:
    own = {
        "metadata": {"annotations": {"kubectl.kubernetes.io/default-container": main} if main else {}},
        "spec": {"containers": [{"name": name, "image": name} for name in names.split()]},
    }
    assert _image_of(own) == image
