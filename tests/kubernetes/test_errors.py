"""What goes wrong with a cluster, and what is said: each on a real one."""

from __future__ import annotations

import base64
import itertools
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import services
from services import cluster

from fiberexec import BrokenExecutor, ConfigError, FiberExecutor, LaunchError
from fiberexec.backends._kubernetes_errors import OUTSIDE, role
from fiberexec.backends._kubernetes_errors import stuck as explain
from fiberexec.backends._kubernetes_pods import Trouble
from fiberexec.backends.base import Job

from .conftest import SLEEP, Place, apply, eventually, get, kubectl

Make = Callable[..., Place]
pytestmark = pytest.mark.timeout(300)  # images are built and given to the cluster, and pods come as they come


def refused(one: Place, number: int = 1) -> LaunchError:
    """The error of a start that fails."""
    with pytest.raises(LaunchError) as caught:
        one.start(number, SLEEP)
    return caught.value


def stuck(one: Place, reason: str) -> str:
    """Start a job that cannot start, for a reason that matches; what is said of it, and again at the next start."""
    exit = one.end(one.start(1, SLEEP))
    assert re.fullmatch(reason, exit.reason) and exit.code is None, exit
    error = refused(one, 2)
    assert error.final
    first = exit.log.splitlines()[0]
    assert first in str(error)
    return str(error)


def no_pods(one: Place) -> bool:
    return [job for job in one.backend.list() if job["program"] == one.program] == []


@pytest.mark.parametrize(
    ("image", "template", "reason", "said"),
    [
        ("registry.invalid/some/image:1", {}, "ErrImagePull|ImagePullBackOff",
         "correct image='registry.invalid/some/image:1'"),
        ("not:a:name", {}, "InvalidImageName", "image='not:a:name' is no name of an image"),
        ("no-such/image:1", {"imagePullPolicy": "Never"}, "ErrImageNeverPull", "must be on each node"),
        (None, {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "none", "key": "a"}}}]},
         "CreateContainerConfigError", 'secret "none" not found. What to do: create the Secret'),
        (None, {"volumeMounts": [{"name": "v", "mountPath": "/v"}]}, "FailedMount", 'configmap "none" not found'),
    ],
)  # fmt: skip
def test_a_pod_that_cannot_start_is_removed_and_says_why(
    image: str | None, template: dict[str, Any], reason: str, said: str, place: Make
) -> None:
    spec: dict[str, Any] = {"containers": [{"name": "worker", **template}]}
    if "volumeMounts" in template:
        spec["volumes"] = [{"name": "v", "configMap": {"name": "none"}}]
    arguments = {"backend_options": {"pod_template": {"spec": spec}}}
    one = place(**arguments, **({"image": image} if image else {}))
    error = stuck(one, reason)
    assert said in error
    assert "Its events:" in error or not image  # of what is missing they say no more than that
    eventually(lambda: no_pods(one))


def test_an_image_name_that_a_node_cannot_read_is_told_as_such() -> None:
    said = 'failed to parse image reference "UPPER/case": repository name must be lowercase'
    assert "is no name of an image" in explain(Trouble("ErrImagePull", said, True), "job", "UPPER/case", "space")


def test_an_executor_breaks_with_the_clusters_words(place: Make, space: str) -> None:
    place()  # sets KUBECONFIG
    image = "registry.invalid/x:1"
    with FiberExecutor(1, backend="kubernetes", image=image, backend_options={"namespace": space}) as executor:
        with pytest.raises(BrokenExecutor, match=r"registry\.invalid/x:1") as caught:
            executor.submit(int).result(60)
        assert "image_pull_secrets" in str(caught.value) + str(caught.value.__cause__)


def test_a_program_that_is_not_in_the_image_says_what_to_do(place: Make) -> None:
    one = place(backend_options={"python": "/no/such/python"})
    exit = one.end(one.start(1, SLEEP))
    assert exit.reason == "StartError"
    error = refused(one, 2)
    assert error.final and 'backend_options={"python": ...}' in str(error) and "/no/such/python" in str(error)


def test_an_image_without_fiberexec_says_the_line_to_add(place: Make) -> None:
    one = place()
    job = Job(f"{one.program}-1", one.program, ("python", "-m", "fiberexec._agent", "-"), b"{}")
    one.backend.start(job)
    assert "RUN pip install fiberexec==" in one.end(job.id).log
    error = refused(one, 2)
    assert error.final and "No module named 'fiberexec'" in str(error)


def test_an_image_of_roots_whose_user_is_to_be_kept(place: Make) -> None:
    one = place(backend_options={"user": "image"})
    assert "leave user= at its default" in stuck(one, "CreateContainerConfigError")


def test_a_full_cluster_is_waited_for_and_said(place: Make, caplog: pytest.LogCaptureFixture) -> None:
    one = place(cpu=5000)
    job = one.start(1, SLEEP)
    eventually(lambda: "Insufficient cpu" in one.backend.explain(job))
    eventually(lambda: "Insufficient cpu" in caplog.text)
    assert "free or add nodes" in one.backend.explain(job)
    assert one.ended == []


