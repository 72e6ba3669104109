"""A cluster that is full, and one that takes pods away: what there is is used, said, and given back in peace."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import services
from services import cluster

from fiberexec import FiberExecutor

from .conftest import SLOT, apply, eventually, get, has_slots, kubectl

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def settings(own_space: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("KUBECONFIG", services.require_kubernetes())
    options: dict[str, Any] = {"namespace": own_space, "advertise_address": cluster.ADDRESS}
    image = services.cluster_image(services.worker_image())
    return {"backend": "kubernetes", "image": image, "backend_options": options}


# A module of its own, which pods get from here: they have no tests.
PROBE = """
import platform, time
from fiberexec import current_task

def where(seconds):
    time.sleep(seconds)
    return platform.node(), current_task().attempt
"""


@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """where(seconds) takes its time, and says in which pod it runs, and in which attempt."""
    (tmp_path / "elastic_probe.py").write_text(PROBE)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("elastic_probe").where


def with_slot(settings: dict[str, Any]) -> dict[str, Any]:
    spec = {"containers": [{"name": "worker", "resources": {"limits": {SLOT: "1"}}}]}
    return {**settings, "backend_options": {**settings["backend_options"], "pod_template": {"spec": spec}}}


def test_a_full_cluster_is_used_as_far_as_it_goes_and_stats_and_a_warning_say_so(
    slots: None, settings: dict[str, Any], own_space: str, caplog: pytest.LogCaptureFixture
) -> None:
    with FiberExecutor(4, **with_slot(settings)) as executor:
        futures = [executor.submit(time.sleep, 1.0) for _ in range(30)]
        eventually(lambda: (executor.stats().starting, executor.stats().started) == (2, 2))
        eventually(lambda: f"Insufficient {SLOT}" in caplog.text)
        pods = get("-n", own_space, "pods", "-l", "fiberexec.job")["items"]
        assert len(pods) == executor.stats().workers == 4  # those that wait count: no other is asked for
        assert not futures[-1].done()
        has_slots(4)  # it grows
        eventually(lambda: (executor.stats().starting, executor.stats().started) == (0, 4))
        for future in futures:
            future.result(60)
        assert executor.stats().failed_launches == executor.stats().lost == 0


def test_a_quota_is_used_as_far_as_it_goes(
    settings: dict[str, Any], own_space: str, where: Any, caplog: pytest.LogCaptureFixture
) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "small", "namespace": own_space}}
    apply({**quota, "spec": {"hard": {"pods": "2"}}})
    eventually(lambda: "pods" in get("-n", own_space, "resourcequota", "small").get("status", {}).get("hard", {}))
    with FiberExecutor(4, **settings) as executor:
        hosts = list(executor.map(where, [0.5] * 20, chunksize=1))
        stats = executor.stats()
    assert len({host for host, _ in hosts}) == 2 == stats.started
    assert stats.failed_launches > 0 and "exceeded quota: small" in caplog.text


def test_workers_that_are_not_needed_any_more_are_given_back(settings: dict[str, Any], own_space: str, where: Any) -> None:
    with FiberExecutor(3, min_workers=1, idle_timeout=1, **settings) as executor:
        assert len({host for host, _ in executor.map(where, [1.0] * 27, chunksize=1)}) == 3
        eventually(lambda: len(get("-n", own_space, "pods", "-l", "fiberexec.job")["items"]) == 1)
        assert executor.stats().workers == 1


@pytest.mark.parametrize("how", ["deleted", "drained", "preempted"])
def test_the_grace_period_is_used_to_finish_what_runs_and_nobody_is_charged(
    how: str, slots: None, settings: dict[str, Any], own_space: str, where: Any
) -> None:
    if how == "preempted":
        meta = {"name": f"high-{own_space}"}
        apply({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": meta, "value": 1000})
    with FiberExecutor(1, max_worker_losses=1, **with_slot(settings)) as executor:
        host, _ = executor.submit(where, 0).result(100)
        running = executor.submit(where, 12.0 if how == "preempted" else 6.0)
        others = [executor.submit(where, 0.1) for _ in range(10)]
        eventually(running.running)
        if how == "deleted":
            kubectl("-n", own_space, "delete", "pod", host, "--wait=false")
        elif how == "drained":  # as kubectl drain does with each pod
            eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": host}}
            kubectl(
                "create",
                "--raw",
                f"/api/v1/namespaces/{own_space}/pods/{host}/eviction",
                "-f",
                "-",
                stdin=json.dumps(eviction),
            )
        else:
            has_slots(1)
            apply(intruder(own_space, settings["image"]))
        assert running.result(60) == (host, 1)  # it was finished where it ran
        if how == "preempted":
            eventually(lambda: executor.stats().starting == 1)
            kubectl("-n", own_space, "delete", "pod", "intruder", "--grace-period=1", "--wait=false")
        found = [future.result(100) for future in others]
        assert host not in {each for each, _ in found} and {attempt for _, attempt in found} == {1}
        assert executor.stats().lost == 0
    if how == "preempted":
        kubectl("delete", "priorityclass", f"high-{own_space}")


def intruder(space: str, image: str) -> dict[str, Any]:
    """A pod that is more important than all others, and wants a slot."""
    container = {
        "name": "main",
        "image": image,
        "command": ["sleep", "600"],
        "resources": {"limits": {SLOT: "1"}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    person = {"runAsNonRoot": True, "runAsUser": 4321, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {"priorityClassName": f"high-{space}", "containers": [container], "securityContext": person}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "intruder", "namespace": space}, "spec": spec}
