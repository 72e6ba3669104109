"""How a program's Job is started: which pod is its, what goes along, and that nothing is left of one that does not start."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import run

from fiberexec import _config
from fiberexec._cli import run as run_command
from fiberexec._cli import run_attach, run_base, run_exec, run_kubernetes
from fiberexec._cli.run_base import Fate, Wanted
from fiberexec._cli.run_kubernetes import KubernetesPlace
from fiberexec._errors import ConfigError, FiberError
from fiberexec.backends import _kubernetes_jobs as jobs
from fiberexec.backends._kubernetes_api import Api, ApiError
from fiberexec.backends._kubernetes_reader import Reader

JOBS = "/apis/batch/v1/namespaces/ns/jobs"


def pod(name: str, job: str, state: str, **meta: Any) -> dict[str, Any]:
    """A pod of a Job, which is given by its uid."""
    started = {"exitCode": 0, "reason": "Completed"} if state == "terminated" else {}
    return {
        "metadata": {"name": name, "ownerReferences": [{"uid": job}], **meta},
        "spec": {
            "containers": [{"name": "sidecar", "command": ["x"]}, {"name": "worker", "command": ["/opt/bin/python", "-m"]}]
        },
        "status": {"containerStatuses": [{"name": "worker", "state": {state: started}}]},
    }


class Cluster:
    """The API server's answers, as far as a start needs them."""

    in_cluster = False

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: list[dict[str, Any]] = []
        self.asked: list[tuple[str, str]] = []
        self.commands: list[list[str]] = []
        self.sent = b""
        self.on_create: Callable[[], None] = lambda: None  # when a Job has been made

    def call(self, method: str, path: str, query: Any = None, body: Any = None, **_: Any) -> Any:
        self.asked.append((method, path))
        name = path.rpartition("/")[2]
        if method == "POST":
            name = body["metadata"]["name"]
            if name in self.jobs:
                raise ApiError(409, "AlreadyExists", "exists", "")
            self.jobs[name] = {**body, "metadata": {**body["metadata"], "uid": "new"}}
            self.on_create()
        if path.endswith("/pods"):
            return {"items": self.pods, "metadata": {}}
        if path.endswith("/events"):  # of an earlier Job, a quota's
            wanted = dict(part.split("=") for part in query["fieldSelector"].split(","))
            self.pods = [pod("night-new", "new", "running")]
            refusal = {"type": "Warning", "reason": "FailedCreate", "message": "exceeded quota"}
            return {"items": [refusal] if wanted.get("involvedObject.uid", "old") == "old" else []}
        if path.startswith(JOBS):
            if name not in self.jobs:
                raise ApiError(404, "NotFound", "none", "")
            return self.jobs.pop(name) if method == "DELETE" else self.jobs[name]
        return {"items": [], "metadata": {}}

    def run(self, pod: str, container: str, command: list[str], stdin: Any, take: Any) -> bytes:
        self.commands.append([pod, *command])
        self.sent += stdin.read() if stdin is not None else b""
        return b""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()
    monkeypatch.setattr(Api, "call", lambda self, *arguments, **named: found.call(*arguments, **named))
    monkeypatch.setattr(Api, "namespace", lambda self: "ns")
    monkeypatch.setattr(run_exec.Exec, "run", lambda self, *arguments: found.run(*arguments))
    return found


def start(place: KubernetesPlace | None = None, name: str = "night", **backend_options: Any) -> list[str]:
    """Returns what was said."""
    said: list[str] = []
    settings = _config.load(backend="kubernetes", image="i:1", backend_options=backend_options)
    wanted = Wanted("kubernetes", ("python", "x.py"), name, {}, None, settings, settings)
    (place or KubernetesPlace("ns")).start(wanted, said.append)
    return said


def options_sent(cluster: Cluster) -> Any:
    spec, _ = json.JSONDecoder().raw_decode(cluster.sent[cluster.sent.index(b'{"command"') :].decode("utf-8", "replace"))
    return json.loads(spec["env"]["FIBEREXEC_BACKEND_OPTIONS"])


def test_a_pod_that_another_job_of_the_name_has_left_is_not_taken_for_the_programs(cluster: Cluster) -> None:
    cluster.pods = [pod("night-old", "old", "terminated", deletionTimestamp="x"), pod("night-new", "new", "running")]
    start()
    assert [command[0] for command in cluster.commands] == ["night-new"]


