"""AsyncManager: every method returns a future."""

from __future__ import annotations

import concurrent.futures
import gc
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fiberexec import mp
from fiberexec.mp.managers import (
    ManagerLost,
)

from .counters import AsyncCounters, kill, start
from .helpers import LIMIT, eventually

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
    assert future.result(LIMIT) == 7
    assert isinstance(counter.fail().exception(LIMIT), ConnectionResetError)


def test_objects_work_at_once(counters: Any) -> None:
    event = counters.Event()
    waiting = [counters.Event().wait(0.0), event.wait(LIMIT)]
    other = pickle.loads(pickle.dumps(event))
    assert other.set().result(LIMIT) is None
    assert [future.result(LIMIT) for future in waiting] == [False, True]


def test_the_calls_of_one_proxy_run_in_their_order(counters: Any) -> None:
    counter = counters.Counter()
    assert [future.result(LIMIT) for future in [counter.add(1) for _ in range(100)]] == list(range(1, 101))


def test_operators_wait(counters: Any) -> None:
    values = counters.list([1, 2])
    values += [3]
    values[0] = 7
    assert (len(values), values[0], 3 in values, 4 in values) == (3, 7, True, False)
    value = counters.Value("i", 1)
    value.value = 5
    assert (value.value, value.get().result(LIMIT)) == (5, 5)
    space = counters.Namespace(x=1)
    space.y = 2
    assert space.x + space.y == 3
    with counters.Lock() as locked:
        assert locked
    with counters.Condition() as _:
        pass


def test_what_a_block_raises_comes_out_of_it(counters: Any) -> None:
    for make in [counters.Lock, counters.RLock, counters.Semaphore, counters.Condition]:
        with pytest.raises(LookupError, match="in the block"), make():
            raise LookupError("in the block")


def test_a_lock_is_free_when_its_block_has_been_left(counters: Any) -> None:
    lock = counters.Lock()
    with lock:
        pass
    assert pickle.loads(pickle.dumps(lock)).acquire(False).result(LIMIT) is True


def test_a_condition_waits_for_its_predicate(counters: Any) -> None:
    condition, answers = counters.Condition(), iter([False, False, True])
    with condition:
        assert condition.wait_for(lambda: next(answers), timeout=0.1) is False
        assert condition.wait_for(lambda: next(answers), timeout=LIMIT) is True


def test_arguments_are_pickled_before_the_method_returns(counters: Any) -> None:
    values, batch = counters.list(), [1]
    future = values.append(batch)
    batch.append(2)
    future.result(LIMIT)
    assert values[0] == [1]


def test_what_cannot_be_pickled_is_the_futures_and_costs_nothing_else(counters: Any) -> None:
    class Bad:
        def __reduce__(self) -> Any:
            raise ValueError("never")

    values = counters.list()
    assert isinstance(values.append(Bad()).exception(LIMIT), ValueError)
    assert isinstance(values.append(threading.Lock()).exception(LIMIT), pickle.PicklingError)
    values.append(1).result(LIMIT)
    assert len(values) == 1


def test_an_async_proxy_travels(counters: Any) -> None:
    def work(counter: Any, queue: Any) -> None:
        queue.put(counter.add(4).result(LIMIT))

    counter, queue = counters.Counter(), counters.Queue()
    process = mp.Process(target=work, args=(counter, queue))
    process.start()
    assert queue.get().result(LIMIT) == 4
    process.join()
    assert counter.add(1).result(LIMIT) == 5


def test_calls_that_wait_and_calls_that_follow_hear_that_the_manager_was_killed() -> None:
    manager = start(AsyncCounters())
    counter = manager.Counter()
    assert counter.add(0).result(LIMIT) == 0
    waiting = [counter.wait(), counter.add(1), counter.add(2)]
    kill(manager)
    assert {type(future.exception(LIMIT)) for future in waiting} == {ManagerLost}
    assert isinstance(counter.add(1).exception(LIMIT), ManagerLost)
    with pytest.raises(ManagerLost):
        manager.Counter()
    manager.shutdown()


def test_a_server_that_ends_replies_to_no_call_it_has_not_taken(nothing_left_behind: None) -> None:
    manager = start(AsyncCounters())
    counter = manager.Counter()
    calls = [counter.end(), counter.add(1)]
    assert isinstance(calls[1].exception(LIMIT), ManagerLost)
    manager.shutdown()
    manager.join()


def test_a_manager_starts_when_it_is_first_used() -> None:
    manager = AsyncCounters()
    assert manager.Counter(1).add(1).result(LIMIT) == 2  # type: ignore[attr-defined]
    manager.shutdown()


def test_a_proxy_that_goes_takes_its_thread_and_connection_with_it(counters: Any) -> None:
    before = threading.active_count()
    counter = counters.Counter()
    counter.add(1).result(LIMIT)
    assert threading.active_count() == before + 1
    del counter
    gc.collect()
    eventually(lambda: threading.active_count() == before)
