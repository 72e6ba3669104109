"""``fiberexec run --backend kubernetes``, in a real cluster: a program as a Job, its workers as pods."""

from __future__ import annotations

import json
import random
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import clusters
import pytest
from clusters import kubectl
from running import EXAMPLES, PI, PI_PATH, WORKS, Runner, until
from services import cluster_image, require_kubernetes, require_registry, worker_image

from fiberexec.backends._kubernetes_errors import RUN, role

pytestmark = pytest.mark.timeout(400)  # the first one may have to make an image


@pytest.fixture(scope="module")
def image() -> str:
    require_kubernetes()
    return cluster_image(worker_image(None, "kubernetes"))


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> Iterator[str]:
    """One of the test's own; with a parameter, it enforces that Pod Security Standard."""
    with clusters.namespace(getattr(request, "param", "privileged")) as name:
        yield name


@pytest.fixture
def fx(tmp_path: Path, image: str, namespace: str) -> Runner:
    runner = Runner(tmp_path, FIBEREXEC_IMAGE=image, KUBECONFIG=require_kubernetes(), FIBEREXEC_BACKEND="kubernetes")
    runner.env["FIBEREXEC_BACKEND_OPTIONS"] = json.dumps({"namespace": namespace})
    runner.program("works.py", WORKS)
    return runner


def left(namespace: str) -> str:
    """Pods, Jobs and Secrets that are there, and not about to go."""
    found = json.loads(kubectl("-n", namespace, "get", "pods,jobs,secrets", "-o", "json"))["items"]
    return " ".join(one["metadata"]["name"] for one in found)


def test_the_program_runs_with_its_code_and_its_exit_code_comes_back(fx: Runner, namespace: str) -> None:
    fx.program("sub/main.py", "import sys, helper; print(helper.text(), *sys.argv[1:], flush=True); sys.exit(7)")
    fx.program("sub/helper.py", "def text(): return open('sub/data.txt').read()")
    fx.program("sub/data.txt", "data")
    done = fx("run", "python3", "sub/main.py", "x", code=7)
    assert done.stdout == "data x\n"
    assert "service account fiberexec was made" in done.stderr
    until(lambda: not left(namespace))


def test_all_that_a_program_writes_comes_whole_and_in_order(fx: Runner) -> None:
    fx.program("much.py", "for n in range(30000): print(n, 'x' * 50)")
    out = fx("run", "python3", "much.py", code=0).stdout
    assert out.splitlines() == [f"{n} {'x' * 50}" for n in range(30000)]


def table(text: str) -> list[str]:
    """What it prints, but how far it is, which a cluster has in the same log, and how long it took."""
    return [line for line in text.splitlines() if not line.startswith("parallel: ")]


def test_the_same_table_as_locally(fx: Runner, namespace: str, tmp_path: Path) -> None:
    fx.program("code_metrics.py", (EXAMPLES / "code_metrics.py").read_text())
    fx.program("subject/a.py", "def f(x):\n    return x if x else [y for y in x]\n" * 20)
    fx.program("subject/b.py", (EXAMPLES / "code_metrics.py").read_text())
    options = ("code_metrics.py", "--no-serial", "--workers", "2", "--path")
    volume = ("--volume", f"{tmp_path}/subject:/subject:ro")  # the cluster's only node is this machine
    tmp_path.chmod(0o755)
    there = fx("run", *volume, "python3", *options, "/subject", code=0).stdout
    here = fx("run", "--backend", "local", sys.executable, *options, "subject", code=0).stdout
    assert table(there) == table(here)
    until(lambda: not left(namespace))


def test_the_ancestors_command_works_with_a_dockerfile_like_the_ancestors(fx: Runner) -> None:
    registry = require_registry().replace("127.0.0.1", "localhost")
    image = fx.env.pop("FIBEREXEC_IMAGE")
    fx.program("examples/pi_estimation.py", PI)
    fx.program("Dockerfile", f"FROM {image}\nADD examples/pi_estimation.py {PI_PATH}\n")
    fx.env["FIBEREXEC_REGISTRY"] = registry
    first = fx("run", "-a", "python3", PI_PATH, code=0)  # as it is written there
    del fx.env["FIBEREXEC_REGISTRY"]
    assert "Pi is roughly 3.1" in first.stdout
    [name] = re.findall(r"pushing (\S+:[0-9a-f]{16})", first.stderr)  # called after what it is made from
    again = fx("run", "--registry", registry, "python3", "-c", "", code=0).stderr
    assert name in again and "build: Step" not in again
    fx.program("examples/pi_estimation.py", "print('changed')")
    changed = fx("run", "--registry", registry, "python3", PI_PATH, code=0)
    assert changed.stdout == "changed\n" and name not in changed.stderr


