"""What goes wrong for a moment, with a kubelet, a registry or an API server: it is waited for, and costs nothing but time."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest

from fiberexec import LaunchError, _config
from fiberexec.backends import _kubernetes_api as api
from fiberexec.backends import _kubernetes_jobs as jobs
from fiberexec.backends import _kubernetes_link as link_program
from fiberexec.backends import _kubernetes_make as make
from fiberexec.backends import _kubernetes_outpost as outpost
from fiberexec.backends import _kubernetes_watch as watches
from fiberexec.backends import kubernetes as backend
from fiberexec.backends._kubernetes_link import Gone, Link
from fiberexec.backends.base import Job, JobEnded

from .conftest import Place, eventually
from .fake import NAMESPACE, Fake, failure
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


ABSENT = 'MountVolume.SetUp failed for volume "v" : configmap "late" not found'
NO_DRIVER = "driver name efs.csi.aws.com not found in the list of registered CSI drivers"


def told(fake: Fake, message: str) -> None:
    """Each pod has had this event."""
    event = {"type": "Warning", "reason": "FailedMount", "message": message}
    fake.after = lambda method, path, query: (200, {}, {"items": [event]}) if path.endswith("/events") else None


def test_a_volume_that_is_missing_when_a_pod_has_long_waited_for_a_node_may_yet_come(
    fake: Fake, one: Place, caplog: pytest.LogCaptureFixture
) -> None:
    fake.node = False
    job = one.start(1, "")
    known = one.backend._jobs[job]
    known.since -= 60.0  # when it was made
    told(fake, ABSENT)
    eventually(lambda: ABSENT in caplog.text, SOON)
    assert known.trouble is not None and not known.trouble.final
    fake.say(job, podIP="10.0.0.1", hostIP="192.0.2.1")  # it has come; its image is pulled
    eventually(lambda: known.trouble is None, SOON)
    known._missed -= 60.0
    looks = fake.count("GET", "/events")
    fake.say(job, message="another look")
    time.sleep(1.0)  # what is being measured: several looks
    assert one.ended == [] and fake.count("DELETE", "pods/") == 0 and fake.count("GET", "/events") <= looks + 1


def test_a_pod_on_its_nodes_network_may_lack_volumes_though_it_has_an_address(fake: Fake, one: Place) -> None:
    fake.node = False
    job = one.start(1, "")
    fake.say(job, podIP="192.0.2.1", hostIP="192.0.2.1")
    told(fake, ABSENT)
    eventually(lambda: one.backend._jobs[job].heard is not None, SOON)


@pytest.mark.parametrize(("message", "given_up"), [(ABSENT, 1), (NO_DRIVER, 0)])
def test_a_volume_that_stays_away_is_an_error_and_a_node_that_is_new_is_none(
    message: str, given_up: int, fake: Fake, one: Place
) -> None:
    fake.node = False
    job = one.start(1, "")
    told(fake, NO_DRIVER)  # at first, for long
    known = one.backend._jobs[job]
    eventually(lambda: known.heard is not None, SOON)
    told(fake, message)
    eventually(lambda: known.heard is not None and known.heard.message == message, SOON)
    assert known.trouble is not None and not known.trouble.final
    known._missed -= jobs.LASTING if known._missed else 0.0
    looks = fake.count("GET", "/events")
    eventually(lambda: fake.count("GET", "/events") > looks + 2 or fake.count("DELETE", "pods/") == 1, SOON)
    assert fake.count("DELETE", "pods/") == given_up
    fake.vanish(job)
    assert (one.end(job, SOON).reason == "FailedMount") == bool(given_up)


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


def test_an_outpost_of_which_nothing_is_heard_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node may be lost, and the cluster keep the pod as it was."""
    told = {"namespace": "here", "job": {"metadata": {"name": "it"}}, "context": None, "port": 1, "timeout": 60.0}
    link = Link({**told, "known": False})
    monkeypatch.setattr(link._tunnel, "turn", lambda: None)
    link._turn()
    link._tunnel.told -= 60.0 + outpost.MARGIN  # the outpost may have ended just now
    link._turn()
    link._tunnel.told -= link_program._LOST - outpost.MARGIN
    with pytest.raises(Gone, match="has not been heard of"):
        link._turn()