def test_a_full_cluster_is_an_error_when_startup_timeout_is_spent(place: Make) -> None:
    one = place(cpu=5000, startup_timeout=15)
    exit = one.end(one.start(1, SLEEP))
    assert exit.reason == "Unschedulable" and "Insufficient cpu" in exit.log
    error = refused(one, 2)  # no other waits as long
    assert error.final and "Insufficient cpu" in str(error)


def test_an_executor_that_gets_no_worker_waits_once_for_startup_timeout(place: Make, space: str) -> None:
    place()  # sets KUBECONFIG
    image = services.cluster_image(services.bare_image())
    options = {"namespace": space, "advertise_address": cluster.ADDRESS}
    began = time.monotonic()
    settings: dict[str, Any] = {"image": image, "cpu": 5000, "startup_timeout": 20, "backend_options": options}
    with FiberExecutor(1, backend="kubernetes", **settings) as executor:
        with pytest.raises(BrokenExecutor) as caught:
            executor.submit(int).result(100)
    assert "Insufficient cpu" in f"{caught.value} {caught.value.__cause__}"
    assert time.monotonic() - began < 35  # 0.9 of it, and what it takes to be told


@pytest.mark.parametrize("bound", [False, True], ids=["not there", "not bound"])
def test_a_claim_that_cannot_be_had(bound: bool, place: Make, space: str) -> None:
    name = "unbound" if bound else "no-such-claim"
    if bound:
        spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}, "storageClassName": ""}
        meta = {"name": name, "namespace": space}
        apply({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta, "spec": spec})
    one = place(backend_options={"volumes": {"/data": name}})
    job = one.start(1, SLEEP)
    said = "unbound immediate PersistentVolumeClaims" if bound else f'persistentvolumeclaim "{name}" not found'
    eventually(lambda: said in one.backend.explain(job))
    assert "correct volumes=" in one.backend.explain(job)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"backend_options": {"volumes": {"/host": {"hostPath": "/etc"}}}}, "violates PodSecurity"),
        ({"backend_options": {"service_account": "no-such"}}, "create serviceaccount NAME"),
        ({"backend_options": {"priority_class": "no-such"}}, "kubectl get priorityclass"),
        ({"backend_options": {"namespace": "no-such-namespace"}}, "kubectl create namespace no-such-namespace"),
        ({"backend_options": {"pod_template": {"spec": {"containers": [{"name": "worker", "ports": "x"}]}}}}, "pod_template="),
        ({"backend_options": {"context": "no-such"}}, "has no context 'no-such'; its contexts are: "),
        ({"backend_options": {"pod_template": "/no/such.yaml"}}, "No such file"),
    ],
    ids=str,
)
def test_what_the_server_refuses_is_final_and_says_what_to_correct(arguments: dict[str, Any], said: str, place: Make) -> None:
    one = place(**arguments)
    error = refused(one)
    assert error.final and said in str(error), error
    one.backend.remove = lambda program: 0  # type: ignore[method-assign]  # there may be no such place


def test_a_quota_is_explained(place: Make, own_space: str) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "small", "namespace": own_space}}
    apply({**quota, "spec": {"hard": {"requests.cpu": "200m"}}})
    eventually(lambda: "requests.cpu" in get("-n", own_space, "resourcequota", "small").get("status", {}).get("hard", {}))
    error = refused(place(backend_options={"namespace": own_space}))
    assert error.final and "give the executor cpu= and memory=" in str(error)
    one = place(cpu=0.15, backend_options={"namespace": own_space})
    one.start(1, SLEEP)
    error = refused(one, 2)
    assert not error.final and "exceeded quota: small" in str(error) and "have the quota raised" in str(error)


