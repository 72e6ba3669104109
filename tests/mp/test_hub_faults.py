"""Processes and the hub die at every bad moment: nobody hangs, nothing is lost, and who waits hears it."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from fiberexec import mp
from fiberexec._errors import HubLost
from fiberexec._hub import client, launch, wire

from .helpers import LIMIT, LONG, eventually, in_thread, process


def killed(victim: mp.Process) -> None:
    victim.kill()
    victim.join(LIMIT)
    assert victim.exitcode == -signal.SIGKILL


# -- a process is killed


def hold(lock: Any, ready: Any) -> None:
    lock.acquire()
    ready.set()
    time.sleep(LONG)


@pytest.mark.parametrize("kind", ["Lock", "RLock", "BoundedSemaphore", "Semaphore", "Condition"])
def test_what_a_killed_process_held_passes_on(kind: str) -> None:
    lock, ready = getattr(mp, kind)(), mp.Event()
    victim = process(hold, lock, ready)
    assert ready.wait(LIMIT)
    assert not lock.acquire(False)
    got: list[bool] = []
    waiter = threading.Thread(target=lambda: (got.append(lock.acquire(timeout=LIMIT)), lock.release()))
    waiter.start()
    killed(victim)
    waiter.join(LIMIT)
    assert got == [True]


def test_a_signal_that_a_killed_process_has_taken_stays_taken() -> None:
    semaphore, ready = mp.Semaphore(0), mp.Event()
    semaphore.release()
    victim = process(hold, semaphore, ready)
    assert ready.wait(LIMIT)
    killed(victim)
    assert semaphore.get_value() == 0


def test_who_is_killed_while_waiting_takes_nothing_and_blocks_nobody() -> None:
    lock, queue, condition, started = mp.Lock(), mp.Queue(), mp.Condition(), mp.Semaphore(0)

    def wait_for(what: str) -> None:
        started.release()
        if what == "lock":
            lock.acquire()
        elif what == "queue":
            queue.get()
        else:
            with condition:
                condition.wait()

    lock.acquire()
    victims = [process(wait_for, what) for what in ("lock", "queue", "condition") for _ in range(2)]
    for _ in victims:
        assert started.acquire(timeout=LIMIT)
    eventually(lambda: condition._call("sleepers") == 2)
    for victim in victims:
        killed(victim)
    eventually(lambda: condition._call("sleepers") == 0)
    lock.release()
    assert lock.acquire(timeout=LIMIT)
    queue.put("mine")
    assert queue.get(timeout=LIMIT) == "mine"
    with condition:
        condition.notify_all()
        assert not condition.wait(0)


def party(barrier: Any) -> tuple[list[bool], threading.Thread]:
    """A thread that waits at a barrier, and what it hears if that breaks."""
    heard: list[bool] = []

    def wait() -> None:
        try:
            barrier.wait(LIMIT)
        except threading.BrokenBarrierError:
            heard.append(True)

    return heard, in_thread(wait)


def test_a_party_that_is_killed_while_it_waits_breaks_the_barrier() -> None:
    barrier = mp.Barrier(3)
    victim = process(barrier.wait)
    heard, other = party(barrier)
    eventually(lambda: barrier.n_waiting == 2)
    killed(victim)
    other.join(LIMIT)
    assert heard == [True] and barrier.broken


def test_a_party_that_is_killed_in_the_action_breaks_the_barrier() -> None:
    barrier = mp.Barrier(2, action=lambda: os.kill(os.getpid(), signal.SIGKILL))
    heard, other = party(barrier)
    eventually(lambda: barrier.n_waiting == 1)
    victim = process(barrier.wait)
    other.join(LIMIT)
    victim.join(LIMIT)
    assert heard == [True]


def take(queue: Any, count: int, ready: Any) -> None:
    for _ in range(count):
        queue.get()
    ready.set()
    time.sleep(LONG)


def test_what_a_killed_consumer_took_ahead_comes_back_in_order() -> None:
    """An item belongs to whom get() gave it, and to nobody else but the queue."""
    queue, ready = mp.Queue(), mp.Event()
    for number in range(1000):
        queue.put(number)
    victim = process(take, queue, 300, ready)
    assert ready.wait(LIMIT)
    killed(victim)
    assert [queue.get(timeout=LIMIT) for _ in range(700)] == list(range(300, 1000))
    assert queue.empty()


class Deadly:
    """Kills whoever unpickles it the first time."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return kill_once, (self.mark,)


def kill_once(mark: Path) -> str:
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


@pytest.mark.parametrize("before", [0, 100])
@pytest.mark.parametrize("kind", ["Queue", "JoinableQueue", "SimpleQueue"])
def test_an_item_whose_consumer_is_killed_while_it_unpickles_it_is_delivered_again(
    kind: str, before: int, tmp_path: Path
) -> None:
    queue = getattr(mp, kind)()
    for number in range(before):  # then it was taken ahead
        queue.put(number)
    queue.put(Deadly(tmp_path / "mark"))
    queue.put("last")

    def consume() -> None:
        for item in iter(queue.get, "never"):
            if kind == "JoinableQueue":
                queue.task_done()
            assert type(item) is int

    victim = process(consume)
    victim.join(LIMIT)
    assert victim.exitcode == -signal.SIGKILL
    assert [queue.get(), queue.get()] == ["survived", "last"]
    assert queue.empty()


class Unreadable:
    def __reduce__(self) -> Any:
        return int, ("no number",)


