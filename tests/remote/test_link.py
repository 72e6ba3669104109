"""The link: only this program's agents are heard, each for its own job alone; nobody else disturbs anybody."""

from __future__ import annotations

import datetime
import os
import pickle
import random
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tenacity import Retrying, stop_after_attempt, wait_none

from fiberexec import FiberExecutor, LaunchError, _launcher, _tls
from fiberexec import _messages as messages
from fiberexec._session import CONTROL, CREDIT, DATA, OPEN, Session
from fiberexec._tls import Authority

LIMIT = 30.0
FULL = os.environ.get("FIBEREXEC_CAMPAIGN") == "full"
FRAMES = 1_000_000 if FULL else 2000
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"


class Mine:
    """What would say that somebody has unpickled it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def joined(session: Session) -> bytes:
    return b"".join(session.take())


def message(*control: Any, body: bytes | None = None) -> bytes:
    session = Session(b"s" * 16)
    session.push(CONTROL, 0, messages.encode(control) if body is None else body)
    return joined(session)


@pytest.fixture
def target(make: Any, jobs: Any) -> Any:
    """A program with an agent at work: its credentials."""
    executor = make(1, driver_timeout=30)
    assert executor.submit(pow, 2, 5).result(LIMIT) == 32
    told = jobs.started[0]
    told["executor"] = executor
    return told


@pytest.fixture
def at_work(target: Any, hub: Any, jobs: Any) -> Any:
    """Call it when everything has been tried: the program goes on as before, with the same hub, agent and worker."""
    executor = target["executor"]
    before = hub().pid, [agent.pid for agent in jobs.agents()], executor.submit(os.getpid).result(LIMIT)

    def check() -> None:
        began = time.monotonic()
        worker = executor.submit(os.getpid).result(LIMIT)
        assert time.monotonic() - began < 5
        assert (hub().pid, [agent.pid for agent in jobs.agents()], worker) == before

    return check


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
    session.push(CONTROL, 0, messages.encode(("leaving",)))  # would keep new tasks from the first job
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


def fake(connect: Any, told: Any) -> tuple[Any, Session]:
    """An agent that is none, with a session."""
    client = connect(told["hub"][0], told["ca"], told["certificate"], told["key"])
    client.greet()
    return client, Session(os.urandom(16))


def hello(session: Session, version: int = messages.VERSION, python: str = VERSION) -> bytes:
    said = "hello", version, python, 1, "elsewhere", (1.0, 1 << 30, 0), ()
    session.push(CONTROL, 0, messages.encode(said))
    return joined(session)


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
    session.push(CONTROL, 0, messages.encode(nonsense))
    session.push(CONTROL, 0, messages.encode(("refused", 1, "enough")))
    client.send(joined(session))
    assert not future.done() or future.exception()
    at_work()


@pytest.mark.parametrize(
    "body",
    [
        b"\x80\x05Nr" + (1 << 28).to_bytes(4, "little") + b".",  # a place far out in the memo: gigabytes
        b"\x80\x05})" + b"\x85" * 900_000 + b"Ns.",  # a deep key: the end of the stack
        b"\x80\x05})" + b"2\x86" * 40 + b"Ns.",  # a key of twice the same, and so on: hours
    ],
    ids=["memory", "stack", "time"],
)
def test_a_message_that_is_more_than_it_looks_costs_its_own_job(
    connect: Any, target: Any, at_work: Any, make: Any, jobs: Any, until: Any, hub: Any, body: bytes
) -> None:
    """For what unpickling it would take, see test_plain."""
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
    session.push(CONTROL, 0, messages.encode(("ended", 1, (0, "", "", False), 0)))
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
    session.push(CONTROL, 0, messages.encode(("started", 1, 1, "late")))
    again.send(joined(session))
    assert again.is_closed() or again.receive() in (None, b"")


def frames(chance: random.Random, valid: list[bytes]) -> bytes:
    """Anything, or something that looks like the real thing."""
    if chance.random() < 0.3:
        return chance.randbytes(chance.choice([0, 1, 3, 48, 49, 200, 5000]))
    data = bytearray(chance.choice(valid))
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(data))
        how = chance.random()
        if how < 0.6:
            data[place] ^= chance.randint(1, 255)
        elif how < 0.75:
            del data[place:]
            data += b"\0"
        elif how < 0.9:
            data[place:place] = chance.randbytes(8)
        else:
            data[place : place + 8] = b"\xff" * 8
    return bytes(data)


def test_bytes_at_random_before_the_handshake(connect: Any, target: Any, at_work: Any) -> None:
    seed = int(time.time()) if FULL else 7
    print("seed", seed)
    chance = random.Random(seed)
    client_hello = bytes.fromhex("16030100c8010000c40303") + chance.randbytes(200)
    for _ in range(FRAMES // 40):
        try:
            client = connect(target["hub"][0], target["ca"], tls=False, hello=None)
            client.sock.sendall(frames(chance, [client_hello, b"\0SP\0\0\x30\0\0" + bytes(40)]))
            client.close()
        except ConnectionError:
            pass
    at_work()


class Impostors:
    """Jobs without end, the test plays whose agents."""

    def __init__(self, jobs: Any, until: Callable[..., Any]) -> None:
        self._jobs, self._until = jobs, until
        jobs.silent = True
        self._used = len(jobs.started)
        self._executor: FiberExecutor | None = None
        self._ending: list[FiberExecutor] = []  # they wait for agents that were never there

    def next(self) -> Any:
        """The credentials of a job that has just been started: the last one has failed, or is given up now."""
        deadline = time.monotonic() + 0.5
        while len(self._jobs.started) <= self._used:
            if self._executor is None or self._future.done() or time.monotonic() > deadline:
                self._end()
                again = Retrying(wait=wait_none())
                self._executor = FiberExecutor(1, backend="agents", launch_retry=again, driver_timeout=30)
                self._future = self._executor.submit(int)
                self._until(lambda: len(self._jobs.started) > self._used, 120)
            time.sleep(0.001)
        self._used = len(self._jobs.started)
        return self._jobs.started[-1]

    def _end(self) -> None:
        if self._executor is not None:
            self._executor.kill_workers()
            self._executor.shutdown(wait=False)
            self._ending.append(self._executor)
        while len(self._ending) > 20:
            self._ending.pop(0).shutdown()

    def close(self) -> None:
        self._end()
        for executor in self._ending:
            executor.shutdown()


@pytest.fixture
def impostors(jobs: Any, until: Any, target: Any) -> Iterator[Impostors]:
    made = Impostors(jobs, until)
    yield made
    made.close()


@pytest.mark.timeout(36_000 if FULL else 120)
@pytest.mark.filterwarnings("ignore:a worker could not be started")
def test_mutated_frames_after_the_handshake(
    connect: Any, target: Any, at_work: Any, impostors: Impostors, hub: Any, tmp_path: Path
) -> None:
    """Of somebody who has a certificate: each is refused, or costs nobody but his own job anything.

    A million of them, or as many as can be sent in 20 minutes: each that is refused costs a handshake.
    """
    seed = int(time.time()) if FULL else 8
    print("seed", seed)
    chance = random.Random(seed)
    until = time.monotonic() + 1200
    path = tmp_path / "unpickled"
    said = [("ended", 1, (0, "", "", False), 0), ("started", 1, 2, "x"), ("output", 1, b"x"), ("leaving",)]
    client, greeted, connections, agents, number = None, 0, 0, 0, 0
    while number < FRAMES and time.monotonic() < until:
        number += 1
        try:
            if client is None:
                if connections % 6 == 0:  # a job takes some connections of its agent
                    mine, session, greeted = impostors.next(), Session(os.urandom(16)), 0
                    agents += 1
                client = connect(mine["hub"][0], mine["ca"], mine["certificate"], mine["key"])
                connections += 1
                client.sock.settimeout(5)
                if chance.random() < 0.9:
                    client.send(hello(session) if not greeted else joined(session))
                    greeted = 1
            if chance.random() < 0.7:  # the right session, the right number
                session.push(CONTROL, 0, messages.encode(chance.choice(said)))
                session.push(CONTROL, 0, pickle.dumps(("output", 1, Mine(path))))
                session.push(chance.choice([DATA, OPEN, CREDIT]), chance.randrange(5), chance.randbytes(8))
            valid = joined(session)
            session.rewind()
            client.send(frames(chance, [valid]), 1 << 60 if chance.random() < 0.003 else None)
            if chance.random() < 0.05:
                client.close()
                client = None
        except (OSError, ValueError):
            if client is not None:
                client.close()
            client = None
        if number % min(FRAMES // 4, 10_000) == 0:
            at_work()
    at_work()
    print(f"{number} frames over {connections} connections of {agents} agents")
    assert not path.exists() and agents > 1
    assert hub().memory_info().rss < 200 << 20


def test_a_message_longer_than_any_is_not_read(connect: Any, target: Any, at_work: Any, hub: Any) -> None:
    client = connect(target["hub"][0], target["ca"], target["certificate"], target["key"])
    client.send(b"x" * 1000, 1 << 40)
    assert client.is_closed()
    at_work()
    assert hub().memory_info().rss < 200 << 20


def test_connections_that_say_nothing_hold_nobody_up(connect: Any, target: Any, at_work: Any) -> None:
    for _ in range(200 if FULL else 50):
        connect(target["hub"][0], target["ca"], tls=False, hello=None)
    at_work()


def test_answers_that_nobody_reads_are_not_kept(
    connect: Any, target: Any, at_work: Any, make: Any, jobs: Any, until: Any, hub: Any
) -> None:
    """Who asks and asks, and reads no answer, loses his connection before that is much memory."""
    jobs.silent = True
    make(1, driver_timeout=1).submit(int)
    client, session = fake(connect, until(lambda: jobs.started[1:])[0])
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.send(hello(session))
    body = joined(session)
    question = struct.pack(">QI", 4 + len(body), 0x80000001) + body
    before = hub().memory_info().rss
    with pytest.raises(OSError):
        for _ in range(1000):
            client.sock.sendall(question * 500)
    at_work()
    assert hub().memory_info().rss < before + (30 << 20)


def test_a_connection_that_says_nothing_is_closed(connect: Any, target: Any, at_work: Any) -> None:
    """nng keeps many of those whose peers have gone before they said anything."""
    client = connect(target["hub"][0], target["ca"], target["certificate"], target["key"])
    assert client.greet()
    client.sock.settimeout(LIMIT)
    assert client.is_closed()
    at_work()
