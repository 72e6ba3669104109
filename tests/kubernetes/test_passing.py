"""What goes wrong for a moment, with a kubelet, a registry or an API server: it is waited for, and costs nothing but time."""

from __future__ import annotations

from typing import Any

import pytest

from fiberexec import LaunchError
from fiberexec.backends import _kubernetes_api as api
from fiberexec.backends import _kubernetes_jobs as jobs
from fiberexec.backends import kubernetes as backend
from fiberexec.backends._kubernetes_link import Link

from .conftest import Place, eventually
from .fake import Fake, failure
from .test_faults import SOON, first

PASSING = [
    ("CreateContainerConfigError", "services have not yet been read at least once, cannot construct envvars"),
    ("CreateContainerError", "context deadline exceeded"),
    ("CreateContainerError", 'failed to reserve container name "worker": name is reserved for "abc"'),
    ("ErrImagePull", "dial tcp: lookup registry.example.org on 10.0.0.10:53: no such host"),
    ("ImagePullBackOff", "failed to fetch anonymous token: unexpected status: 401 Unauthorized"),
]


def waiting(reason: str, message: str, container: str = "worker") -> list[dict[str, Any]]:
    return [{"name": container, "state": {"waiting": {"reason": reason, "message": message}}}]


RUNNING = [{"name": "worker", "state": {"running": {}}}]


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_LOOK", 0.2)


@pytest.mark.parametrize(("reason", "message"), PASSING)
def test_what_passes_sometimes_is_waited_for(
    reason: str, message: str, fake: Fake, one: Place, caplog: pytest.LogCaptureFixture
) -> None:
    fake.node = False
    job = one.start(1, "")
    fake.say(job, containerStatuses=waiting(reason, message))
    eventually(lambda: message in caplog.text, SOON)  # it has been looked at, and told
    assert message in one.backend.explain(job)
    fake.say(job, phase="Running", containerStatuses=RUNNING)
    one.start(2, "")  # nor is anything settled
    assert one.ended == [] and fake.count("DELETE", "pods/") == 0


@pytest.mark.parametrize(("reason", "message"), PASSING)
def test_what_does_not_pass_is_an_error(
    reason: str, message: str, fake: Fake, one: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LASTING", 1.0)
    fake.node = False
    job = one.start(1, "")
    fake.say(job, containerStatuses=waiting(reason, message))
    eventually(lambda: fake.count("DELETE", "pods/") == 1, SOON)
    fake.vanish(job)
    exit = one.end(job, SOON)
    assert exit.reason == reason and message in exit.log
    with pytest.raises(LaunchError) as caught:
        one.start(2, "")
    assert caught.value.final and message in str(caught.value)


def test_a_kubelet_that_does_not_repeat_why_an_image_is_refused(
    fake: Fake, one: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LASTING", 1.0)
    fake.node = False
    job = one.start(1, "")
    fake.say(job, containerStatuses=waiting("ErrImagePull", "403 Forbidden"))
    fake.say(job, containerStatuses=waiting("ImagePullBackOff", 'Back-off pulling image "x"'))
    eventually(lambda: fake.count("DELETE", "pods/") == 1, SOON)
    fake.vanish(job)
    assert "403 Forbidden" in one.end(job, SOON).log


def test_an_image_of_which_pods_run_is_no_image_that_cannot_be_had(
    fake: Fake, one: Place, caplog: pytest.LogCaptureFixture
) -> None:
    one.start(1, "")
    eventually(lambda: any(known.runs for known in one.backend._jobs.values()), SOON)
    fake.node = False
    job = one.start(2, "")
    fake.say(job, containerStatuses=waiting("ErrImagePull", "manifest unknown"))  # on a node with another mirror
    eventually(lambda: "manifest unknown" in caplog.text, SOON)
    one.start(3, "")
    assert one.ended == [] and fake.count("DELETE", "pods/") == 0


def test_what_an_outpost_waits_for_may_pass_too(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"namespace": "here", "job": {"metadata": {"name": "it"}}, "context": None, "port": 1, "timeout": 60.0}
    link = Link({**told, "known": False, "deadline": float("inf"), "parent": None})
    monkeypatch.setattr(Link, "over", False)

    def pod(statuses: list[dict[str, Any]]) -> dict[str, Any]:
        spec = {"containers": [{"name": "worker", "image": "x"}]}
        status = {"phase": "Pending", "podIP": "10.1.2.3", "containerStatuses": statuses}
        return {"metadata": {"name": "it-1"}, "spec": spec, "status": status}

    monkeypatch.setattr(link._api, "call", lambda *_, **__: {"made": True})
    seen = iter([pod(waiting(*PASSING[0])), pod(waiting(*PASSING[3])), pod(RUNNING)])
    monkeypatch.setattr(link._reader, "pods", lambda selector: [next(seen)])
    assert link._make() == {"made": True} and link._pod == "it-1"
    monkeypatch.setattr(jobs, "LASTING", 0.5)
    monkeypatch.setattr(link._reader, "pods", lambda selector: [pod(waiting(*PASSING[3]))])
    with pytest.raises(LaunchError, match="no such host") as caught:
        link._make()
    assert caught.value.final


# -- an API server


CONFLICT = failure(409, "Conflict", 'Operation cannot be fulfilled on resourcequotas "q": the object has been modified')


@pytest.mark.parametrize("path", ["pods$", "secrets$"])
def test_a_quota_that_is_changed_by_others_meanwhile_is_asked_again(path: str, fake: Fake, one: Place) -> None:
    fake.before = first(3, CONFLICT, "POST", path)
    job = one.start(1, "")
    assert list(fake.pods) == list(fake.secrets) == [job]


def test_a_pod_whose_secret_is_refused_for_that_does_not_stay(
    fake: Fake, one: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "PATIENCE", 0.5)
    fake.before = first(1000, CONFLICT, "POST", "secrets$")
    with pytest.raises(LaunchError, match="Operation cannot be fulfilled") as caught:
        one.start(1, "")
    assert not caught.value.final
    eventually(lambda: not fake.pods and not one.backend._jobs, SOON)
