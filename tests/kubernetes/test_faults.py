"""An API server that is busy, slow, away, forgetful or wrong: no end is invented, none is lost, none is told twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fiberexec import LaunchError
from fiberexec._session import UNREACHABLE
from fiberexec.backends import _kubernetes_api as api
from fiberexec.backends import _kubernetes_watch as watches
from fiberexec.backends import kubernetes as backend
from fiberexec.backends._kubernetes_outpost import Way

from .conftest import Place, eventually
from .fake import DROP, NAMESPACE, Answer, Fake, failure

PODS = f"/namespaces/{NAMESPACE}/pods$"
SOON = 60.0  # seconds


def first(count: int, answer: Answer, method: str, path: str = PODS) -> Callable[..., Answer | None]:
    """Gives this answer to so many of the requests of a kind."""
    lock = threading.Lock()
    left = [count]

    def hook(asked: str, where: str, query: dict[str, str]) -> Answer | None:
        import re

        with lock:
            if asked == method and re.search(path, where) and not query.get("watch") and left[0]:
                left[0] -= 1
                return answer
        return None

    return hook


def watching(fake: Fake, count: int) -> None:
    eventually(lambda: fake.count("GET", PODS, watch="1") >= count, SOON)


def nothing_has_ended(one: Place) -> bool:
    return one.ended == []


# -- the watch


def test_a_watch_that_ends_goes_on_where_it_was(fake: Fake, one: Place) -> None:
    jobs = [one.start(number, "") for number in range(3)]
    for number, job in enumerate(jobs):
        fake.end_watches()
        fake.end(job, number)
        assert one.end(job, SOON).code == number
    assert fake.count("GET", PODS, watch="") == 1  # nothing was listed again


@pytest.mark.parametrize("how", ["in the stream", "at once"])
def test_after_410_all_is_listed_again_and_what_has_gone_has_ended(how: str, fake: Fake, one: Place) -> None:
    kept, ended, gone = (one.start(number, "") for number in range(3))
    fake.stalled = True
    fake.end(ended, 3)
    fake.vanish(gone)
    fake.compact()
    if how == "at once":
        said = failure(410, "Expired")
        told = iter([said])
        fake.before = lambda method, path, query: next(told, None) if query.get("watch") else None
    fake.stalled = False
    fake.end_watches()
    assert one.end(ended, SOON).code == 3
    exit = one.end(gone, SOON)
    assert exit.infrastructure and exit.reason == "Deleted"
    assert fake.count("GET", PODS, watch="") <= 3
    fake.end(kept)
    assert one.end(kept, SOON).code == 0


def test_a_watch_that_stalls_is_made_again(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "_SILENCE", 0.5)
    one = Place(image="x")
    job = one.start(1, "")
    watching(fake, 1)
    fake.stalled = True
    fake.end(job, 2)
    assert nothing_has_ended(one)
    watching(fake, 2)
    fake.stalled = False
    assert one.end(job, SOON).code == 2
    one.close()


@pytest.mark.parametrize("last", [b'{"type": "MODI', b"no json\n", b'{"type": "ERROR", "object": {"code": 500}}\n', b"[]\n"])
def test_a_watch_that_is_cut_or_says_nonsense_is_made_again(last: bytes, fake: Fake, one: Place) -> None:
    job = one.start(1, "")
    fake.end_watches(last)
    watching(fake, 2)
    fake.end(job, 2)
    assert one.end(job, SOON).code == 2


def test_watches_that_end_at_once_are_not_made_without_a_pause(fake: Fake, one: Place) -> None:
    job = one.start(1, "")
    empty: Answer = (200, {}, {})
    fake.before = lambda method, path, query: empty if query.get("watch") else None
    fake.end_watches()
    watching(fake, 5)
    fake.before = lambda *_: None
    assert fake.count("GET", PODS, watch="1") < 20
    fake.end(job)
    one.end(job, 30)


def test_one_watch_serves_all_backends_of_a_program(fake: Fake, one: Place) -> None:
    other = Place(image="y")
    other.program = one.program
    mine, theirs = one.start(1, ""), other.start(2, "")
    assert (fake.count("GET", PODS, watch=""), fake.count("GET", PODS, watch="1")) == (1, 1)
    fake.end(mine, 1)
    assert one.end(mine, SOON).code == 1
    other.backend.terminate([theirs])
    other.end(theirs, SOON)
    other.backend.close()
    other._thread.join(SOON)
    last = one.start(3, "")
    fake.end(last, 3)
    assert one.end(last, SOON).code == 3 and [ended.job for ended in other.ended] == [theirs]


def test_an_idle_program_asks_nothing(fake: Fake, one: Place) -> None:
    job = one.start(1, "")
    watching(fake, 1)
    before = len(fake.requests)
    time.sleep(2)
    assert len(fake.requests) == before
    assert one.ended == [] and job in fake.pods


# -- a server that is away


def test_a_start_while_the_server_is_away_fails_and_may_be_tried_again(
    fake: Fake, one: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    one.start(1, "")
    monkeypatch.setattr(api, "PATIENCE", 0.5)
    fake.down()
    with pytest.raises(LaunchError, match="does not answer") as caught:
        one.start(2, "")
    assert not caught.value.final
    fake.up()
    one.start(3, "")


def test_a_server_that_has_never_answered_is_a_final_error(
    fake: Fake, one: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watches, "PATIENCE", 1.0)
    fake.down()
    with pytest.raises(LaunchError, match=r"API server at http://127\.0\.0\.1:\d+ does not answer") as caught:
        one.start(1, "")
    assert caught.value.final
    one.backend.close()
    one._thread.join(SOON)


def test_jobs_that_were_given_up_while_the_server_was_away_are_deleted_when_it_is_back(
    fake: Fake, one: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [one.start(number, "") for number in range(2)]
    fake.before = lambda method, path, query: failure(503, "ServiceUnavailable") if method == "DELETE" else None
    one.backend.terminate(jobs[:1])
    assert jobs[0] in fake.pods
    fake.down()
    fake.before = lambda *_: None
    fake.up()
    one.end(jobs[0], 30)
    assert list(fake.pods) == jobs[1:] and list(fake.secrets) == jobs[1:]


def test_a_job_that_is_terminated_while_it_starts_ends(fake: Fake, one: Place) -> None:
    arrived, go = threading.Event(), threading.Event()

    def hold(method: str, path: str, query: dict[str, str]) -> None:
        if method == "POST" and path.endswith("pods"):
            arrived.set()
            go.wait(SOON)

    fake.before = hold
    job = one.job(1, "")
    starting = threading.Thread(target=one.backend.start, args=(job,))
    starting.start()
    assert arrived.wait(SOON)
    one.backend.terminate([job.id])
    go.set()
    starting.join()
    one.end(job.id, SOON)
    assert not fake.pods


def test_what_is_left_of_a_job_that_has_ended_is_deleted_when_the_server_lets_it(
    fake: Fake, one: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_LOOK", 0.2)
    job = one.start(1, "")
    fake.end(job)
    one.end(job, SOON)
    fake.before = first(3, failure(503), "DELETE", "pods/")
    one.backend.terminate([job])
    eventually(lambda: not fake.pods and not one.backend._jobs, SOON)
    assert fake.count("DELETE", "pods/") == 4 and len(one.ended) == 1


def test_a_delete_that_is_refused_for_a_while_is_tried_again(
    fake: Fake, one: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_LOOK", 0.2)
    job = one.start(1, "")
    fake.before = first(5, failure(503, "ServiceUnavailable"), "DELETE", "pods/")
    one.backend.terminate([job])
    one.end(job, SOON)
    assert fake.count("DELETE", "pods/") == 6 and not fake.pods


# -- a server that is busy, or whose answers are lost


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_a_create_is_tried_again_while_the_server_is_busy(code: int, fake: Fake, one: Place) -> None:
    fake.before = first(2, failure(code), "POST")
    job = one.start(1, "")
    assert list(fake.pods) == list(fake.secrets) == [job]


def test_retry_after_is_honoured(fake: Fake, one: Place) -> None:
    fake.before = first(1, failure(429, "TooManyRequests", Retry_After="1"), "POST")
    one.start(1, "")
    times = [when for when, method, path, _ in fake.requests if method == "POST" and path.endswith("/pods")]
    assert len(times) == 2 and times[1] - times[0] >= 1.0


@pytest.mark.parametrize("path", [PODS, "secrets"])
def test_a_create_whose_answer_is_lost_makes_one_pod(path: str, fake: Fake, one: Place) -> None:
    fake.after = first(1, DROP, "POST", path)
    job = one.start(1, "")
    assert fake.count("POST", path) == 2
    assert list(fake.pods) == list(fake.secrets) == [job]
    fake.end(job)
    one.end(job, SOON)


def test_a_name_that_somebody_elses_pod_has_is_an_error(fake: Fake, one: Place) -> None:
    name = f"{one.program}-1"
    fake.pods[name] = {"metadata": {"name": name, "labels": {}}, "status": {}, "spec": {}}
    with pytest.raises(LaunchError, match="already exists"):
        one.start(1, "")
    assert list(fake.pods) == [name]  # nor is it touched
    fake.pods.clear()


def test_a_pod_without_its_secret_does_not_stay(fake: Fake, one: Place) -> None:
    fake.before = first(1, failure(403, "Forbidden", "exceeded quota: secrets"), "POST", "secrets")
    with pytest.raises(LaunchError, match="exceeded quota"):
        one.start(1, "")
    eventually(lambda: not fake.pods, SOON)
    assert one.ended == []  # it was never started


def test_a_list_in_pages_that_breaks_is_begun_again(fake: Fake, one: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "PAGE", 2)
    jobs = [one.start(number, "") for number in range(5)]
    told = iter([failure(410, "Expired", "the continue parameter is too old")])
    fake.before = lambda method, path, query: next(told, None) if query.get("continue") else None
    fake.stalled = True
    for job in jobs[:2]:
        fake.vanish(job)
    fake.compact()
    fake.stalled = False
    fake.end_watches()
    for job in jobs[:2]:
        assert one.end(job, SOON).infrastructure
    assert len(one.ended) == 2


# -- nodes


def test_the_pods_of_a_lost_node_have_not_ended_before_they_are_gone(fake: Fake, one: Place) -> None:
    job = one.start(1, "")
    fake.node = False
    fake.say(job, conditions=[{"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}])
    fake.answer("DELETE", f"/api/v1/namespaces/{NAMESPACE}/pods/{job}", {}, {})
    time.sleep(1)
    assert nothing_has_ended(one)
    fake.vanish(job)
    exit = one.end(job, 30)
    assert (exit.reason, exit.infrastructure) == ("DeletionByTaintManager", True)


def test_a_pod_that_ended_by_itself_before_it_was_deleted_is_to_blame(fake: Fake, one: Place) -> None:
    job = one.start(1, "")
    state: dict[str, Any] = {"terminated": {"exitCode": 9, "reason": "Error", "finishedAt": "2020-01-01T00:00:00Z"}}
    with fake.changed:
        fake.pods[job]["metadata"]["deletionTimestamp"] = "2020-01-01T00:10:00Z"
        fake.say(job, phase="Failed", containerStatuses=[{"name": "worker", "state": state}])
    exit = one.end(job, SOON)
    assert (exit.code, exit.infrastructure) == (9, False)


def test_agents_that_do_not_find_an_outpost_that_has_gone_prove_nothing(
    fake: Fake, one: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Way, "serves", lambda way, since: False)
    for number in range(4):  # as many as would prove that the image is no good
        job = one.start(number, "")
        fake.end(job, UNREACHABLE)
        assert one.end(job, SOON).infrastructure
    assert [end.final for end in one.ended] == [""] * 4


def test_a_container_beside_the_worker_does_not_keep_a_job_alive(fake: Fake, one: Place) -> None:
    job = one.start(1, "")
    states = [{"name": "proxy", "state": {"running": {}}}, {"name": "worker", "state": {"terminated": {"exitCode": 0}}}]
    fake.say(job, containerStatuses=states)
    assert one.end(job, SOON).code == 0


def test_a_watch_that_is_told_how_far_it_is_goes_on_from_there(fake: Fake, one: Place) -> None:
    """Though all that it has seen itself is so old that it can only be listed."""
    job = one.start(1, "")
    watching(fake, 1)
    version = fake.bookmark()
    watch: Any = one.backend._watch
    eventually(lambda: watch._version == version, SOON)
    lists = fake.count("GET", PODS, watch="")
    fake.compact()
    fake.end_watches()
    watching(fake, 2)
    fake.end(job, 3)
    assert one.end(job, SOON).code == 3
    assert fake.count("GET", PODS, watch="") == lists


def test_pods_are_made_side_by_side_but_not_all_at_once(fake: Fake, one: Place) -> None:
    lock = threading.Lock()
    now, most = 0, 0

    def takes_its_time(method: str, path: str, query: dict[str, str]) -> None:
        nonlocal now, most
        if method == "POST" and path.endswith("/pods"):
            with lock:
                now += 1
                most = max(most, now)
            time.sleep(0.1)
            with lock:
                now -= 1

    fake.before = takes_its_time
    with ThreadPoolExecutor(30) as pool:
        jobs = list(pool.map(lambda number: one.start(number, ""), range(30)))
    assert len(set(jobs)) == 30 and 1 < most <= backend._STARTS


def test_an_error_that_is_taken_back_while_it_is_told_is_the_one_that_is_told(fake: Fake) -> None:
    refusals = iter([api.ApiError(401, "Unauthorized", "who are you", "")])

    class Watch(watches.Watch):
        _error = property(lambda self: next(refusals, None), lambda self, value: None)  # type: ignore[assignment]

        def __init__(self) -> None:
            self._ready = threading.Event()
            self._ready.set()
            self._said, self._api = None, api.Api(None)

    with pytest.raises(api.ApiError, match="who are you"):
        Watch().wait(1.0)
    Watch().wait(1.0)  # it is watched now
