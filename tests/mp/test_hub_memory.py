"""The hub takes no more memory than it may, and nothing is lost nor held up for want of it."""

from __future__ import annotations

import os
import pickle
import queue as standard
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from fiberexec import mp
from fiberexec._errors import HubFull
from fiberexec._hub import client, launch, wire
from fiberexec._messages import decode
from fiberexec._serialize import dumps_result

from .helpers import LIMIT, MIB, SHORT, eventually, in_thread


def _raises(kind: type[Exception], call: Callable[[], object]) -> bool:
    try:
        call()
    except kind:
        return True
    return False


# -- memory


def test_the_hub_takes_no_more_than_its_limit_and_says_so() -> None:
    queue = mp.Queue()
    client.call("limit", wire.HUB, 8 << 20)
    refused = 0
    put = 0
    deadline = time.monotonic() + LIMIT
    while not refused:
        assert time.monotonic() < deadline
        try:
            queue.put(bytes(1 << 20))
            put += 1
        except HubFull as error:
            assert "consumers do not keep up" in str(error)
            refused += 1
    assert 8 <= put
    for _ in range(put):  # nothing that was put is lost
        assert len(queue.get(timeout=LIMIT)) == 1 << 20
    eventually(lambda: not _raises(HubFull, lambda: queue.put(b"again")))
    assert queue.get(timeout=LIMIT) == b"again"


def test_a_queue_that_waits_for_memory_holds_up_no_other() -> None:
    full, other, filler = mp.Queue(), mp.JoinableQueue(), mp.SimpleQueue()
    other.put(1)
    assert other.get(timeout=LIMIT) == 1
    client.call("limit", wire.HUB, 1 << 20)
    filler.put(bytes(1 << 20))
    full.put(1)
    eventually(lambda: full._full is not None)
    assert other.qsize() == 0
    other.task_done()  # waits for what was put before
    other.put(2)
    eventually(lambda: other._full is not None)
    for queue in (full, other):
        with pytest.raises(HubFull, match="consumers do not keep up"):
            queue.put(3)
        with pytest.raises(standard.Empty):
            queue.get(timeout=0.01)
        assert queue.qsize() == 0
    filler.get()
    filler.put(0)  # the hub has seen that
    assert full.get(timeout=LIMIT) == 1 and other.get(timeout=LIMIT) == 2
    other.task_done()
    other.join()


def test_nothing_counts_as_done_before_what_was_put_because_of_it_has_found_memory() -> None:
    jobs, results, filler, joined = mp.JoinableQueue(), mp.Queue(), mp.SimpleQueue(), threading.Event()
    jobs.put(1)
    assert jobs.get(timeout=LIMIT) == 1
    client.call("limit", wire.HUB, 1 << 20)
    filler.put(bytes(1 << 20))
    joiner = threading.Thread(target=lambda: (jobs.join(), joined.set()))
    joiner.start()
    results.put(1)
    jobs.task_done()
    eventually(lambda: results._full is not None)
    assert not joined.wait(0.05)
    filler.get()
    filler.put(0)  # the hub has seen that
    assert joined.wait(LIMIT)
    joiner.join()
    assert results.get(timeout=LIMIT) == 1


def test_what_was_put_while_memory_was_short_is_there_in_order() -> None:
    queue = mp.Queue()
    client.call("limit", wire.HUB, 1 << 20)
    put = 0
    with pytest.raises(HubFull):
        while True:
            queue.put((put, bytes(1 << 16)))
            put += 1
    for number in range(put):
        assert queue.get(timeout=LIMIT)[0] == number


def test_what_comes_when_memory_is_short_is_not_lost_when_there_is_some_the_next_moment() -> None:
    queue, filler = mp.Queue(), mp.SimpleQueue()
    client.call("limit", wire.HUB, 1 << 20)
    filler.put(bytes(1 << 20))
    puts, drops = client._Channel(queue._hub), client._Channel(queue._hub)
    os.kill(launch._pid, signal.SIGSTOP)
    try:  # then the hub sees both at once
        puts.stream.send(wire.REQUEST, client.encode(("put", queue._id, ([dumps_result("here")[0]], 0.0))))
        drops.stream.send(wire.POST, client.encode(("drop", wire.HUB, (filler._id,))))
    finally:
        os.kill(launch._pid, signal.SIGCONT)
    kind, body, _ = puts.stream.receive_one()
    assert (kind, decode(body)) == (wire.REPLY, True)
    assert queue.get(timeout=LIMIT) == "here"
    for each in (puts, drops):
        each.close()


