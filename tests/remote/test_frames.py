"""What a hub makes of bytes that no agent sends: refused, or at the cost of nobody but the job whose key was used.

Each message is taken to the hub's own code, without a network, so that a million of them take minutes; test_flood.py sends
as many over the real link.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hubs import HELLO, Place

from fiberexec import _config
from fiberexec._relay import PIECE
from fiberexec._remote import Elsewhere, RemoteBackend
from fiberexec._session import CLOSE, CONTROL, CREDIT, DATA, KEY_SIZE, OPEN, Session, encode
from fiberexec.backends.base import Exit

FULL = os.environ.get("FIBEREXEC_CAMPAIGN") == "full"
COUNT = 1_000_000 if FULL else 20_000
MINE, OTHERS = 1, 2  # workers: of the job that is attacked from, and of another
SAID: list[tuple[Any, ...]] = [
    HELLO,
    ("started", MINE, 7, "elsewhere"),
    ("started", OTHERS, 7, "elsewhere"),
    ("refused", MINE, "no memory"),
    ("ended", MINE, (0, "", "", False), 0),
    ("ended", OTHERS, (0, "", "", False), 0),
    ("probed", MINE, (1, 0.5, 1)),
    ("probed", OTHERS, (1, 0.5, 1)),
    ("recalled", MINE, 3, 2),
    ("recalled", OTHERS, 3, 2),
    ("output", 1, "printed"),
    ("leaving",),
]


@pytest.fixture
def place(tmp_path: Any) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.close()


def packet(chance: random.Random) -> tuple[int, int, bytes]:
    """Something that an agent may say, or nearly."""
    kind = chance.random()
    if kind < 0.6:
        said = list(chance.choice(SAID))
        if len(said) > 1 and chance.random() < 0.5:  # a value of another kind
            place = chance.randrange(len(said))
            said[place] = chance.choice([None, -1, 1 << 70, "x", "\u20ac", "\udc80", (1, 2), [], {}, 0.5, float("nan"), True])
        if chance.random() < 0.2:
            said = said[: chance.randrange(len(said) + 1)] + [0] * chance.randrange(2)
        return CONTROL, 0, encode(*said)
    channel = chance.choice([0, 1, 2, 3, 5, 1 << 40])
    data = chance.choice([b"", b"x" * 40, (PIECE).to_bytes(8, "little"), b"\xff" * 8, bytes(70000)])
    return chance.choice([DATA, CREDIT, CLOSE, OPEN, 9]), channel, data


def mutated(chance: random.Random, data: bytes) -> bytes:
    if chance.random() < 0.05:
        return chance.randbytes(chance.choice([0, 1, 47, 48, 49, 500]))
    found = bytearray(data)
    for _ in range(chance.choice([0, 1, 1, 1, 2, 4])):
        place = chance.randrange(len(found)) if found else 0
        how = chance.random()
        if how < 0.7 and found:
            found[place] ^= 1 << chance.randrange(8)
        elif how < 0.8:
            del found[place:]
        elif how < 0.9:
            found[place:place] = chance.randbytes(8)
        else:
            found[place : place + 8] = b"\xff" * 8
    return bytes(found)


@pytest.mark.timeout(7200 if FULL else 120)
def test_mutated_messages_of_a_jobs_own_agent_cost_its_own_job_at_most(place: Place) -> None:
    """Nobody else's worker is spoken for, the hub goes on, and its owner understands all that he is told."""
    seed = int(os.environ.get("SEED") or (time.time() if FULL else 11))
    print("seed", seed)
    chance = random.Random(seed)
    others = place.fleet()
    other = place.job(others, OTHERS)
    theirs = Session(b"o" * KEY_SIZE)
    for said in (HELLO, ("started", OTHERS, 9, "there")):
        theirs.push(CONTROL, 0, encode(*said))
    assert place.hear(other, b"".join(theirs.take()))
    assert [event[:2] for event in place.told] == [("started", OTHERS)]
    settings = _config.load(backend="agents")
    backend = RemoteBackend(Elsewhere("agents", settings), settings)
    count: Counter[str] = Counter()
    heard = 0
    while heard < COUNT:
        place.told.clear()
        fleet = place.fleet()
        job = place.job(fleet, MINE)
        session = Session(chance.randbytes(KEY_SIZE))
        if chance.random() < 0.8:
            session.push(CONTROL, 0, encode(*HELLO))
        if chance.random() < 0.5:
            session.push(CONTROL, 0, encode("started", MINE, 7, "elsewhere"))
        place.hear(job, b"".join(session.take()))
        count["jobs"] += 1
        for _ in range(40):
            for _ in range(chance.choice([1, 1, 3])):
                session.push(*packet(chance))
            if chance.random() < 0.1:
                session.rewind()
            if place.hear(job, mutated(chance, b"".join(session.take()))):
                count["accepted"] += 1
            heard += 1
            if job.why_lost or job.ended:
                break
        for event in place.told:
            count[event[0]] += 1
        understood(backend, place.told)
        while place.hub._peers:
            place.hub._close(next(iter(place.hub._peers.values())))
        job.end((None, "", "", False))
        job.link.relays.close()
        place.launcher.fleets.pop(fleet, None)
        place.hub._timers._entries.clear()  # nobody runs them, and they would keep what has ended
        place.hub._timers._looks.clear()
    assert list(others.jobs.values()) == [other] and other.workers[OTHERS].started and not other.why_lost
    assert place.hear(other, b"".join(theirs.take()))
    assert set(place.hub.switch.links) == {other.id}
    print(f"{heard} messages, {dict(count)}")
    assert count["accepted"] > heard / 20 and count["jobs"] > heard / 100