def test_what_kept_another_job_of_the_name_from_its_pod_is_no_matter(cluster: Cluster) -> None:
    start()
    assert ("GET", "/api/v1/namespaces/ns/events") in cluster.asked and cluster.commands


@pytest.mark.parametrize("another", [False, True])
def test_a_job_that_somebody_removes_before_it_has_a_pod_is_not_waited_for(
    another: bool, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = {"metadata": {"name": "night", "uid": "theirs"}}
    monkeypatch.setattr(run_kubernetes, "_PAUSE", 0.0)
    monkeypatch.setattr(Reader, "pods", lambda *_: [])

    def events(*_: object) -> list[Any]:
        cluster.jobs.clear()
        if another:
            cluster.jobs["night"] = theirs
        return []

    monkeypatch.setattr(Reader, "events", events)
    with pytest.raises(FiberError, match="night was removed by somebody before it had started"):
        start()
    assert cluster.jobs == ({"night": theirs} if another else {})


def test_a_namespace_is_checked_before_anything_is_asked(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match="namespace must be a name as Kubernetes takes it"):
        KubernetesPlace("Bad NS/../x")
    assert cluster.asked == []


@pytest.mark.parametrize("lasting", [False, True])
def test_a_kubelets_error_that_passes_sometimes_ends_a_start_only_if_it_lasts(
    lasting: bool, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_kubernetes, "_PAUSE", 0.0)
    monkeypatch.setattr(jobs, "LASTING", 0.0 if lasting else 60.0)
    stuck, runs = pod("night-new", "new", "waiting"), pod("night-new", "new", "running")
    stuck["status"]["containerStatuses"][0]["state"]["waiting"] = {
        "reason": "CreateContainerError",
        "message": "context deadline exceeded",
    }
    seen = itertools.chain([stuck, stuck], itertools.repeat(runs))
    monkeypatch.setattr(Reader, "pods", lambda *_: [next(seen)])
    if lasting:
        with pytest.raises(FiberError, match="context deadline exceeded"):
            start()
        assert cluster.jobs == {} and cluster.commands == []
    else:
        told = start()
        assert [text for text in told if "context deadline exceeded" in text] == told[-1:]
        assert cluster.commands[-1][0] == "night-new"


def test_of_two_pods_of_a_name_that_which_stays_is_meant_or_else_the_newer(cluster: Cluster) -> None:
    going = pod("going", "1", "running", deletionTimestamp="x", creationTimestamp="2026-01-02T00:00:00Z")
    older = pod("older", "2", "running", creationTimestamp="2026-01-01T00:00:00Z")
    newer = pod("newer", "3", "running", creationTimestamp="2026-01-01T00:00:01Z")
    cluster.pods = [going, older, newer]
    KubernetesPlace("ns").signal("night", signal.SIGINT)
    assert cluster.commands[0][0] == "newer"


def test_commands_in_the_pod_run_in_the_python_that_it_was_started_with(cluster: Cluster) -> None:
    cluster.pods = [pod("night-new", "new", "running")]
    start(python="/opt/bin/python")
    assert [command[1] for command in cluster.commands] == ["/opt/bin/python"]
    assert cluster.jobs["night"]["spec"]["template"]["spec"]["containers"][0]["command"][0] == "/opt/bin/python"


def test_what_is_of_this_host_alone_does_not_go_along(cluster: Cluster, tmp_path: Path) -> None:
    cluster.pods = [pod("night-new", "new", "running")]
    (tmp_path / "pod.yaml").write_text("spec: {hostNetwork: true}")
    start(advertise_address="192.0.2.1", pod_template=str(tmp_path / "pod.yaml"), node_selector={"a": "b"})
    template = options_sent(cluster).pop("pod_template")
    assert options_sent(cluster) == {"pod_template": template, "node_selector": {"a": "b"}, "namespace": "ns"}
    assert template == "spec: {hostNetwork: true}\n"
    settings = _config.load(backend="docker", backend_options={"advertise_address": "192.0.2.1"})
    assert "FIBEREXEC_BACKEND_OPTIONS" not in run_base.variables(Wanted("docker", (), "n", {}, None, settings, settings))


def test_a_template_that_is_not_there_is_an_error_before_anything_is_made(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pod_template=.*pod\.yaml.*No such file"):
        start(pod_template=str(tmp_path / "pod.yaml"))
    assert not cluster.asked


def test_a_job_whose_creation_was_not_heard_of_is_the_programs_own(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(method: str, path: str, *arguments: Any, **named: Any) -> Any:
        if method == "POST" and not cluster.jobs:
            cluster.call(method, path, *arguments, **named)  # and its answer is lost
        return cluster.call(method, path, *arguments, **named)

    monkeypatch.setattr(Api, "call", lambda self, *arguments, **named: twice(*arguments, **named))
    cluster.pods = [pod("night-new", "new", "running")]
    start()
    assert cluster.commands
    with pytest.raises(ConfigError, match="already: give another --name"):
        start()
    assert list(cluster.jobs) == ["night"]


def test_a_server_that_goes_away_when_it_has_made_a_job_has_made_it(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(method: str, path: str, *arguments: Any, **named: Any) -> Any:
        answer = cluster.call(method, path, *arguments, **named)
        if method == "POST" and path == JOBS:
            raise ApiError(0, "", "ReadTimeoutError", "")
        return answer

    monkeypatch.setattr(Api, "call", lambda self, *arguments, **named: lost(*arguments, **named))
    cluster.pods = [pod("night-new", "new", "running")]
    start()
    assert cluster.commands


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("when", ["is being made", "is waited for"])
def test_a_signal_while_a_job_starts_leaves_nothing(cluster: Cluster, number: int, when: str) -> None:
    def send() -> None:
        os.kill(os.getpid(), number)

    if when == "is being made":
        cluster.on_create = send
    else:
        cluster.pods = [pod("night-new", "new", "running")]
        cluster.run = lambda *_: send()  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(SystemExit, match=str(128 + number)), run_attach.stoppable():
        start()
    assert ("DELETE", f"{JOBS}/night") in cluster.asked and not cluster.jobs


def test_a_signal_while_a_job_starts_leaves_another_of_its_name_alone(cluster: Cluster) -> None:
    def refused() -> None:
        cluster.jobs["night"]["metadata"]["annotations"] = {run_base.MARK: "of somebody else"}
        raise SystemExit(143)

    cluster.on_create = refused
    with pytest.raises(SystemExit):
        start()
    assert list(cluster.jobs) == ["night"]


class Ends:
    """A program that ends at once, and cannot be removed."""

    name, where = "kubernetes", "--namespace ns "

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def follow(self, name: str, put: Any) -> Fate:
        return Fate(7)

    def has(self, name: str) -> bool:
        return True

    def remove(self, name: str) -> None:
        raise self.error

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("error", "said"), [(FiberError("you may not delete"), "you may not delete"), (KeyboardInterrupt(), "interrupted")]
)
def test_what_is_not_removed_does_not_change_the_programs_exit_code(
    error: BaseException, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_command, "_place", lambda *_: Ends(error))
    result = run("attach", "--backend", "kubernetes", "night")
    assert result.exit_code == 7
    assert f"could not be removed: {said}. What to do: fiberexec kill --namespace ns night" in result.stderr


def test_signals_that_are_ignored_stay_so_while_a_program_is_shown() -> None:
    seen = {}

    def follow(name: str, put: Any) -> Fate:
        seen.update({number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)})
        return Fate(0)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        place: Any = SimpleNamespace(follow=follow)
        assert run_attach.attached(place, "night") == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen[signal.SIGHUP] == signal.SIG_IGN != seen[signal.SIGTERM]


def test_clean_of_everything_takes_jobs_too_those_without_a_pod_among_them(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KubernetesPlace, "names", lambda self: sorted(cluster.jobs))
    cluster.jobs = {"night": {}, "refused": {}}
    labels = {"fiberexec.job": "night", "fiberexec.program": "night", "fiberexec.role": "driver"}
    cluster.pods = [pod("night-new", "new", "running", labels=labels, annotations={"fiberexec.driver": "1@night"})]
    for arguments, rest in ((), ["night", "refused"]), (("--all", "--dry-run"), ["night", "refused"]), (("--all",), []):
        result = run("clean", "--backend", "kubernetes", *arguments)
        assert result.exit_code == 0 and sorted(cluster.jobs) == rest
    assert [line for line in result.stdout.splitlines() if "refused" in line]