def test_a_queue_that_waits_for_memory_goes_on_when_another_is_emptied() -> None:
    full, other = mp.Queue(), mp.SimpleQueue()
    client.call("limit", wire.HUB, 1 << 20)
    other.put(bytes(1 << 20))
    full.put(bytes(1 << 20))
    eventually(lambda: full._full is not None)
    other.get()
    other.close()
    assert len(full.get(timeout=LIMIT)) == 1 << 20


# -- producers that wait for a place


def full_queue() -> Any:
    """A queue with one place, which is taken, of a hub that keeps 128 KiB for those who wait."""
    queue = mp.Queue(1)
    queue.put(None)
    client.call("limit", wire.HUB, MIB)
    return queue


def asks(queue: Any, data: bytes, again: bool = False) -> client.Pending:
    put = client.Pending(queue._hub, ("put", queue._id, ([pickle.dumps(data)], None, again)))
    queue._call("size")  # the hub has seen it
    return put


def test_what_waits_for_a_place_takes_little_memory_and_all_of_it_comes() -> None:
    queue = full_queue()
    process = psutil.Process(launch._pid)
    before = process.memory_info().rss

    def produce(name: int) -> None:
        for number in range(3):
            queue.put((name, number, bytes((4 * MIB, 10, 4 * MIB)[number])))

    producers = [in_thread(produce, name) for name in range(8)]
    eventually(lambda: len(client._channels) >= 8)
    threading.Event().wait(10 * SHORT)  # for what must not stay
    eventually(lambda: process.memory_info().rss < before + 16 * MIB)  # 32 wait
    assert queue.get(timeout=LIMIT) is None
    got = [queue.get(timeout=LIMIT)[:2] for _ in range(24)]
    for each in producers:
        each.join(LIMIT)
    assert sorted(got) == [(name, number) for name in range(8) for number in range(3)]
    for name in range(8):
        assert [number for each, number in got if each == name] == [0, 1, 2]


def test_a_put_that_the_hub_does_not_keep_is_over_in_time() -> None:
    queue = full_queue()
    for timeout in (0, 0.05):
        with pytest.raises(standard.Full):
            queue.put(bytes(MIB // 4), timeout=timeout)
    assert queue.get(timeout=LIMIT) is None
    queue.put("next", block=False)
    assert queue.get(timeout=LIMIT) == "next"
    with pytest.raises(standard.Empty):
        queue.get(block=False)


@pytest.mark.parametrize("interrupted", [False, True])
def test_who_does_not_send_again_holds_up_others_for_a_moment_at_most(interrupted: bool) -> None:
    queue = full_queue()
    first = asks(queue, bytes(MIB // 4))
    assert queue.get(timeout=LIMIT) is None
    if interrupted:
        first.cancel()
        queue.put(1, block=False)
    else:
        assert first.result() is None
        with pytest.raises(standard.Full):
            queue.put(1, block=False)
        queue.put(1, timeout=LIMIT)
    assert queue.get(timeout=LIMIT) == 1


def test_who_sends_again_too_late_has_the_next_place() -> None:
    queue = full_queue()
    first = asks(queue, bytes(MIB // 4))
    assert queue.get(timeout=LIMIT) is None
    assert first.result() is None
    queue.put(1, timeout=LIMIT)
    others = asks(queue, b"2")
    first = asks(queue, bytes(MIB // 4), again=True)
    assert queue.get(timeout=LIMIT) == 1
    assert first.result() is None
    first = asks(queue, bytes(MIB // 4), again=True)
    assert first.result() is True
    assert len(queue.get(timeout=LIMIT)) == MIB // 4
    assert others.result() is True
    assert queue.get(timeout=LIMIT) == b"2"


def test_what_comes_while_somebody_is_to_send_again_is_not_lost() -> None:
    queue, filler = mp.Queue(), mp.SimpleQueue()
    client.call("limit", wire.HUB, 1 * MIB)
    filler.put(bytes(MIB))
    first = asks(queue, bytes(MIB // 4))
    filler.get()
    filler.put(0)  # the hub has seen that
    assert first.result() is None
    queue.put("small")
    assert queue.get(timeout=LIMIT) == "small"