def understood(backend: RemoteBackend, told: list[tuple[Any, ...]]) -> None:
    """What the owner's backend makes of it: it never fails, and is never about somebody else's worker."""
    backend._workers[MINE] = True
    backend._found = []
    for event in told:
        if event[0] == "output":
            assert isinstance(event[1], int) and isinstance(event[2], bytes)
        else:
            assert event[1] == MINE, event
        if event[0] not in ("output", "started"):
            backend._take(*event)
    for found in backend._found:
        if hasattr(found, "exit"):
            assert found.exit == Exit(*found.exit) and isinstance(found.exit.code, (int, type(None)))


def test_a_channel_that_is_open_is_not_opened_again(place: Place) -> None:
    job = place.job(place.fleet(), MINE)
    session = Session(b"s" * KEY_SIZE)
    session.push(CONTROL, 0, encode(*HELLO))
    session.push(OPEN, 3)
    assert place.hear(job, b"".join(session.take())) and len(place.hub._peers) == 1
    session.push(OPEN, 3)
    assert not place.hear(job, b"".join(session.take())) and len(place.hub._peers) == 1


def test_a_hub_without_a_descriptor_to_spare_refuses_a_channel_and_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fiberexec._hub import switch

    def none() -> Any:
        raise OSError(24, "too many open files")

    monkeypatch.setattr(switch._platform, "stream_pair", none)
    job = place.job(place.fleet(), MINE)
    session = Session(b"s" * KEY_SIZE)
    session.push(CONTROL, 0, encode(*HELLO))
    session.push(OPEN, 3)
    assert place.hear(job, b"".join(session.take()))
    assert not place.hub._peers and not job.why_lost


def test_a_job_takes_no_more_than_its_share_of_the_hubs_descriptors(place: Place) -> None:
    place.hub.switch.channels = 20
    closed = []
    for worker, channels in ((MINE, 100), (OTHERS, 5)):
        job = place.job(place.fleet(), worker)
        session = Session(job.id.encode().ljust(KEY_SIZE))
        session.push(CONTROL, 0, encode(*HELLO))
        assert place.hear(job, b"".join(session.take()))
        assert job.link._session is not None
        first = job.link._session._last
        for channel in range(1, 2 * channels, 2):
            session.push(OPEN, channel)
        assert place.hear(job, b"".join(session.take())) and not job.why_lost
        said = list(job.link._session._kept)[first - job.link._session._last :] if job.link._session._last > first else []
        assert {packet.kind for packet in said} <= {CLOSE}
        closed.append(len(said))
        assert len(job.link.relays.channels) == channels - len(said)
    assert closed == [80, 0] and len(place.hub._peers) == 25