def test_a_policy_that_refuses_a_pod_is_quoted(place: Make, own_space: str) -> None:
    name = f"no-cats-{own_space}"
    match = {"resourceRules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}]}
    rule = {"expression": "!('cat' in object.metadata.labels)", "message": "no cats in here"}
    kind = {"apiVersion": "admissionregistration.k8s.io/v1", "metadata": {"name": name}}
    apply({**kind, "kind": "ValidatingAdmissionPolicy", "spec": {"matchConstraints": match, "validations": [rule]}})
    here = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": own_space}}}
    spec = {"policyName": name, "validationActions": ["Deny"], "matchResources": here}
    apply({**kind, "kind": "ValidatingAdmissionPolicyBinding", "spec": spec})
    try:
        one = place(backend_options={"namespace": own_space, "labels": {"cat": "yes"}})
        said: list[LaunchError] = []
        numbers = itertools.count(1)

        def is_refused() -> bool:  # policies take some seconds to come into force
            try:
                one.start(next(numbers), SLEEP)
            except LaunchError as error:
                said.append(error)
            return bool(said)

        eventually(is_refused)
        assert said[0].final and "no cats in here" in str(said[0]) and "a policy of the cluster refuses" in str(said[0])
    finally:
        kubectl("delete", "validatingadmissionpolicybinding,validatingadmissionpolicy", name)


def test_a_registry_that_may_come_back_is_waited_for_and_said(place: Make) -> None:
    one = place(image="localhost:1/some/image:1", startup_timeout=30)
    job = one.start(1, SLEEP)
    eventually(lambda: "ImagePullBackOff: " in one.backend.explain(job))
    eventually(lambda: "correct image='localhost:1/some/image:1'" in one.backend.explain(job))
    assert one.ended == []
    exit = one.end(job)
    assert exit.reason in ("ErrImagePull", "ImagePullBackOff") and "connection refused" in exit.log


# -- rights


@pytest.fixture
def account(own_space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """KUBECONFIG is that of a service account without any rights; its name."""
    kubectl("-n", own_space, "create", "serviceaccount", "driver")
    config = json.loads(Path(services.require_kubernetes()).read_text())
    config["users"] = [{"name": "driver", "user": {"token": kubectl("-n", own_space, "create", "token", "driver")}}]
    for context in config["contexts"]:
        context["context"]["user"] = "driver"
    (tmp_path / "config").write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    return f"system:serviceaccount:{own_space}:driver"


def test_a_missing_right_names_verb_resource_namespace_and_the_role_that_is_enough(
    place: Make, account: str, own_space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    config = os.environ["KUBECONFIG"]
    options = {"namespace": own_space}
    image = services.cluster_image(services.worker_image())
    one = place(image=image, backend_options=options)
    monkeypatch.setenv("KUBECONFIG", config)
    error = refused(one)
    assert error.final and f"{account} may not list pods in namespace {own_space}" in str(error)
    advised = str(error).partition("(kubectl apply -f -):\n")[2]
    assert advised == role(own_space, account, OUTSIDE)
    kubectl("apply", "-f", "-", stdin=advised)
    with FiberExecutor(1, backend="kubernetes", image=image, backend_options=options) as executor:
        assert executor.submit(pow, 2, 10).result(60) == 1024  # with these rights and no others
    one.backend.remove(one.program)


def test_credentials_that_are_renewed_are_read_again(
    place: Make, account: str, own_space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    path = Path(os.environ["KUBECONFIG"])
    kubectl("apply", "-f", "-", stdin=role(own_space, account))
    good = path.read_text()
    config = json.loads(good)
    config["users"][0]["user"]["token"] = base64.b64encode(b"old").decode()
    path.write_text(json.dumps(config))
    one = place(backend_options={"namespace": own_space})
    monkeypatch.setenv("KUBECONFIG", str(path))
    error = refused(one)
    assert error.final and "does not accept this program's credentials" in str(error)
    path.write_text(good)
    began = time.monotonic()
    while True:
        try:
            job = one.start(2, "pass")
            break
        except LaunchError as again:
            assert "credentials" in str(again) and time.monotonic() < began + 30
    assert one.end(job).code == 0


# -- options


def with_container(**fields: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "worker", **fields}]}}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name_space": "x"}, "did you mean 'namespace'?"),
        ({"namespace": "Upper"}, "must be a name as Kubernetes takes it"),
        ({"labels": {"fiberexec.job": "x"}}, "begin with 'fiberexec.'"),
        ({"labels": {"a": "b c"}}, "must not have the value 'b c'"),
        ({"volumes": {"/x": {"nfs": {}}}}, "must have one of persistentVolumeClaim"),
        ({"volumes": ["a:/b"]}, "must map folders"),
        ({"pod_template": {"kind": "Deployment"}}, "must be a Pod, not a Deployment"),
        ({"pod_template": "spec: ["}, "is no YAML of a pod"),
        ({"pod_template": {"spec": {"containers": [{"image": "x"}]}}}, "must have a name for each of its containers"),
        ({"pod_template": {"spec": {"containers": {}}}}, "must have a list of dicts as its containers"),
        ({"pod_template": {"spec": "x"}}, "must have a dict as its spec"),
        ({"pod_template": {"spec": []}}, "must have a dict as its spec"),
        ({"pod_template": {"metadata": "x"}}, "must have a dict as its metadata"),
        ({"pod_template": {"metadata": {"labels": ["x"]}}}, "must have a dict as its labels"),
        ({"pod_template": with_container(env=[{"value": "x"}])}, "must have a name for each of its env"),
        ({"pod_template": with_container(env={"A": "b"})}, "must have a list of dicts as its env"),
        ({"pod_template": with_container(volumeMounts=[{"name": "x"}])}, "must have a mountPath for each of its volumeMounts"),
        ({"working_dir": "data"}, "working_dir must be an absolute path"),
        ({"volumes": {"/d": ""}}, "volumes must be a str that is not empty"),
        ({"user": "root"}, "must be a uid"),
        ({"advertise_address": "a:1"}, "without a port"),
        ({"tolerations": "x"}, "must be a list of dicts"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FiberExecutor(1, backend="kubernetes", image="x", backend_options=options)
    assert said in str(caught.value)


def test_outside_a_cluster_an_image_must_be_given() -> None:
    with pytest.raises(ConfigError, match="needs image="):
        FiberExecutor(1, backend="kubernetes")
