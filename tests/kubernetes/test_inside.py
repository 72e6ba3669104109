"""A driver in a pod of the cluster, with the rights that are advised and no others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import services

from fiberexec.backends._kubernetes_errors import role

from .conftest import apply, eventually, get, kubectl

pytestmark = pytest.mark.timeout(300)  # images are built and given to the cluster, and pods come as they come
RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
PERSON = {"runAsNonRoot": True, "runAsUser": 4321, "seccompProfile": {"type": "RuntimeDefault"}}
HEAD = """
import os, platform, signal, sys, time
from fiberexec import FiberExecutor
if __name__ == "__main__":
"""


@pytest.fixture
def driver(own_space: str) -> Iterator[Callable[..., str]]:
    """Starts a program in a pod; returns the pod's name."""
    kubectl("-n", own_space, "create", "serviceaccount", "driver")
    kubectl("apply", "-f", "-", stdin=role(own_space, f"system:serviceaccount:{own_space}:driver"))
    image = services.cluster_image(services.worker_image(None, "kubernetes"))

    def start(code: str, after: int = 0) -> str:
        program = HEAD + "".join(f"    {line}\n" for line in code.strip().splitlines())
        meta = {"name": "program", "namespace": own_space}
        apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"program.py": program}})
        container: dict[str, Any] = {
            "name": "main",
            "image": image,
            "command": ["sh", "-c", "python -u /program/program.py; sleep $AFTER"],  # a first process cannot kill itself
            "env": [{"name": "HOME", "value": "/tmp"}, {"name": "AFTER", "value": str(after)}],
            "securityContext": RESTRICTED,
            "volumeMounts": [{"name": "program", "mountPath": "/program"}],
        }
        spec = {
            "restartPolicy": "Never",
            "serviceAccountName": "driver",
            "securityContext": PERSON,
            "containers": [container],
            "volumes": [{"name": "program", "configMap": {"name": "program"}}],
        }
        name = "driver"
        apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": own_space}, "spec": spec})
        return name

    yield start


def others(space: str) -> list[str]:
    """What there is besides the driver."""
    found = get("-n", space, "pods,secrets,configmaps", "-l", "fiberexec.job")["items"]
    return [f"{one['kind']} {one['metadata']['name']}" for one in found]


def phase(space: str, pod: str) -> str:
    return kubectl("-n", space, "get", "pod", pod, "-o", "jsonpath={.status.phase}")


def test_its_workers_are_pods_of_its_own_image_that_belong_to_it(own_space: str, driver: Callable[..., str]) -> None:
    name = driver("""
with FiberExecutor(2, backend="kubernetes") as executor:
    print(executor.submit(platform.node).result(), flush=True)
    executor.submit(time.sleep, 4).result()
    print(sum(executor.map(abs, range(1000))), flush=True)
""")
    eventually(lambda: phase(own_space, name) != "Pending" and "fx-" in kubectl("-n", own_space, "logs", name))
    host = kubectl("-n", own_space, "logs", name).split()[0]
    worker = get("-n", own_space, "pod", host)
    [owner] = worker["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"]) == ("Pod", name)
    own = get("-n", own_space, "pod", name)
    assert worker["spec"]["containers"][0]["image"] == own["spec"]["containers"][0]["image"]
    eventually(lambda: phase(own_space, name) == "Succeeded")
    assert kubectl("-n", own_space, "logs", name).split()[1:] == ["499500"]
    eventually(lambda: others(own_space) == [])


@pytest.mark.parametrize("how", ["its pod is deleted", "it is killed"])
def test_nothing_is_left_of_a_driver_that_dies(how: str, own_space: str, driver: Callable[..., str]) -> None:
    code = """
executor = FiberExecutor(2, backend="kubernetes", driver_timeout=10)
futures = [executor.submit(time.sleep, 600) for _ in range(2)]
while sum(future.running() for future in futures) < 2:
    time.sleep(0.1)
print("running", flush=True)
time.sleep(1)
if DYING:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""
    name = driver(code.replace("DYING", str(how == "it is killed")), after=600)  # its pod lives on
    eventually(lambda: phase(own_space, name) != "Pending" and "running" in kubectl("-n", own_space, "logs", name))
    assert how == "it is killed" or others(own_space)  # a janitor is quick
    if how != "it is killed":
        kubectl("-n", own_space, "delete", "pod", name, "--grace-period=0", "--force")
    eventually(lambda: others(own_space) == [], 100)


def test_a_pod_without_rights_is_told_the_role(own_space: str, driver: Callable[..., str]) -> None:
    kubectl("-n", own_space, "delete", "rolebinding", "fiberexec")
    name = driver("""
try:
    FiberExecutor(1, backend="kubernetes").submit(int).result()
except Exception as error:
    print(error, error.__cause__)
""")
    eventually(lambda: phase(own_space, name) == "Succeeded")
    said = kubectl("-n", own_space, "logs", name)
    assert "kind: RoleBinding" in said and f"name: driver, namespace: {own_space}" in said and "portforward" not in said
