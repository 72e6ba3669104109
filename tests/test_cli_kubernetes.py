"""The command with a real cluster: ``ps``, ``logs``, ``kill``, ``clean`` and ``doctor``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clusters
import pytest
from commands import HOST, ROOT, run, told
from running import until
from services import cluster, cluster_image, require_kubernetes, worker_image

pytestmark = pytest.mark.timeout(300)  # its image may have to be built
DEADLINE = 90.0  # seconds, for what takes a few where nothing else runs

# A driver with a worker that prints, and waits; it reads a line, and ends without a word.
DRIVER = """
import os, sys, time
from fiberexec import FiberExecutor
def task():
    print("one", flush=True)
    print("two", flush=True)
    time.sleep(1000)
executor = FiberExecutor(1, env={"PYTHONUNBUFFERED": "1"})
future = executor.submit(task)
while not future.running():
    time.sleep(0.05)
print("job", executor.workers()[0].host, flush=True)  # a pod is called as its host
sys.stdin.read()
"""


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A namespace of the test's own, which is that of the settings."""
    monkeypatch.setenv("KUBECONFIG", require_kubernetes())
    monkeypatch.setenv("FIBEREXEC_BACKEND", "kubernetes")
    monkeypatch.setenv("FIBEREXEC_IMAGE", cluster_image(worker_image(None, "kubernetes")))
    monkeypatch.setenv("PYTHONPATH", ROOT)
    monkeypatch.chdir(tmp_path)
    with clusters.namespace() as name:
        configure(monkeypatch, name)
        yield name


def configure(monkeypatch: pytest.MonkeyPatch, space: str, **options: str) -> None:
    options = {"advertise_address": cluster.ADDRESS, **options, "namespace": space}
    monkeypatch.setenv("FIBEREXEC_BACKEND_OPTIONS", json.dumps({name: value for name, value in options.items() if value}))


@pytest.fixture
def driver(space: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def job_of(process: subprocess.Popen[str]) -> str:
    """The pod of its worker, which has begun to work."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("job "):  # else it is the task's
            return line.split()[1]
    raise AssertionError("it has ended")


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster of the settings is one where nobody listens."""
    text = Path(require_kubernetes()).read_text().replace(f"{cluster.ADDRESS}:6443", "127.0.0.1:1")
    (tmp_path / "kubeconfig").write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("FIBEREXEC_BACKEND", "kubernetes")
    monkeypatch.setenv("FIBEREXEC_IMAGE", "not.asked.for:1")
    monkeypatch.chdir(tmp_path)


def rows() -> dict[str, dict[str, Any]]:
    answer = told("ps", "--backend", "kubernetes")
    assert answer["problems"] == []
    return {row["id"]: row for row in answer["jobs"]}


def test_pods_of_another_driver_are_seen_read_and_ended(driver: subprocess.Popen[str], space: str) -> None:
    job = job_of(driver)
    until(lambda: rows()[job]["state"] == "running")  # the worker may say so before the cluster does
    row = rows()[job]
    assert row["driver"] == f"{driver.pid}@{HOST}" and row["driver_runs"] is True
    assert row["role"] == "worker" and row["backend"] == "kubernetes"
    until(lambda: run("logs", "--backend", "kubernetes", job).stdout == "one\ntwo\n")
    assert told("clean", "--backend", "kubernetes", "--dry-run")["removed"] == []
    assert told("kill", "--backend", "kubernetes", job)["ended"][0]["kind"] == "job"
    until(lambda: rows() and job not in rows())  # another one runs the task again
    answer = told("kill", "--backend", "kubernetes", row["program"])
    assert {each["kind"] for each in answer["ended"]} == {"driver", "program"}
    assert driver.wait(DEADLINE) < 0
    until(lambda: not rows())


def test_logs_follow_a_pod_to_its_end(driver: subprocess.Popen[str], space: str) -> None:
    job = job_of(driver)
    until(lambda: rows()[job]["state"] == "running")  # the worker may say so before the cluster does
    command = [sys.executable, "-m", "fiberexec", "logs", "-f", "--backend", "kubernetes", job]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follow:
        assert follow.stdout is not None
        assert [follow.stdout.readline() for _ in range(2)] == ["one\n", "two\n"]
        driver.terminate()
        assert follow.wait(DEADLINE) == 0


def test_clean_removes_what_a_dead_driver_left(space: str) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    labels = {"fiberexec.program": "fx-left", "fiberexec.job": "fx-left-1", "fiberexec.driver": f"{gone.pid}.{HOST}"}
    container = {
        "name": "worker",
        "image": cluster_image(worker_image(None, "kubernetes")),
        "command": ["sleep", "1000"],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    person = {"runAsNonRoot": True, "runAsUser": 65534, "seccompProfile": {"type": "RuntimeDefault"}}
    clusters.apply(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": "fx-left-1",
                "namespace": space,
                "labels": labels,
                "annotations": {"fiberexec.driver": f"{gone.pid}@{HOST}"},
            },
            "spec": {"restartPolicy": "Never", "containers": [container], "securityContext": person},
        }
    )
    assert rows()["fx-left-1"]["driver_runs"] is False
    removed = told("clean", "--backend", "kubernetes")["removed"]
    assert [(each["program"], each["number"]) for each in removed if each["backend"] == "kubernetes"] == [("fx-left", 1)]
    until(lambda: not rows())


def test_clean_of_everything_finds_a_job_that_the_cluster_has_given_no_pod(space: str) -> None:
    labels = {"fiberexec.program": "fx-left", "fiberexec.job": "fx-left-outpost-1", "fiberexec.role": "outpost"}
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "worker", "image": "not.asked.for:1"}]}}
    meta = {"name": "fx-left-outpost-1", "namespace": space, "labels": labels}
    spec = {"suspend": True, "template": template}
    clusters.apply({"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": spec})
    removed = told("clean", "--backend", "kubernetes", "--all")["removed"]
    assert [each["program"] for each in removed] == ["fx-left-outpost-1"]
    until(lambda: not clusters.get("-n", space, "jobs")["items"])


# -- doctor


def findings(exit_code: int) -> dict[str, dict[str, str]]:
    answer = told("doctor", exit_code=exit_code)
    return {finding["check"]: finding for finding in answer["findings"]}


@pytest.mark.parametrize(("address", "way"), [(cluster.ADDRESS, "directly"), ("", "by an outpost")])
def test_doctor_names_the_way_by_which_pods_reach_the_driver(
    address: str, way: str, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, space, advertise_address=address)
    command = [sys.executable, "-m", "fiberexec", "doctor", "--json"]  # what it makes goes with its process
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    found = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 0, found
    expected = {"kubernetes", "image", "image's fiberexec", "route", "clock", "link", "task"}
    assert expected <= set(found)
    assert all(found[name]["status"] == "ok" for name in expected), found
    assert way in found["route"]["found"]
    left = {row["id"] for row in told("ps", "--backend", "kubernetes")["jobs"]}
    until(lambda: not left & set(rows()))


def test_ps_says_why_a_cluster_does_not_answer(nowhere: None) -> None:
    (problem,) = told("ps", "--backend", "kubernetes", exit_code=1)["problems"]
    assert "127.0.0.1:1" in problem["problem"] and "kubectl" in problem["problem"]


def test_doctor_says_what_is_wrong_with_a_cluster_that_does_not_answer(nowhere: None) -> None:
    found = findings(exit_code=1)
    assert found["kubernetes"]["status"] == "broken" and "127.0.0.1:1" in found["kubernetes"]["found"]
    assert "kubectl" in found["kubernetes"]["found"]
    assert found["job"]["status"] == "skipped"
