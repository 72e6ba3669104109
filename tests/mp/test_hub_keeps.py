"""What the hub keeps: what is dropped is gone, and what a process made goes with it unless others have it."""

from __future__ import annotations

import gc
import os
import signal
import threading
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from fiberexec import mp
from fiberexec._hub import client, launch, wire

from .helpers import LIMIT, eventually

SLACK = 20.0  # seconds that a loaded machine may take longer


def test_the_hub_keeps_nothing_of_what_is_dropped() -> None:
    """Objects, timers and buffers that are done are gone: its memory stays as it was."""
    queue: Any = mp.Queue()
    process = psutil.Process(launch._pid)
    lock = mp.Lock()
    lock.acquire()

    def rounds(count: int) -> int:
        for _ in range(count):
            queue.put(bytes(1 << 20))
            queue.get(timeout=LIMIT)
            assert not lock.acquire(timeout=0.0001)
            mp.Event().wait(0)
        gc.collect()
        client.call("ping", wire.HUB)
        return int(process.memory_info().rss)

    before = rounds(20)
    assert rounds(200) < before + (8 << 20)
    lock.release()


def test_the_hub_lets_go_within_two_seconds_of_what_somebody_got() -> None:
    queue = mp.SimpleQueue()
    process = psutil.Process(launch._pid)
    before = process.memory_info().rss
    queue.put(bytes(64 << 20))
    assert process.memory_info().rss > before + (60 << 20)
    queue.get()
    eventually(lambda: process.memory_info().rss < before + (4 << 20), 2 + SLACK)  # and nobody asks it for anything


def test_the_hub_lets_go_of_what_came_late_into_a_full_queue() -> None:
    queue = mp.Queue(1)
    process = psutil.Process(launch._pid)
    before = process.memory_info().rss
    queue.put(0)
    waiter = threading.Thread(target=queue.put, args=(bytes(64 << 20),), kwargs={"timeout": 1000})
    waiter.start()
    eventually(lambda: process.memory_info().rss > before + (60 << 20))
    assert queue.get(timeout=LIMIT) == 0
    waiter.join(LIMIT)
    assert len(queue.get(timeout=LIMIT)) == 64 << 20
    eventually(lambda: process.memory_info().rss < before + (4 << 20))


@pytest.mark.parametrize("kind", ["Queue", "JoinableQueue"])
def test_what_was_got_from_a_queue_that_is_dropped_counts_no_more(kind: str) -> None:
    mp.Event().set()
    client.call("limit", wire.HUB, 4 << 20)
    for _ in range(20):
        queue = getattr(mp, kind)(1)
        queue.put(bytes(1 << 20), block=False)
        assert len(queue.get(timeout=LIMIT)) == 1 << 20
        del queue
        gc.collect()


def test_nothing_stays_of_locks_that_were_used_and_dropped() -> None:
    mp.Event().set()
    process = psutil.Process(launch._pid)

    def rounds(count: int) -> int:
        for _ in range(count):
            with mp.Lock():
                pass
        client.call("ping", wire.HUB)
        return int(process.memory_info().rss)

    before = rounds(1000)
    assert rounds(5000) < before + (1 << 20)


def is_there(id: int) -> bool:
    try:
        client.call("size", id)
    except KeyError:
        return False
    return True


def test_what_a_process_made_and_showed_nobody_goes_with_it_however_it_ends() -> None:
    seen = mp.SimpleQueue()

    def make() -> None:
        queues = [mp.Queue() for _ in range(3)]
        queues[1].put("shown")
        while not queues[1].qsize():
            pass
        seen.put([each._id for each in queues])
        seen.put(queues[1])
        os.kill(os.getpid(), signal.SIGKILL)

    process = mp.Process(target=make)
    process.start()
    hidden, shown, other = seen.get()
    queue = seen.get()
    process.join()
    eventually(lambda: not is_there(hidden) and not is_there(other))
    assert is_there(shown)
    assert queue.get(timeout=LIMIT) == "shown"


def test_what_a_process_made_before_it_forked_outlives_it() -> None:
    seen = mp.SimpleQueue()

    def make_and_fork() -> None:
        before = mp.Queue()
        if not (child := os.fork()):
            os._exit(0)
        os.waitpid(child, 0)
        after = mp.Queue()
        seen.put((before._id, after._id))
        os.kill(os.getpid(), signal.SIGKILL)

    process = mp.Process(target=make_and_fork)
    process.start()
    before, after = seen.get()
    process.join()
    eventually(lambda: not is_there(after))
    assert is_there(before)