@pytest.mark.parametrize(("given", "expected"), [(None, "25"), (600, "595"), (3, "2.5"), (0, "0")])
def test_an_agent_has_the_grace_period_that_the_template_gives(given: int | None, expected: str, fake: Fake) -> None:
    template = {"spec": {} if given is None else {"terminationGracePeriodSeconds": given}}
    one = Place(image="x", backend_options={"pod_template": template})
    [container] = fake.pods[one.start(1, "")]["spec"]["containers"]
    assert {"name": "FIBEREXEC_GRACE", "value": expected} in container["env"]
    one.close()


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


@pytest.mark.parametrize("code", [429, 503])
def test_a_server_that_is_busy_at_the_start_is_no_server_that_is_not_there(
    code: int, fake: Fake, one: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watches, "PATIENCE", 5.0)
    fake.before = lambda method, path, query: failure(code, message="too many requests, please try again later")
    with pytest.raises(LaunchError, match="please try again later") as caught:
        one.start(1, "")
    assert not caught.value.final and "VPN" not in str(caught.value)
    fake.before = lambda *_: None
    monkeypatch.setattr(watches, "PATIENCE", 30.0)  # it is asked again when it has been left alone for some seconds
    one.start(2, "")


@pytest.fixture
def inside(fake: Fake, one: Place) -> str:
    """The program is in a pod, whose path in the API this is, if there is such a pod."""
    one.backend._api.server()
    one.backend._api.in_cluster = True
    return f"/api/v1/namespaces/{NAMESPACE}/pods/{socket.gethostname()}"


def test_an_owner_that_could_not_be_looked_at_once_owns_all_pods(
    fake: Fake, one: Place, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "_PATIENCE", 0.0)
    name = socket.gethostname()
    fake.pods[name] = {"metadata": {"name": name, "uid": "u", "namespace": NAMESPACE}, "spec": {}, "status": {}}
    fake.before = first(1, failure(503), "GET", inside)
    with pytest.raises(LaunchError) as caught:
        one.start(1, "")
    assert not caught.value.final and not one.backend._jobs
    job = one.start(2, "")
    assert [owner["uid"] for owner in fake.pods[job]["metadata"]["ownerReferences"]] == ["u"]


def test_a_pod_of_another_name_than_its_hosts_is_found_by_its_address(fake: Fake, one: Place, inside: str) -> None:
    """As those of a Job with indices."""
    others = [("node", True, "Running"), ("ended", False, "Succeeded")]
    for name, network, phase in [*others, ("train-0-x7k2p", False, "Running")]:
        meta = {"name": name, "uid": name, "namespace": NAMESPACE}
        status = {"podIP": "127.0.0.1", "phase": phase}
        fake.pods[name] = {"metadata": meta, "spec": {"hostNetwork": network}, "status": status}
    job = one.start(1, "")
    assert [owner["uid"] for owner in fake.pods[job]["metadata"]["ownerReferences"]] == ["train-0-x7k2p"]


def test_a_pod_of_its_hosts_name_that_has_another_address_owns_nothing_of_it(fake: Fake, one: Place, inside: str) -> None:
    for name, address in ((socket.gethostname(), "10.9.9.9"), ("own", "127.0.0.1")):
        meta = {"name": name, "uid": name, "namespace": NAMESPACE}
        fake.pods[name] = {"metadata": meta, "spec": {}, "status": {"podIP": address}}
    job = one.start(1, "")
    assert [owner["uid"] for owner in fake.pods[job]["metadata"]["ownerReferences"]] == ["own"]


