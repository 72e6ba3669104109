"""Locks and semaphores, how handles travel, and interrupts."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Full
from typing import Any

import pytest

from fiberexec import FiberExecutor, mp
from fiberexec._hub import client

from .helpers import LIMIT, SHORT, ended, eventually, in_thread, process


def hold(lock: Any, held: Any, until: Any) -> None:
    with lock:
        held.set()
        until.wait(LIMIT)


# -- locks


@pytest.mark.parametrize("kind", ["Lock", "RLock", "Semaphore", "BoundedSemaphore"])
def test_what_one_process_holds_another_waits_for(kind: str) -> None:
    lock, held, until = getattr(mp, kind)(), mp.Event(), mp.Event()
    holder = process(hold, lock, held, until)
    assert held.wait(LIMIT)
    assert lock.acquire(False) is False
    assert lock.acquire(timeout=SHORT) is False
    until.set()
    assert lock.acquire(timeout=LIMIT) is True
    lock.release()
    assert ended(holder) == [0]


def test_a_lock_is_not_recursive_and_any_thread_may_release_it() -> None:
    lock = mp.Lock()
    assert lock.acquire() and not lock.acquire(False)
    in_thread(lock.release).join()
    assert lock.acquire(False)
    lock.release()


def test_releasing_a_lock_that_is_free_is_refused() -> None:
    lock, bounded = mp.Lock(), mp.BoundedSemaphore(2)
    with pytest.raises(ValueError, match="too many times"):
        lock.release()
    with pytest.raises(ValueError, match="too many times"):
        bounded.release()


def test_an_rlock_is_released_as_often_as_acquired_by_its_thread_alone() -> None:
    lock = mp.RLock()
    for _ in range(3):
        assert lock.acquire()
    refused: list[bool] = []
    in_thread(lambda: refused.append(lock.acquire(False))).join()
    assert refused == [False]
    for _ in range(3):
        lock.release()
    with pytest.raises(AssertionError, match="not owned"):
        lock.release()
    got: list[bool] = []
    in_thread(lambda: (got.append(lock.acquire(False)), lock.release())).join()
    assert got == [True]


def test_a_release_is_seen_by_whoever_hears_of_it() -> None:
    """A release is not answered; still nobody who was told of it afterwards finds the lock taken."""
    lock, turns = mp.Lock(), [threading.Event() for _ in range(400)]
    failed: list[int] = []

    def other() -> None:
        for number, turn in enumerate(turns):
            if number % 2 == 1:
                turn.wait(LIMIT)
                if not lock.acquire(False):
                    failed.append(number)
                else:
                    lock.release()
                if number + 1 < len(turns):
                    turns[number + 1].set()

    helper = in_thread(other)
    for number in range(0, len(turns), 2):
        if number:
            turns[number].wait(LIMIT)
        if not lock.acquire(False):
            failed.append(number)
        else:
            lock.release()
        turns[number + 1].set()
    helper.join()
    assert not failed


def test_semaphores_count() -> None:
    semaphore = mp.Semaphore(2)
    assert semaphore.acquire() and semaphore.acquire() and not semaphore.acquire(False)
    assert semaphore.get_value() == 0
    for _ in range(3):
        semaphore.release()
    assert semaphore.get_value() == 3
    assert repr(semaphore) == "<Semaphore(value=3)>"
    assert repr(mp.BoundedSemaphore(4)) == "<BoundedSemaphore(value=4, maxvalue=4)>"
    with pytest.raises(OSError):
        mp.Semaphore(-1)


def test_repr_says_who_owns_a_lock() -> None:
    lock, held, until = mp.Lock(), mp.Event(), mp.Event()
    assert repr(lock) == "<Lock(owner=None)>"
    with lock:
        assert repr(lock) == "<Lock(owner=MainProcess)>"
        seen: list[str] = []
        in_thread(lambda: seen.append(repr(lock))).join()
        assert seen == ["<Lock(owner=SomeOtherThread)>"]
    holder = process(hold, lock, held, until)
    held.wait(LIMIT)
    assert repr(lock) == "<Lock(owner=SomeOtherProcess)>"
    until.set()
    ended(holder)
    recursive = mp.RLock()
    assert repr(recursive) == "<RLock(None, 0)>"
    with recursive, recursive:
        assert repr(recursive) == "<RLock(MainProcess, 2)>"


def test_waiting_with_a_timeout_takes_about_that_long() -> None:
    lock = mp.Lock()
    lock.acquire()
    began = time.monotonic()
    assert not lock.acquire(timeout=0.2)
    assert 0.2 <= time.monotonic() - began < 5
    assert not lock.acquire(True, -1)
    lock.release()


def add(lock: Any, path: Path, count: int) -> None:
    for _ in range(count):
        with lock:
            path.write_text(str(int(path.read_text()) + 1))


def test_a_lock_excludes(tmp_path: Path) -> None:
    lock, path = mp.Lock(), tmp_path / "count"
    path.write_text("0")
    assert ended(*(process(add, lock, path, 300) for _ in range(3))) == [0, 0, 0]
    assert path.read_text() == "900"


# -- how handles travel and end


def test_handles_travel_in_queues_and_results() -> None:
    queue, lock = mp.Queue(), mp.Lock()
    queue.put((queue, lock))
    same, also = queue.get()
    same.put("hello")
    assert queue.get() == "hello"
    with lock:
        assert not also.acquire(False)
    with FiberExecutor(1) as executor:
        made = executor.submit(lambda: mp.Event()).result()
        executor.submit(made.set).result()
        assert made.is_set()


def test_an_object_that_was_never_pickled_goes_with_its_handle() -> None:
    lock = mp.Lock()
    data = pickle.dumps(lock)
    copy = pickle.loads(data)
    del lock
    with copy:  # it was pickled: it stays
        pass
    lock = mp.Lock()
    state = lock._hub, lock._id
    del lock
    ghost = mp.Lock()
    ghost._hub, ghost._id, ghost._owner = *state, None
    with pytest.raises(KeyError, match="last handle has gone"):
        ghost.acquire()


# -- interrupts


class Interrupt(Exception):
    """Raised by a signal's handler."""


