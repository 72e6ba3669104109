"""Options as a real cluster takes them: what is asked for is there."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import services
from services import cluster

from fiberexec import FiberExecutor

from .conftest import SLOT, apply, eventually, get, kubectl

pytestmark = pytest.mark.timeout(300)
LINUX = {"matchExpressions": [{"key": "kubernetes.io/os", "operator": "In", "values": ["linux"]}]}
AFFINITY = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [LINUX]}}}


@pytest.fixture
def claim(own_space: str, tmp_path: Path) -> Iterator[str]:
    """A claim of a volume with a file "a"."""
    (tmp_path / "a").write_text("1")
    tmp_path.chmod(0o755)
    spec = {"accessModes": ["ReadWriteMany"], "storageClassName": "", "volumeName": own_space}
    size = {"storage": "1Mi"}
    volume = {"capacity": size, "accessModes": ["ReadWriteMany"], "hostPath": {"path": str(tmp_path)}}
    asked = {**spec, "resources": {"requests": size}}
    meta = {"name": "data", "namespace": own_space}
    apply(
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": own_space}, "spec": volume},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta, "spec": asked},
    )
    eventually(lambda: get("-n", own_space, "pvc", "data")["status"]["phase"] == "Bound")
    yield "data"
    kubectl("delete", "pv", own_space, "--wait=false")


@pytest.fixture
def priority(own_space: str) -> Iterator[str]:
    kind = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass"}
    apply({**kind, "metadata": {"name": own_space}, "value": 7})
    yield own_space
    kubectl("delete", "priorityclass", own_space)


def test_workers_have_what_the_options_say(
    slots: None, own_space: str, claim: str, priority: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", services.require_kubernetes())
    kubectl("-n", own_space, "create", "serviceaccount", "worker")
    login = ("docker-registry", "login", "--docker-username=me", "--docker-password=x", "--docker-server=registry.invalid")
    kubectl("-n", own_space, "create", "secret", *login)
    options: dict[str, Any] = {
        "namespace": own_space,
        "advertise_address": cluster.ADDRESS,
        "service_account": "worker",
        "image_pull_secrets": ["login"],
        "priority_class": priority,
        "node_selector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "affinity": AFFINITY,
        "labels": {"team": "blue"},
        "annotations": {"note": "of two words"},
        "gpu_resource": SLOT,
        "volumes": {"/claim": {"persistentVolumeClaim": claim, "read_only": True}},
    }
    image = services.cluster_image(services.worker_image())
    settings: dict[str, Any] = {"image": image, "cpu": 0.2, "memory": "96Mi", "gpu": 1, "env": {"A": "b"}}
    settings |= {"backend": "kubernetes", "workers_per_job": 2, "min_workers": 2, "backend_options": options}
    shell = "echo $A; cat /claim/a; touch /claim/b 2>/dev/null || echo not written; test -e /var/run/secrets || echo no token"
    with FiberExecutor(2, **settings) as executor:
        said = executor.submit(subprocess.check_output, ["sh", "-c", shell], text=True).result(100)
        assert said.split("\n") == ["b", "1not written", "no token", ""]
        eventually(lambda: executor.stats().started == 2)
        assert len({worker.host for worker in executor.workers()}) == 1  # both are in one pod
        [pod] = get("-n", own_space, "pods", "-l", "fiberexec.job")["items"]
    meta, spec = pod["metadata"], pod["spec"]
    assert meta["labels"]["team"] == "blue" and meta["annotations"]["note"] == "of two words"
    assert spec["serviceAccountName"] == "worker" and spec["imagePullSecrets"] == [{"name": "login"}]
    assert spec["priorityClassName"] == priority and spec["priority"] == 7 and spec["affinity"] == AFFINITY
    assert spec["nodeSelector"] == {"kubernetes.io/os": "linux"}
    assert {"key": "gpu", "operator": "Exists"} in spec["tolerations"]
    amounts = {"cpu": "200m", "memory": str(96 << 20), SLOT: "1"}
    assert spec["containers"][0]["resources"] == {"limits": amounts, "requests": amounts}
