"""Floods and noise at the hub's port: whatever comes, before the handshake or after it, costs nobody else anything."""

from __future__ import annotations

import os
import pickle
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from impostors import Impostors, Mine, fake, hello, joined

from fiberexec._session import CONTROL, CREDIT, DATA, OPEN, Session, encode

LIMIT = 30.0
FULL = os.environ.get("FIBEREXEC_CAMPAIGN") == "full"
FRAMES = 1_000_000 if FULL else 2000


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
    said = [("ended", 1, (0, "", "", False), 0), ("started", 1, 2, "x"), ("output", 1, "x"), ("leaving",)]
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
                session.push(CONTROL, 0, encode(*chance.choice(said)))
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