def test_a_program_that_cannot_find_its_pod_says_once_that_it_owns_none(
    fake: Fake, one: Place, inside: str, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(2):
        job = one.start(number, "")
        assert "ownerReferences" not in fake.pods[job]["metadata"]
    assert caplog.text.count("hostNetwork?") == 1 and fake.count("GET", inside) == 1


def test_no_pod_is_without_an_owner_while_an_outpost_is_made_anew(one: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    owners: list[Any] = []

    class Made:
        address = "10.0.0.1:1"
        alive = False

        def __init__(self, *_: Any) -> None:
            owners.append(one.backend._maker.owner)
            self.owner = {"uid": len(owners)}

        def connect(self, warn: Any) -> None:
            pass

        def close(self) -> None:
            pass

    monkeypatch.setattr(outpost, "Outpost", Made)
    assert [one.backend.reach(1, "p") for _ in range(2)] == [("10.0.0.1:1",)] * 2
    assert owners == [None, {"uid": 1}] and one.backend._maker.owner == {"uid": 2}


def test_who_is_told_to_wait_for_longer_than_it_can_does_not(fake: Fake, one: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    one.start(1, "")
    monkeypatch.setattr(api, "PATIENCE", 1.0)
    fake.before = first(1, failure(429, "TooManyRequests", Retry_After="60"), "POST")
    began = time.monotonic()
    with pytest.raises(LaunchError):
        one.start(2, "")
    assert time.monotonic() - began < 30


def test_nobody_waits_for_an_hour_because_he_is_told_to(fake: Fake, one: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_ASKED", 1.0)
    fake.before = first(1, failure(429, "TooManyRequests", Retry_After="3600"), "POST")
    began = time.monotonic()
    one.start(1, "")
    assert time.monotonic() - began > 1.0  # some time, though


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")
def test_a_connection_that_nobody_confirms_leaves_time_for_another(fake: Fake, one: Place) -> None:
    one.start(1, "")
    server = one.backend._api.server()
    idle = server.pool.connection_from_url(server.url).pool
    connection = idle.get_nowait()
    idle.put(connection)
    unheard = connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert 0 < unheard < 1000 * api.PATIENCE / 2
    assert connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)  # as always


# -- the backend itself


def test_a_watch_over_jobs_that_has_failed_goes_on_when_it_is_called_again(fake: Fake) -> None:
    made = backend.KubernetesBackend(_config.load(backend="kubernetes", image="x"))
    jobs = [Job(f"p-{number}", "p", ("python", "-"), b"") for number in range(3)]
    for job in jobs[:2]:
        made.start(job)
    fake.end("p-0")

    def fails(ended: list[JobEnded]) -> None:
        raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        made.watch(fails)
    told: list[JobEnded] = []
    fake.end("p-1", 3)  # nobody watches
    thread = threading.Thread(target=made.watch, args=(told.extend,))
    thread.start()
    eventually(lambda: [(end.job, end.exit.code) for end in told] == [("p-1", 3)], SOON)
    fake.before = first(2, failure(503), "POST")  # and what fails is tried again, as before
    made.start(jobs[2])
    made.close()
    thread.join(SOON)
    assert not thread.is_alive() and watches._watches == {}


def test_a_backend_that_nobody_watches_ends_its_watch(fake: Fake) -> None:
    made = backend.KubernetesBackend(_config.load(backend="kubernetes", image="x"))
    made.start(Job("p-1", "p", ("python", "-"), b""))
    made.close()
    assert watches._watches == {}


def test_what_was_wrong_once_is_not_told_for_ever(fake: Fake, one: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    one.backend._verdicts.settle("no such image")
    assert one.backend.explain("job") == "no such image"
    monkeypatch.setattr(jobs, "_VALID", 0.0)
    one.backend._verdicts.settle("no such image")
    assert one.backend.explain("job") == ""


def test_an_init_container_that_fails_is_named(fake: Fake, one: Place) -> None:
    fake.node = False
    state = {"terminated": {"exitCode": 1, "reason": "Error"}}
    good = {"terminated": {"exitCode": 0, "reason": "Completed"}}
    told = [{"name": "first", "state": good}, {"name": "prep", "state": state}]
    for number in range(3):
        job = one.start(number, "")
        fake.say(job, phase="Failed", initContainerStatuses=told, containerStatuses=waiting("PodInitializing", ""))
        exit = one.end(job, SOON)
        assert exit.code == 1 and "init container 'prep' ended with exit code 1" in exit.log
    with pytest.raises(LaunchError, match="init container 'prep' ended with exit code 1"):
        one.start(3, "")  # three are enough