@pytest.fixture
def interrupted(request: pytest.FixtureRequest) -> Any:
    """Calls a function that blocks, and interrupts it some time after ``when()`` has become true."""

    def handler(number: int, frame: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGUSR1, handler)

    def call(function: Callable[[], object], when: Callable[[], object]) -> None:
        main, begun = threading.get_ident(), threading.Event()

        def interrupt() -> None:
            begun.wait(LIMIT)
            eventually(when)
            signal.pthread_kill(main, signal.SIGUSR1)

        helper = in_thread(interrupt)
        with pytest.raises(Interrupt):
            begun.set()
            function()
        helper.join()

    yield call
    signal.signal(signal.SIGUSR1, before)


def test_an_interrupted_wait_takes_nothing(interrupted: Any) -> None:
    lock, queue, event = mp.Lock(), mp.Queue(), mp.Event()
    lock.acquire()
    for function in [lock.acquire, queue.get, event.wait]:
        pause = time.monotonic() + SHORT
        interrupted(function, lambda pause=pause: time.monotonic() > pause)
    lock.release()
    assert lock.acquire(False)
    queue.put(1)
    assert queue.get(timeout=LIMIT) == 1


def test_an_interrupted_wait_at_a_condition_holds_the_lock(interrupted: Any) -> None:
    condition = mp.Condition()
    with condition:
        interrupted(condition.wait, lambda: condition._call("sleepers") == 1)
        assert condition._lock._is_mine()
        refused: list[bool] = []
        in_thread(lambda: refused.append(condition.acquire(False))).join()
        assert refused == [False]
    assert condition.acquire(False)
    condition.release()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a socket that was just made
def test_an_interrupt_breaks_no_lock_whenever_it_comes() -> None:
    """Interrupts at moments that nobody chose: afterwards the lock is free, and works."""
    lock = mp.Lock()
    stop = threading.Event()
    raised = 0
    main = threading.get_ident()

    def handler(number: int, frame: Any) -> None:
        if frame is not None and frame.f_code.co_filename.endswith(("client.py", "_stream.py")):
            raise Interrupt

    def disturb() -> None:
        while not stop.wait(0.001):
            signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    helper = in_thread(disturb)
    try:
        for _ in range(300):
            try:
                if lock.acquire(timeout=LIMIT):
                    lock.release()
                else:
                    pytest.fail("the lock was lost")
            except Interrupt:
                raised += 1
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
                lock._depth = 0
                if lock._get_value() == 0:  # the interrupt came between the release's bookkeeping and its message
                    lock._call("release")
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
    finally:
        stop.set()
        helper.join()
        signal.signal(signal.SIGUSR1, before)
    assert lock.acquire(False)
    assert raised or os.cpu_count() == 1


def take_and_wait(lock: Any, event: Any) -> None:
    lock.acquire()
    event.wait()


def produce(empty: Any, full: Any, count: int) -> None:
    for _ in range(count):
        empty.acquire()
        full.release()


def test_a_lock_that_another_process_released_is_not_given_back_twice() -> None:
    lock, event = mp.Lock(), mp.Event()
    holder = mp.Process(target=take_and_wait, args=(lock, event))
    holder.start()
    while lock.acquire(block=False):
        lock.release()
    lock.release()  # what the holder has acquired
    assert lock.acquire(timeout=LIMIT)
    event.set()
    holder.join()
    assert not lock.acquire(timeout=0.2), "this process holds it"
    lock.release()


def test_a_process_that_ends_in_order_keeps_what_it_took_of_a_count() -> None:
    empty, full = mp.Semaphore(4), mp.Semaphore(0)
    producer = mp.Process(target=produce, args=(empty, full, 8))
    producer.start()
    for _ in range(4):
        assert full.acquire(timeout=LIMIT)
        empty.release()
    producer.join()
    assert not empty.acquire(timeout=0.2), "four slots are taken, whoever took them"
    assert [full.acquire(block=False) for _ in range(5)] == [True] * 4 + [False]


def test_numbers_of_any_kind_will_do() -> None:
    numpy = pytest.importorskip("numpy")
    semaphore, queue = mp.Semaphore(numpy.int64(2)), mp.Queue(numpy.int64(1))
    assert semaphore.acquire(timeout=numpy.float64(1)) and semaphore.acquire(timeout=True)
    assert not semaphore.acquire(timeout=numpy.float32(0.01))
    assert not mp.Event().wait(numpy.float64(0.01))
    queue.put(1, timeout=numpy.float64(1))
    with pytest.raises(Full):
        queue.put(2, timeout=numpy.float64(0.01))
    assert queue.get(timeout=numpy.float64(LIMIT)) == 1


def test_an_interrupt_while_a_connection_is_replaced_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Channels(set[client._Channel]):
        def add(self, channel: client._Channel) -> None:
            raise Interrupt

    lock = mp.Lock()
    lock.acquire()
    assert len(client._channels) == 1
    waiting = client.Pending(lock._hub, ("acquire", lock._id, (None,)))
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr(client, "_channels", Channels(client._channels))
        waiting.cancel()
    lock.release()
    assert lock.acquire(False)