def test_in_a_pod_workers_are_pods_unless_something_else_is_said(fx: Runner) -> None:
    fx.program(
        "choose.py",
        "import logging, platform\nfrom fiberexec import FiberExecutor\n"
        "logging.basicConfig(format='%(message)s')\nlogging.getLogger('fiberexec').setLevel('INFO')\n"
        "for backend in (None, None, 'local'):\n"
        "    with FiberExecutor(1, backend=backend) as executor:\n"
        "        print(executor.submit(platform.node).result() == platform.node(), flush=True)\n",
    )
    lines = fx("run", "--env", "FIBEREXEC_BACKEND=", "python3", "choose.py", code=0).stdout.splitlines()
    assert [line for line in lines if line in ("True", "False")] == ["False", "False", "True"]
    why = "backend 'kubernetes' is used: this process is in a pod (KUBERNETES_SERVICE_HOST is set); backend= chooses another"
    assert [line for line in lines if "is used" in line] == [why]


def test_a_pod_that_may_not_make_pods_is_told_the_role_and_does_not_run_locally(fx: Runner, namespace: str) -> None:
    kubectl("-n", namespace, "create", "serviceaccount", "bare")
    fx.program(
        "try.py",
        "from fiberexec import BrokenExecutor, FiberExecutor\n"
        "try:\n    print('ran', FiberExecutor(1).submit(int).result())\n"
        "except BrokenExecutor as error:\n    print(error, error.__cause__)\n",
    )
    out = fx("run", "--service-account", "bare", "--env", "FIBEREXEC_BACKEND=", "python3", "try.py", code=0).stdout
    assert "kind: Role" in out and "name: bare" in out and f"namespace: {namespace}" in out and "ran" not in out.split()


def test_detach_attach_and_files_and_nothing_secret_is_to_be_seen(fx: Runner, namespace: str, tmp_path: Path) -> None:
    fx("run", "--detach", "--name", "apart", "--env", "TOKEN=hush-hush", "python3", "works.py", code=0)
    until(lambda: "up" in fx("logs", "--backend", "kubernetes", "apart", code=0).stdout)
    told = kubectl("-n", namespace, "get", "pods,jobs", "-o", "json")
    things = json.loads(told)["items"]
    assert sorted(one["kind"] for one in things) == ["Job", "Pod", "Pod", "Pod"]
    [job] = [one["spec"] for one in things if one["kind"] == "Job"]
    assert job["backoffLimit"] == 0 and job["ttlSecondsAfterFinished"] > 0
    assert job["template"]["spec"]["serviceAccountName"] == "fiberexec"
    assert "hush-hush" not in told
    (tmp_path / "in.txt").write_text("in")
    fx("cp", "in.txt", "apart:", code=0)
    fx("cp", "apart:in.txt", "out.txt", code=0)
    assert (tmp_path / "out.txt").read_text() == "in"
    fx("cp", "apart:.", "folder", code=0)
    assert (tmp_path / "folder" / "works.py").read_text() == WORKS
    assert "No such file" in fx("cp", "apart:nowhere", ".", code=1).stderr
    again = fx.begin("attach", "--backend", "kubernetes", "apart")
    again.expect("up")
    again.interrupt()
    again.end(130)
    until(lambda: not left(namespace))


def test_large_files_are_copied_whole_and_links_are_followed(fx: Runner, tmp_path: Path) -> None:
    fx("run", "--detach", "--name", "large", "python3", "works.py", code=0)
    content = random.Random(1).randbytes(40 << 20)
    (tmp_path / "in.bin").write_bytes(content)
    fx("cp", "in.bin", "large:new/folder/", code=0)
    assert (tmp_path / "in.bin").read_bytes() == content
    fx("cp", "large:new/folder/in.bin", "out.bin", code=0)
    assert (tmp_path / "out.bin").read_bytes() == content
    fx("cp", "large:/proc/1/cwd", "here", code=0)
    assert (tmp_path / "here" / "works.py").read_text() == WORKS
    assert "nothing was copied" in fx("cp", "large:/dev/null", ".", code=1).stderr
    fx("kill", "--backend", "kubernetes", "large", code=0)


def test_who_is_killed_before_he_has_started_is_not_waited_for(fx: Runner, namespace: str) -> None:
    command = fx.begin("run", "--name", "waits", "--cpu", "5000", "python3", "works.py", terminal=True)
    command.expect("Insufficient cpu", error=True)
    fx("kill", "--backend", "kubernetes", "waits", code=0)
    command.expect("waits was removed by somebody before it had started", error=True)
    command.end(1)
    until(lambda: not left(namespace))


def test_a_program_whose_end_has_been_seen_is_gone_however_long_the_cluster_keeps_its_pod(fx: Runner, namespace: str) -> None:
    name = fx("run", "--detach", "python3", "-c", "raise SystemExit(3)", code=0).stdout.strip()
    pod = kubectl("-n", namespace, "get", "pods", "-o", "name")
    kubectl("-n", namespace, "patch", pod, "--type=merge", "-p", '{"metadata": {"finalizers": ["example.org/kept"]}}')
    try:
        fx("attach", "--backend", "kubernetes", name, code=3)
        assert "its end has been seen" in fx("attach", "--backend", "kubernetes", name, code=1).stderr
        assert kubectl("-n", namespace, "get", "pods", "-o", "name") == pod
    finally:
        kubectl("-n", namespace, "patch", pod, "--type=merge", "-p", '{"metadata": {"finalizers": null}}')


