"""The link: only this program's agents are heard, each for its own job alone; nobody else disturbs anybody."""

from __future__ import annotations

import datetime
import json
import pickle
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from impostors import VERSION, Mine, fake, hello, joined, message
from tenacity import Retrying, stop_after_attempt

from fiberexec import LaunchError, _launcher, _tls
from fiberexec import _messages as messages
from fiberexec._session import CONTROL, DATA, encode
from fiberexec._tls import Authority

LIMIT = 30.0


def refused(connect: Callable[..., Any], target: Any, *args: Any, **options: Any) -> bool:
    """Whether a client is refused, at once or as soon as it has said something."""
    try:
        client = connect(target["hub"][0], target["ca"], *args, **options)
        client.send(message("hello"))
        return bool(client.is_closed())
    except (ssl.SSLError, ConnectionError):
        return True


def test_no_certificate(connect: Any, target: Any, at_work: Any) -> None:
    assert refused(connect, target)
    at_work()


def test_the_certificate_of_another_program(connect: Any, target: Any, at_work: Any) -> None:
    assert refused(connect, target, *Authority().certificate(target["job"]))
    at_work()


@pytest.mark.parametrize(("begins", "ends"), [(-2.0, -0.001), (0.1, 2.0)], ids=["expired", "not valid yet"])
def test_a_certificate_out_of_its_time(
    connect: Any, target: Any, at_work: Any, authority: Any, monkeypatch: pytest.MonkeyPatch, begins: float, ends: float
) -> None:
    """Of the very job that is at work, and signed by the program itself."""
    now = datetime.datetime.now(datetime.timezone.utc)
    days = now + datetime.timedelta(begins), now + datetime.timedelta(ends)
    monkeypatch.setattr(_tls, "_validity", lambda: days)
    assert refused(connect, target, *authority().certificate(target["job"]))
    at_work()


def test_a_certificate_of_a_hub_is_none_of_an_agent(connect: Any, target: Any, at_work: Any, authority: Any) -> None:
    """Though it has the name of the job that is at work."""
    assert refused(connect, target, *authority().certificate(target["job"], server=True))
    assert refused(connect, target, *authority().certificate("hub", server=True))
    at_work()


def test_a_certificate_that_names_its_owner_elsewhere_than_in_its_name(
    connect: Any, target: Any, at_work: Any, make: Any, jobs: Any, until: Any
) -> None:
    """The certificate of another living job, whose holder begins as the first job's agent would: it is that other job's."""
    jobs.silent = True
    future = make(1, driver_timeout=5).submit(int)
    other = until(lambda: jobs.started[1:])[0]
    claimed = {**target, "certificate": other["certificate"], "key": other["key"]}
    client, session = fake(connect, claimed)
    client.send(hello(session))
    session.push(CONTROL, 0, encode("leaving"))  # would keep new tasks from the first job
    client.send(joined(session))
    at_work()
    assert not future.done()


def test_the_hub_of_another_program_is_not_believed(connect: Any, target: Any) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(target["hub"][0], Authority().ca, target["certificate"], target["key"])


def test_the_version_of_tls_is_the_one_whose_code_threads_may_share(connect: Any, target: Any, at_work: Any) -> None:
    """By 1.3, connections at the same time have damaged the hub's heap: see _link."""
    client = connect(target["hub"][0], target["ca"], target["certificate"], target["key"])
    assert client.sock.version() == "TLSv1.2"
    at_work()


def test_a_client_without_tls(connect: Any, target: Any, at_work: Any) -> None:
    assert refused(connect, target, tls=False)
    assert refused(connect, target, tls=False, hello=b"GET / HTTP/1.1\r\n\r\n")
    at_work()


def test_a_certificate_of_no_living_job(connect: Any, target: Any, at_work: Any, authority: Any) -> None:
    assert refused(connect, target, *authority().certificate("fx-0000000000-7"))
    at_work()


def test_a_second_agent_with_the_same_certificate(connect: Any, target: Any, at_work: Any) -> None:
    assert refused(connect, target, target["certificate"], target["key"])
    at_work()


