"""Pipes through the hub: which these are, waiting, and what is under way."""

from __future__ import annotations

import signal
import time
from functools import partial
from multiprocessing import connection as standard
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from fiberexec import mp
from fiberexec._errors import HubFull
from fiberexec._hub import client, launch, pipes
from fiberexec._hub.wire import HUB
from fiberexec.mp import connection
from fiberexec.mp._hubconnection import HubConnection, pipe

from .helpers import LIMIT, MIB, close, eventually, in_thread

# -- which pipes these are


def test_the_backend_decides_when_a_pipe_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    for backend in ("local", "elsewhere"):
        monkeypatch.setenv("FIBEREXEC_BACKEND", backend)
        ends = [*mp.Pipe(), *connection.Pipe(), *mp.get_context("fork").Pipe(False), *mp.get_context("local").Pipe()]
        made += ends
        expected = [backend == "elsewhere"] * 6 + [False] * 2
        assert [isinstance(end, HubConnection) for end in ends] == expected
        assert all(isinstance(end, standard.Connection) for end in ends)
    close(*made)


def test_there_is_no_descriptor_and_that_is_said() -> None:
    one, other = pipe(True)
    with one, other, pytest.raises(OSError, match="no descriptor"):
        one.fileno()
    with pytest.raises(OSError, match="closed"):
        one.fileno()


# -- waiting


def test_poll_takes_its_time_and_no_more() -> None:
    one, other = pipe(True)
    with one, other:
        began = time.monotonic()
        assert not one.poll(0.1)
        assert 0.1 <= time.monotonic() - began < LIMIT
        assert not one.poll(-1)
        thread = in_thread(partial(other.send, 1))
        assert one.poll(None) and one.poll()
        thread.join()


def test_wait_takes_them_with_sockets_and_sentinels() -> None:
    ends = [pipe(True) for _ in range(3)]
    plain = mp.get_context("local").Pipe()
    process = mp.Process(target=signal.pause)
    process.start()
    objects = [process.sentinel, plain[0], *(one for one, _ in ends)]
    assert connection.wait(objects, 0) == connection.wait(objects, 0.05) == []
    for timeout in (0, LIMIT, None):
        ends[1][1].send(1)
        assert connection.wait(objects, timeout) == [ends[1][0]]
        assert ends[1][0].recv() == 1
    for act, expected in ((partial(plain[1].send, 1), plain[0]), (partial(ends[2][1].send, 2), ends[2][0])):
        found: list[Any] = []
        thread = in_thread(lambda: found.extend(connection.wait(objects, LIMIT)))  # noqa: B023
        act()
        thread.join()
        assert found == [expected]
        expected.recv()
    process.kill()
    assert connection.wait(objects, LIMIT) == [process.sentinel]
    process.join(LIMIT)
    ends[0][1].close()
    assert connection.wait(objects[1:], LIMIT) == [ends[0][0]]
    with pytest.raises(EOFError):
        ends[0][0].recv()
    close(*plain, *(end for pair in ends for end in pair))
    with pytest.raises(OSError, match="closed"):
        connection.wait([ends[0][0]], 0)


def test_waiting_uses_no_time_of_the_processor() -> None:
    one, other = pipe(True)
    with one, other:
        one.poll()
        hub = psutil.Process(launch._pid)
        before = sum(hub.cpu_times()[:2]) + time.process_time()
        assert connection.wait([one], 0.3) == []
        assert sum(hub.cpu_times()[:2]) + time.process_time() - before < 0.1


# -- what is under way


def test_a_sender_waits_while_the_pipe_is_full_and_the_other_way_is_free() -> None:
    one, other = pipe(True)
    message = bytes(100_000)
    sent: list[int] = []

    def send() -> None:
        for number in range(30):
            one.send_bytes(message)
            sent.append(number)

    with one, other:
        thread = in_thread(send)
        eventually(lambda: len(sent) >= pipes.CAPACITY // 101_000)
        other.send("back")
        assert one.recv() == "back"
        assert len(sent) <= pipes.CAPACITY // len(message)
        for _ in range(30):
            assert other.recv_bytes() == message
        thread.join()
        assert not other.poll()


def test_the_hub_holds_no_more_than_one_large_message_for_each_way() -> None:
    one, other = pipe(True)
    message = bytes(32 * MIB)
    with one, other:
        threads = [in_thread(partial(one.send_bytes, message)) for _ in range(6)]
        assert other.poll(LIMIT)
        hub = psutil.Process(launch._pid)
        peak = 0
        for _ in range(6):
            assert other.poll(LIMIT)
            peak = max(peak, hub.memory_info().rss)
            assert other.recv_bytes() == message
        for thread in threads:
            thread.join()
        assert peak < 4 * 32 * MIB
        eventually(lambda: hub.memory_info().rss < 2 * 32 * MIB)


def test_a_hub_without_memory_says_so() -> None:
    one, other = pipe(True)
    with one, other:
        client.call("limit", HUB, 10 * MIB)
        with pytest.raises(HubFull, match="limit"):
            one.send(bytes(11 * MIB))
        one.send(bytes(9 * MIB))
        with pytest.raises(HubFull, match="limit"):
            other.send(bytes(2 * MIB))
        assert other.recv() == bytes(9 * MIB)
        other.send(bytes(2 * MIB))
        assert one.recv() == bytes(2 * MIB)


def test_a_hundred_pipes_work_at_once() -> None:
    pairs = [pipe(True) for _ in range(100)]

    def work(number: int) -> None:
        one, other = pairs[number]
        for value in range(10):
            one.send((number, value))
            assert other.recv() == (number, value)
        other.send(number)

    threads = [in_thread(partial(work, number)) for number in range(100)]
    left = {one: number for number, (one, _) in enumerate(pairs)}
    while left:
        ready = connection.wait(left, LIMIT)
        assert ready
        for one in ready:
            assert one.recv() == left.pop(one)
    for thread in threads:
        thread.join()
    close(*(end for pair in pairs for end in pair))
