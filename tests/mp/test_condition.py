"""Conditions, events and barriers."""

from __future__ import annotations

import select
import threading
from typing import Any

import pytest

from fiberexec import mp
from fiberexec._hub import client

from .helpers import LIMIT, SHORT, ended, eventually, in_thread, process


def hold(lock: Any, held: Any, until: Any) -> None:
    with lock:
        held.set()
        until.wait(LIMIT)


# -- conditions


def test_a_notification_wakes_as_many_as_it_says() -> None:
    condition, sleeping, woken = mp.Condition(), mp.Semaphore(0), mp.Semaphore(0)

    def sleep() -> None:
        with condition:
            sleeping.release()
            assert condition.wait(LIMIT)
            woken.release()

    sleepers: list[Any] = [process(sleep) for _ in range(2)] + [in_thread(sleep) for _ in range(2)]
    for _ in sleepers:
        assert sleeping.acquire(timeout=LIMIT)
    with condition:
        condition.notify()
    eventually(lambda: woken.get_value() == 1)
    with condition:
        condition.notify(2)
    eventually(lambda: woken.get_value() == 3)
    with condition:
        condition.notify_all()
    for each in sleepers:
        each.join(LIMIT)
    assert woken.get_value() == 4


def test_wait_gives_back_a_lock_that_is_held_more_than_once() -> None:
    condition = mp.Condition()

    def notify() -> None:
        with condition:
            condition.notify()

    with condition, condition:
        helper = in_thread(notify)
        assert condition.wait(LIMIT)
        assert condition._lock._count() == 2
    helper.join()
    assert condition.acquire(False)
    condition.release()


def test_a_wait_that_ends_by_its_time_holds_the_lock() -> None:
    condition = mp.Condition(mp.Lock())
    with condition:
        assert condition.wait(0) is False
        assert condition.wait(SHORT) is False
        assert condition.wait_for(lambda: False, SHORT) is False
        refused: list[bool] = []
        in_thread(lambda: refused.append(condition.acquire(False))).join()
        assert refused == [False]
    assert condition.wait_for.__self__ is condition
    with condition:
        assert condition.wait_for(lambda: 7) == 7


def test_who_does_not_hold_the_lock_may_not_wait_nor_notify() -> None:
    condition = mp.Condition()
    with pytest.raises(AssertionError, match="must acquire"):
        condition.wait()
    with pytest.raises(AssertionError, match="not owned"):
        condition.notify()


# -- events


def test_an_event_wakes_all_and_can_be_cleared() -> None:
    event, count = mp.Event(), mp.Semaphore(0)

    def wait() -> None:
        if event.wait(LIMIT):
            count.release()

    waiting: list[Any] = [process(wait), in_thread(wait)]
    assert not event.is_set() and not event.wait(0) and not event.wait(SHORT)
    event.set()
    for each in waiting:
        each.join(LIMIT)
    assert count.get_value() == 2
    assert event.is_set() and event.wait() and event.wait(0)
    assert repr(event).endswith(" set>")
    event.clear()
    assert not event.is_set()


# -- barriers


def passes(barrier: Any, queue: Any, rounds: int) -> None:
    for _ in range(rounds):
        queue.put(barrier.wait(LIMIT))


def test_a_barrier_lets_all_pass_with_a_number_each() -> None:
    barrier, queue = mp.Barrier(3), mp.Queue()
    others = [process(passes, barrier, queue, 5) for _ in range(2)]
    passes(barrier, queue, 5)
    assert ended(*others) == [0, 0]
    assert sorted(queue.get(timeout=LIMIT) for _ in range(15)) == [0] * 5 + [1] * 5 + [2] * 5
    assert (barrier.parties, barrier.n_waiting, barrier.broken) == (3, 0, False)


def test_the_action_runs_once_before_anybody_passes() -> None:
    queue = mp.SimpleQueue()
    barrier = mp.Barrier(2, action=lambda: queue.put("action"))

    def party() -> None:
        barrier.wait(LIMIT)
        queue.put("passed")

    others = [process(party), process(party)]
    assert ended(*others) == [0, 0]
    assert [queue.get() for _ in range(3)] == ["action", "passed", "passed"]


def test_an_action_that_raises_breaks_the_barrier() -> None:
    barrier = mp.Barrier(2, action=lambda: 1 / 0)
    broken: list[bool] = []

    def party() -> None:
        try:
            barrier.wait(LIMIT)
        except threading.BrokenBarrierError:
            broken.append(True)
        except ZeroDivisionError:
            broken.append(False)

    others = [in_thread(party), in_thread(party)]
    for each in others:
        each.join(LIMIT)
    assert sorted(broken) == [False, True]
    assert barrier.broken


def test_a_timeout_an_abort_and_a_reset_are_heard_by_all_who_wait() -> None:
    barrier = mp.Barrier(3, timeout=LIMIT)
    heard = mp.Semaphore(0)

    def party() -> None:
        try:
            barrier.wait()
        except threading.BrokenBarrierError:
            heard.release()

    def wait_shortly() -> None:
        with pytest.raises(threading.BrokenBarrierError):
            barrier.wait(SHORT)

    for end in (barrier.abort, wait_shortly, barrier.reset):
        if barrier.broken:
            barrier.reset()
        other = in_thread(party)
        eventually(lambda: barrier.n_waiting == 1)
        end()
        other.join(LIMIT)
        assert heard.acquire(False)
    assert not barrier.broken
    with pytest.raises(ValueError):
        mp.Barrier(0)


def test_an_action_may_take_longer_than_anybody_waits_for_others() -> None:
    limit = 2.0  # seconds that the second party has to come
    heard: list[object] = []

    def party(timeout: float) -> None:
        try:
            heard.append(barrier.wait(timeout))
        except threading.BrokenBarrierError:
            heard.append("broken")

    def act() -> None:
        helpers.append(in_thread(party, SHORT))  # for the next round, to which nobody else will come
        eventually(lambda: barrier.n_waiting == 2)
        threading.Event().wait(1.2 * limit)

    barrier = mp.Barrier(2, action=act)
    helpers = [in_thread(party, limit)]
    eventually(lambda: barrier.n_waiting == 1)
    party(limit)
    for each in helpers:
        each.join(LIMIT)
    assert sorted(heard, key=str) == [0, 1, "broken"]


def test_a_barrier_breaks_when_the_last_party_is_interrupted_before_it_hears_that_it_acts() -> None:
    barrier = mp.Barrier(2, action=lambda: None)
    broken = threading.Event()

    def party() -> None:
        with pytest.raises(threading.BrokenBarrierError):
            barrier.wait()
        broken.set()

    other = in_thread(party)
    eventually(lambda: barrier.n_waiting == 1)
    last = client.Pending(barrier._hub, ("wait", barrier._id, (None,)))
    assert select.select([last], [], [], LIMIT)[0]
    last.cancel()
    try:
        assert broken.wait(LIMIT)
    finally:
        barrier.abort()
        other.join()