@pytest.mark.parametrize("kind", ["Queue", "SimpleQueue"])
def test_what_cannot_be_unpickled_is_raised_once_and_not_delivered_again(kind: str) -> None:
    queue = getattr(mp, kind)()
    queue.put(Unreadable())

    def consume() -> None:
        with pytest.raises(ValueError, match="no number"):
            queue.get()
        os.kill(os.getpid(), signal.SIGKILL)

    victim = process(consume)
    victim.join(LIMIT)
    assert victim.exitcode == -signal.SIGKILL
    queue.put("next")
    assert queue.get() == "next"


def test_what_a_killed_consumer_did_not_mark_as_done_is_delivered_again() -> None:
    queue, ready = mp.JoinableQueue(), mp.Event()
    for number in range(100):
        queue.put(number)

    def take_and_mark() -> None:
        for _ in range(50):
            queue.get()
        for _ in range(20):
            queue.task_done()
        ready.set()
        time.sleep(LONG)

    victim = process(take_and_mark)
    assert ready.wait(LIMIT)
    killed(victim)
    got = []
    for _ in range(80):
        got.append(queue.get(timeout=LIMIT))
        queue.task_done()
    queue.join()
    assert got == list(range(20, 100))


def test_a_producer_that_is_killed_half_way_through_leaves_nothing_half() -> None:
    queue = mp.Queue()
    address = launch.address()
    from fiberexec._stream import pack

    frame = b"".join(pack(wire.REQUEST, client.encode(("put", queue._id, ([(None, 1)], 0.0))), [bytes(1 << 20)]))
    import socket

    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(address.path)
        sock.sendall(wire.HELLO.pack(wire.MAGIC, address.token, b"k" * 16, 1, 1, 0, 0) + frame[: 1 << 19])
    queue.put("whole")
    assert queue.get(timeout=LIMIT) == "whole"
    assert queue.empty()


def test_consumers_are_killed_at_random_and_every_item_is_done(backend: str) -> None:
    """What was marked as done is done once; what was not is done again."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    items, count = 3000 if backend == "local" else 300, 4
    queue, log = mp.JoinableQueue(), mp.SimpleQueue()

    def consume(name: int) -> None:
        log.put(("worker", name))
        for item in iter(queue.get, None):
            log.put(("got", item))
            queue.task_done()
            log.put(("done", item))
        queue.task_done()

    entries: list[tuple[str, int]] = []
    reader = threading.Thread(target=lambda: entries.extend(iter(log.get, None)))
    reader.start()
    names = itertools.count()
    workers = {name: process(consume, name) for name in itertools.islice(names, count)}
    producer = process(lambda: [queue.put(number) for number in range(items)])
    producer.join(LIMIT)
    joined = threading.Event()
    joiner = threading.Thread(target=lambda: (queue.join(), joined.set()))
    joiner.start()
    kills = due = 0
    while not joined.wait(0.002):
        if len(entries) < due:
            continue  # however slow the machine is, something is done between two kills
        due = len(entries) + rng.randrange(1, 2 * items // 15)
        running = [name for name in workers if ("worker", name) in entries]
        if not running:
            continue
        killed(workers.pop(rng.choice(running)))
        name = next(names)
        workers[name] = process(consume, name)
        kills += 1
        assert kills < 300
    joiner.join()
    for _ in workers:
        queue.put(None)
    for worker in workers.values():
        worker.join(LIMIT)
    log.put(None)
    reader.join(LIMIT)
    got = Counter(item for what, item in entries if what == "got")
    done = Counter(item for what, item in entries if what == "done")
    assert set(got) == set(range(items))
    assert max(done.values()) == 1
    assert sum(got.values()) - items <= kills  # at most the one that was being worked on comes again


# -- the hub is killed


def test_when_the_hub_is_killed_every_call_ends_and_says_so() -> None:
    lock, queue, event, barrier, condition = mp.Lock(), mp.Queue(), mp.Event(), mp.Barrier(2), mp.Condition()
    joinable = mp.JoinableQueue()
    joinable.put(1)
    lock.acquire()

    def sleep() -> None:
        with condition:
            condition.wait()

    calls = [lock.acquire, queue.get, event.wait, barrier.wait, sleep, joinable.join]
    heard: list[BaseException] = []
    waiting = threading.Barrier(len(calls) + 1)

    def wait(call: Callable[[], object]) -> None:
        waiting.wait()
        try:
            call()
        except BaseException as error:
            heard.append(error)

    threads = [threading.Thread(target=wait, args=(call,)) for call in calls]
    for each in threads:
        each.start()
    waiting.wait()
    eventually(lambda: condition._call("sleepers") == 1 and barrier.n_waiting == 1)
    began = time.monotonic()
    hub = psutil.Process(launch._pid)
    hub.kill()
    for each in threads:
        each.join(LIMIT)
    assert time.monotonic() - began < 20
    eventually(lambda: hub.status() == psutil.STATUS_ZOMBIE)  # all of its connections are closed
    assert [type(error) for error in heard] == [HubLost] * len(calls)
    for call in (lock.acquire, lock.release, queue.qsize, lambda: queue.get(False), event.set, mp.Lock, mp.Queue):
        with pytest.raises(HubLost, match="has gone"):
            call()
    eventually(lambda: _raises(HubLost, lambda: queue.put(1)))
    queue.close()
    queue.join_thread()


def _raises(kind: type[Exception], call: Callable[[], object]) -> bool:
    try:
        call()
    except kind:
        return True
    return False


@pytest.mark.one_host("processes elsewhere are ended when the hub has gone")
def test_a_child_hears_of_the_hubs_end() -> None:
    event, ready = mp.Event(), mp.Event()

    def wait() -> None:
        try:
            ready.set()
            event.wait()
        except HubLost:
            os._exit(42)

    child = process(wait)
    assert ready.wait(LIMIT)
    os.kill(launch._pid, signal.SIGKILL)
    child.join(LIMIT)
    assert child.exitcode == 42
