"""What an agent can cost others by what it says: no more than its own job, and memory, time and descriptors of its size."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from hubs import HELLO, Place

from fiberexec._hub import client, launch
from fiberexec._hub.jobs import Job
from fiberexec._hub.wire import HUB
from fiberexec._session import CONTROL, DATA, KEY_SIZE, OPEN, Session, encode

WORKER = 1
NOTHING = None, "", "", False  # an Exit of which nothing is known


@pytest.fixture
def place(tmp_path: Any) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.close()


@pytest.fixture
def job(place: Place) -> Job:
    return place.job(place.fleet(), WORKER)


@pytest.fixture
def say(place: Place, job: Job) -> Callable[..., bool]:
    """Say something as the job's agent, a packet or a message each; whether all of it was accepted."""
    session = Session(b"s" * KEY_SIZE)

    def push(*what: Any) -> bool:
        for each in what:
            session.push(*(each if isinstance(each[0], int) else (CONTROL, 0, encode(*each))))
        accepted = True
        while accepted and session.has_output:
            accepted = place.hear(job, b"".join(session.take()))
        return accepted

    return push


def test_an_agent_that_was_refused_opens_nothing(place: Place, say: Callable[..., bool]) -> None:
    before = len(os.listdir("/dev/fd"))
    say(("hello", 99, "9.9", 1, "elsewhere", ""), *((OPEN, channel) for channel in range(1, 101, 2)))
    assert [event[0] for event in place.told] == ["refused"] and "protocol 99" in place.told[0][2]
    assert len(os.listdir("/dev/fd")) == before and not place.hub._peers


@pytest.mark.parametrize("said", [pickle.dumps(HELLO), encode(*HELLO[:-1], 7), b"[]", b"5", b"\xff"], ids=repr)
def test_who_says_hello_as_nobody_does_is_said_to_be_of_another_version(
    place: Place, job: Job, say: Callable[..., bool], said: bytes
) -> None:
    assert not say((CONTROL, 0, said))
    job.end((-9, "", "", False))
    ((verb, worker, text, _),) = place.told
    assert (verb, worker) == ("refused", WORKER)
    assert "nobody understands" in text and "another version of fiberexec" in text


def test_who_asks_for_channels_and_hears_no_answer_loses_its_job(place: Place, job: Job, say: Callable[..., bool]) -> None:
    place.hub.switch.channels = 10
    assert say(HELLO)
    asked = 0
    while say(*((OPEN, channel) for channel in range(asked * 2 + 1, asked * 2 + 20_001, 2))):
        asked += 10_000
        assert asked < 1_000_000
    assert job.why_lost and job.link._session is not None and job.link._session.unheard < 400_000


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1e999", "-1e999", "NaN", str(1 << 64)])
def test_numbers_beyond_all_measure_are_refused(place: Place, say: Callable[..., bool], number: str) -> None:
    """Whoever reckoned with them would fail, and that is the driver."""
    assert say(HELLO, ("started", WORKER, 7, "elsewhere"))
    place.launcher.fleets.popitem()[0].do_probe(None, WORKER)  # type: ignore[arg-type]
    place.told.clear()
    assert not say((CONTROL, 0, b'["probed",1,[1,%s,0]]' % number.encode()))
    assert place.told == []


@pytest.mark.parametrize(
    "said", [("probed", WORKER, (1, 0.5, 1)), ("recalled", WORKER, 3, 2), ("leaving",)], ids=lambda said: str(said[0])
)
def test_what_was_asked_once_is_answered_once(place: Place, say: Callable[..., bool], said: tuple[Any, ...]) -> None:
    fleet = next(iter(place.launcher.fleets))
    assert say(HELLO, ("started", WORKER, 7, "elsewhere"))
    fleet.do_probe(None, WORKER)  # type: ignore[arg-type]
    fleet.do_recall(None, WORKER, 3)  # type: ignore[arg-type]
    place.told.clear()
    assert say(said) and not say(said)
    assert [event[0] for event in place.told] == [said[0]]


def test_little_pieces_that_nobody_reads_take_the_time_and_memory_of_their_bytes(
    place: Place, job: Job, say: Callable[..., bool]
) -> None:
    assert say(HELLO, (OPEN, 3))
    began = time.monotonic()
    assert say(*((DATA, 3, b"x") for _ in range(100_000)))
    assert time.monotonic() - began < 15
    relay = job.link.relays.channels[3]
    assert relay._waiting == sum(map(len, relay._out)) > 50_000 and len(relay._out) < 10


def test_a_channel_of_the_hub_is_not_opened_by_an_agent(place: Place, job: Job, say: Callable[..., bool]) -> None:
    assert say(HELLO) and not say((OPEN, 2))
    assert not job.link.relays.channels


def test_executors_that_were_closed_leave_nothing_in_the_hub() -> None:
    """Nor does what they shipped."""
    hub = launch.start()
    process = psutil.Process(launch._pid)
    launcher = client.call("new", HUB, "launcher", "fx-test", hub=hub)
    channel = client.subscribe(hub, ("events", launcher, ()))
    sizes = []
    try:
        for _ in range(12):
            fleet = client.call("new", HUB, "fleet", hub=hub)
            client.call("ship", fleet, "digest", buffers=(bytes(20 << 20),), hub=hub)
            events = client.subscribe(hub, ("events", fleet, (launcher, ("docker", {}), 1, 60.0)))
            client.call("close", fleet, hub=hub)
            client.post(hub, ("drop", HUB, (fleet,)))
            events.close()
            client.call("ping", HUB, hub=hub)
            sizes.append(process.memory_info().rss)
    finally:
        channel.close()
    assert sizes[-1] < sizes[0] + (100 << 20), sizes  # the allocator keeps the room of two or three
