"""What an executor without anything to do asks of the API server."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import clusters
import pytest
import services
from clusters import kubectl
from running import Runner

pytestmark = pytest.mark.timeout(300)  # its image may have to be built
# Seconds, and calls that may be made meanwhile: a minute may have one.
SPAN, MOST = (60.0, 1) if os.environ.get("FIBEREXEC_CAMPAIGN") == "full" else (15.0, 0)
IDLE = """
import time
from fiberexec import FiberExecutor
with FiberExecutor(2, min_workers=2) as executor:
    while sum(worker.state == "idle" for worker in executor.workers()) < 2:
        time.sleep(0.1)
    print("idle", flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def space() -> Iterator[str]:
    """A namespace whose programs' calls are counted: they are a flow of their own."""
    with clusters.namespace("privileged") as name:
        subject = {"kind": "ServiceAccount", "serviceAccount": {"namespace": name, "name": "fiberexec"}}
        every = {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "namespaces": ["*"], "clusterScope": True}
        spec = {
            "matchingPrecedence": 100,
            "priorityLevelConfiguration": {"name": "workload-low"},
            "rules": [{"subjects": [subject], "resourceRules": [every]}],
        }
        api = "flowcontrol.apiserver.k8s.io/v1"
        clusters.apply({"apiVersion": api, "kind": "FlowSchema", "metadata": {"name": name}, "spec": spec})
        try:
            yield name
        finally:
            kubectl("delete", "flowschema", name)


def calls(space: str) -> int:
    """How many there were; a watch counts when it begins."""
    counter = rf'^apiserver_flowcontrol_dispatched_requests_total{{flow_schema="{space}",.*}} (\S+)$'
    found = re.search(counter, kubectl("get", "--raw", "/metrics"), re.MULTILINE)
    return int(float(found[1])) if found else 0


def test_an_idle_executor_makes_no_call_but_its_watch(space: str, tmp_path: Path) -> None:
    image = services.cluster_image(services.worker_image(None, "kubernetes"))
    fx = Runner(tmp_path, FIBEREXEC_IMAGE=image, KUBECONFIG=services.require_kubernetes())
    fx.env["FIBEREXEC_BACKEND_OPTIONS"] = json.dumps({"namespace": space})
    fx.program("idle.py", IDLE)
    command = fx.begin("run", "--backend", "kubernetes", "python3", "idle.py")
    command.expect("idle")
    before = calls(space)
    assert before >= 4, "its calls are not counted"  # two pods, their Secrets, a list, a watch
    time.sleep(SPAN)
    assert calls(space) - before <= MOST
    command.interrupt()
    command.end(130, 1)