def test_nothing_is_unpickled_that_is_more_than_plain_data(
    connect: Any, target: Any, at_work: Any, make: Any, jobs: Any, tmp_path: Path, until: Any
) -> None:
    """Neither of strangers nor of an agent: what an agent says is plain data, or is refused."""
    path = tmp_path / "unpickled"
    body = pickle.dumps(("hello", Mine(path)))
    for options in ({"tls": False}, {"certificate": target["certificate"], "key": target["key"]}):
        client = connect(target["hub"][0], target["ca"], **options)
        client.send(message(body=body))
        client.is_closed()
    jobs.silent = True
    future = make(1).submit(int)
    mine = until(lambda: jobs.started[1:])[0]
    client = connect(mine["hub"][0], mine["ca"], mine["certificate"], mine["key"])
    client.send(message(body=body))
    assert client.is_closed()
    assert not path.exists() and not future.done()
    at_work()


@pytest.mark.parametrize(("version", "python"), [(99, VERSION), (messages.VERSION, "3.99")])
def test_another_version_is_refused_by_name_and_with_a_remedy(
    connect: Any, make: Any, jobs: Any, until: Any, version: int, python: str
) -> None:
    jobs.silent = True
    executor = make(1)
    future = executor.submit(int)
    client, session = fake(connect, until(lambda: jobs.started)[0])
    client.send(hello(session, version, python))
    error = future.exception(LIMIT)
    assert isinstance(error.__cause__, LaunchError)
    assert f"Python {python} and protocol {version}" in str(error.__cause__) and "FROM python:" in str(error.__cause__)


@pytest.mark.parametrize(
    "nonsense",
    [("dance",), ("ended", 1), ("started",), (1, 2, 3), ("ended", [], [], []), ("output",), ("probed", 77), 5, None],
    ids=repr,
)
def test_an_agent_that_talks_nonsense_loses_its_job_and_nobody_elses(
    connect: Any, target: Any, at_work: Any, make: Any, jobs: Any, until: Any, nonsense: Any
) -> None:
    jobs.silent = True
    other = make(1, driver_timeout=1)
    future = other.submit(int)
    client, session = fake(connect, until(lambda: jobs.started[1:])[0])
    client.send(hello(session))
    session.push(CONTROL, 0, json.dumps(nonsense).encode())
    session.push(CONTROL, 0, encode("refused", 1, "enough"))
    client.send(joined(session))
    assert not future.done() or future.exception()
    at_work()


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 900_000,  # the end of the stack
        b'["ended",1,[' + b"9" * 900_000 + b',"","",false],0]',  # minutes
        b'["output",1,"' + b"x" * (2 << 20) + b'"]',
        b"\x80\x05Nr" + (1 << 28).to_bytes(4, "little") + b".",  # a pickle with a place far out in the memo: gigabytes
    ],
    ids=["deep", "digits", "long", "pickle"],
)
def test_a_message_that_is_more_than_it_looks_costs_its_own_job(
    connect: Any, target: Any, at_work: Any, make: Any, jobs: Any, until: Any, hub: Any, body: bytes
) -> None:
    jobs.silent = True
    future = make(1, launch_retry=Retrying(stop=stop_after_attempt(1))).submit(int)
    client, session = fake(connect, until(lambda: jobs.started[1:])[0])
    client.send(hello(session))
    session.push(CONTROL, 0, body)
    while session.has_output:
        client.send(joined(session))
    assert "nobody understands" in str(future.exception(LIMIT).__cause__)
    at_work()
    assert hub().memory_info().rss < 200 << 20


def test_one_job_cannot_speak_for_another(connect: Any, target: Any, at_work: Any, make: Any, jobs: Any, until: Any) -> None:
    """Whatever it says, it is about its own workers, though the other's have the same numbers."""
    jobs.silent = True
    future = make(1, driver_timeout=1).submit(int)
    client, session = fake(connect, until(lambda: jobs.started[1:])[0])
    client.send(hello(session))
    session.push(CONTROL, 0, encode("ended", 1, (0, "", "", False), 0))
    session.push(DATA, 2, b"bytes for the channel of the other's worker")
    client.send(joined(session))
    time.sleep(0.1)  # for the hub to do something wrong
    assert not future.done()
    at_work()


def test_late_results_of_a_job_that_was_given_up_are_refused(
    connect: Any, make: Any, jobs: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_launcher.Launcher, "_terminate", lambda self, job: self._post("ended", job, (None, "", "", False)))
    jobs.silent = True
    make(1, driver_timeout=0.5).submit(int)
    told = until(lambda: jobs.started)[0]
    client, session = fake(connect, told)
    client.send(hello(session))
    until(lambda: jobs.started[1:], what="it is given up, and another job is started")
    again, _ = fake(connect, told)
    session.push(CONTROL, 0, encode("started", 1, 1, "late"))
    again.send(joined(session))
    assert again.is_closed() or again.receive() in (None, b"")