def test_kill_ends_program_and_workers(fx: Runner, namespace: str) -> None:
    command = fx.begin("run", "--name", "killed", "python3", "works.py")
    command.expect("up")
    fx("kill", "--backend", "kubernetes", "killed", code=0)
    command.end(137, 143)  # the second if its end was seen before it was gone
    until(lambda: not left(namespace))


@pytest.mark.parametrize("namespace", ["restricted"], indirect=True)
def test_a_restricted_namespace_takes_what_has_a_user_and_says_so_of_what_has_none(fx: Runner, namespace: str) -> None:
    refused = fx("run", "--name", "rooted", "python3", "-c", "print('no')", code=1)
    assert "restricted Pod Security Standard" in refused.stderr and "USER 1000" in refused.stderr
    fx.env["FIBEREXEC_BACKEND_OPTIONS"] = json.dumps({"namespace": namespace, "user": 1000})
    fx.program("who.py", "import os; print(os.getuid())")
    assert fx("run", "python3", "who.py", code=0).stdout == "1000\n"
    until(lambda: not left(namespace))


def test_without_an_image_or_a_registry_it_says_what_to_give(fx: Runner) -> None:
    del fx.env["FIBEREXEC_IMAGE"]
    assert "--registry says where" in fx("run", "python3", "works.py", code=1).stderr


def test_rights_can_be_applied_as_they_are_printed(fx: Runner, namespace: str) -> None:
    kubectl("apply", "-f", "-", stdin=fx("rbac", "--namespace", namespace, "--service-account", "ours", code=0).stdout)
    fx.program("two.py", "from fiberexec import FiberExecutor as E\nwith E(2) as ex: print(sum(ex.map(abs, range(-9, 9))))")
    done = fx("run", "--service-account", "ours", "python3", "two.py", code=0)
    assert done.stdout == "81\n" and "is made" not in done.stderr


def test_who_starts_programs_needs_this_role_and_no_more_and_is_told_it(fx: Runner, namespace: str, tmp_path: Path) -> None:
    kubectl("apply", "-f", "-", stdin=fx("rbac", "--namespace", namespace, code=0).stdout)
    kubectl("-n", namespace, "create", "serviceaccount", "me")
    wanted = role(namespace, f"system:serviceaccount:{namespace}:me", RUN)
    config = json.loads(Path(fx.env["KUBECONFIG"]).read_text())
    config["users"][0]["user"] = {"token": kubectl("-n", namespace, "create", "token", "me")}
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    fx.env["KUBECONFIG"] = str(tmp_path / "kubeconfig")
    assert wanted in fx("run", "--name", "mine", "python3", "works.py", code=1).stderr
    exec = next(line for line in wanted.splitlines(True) if "pods/exec" in line)
    kubectl("apply", "-f", "-", stdin=wanted.replace(exec, ""))
    assert wanted in fx("run", "--name", "mine", "python3", "works.py", code=1).stderr
    kubectl("apply", "-f", "-", stdin=wanted)
    assert fx("run", "-d", "--name", "mine", "python3", "works.py", code=0).stdout == "mine\n"
    until(lambda: fx("logs", "mine").stdout == "up\n")
    assert fx("cp", "mine:works.py", "there.txt", code=0) and (tmp_path / "there.txt").read_text() == WORKS
    fx("kill", "mine", code=0)
    until(lambda: not left(namespace).replace("me-token", ""))


def test_a_program_has_the_size_and_the_volumes_that_it_is_given(fx: Runner, namespace: str) -> None:
    sizes = ("--cpu", "200m", "--memory", "64Mi", "--volume", "data:/data:ro", "--volume", "/tmp:/host")
    command = fx.begin("run", "--name", "sized", *sizes, "true")  # it waits for the claim
    until(lambda: "sized" in left(namespace))
    spec = json.loads(kubectl("-n", namespace, "get", "job", "sized", "-o", "json"))["spec"]["template"]["spec"]
    command.process.send_signal(signal.SIGTERM)
    command.end(128 + 15)
    amounts = {"cpu": "200m", "memory": str(64 << 20)}
    assert spec["containers"][0]["resources"] == {"limits": amounts, "requests": amounts}
    given = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: (given[mount["name"]], mount) for mount in spec["containers"][0]["volumeMounts"]}
    assert mounts["/data"][0]["persistentVolumeClaim"]["claimName"] == "data" and mounts["/data"][1]["readOnly"]
    assert mounts["/host"][0]["hostPath"]["path"] == "/tmp"
