"""Managers and their proxies, where they are more than multiprocessing's, and what happens when a process goes.

What they share with multiprocessing is in tests/conformance.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import gc
import os
import pickle
import random
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fiberexec import mp
from fiberexec.mp.managers import (
    AsyncManager,
    BaseManager,
    BaseProxy,
    ManagerLost,
    RemoteError,
    SharedMemoryManager,
    SyncManager,
)

LONG = 30.0


class Counter:
    def __init__(self, start: int = 0) -> None:
        self.count = start

    def add(self, n: int) -> int:
        self.count += n
        return self.count

    def fail(self) -> None:
        raise ConnectionResetError("not the manager's")

    def pid(self) -> int:
        return os.getpid()

    def wait(self) -> None:
        threading.Event().wait()


class Counters(BaseManager):
    pass


class AsyncCounters(AsyncManager):
    pass


Counters.register("Counter", Counter)
AsyncCounters.register("Counter", Counter)
AsyncCounters.register("Event", threading.Event)


@pytest.fixture
def manager(nothing_left_behind: None) -> Iterator[SyncManager]:
    with mp.Manager() as manager:
        yield manager
    manager.join()  # or pytest keeps its Process


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Proxies travel.


def test_a_proxy_is_pickled_at_any_time(manager: SyncManager) -> None:
    shared = manager.list([1])
    again = pickle.loads(pickle.dumps(shared))
    again.append(2)
    assert list(shared) == [1, 2]
    assert type(again) is type(shared)


@pytest.mark.parametrize("typeid", ["Queue", "Event", "Lock", "Condition", "Barrier", "Namespace", "Value", "Array", "dict"])
def test_each_kind_of_proxy_travels(manager: SyncManager, typeid: str) -> None:
    arguments = {"Barrier": (1,), "Value": ("i", 3), "Array": ("i", [1, 2])}
    proxy = getattr(manager, typeid)(*arguments.get(typeid, ()))
    again = pickle.loads(pickle.dumps(proxy))
    assert str(again) == str(proxy)


def test_a_proxy_goes_into_a_process_and_comes_back_through_a_queue(manager: SyncManager) -> None:
    def work(shared: Any, queue: Any) -> None:
        shared["a"] = lambda: 7
        queue.put(shared)

    queue = manager.Queue()
    process = mp.Process(target=work, args=(manager.dict(), queue))
    process.start()
    process.join()
    assert queue.get()["a"]() == 7


def test_an_object_outlives_the_proxy_it_was_pickled_from(manager: SyncManager) -> None:
    shared = manager.list([1, 2])
    data = pickle.dumps(shared)
    del shared
    gc.collect()
    assert list(pickle.loads(data)) == [1, 2]


def test_an_object_outlives_the_process_that_made_it(manager: SyncManager) -> None:
    def make(queue: Any) -> None:
        with mp.Pool(1) as pool:
            assert pool.apply(len, ([1],)) == 1
        queue.put(queue._manager)  # a proxy that has travelled knows no manager
        inner = pickle.loads(pickle.dumps(queue))
        queue.put(inner)

    queue = manager.Queue()
    process = mp.Process(target=make, args=(queue,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert queue.get() is None
    queue.get().put(3)
    assert queue.get() == 3


def test_an_object_goes_with_its_last_proxy(manager: SyncManager) -> None:
    before = manager._number_of_objects()
    shared = manager.list([1])
    again = pickle.loads(pickle.dumps(shared))
    del shared
    gc.collect()
    assert manager._number_of_objects() == before + 1
    del again
    gc.collect()
    assert manager._number_of_objects() == before


def test_a_pickle_may_be_loaded_twice(manager: SyncManager) -> None:
    shared = manager.list([1])
    data = pickle.dumps(shared)
    one, two = pickle.loads(data), pickle.loads(data)
    del one
    gc.collect()
    two.append(2)
    assert list(shared) == [1, 2]


def test_proxies_nest_and_are_iterated_where_no_manager_is_known(manager: SyncManager) -> None:
    outer = manager.dict()
    outer["inner"] = manager.dict(a=1)
    inner = outer["inner"]
    assert inner._manager is None
    assert list(inner) == ["a"]
    outer["inner"]["b"] = 2
    assert inner.copy() == {"a": 1, "b": 2}


def test_what_is_registered_may_be_a_lambda_or_a_local_class() -> None:
    class Local:
        def name(self) -> str:
            return "local"

    class Manager(BaseManager):
        pass

    Manager.register("Local", Local)
    Manager.register("lucky", lambda: collections.Counter("aab"))
    with Manager() as manager:
        assert manager.Local().name() == "local"  # type: ignore[attr-defined]
        assert manager.lucky().most_common(1) == [("a", 2)]  # type: ignore[attr-defined]


# A manager goes.


def start(manager: Any) -> Any:
    manager.start()
    return manager


def kill(manager: Any) -> None:
    os.kill(manager._process.pid, signal.SIGKILL)


def test_a_call_that_waits_hears_that_the_manager_was_killed() -> None:
    manager = start(Counters())
    counter = manager.Counter()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(counter.wait)
        counter.add(1)
        kill(manager)
        assert isinstance(waiting.exception(LONG), ManagerLost)
    manager.shutdown()


def test_every_use_of_a_manager_that_has_gone_says_so() -> None:
    manager = start(SyncManager())
    shared = manager.dict(a=1)
    kill(manager)
    manager._process.join()
    for use in [lambda: shared["a"], manager.list, manager.dict, lambda: pickle.loads(pickle.dumps(shared))]:
        with pytest.raises(ManagerLost, match="start another one"):
            use()
    assert "failed" in str(shared)
    manager.shutdown()


class Ends:
    def __init__(self, reason: type[BaseException] | None = None) -> None:
        if reason is not None:
            raise reason("made")

    def end(self, reason: type[BaseException]) -> None:
        raise reason("called")

    def count(self) -> int:
        return 1


@pytest.mark.parametrize("reason", [SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("kind", [BaseManager, AsyncManager])
def test_a_method_that_would_end_its_thread_is_an_error_and_the_proxy_goes_on(
    kind: type[BaseManager], reason: type[BaseException], capfd: pytest.CaptureFixture[str]
) -> None:
    class Manager(kind):  # type: ignore[misc,valid-type]
        pass

    Manager.register("Ends", Ends)
    Manager.register("exit", lambda: sys, exposed=["exit"])

    def outcome(of: Any) -> Any:
        return of.result(LONG) if kind is AsyncManager else of

    with Manager() as manager:
        ends = manager.Ends()
        with pytest.raises(RemoteError, match=f"{reason.__name__}: called"):
            outcome(ends.end(reason))
        with pytest.raises(RemoteError, match=rf"{reason.__name__}\('made'\)"):
            manager.Ends(reason)
        with pytest.raises(RemoteError, match="SystemExit: 3"):
            outcome(manager.exit().exit(3))
        assert outcome(ends.count()) == 1
        assert outcome(manager.Ends().count()) == 1
    manager.join()
    assert capfd.readouterr().err == ""


def test_what_a_method_raises_is_its_own() -> None:
    with Counters() as manager, pytest.raises(ConnectionResetError, match="not the manager's") as caught:
        manager.Counter().fail()  # type: ignore[attr-defined]
    assert not isinstance(caught.value, ManagerLost)


def test_a_manager_whose_initializer_fails_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    manager = Counters()
    with pytest.raises(ManagerLost, match="exit code 1"):
        manager.start(lambda: 1 / 0)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_what_an_argument_raises_is_its_own(manager: SyncManager) -> None:
    class Bad:
        def __reduce__(self) -> Any:
            raise OSError("not the manager's")

    shared = manager.list()
    with pytest.raises(OSError, match="not the manager's") as caught:
        shared.append(Bad())
    assert not isinstance(caught.value, ManagerLost)
    assert len(shared) == 0


def test_an_interrupted_start_leaves_no_process(tmp_path: Path) -> None:
    def initialize() -> None:
        (tmp_path / "begun").touch()
        signal.pause()

    def interrupt(*_: object) -> None:
        if (tmp_path / "begun").exists():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        with pytest.raises(KeyboardInterrupt):
            Counters().start(initialize)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert mp.active_children() == []


def test_an_interrupted_call_leaves_no_reply_for_the_next(manager: SyncManager) -> None:
    event, shared = manager.Event(), manager.list([1, 2, 3])
    assert event.is_set() is False

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            event.wait()
        event.set()
        assert len(shared) == 3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_manager_goes_with_the_process_that_started_it() -> None:
    def work(conn: Any) -> None:
        manager = Counters()
        manager.start()
        conn.send(manager.Counter())  # type: ignore[attr-defined]
        threading.Event().wait()

    here, there = mp.Pipe()
    process = mp.Process(target=work, args=(there,))
    process.start()
    counter = here.recv()
    assert counter.add(2) == 2
    process.kill()
    process.join()
    with pytest.raises(ManagerLost):
        while True:
            counter.add(1)
    here.close()
    there.close()


def test_a_manager_is_started_once() -> None:
    manager = start(Counters())
    with pytest.raises(mp.ProcessError, match="Already started"):
        manager.start()
    manager.shutdown()
    with pytest.raises(mp.ProcessError, match="shut down"):
        manager.start()


@pytest.mark.leaks("multiprocessing's resource tracker stays")
def test_shared_memory_goes_with_its_manager() -> None:
    with SharedMemoryManager() as manager:
        block = manager.SharedMemory(10)
        values = manager.ShareableList([1, 2])
        assert (block.size, values[1]) == (10, 2)
        block.close()
        values.shm.close()
    with pytest.raises(FileNotFoundError):
        type(block)(block.name)


# Others knock.


def test_a_wrong_key_is_refused(manager: SyncManager) -> None:
    other = SyncManager(address=manager.address, authkey=b"wrong")
    with pytest.raises(mp.AuthenticationError):
        other.connect()
    assert list(manager.list([1])) == [1]


def test_nothing_is_unpickled_for_who_has_no_key(manager: SyncManager, tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "unpickled"),)

    generator = random.Random(4)
    payload = pickle.dumps((None, "dummy", (Touch(),), {}))
    for data in [payload, generator.randbytes(1000), generator.randbytes(10), b"\xff" * 8, b""]:
        with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
            sock.connect(manager.address)
            sock.sendall(struct.pack("!i", len(data)) + data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
    assert list(manager.list([1])) == [1]
    assert not (tmp_path / "unpickled").exists()


def test_a_manager_at_an_address_of_its_own_is_reached_by_who_has_the_key() -> None:
    with Counters(address=("127.0.0.1", 0), authkey=b"ours") as manager:
        other = Counters(address=manager.address, authkey=b"ours")
        other.connect()
        assert other.Counter(3).add(1) == 4  # type: ignore[attr-defined]


# AsyncManager.


@pytest.fixture
def counters(nothing_left_behind: None) -> Iterator[Any]:
    with AsyncCounters() as manager:
        yield manager
    manager.join()


def test_every_method_returns_a_future(counters: Any) -> None:
    counter = counters.Counter(5)
    future = counter.add(2)
    assert isinstance(future, concurrent.futures.Future)
    assert future.result(LONG) == 7
    assert isinstance(counter.fail().exception(LONG), ConnectionResetError)


def test_objects_work_at_once(counters: Any) -> None:
    event = counters.Event()
    waiting = [counters.Event().wait(0.0), event.wait(LONG)]
    other = pickle.loads(pickle.dumps(event))
    assert other.set().result(LONG) is None
    assert [future.result(LONG) for future in waiting] == [False, True]


def test_the_calls_of_one_proxy_run_in_their_order(counters: Any) -> None:
    counter = counters.Counter()
    assert [future.result(LONG) for future in [counter.add(1) for _ in range(100)]] == list(range(1, 101))


def test_operators_wait(counters: Any) -> None:
    values = counters.list([1, 2])
    values += [3]
    values[0] = 7
    assert (len(values), values[0], 3 in values, 4 in values) == (3, 7, True, False)
    value = counters.Value("i", 1)
    value.value = 5
    assert (value.value, value.get().result(LONG)) == (5, 5)
    space = counters.Namespace(x=1)
    space.y = 2
    assert space.x + space.y == 3
    with counters.Lock() as locked:
        assert locked
    with counters.Condition() as _:
        pass


def test_a_condition_waits_for_its_predicate(counters: Any) -> None:
    condition, answers = counters.Condition(), iter([False, False, True])
    with condition:
        assert condition.wait_for(lambda: next(answers), timeout=0.1) is False
        assert condition.wait_for(lambda: next(answers), timeout=LONG) is True


def test_arguments_are_pickled_before_the_method_returns(counters: Any) -> None:
    values, batch = counters.list(), [1]
    future = values.append(batch)
    batch.append(2)
    future.result(LONG)
    assert values[0] == [1]


def test_what_cannot_be_pickled_is_the_futures_and_costs_nothing_else(counters: Any) -> None:
    class Bad:
        def __reduce__(self) -> Any:
            raise ValueError("never")

    values = counters.list()
    assert isinstance(values.append(Bad()).exception(LONG), ValueError)
    assert isinstance(values.append(threading.Lock()).exception(LONG), pickle.PicklingError)
    values.append(1).result(LONG)
    assert len(values) == 1


def test_an_async_proxy_travels(counters: Any) -> None:
    def work(counter: Any, queue: Any) -> None:
        queue.put(counter.add(4).result(LONG))

    counter, queue = counters.Counter(), counters.Queue()
    process = mp.Process(target=work, args=(counter, queue))
    process.start()
    assert queue.get().result(LONG) == 4
    process.join()
    assert counter.add(1).result(LONG) == 5


def test_calls_that_wait_and_calls_that_follow_hear_that_the_manager_was_killed() -> None:
    manager = start(AsyncCounters())
    counter = manager.Counter()
    pid = counter.pid().result(LONG)
    waiting = [counter.wait(), counter.add(1), counter.add(2)]
    os.kill(pid, signal.SIGKILL)
    assert {type(future.exception(LONG)) for future in waiting} == {ManagerLost}
    assert isinstance(counter.add(1).exception(LONG), ManagerLost)
    with pytest.raises(ManagerLost):
        manager.Counter()
    manager.shutdown()


def test_a_manager_starts_when_it_is_first_used() -> None:
    manager = AsyncCounters()
    assert manager.Counter(1).add(1).result(LONG) == 2  # type: ignore[attr-defined]
    manager.shutdown()


def test_a_proxy_that_goes_takes_its_thread_and_connection_with_it(counters: Any) -> None:
    before = threading.active_count()
    counter = counters.Counter()
    counter.add(1).result(LONG)
    assert threading.active_count() == before + 1
    del counter
    gc.collect()
    eventually(lambda: threading.active_count() == before)


def test_a_class_of_proxies_of_ones_own(manager: SyncManager) -> None:
    class Manager(BaseManager):
        pass

    Manager.register("Counter", Counter, Twice)
    with Manager() as own:
        counter = own.Counter(2)  # type: ignore[attr-defined]
        assert pickle.loads(pickle.dumps(counter)).add(3) == 10


class Twice(BaseProxy):
    _exposed_ = ("add",)

    def add(self, n: int) -> Any:
        return 2 * self._callmethod("add", (n,))


def test_a_manager_that_is_killed_leaves_no_folder_behind() -> None:
    folder = Path(tempfile.gettempdir())
    before = set(folder.glob("pymp-*"))
    manager = mp.Manager()
    assert manager.list([1])[:] == [1]
    os.kill(manager._process.pid, signal.SIGKILL)
    manager._process.join()
    assert set(folder.glob("pymp-*")) == before
