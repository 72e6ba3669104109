"""AsyncManager: proxies that several threads use, in callbacks, after forks and after interrupts."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fiberexec.mp.managers import ManagerLost

from .counters import AsyncCounters
from .helpers import LIMIT, eventually, in_thread


@pytest.fixture
def counters(nothing_left_behind: None) -> Iterator[Any]:
    with AsyncCounters() as manager:
        yield manager
    manager.join()


def in_another(call: Callable[[], Any]) -> Any:
    """What a call returns in a thread of its own."""
    found: list[Any] = []
    in_thread(lambda: found.append(call())).join(LIMIT)
    return found[0]


@pytest.mark.parametrize("kind", ["Lock", "RLock", "Semaphore", "Condition"])
def test_a_lock_belongs_to_the_thread_that_takes_it(kind: str, counters: Any) -> None:
    lock, order = getattr(counters, kind)(), list[str]()

    def enter() -> None:
        with lock:
            order.append("entered")

    with lock:
        assert in_another(lambda: lock.acquire(False).result(LIMIT)) is False
        other = in_thread(enter)
        order.append("leaving")
    other.join(LIMIT)
    assert order == ["leaving", "entered"]


def test_who_waits_holds_up_no_other_thread(counters: Any) -> None:
    event, queue, barrier = counters.Event(), counters.Queue(), counters.Barrier(2)
    waiting = [event.wait(), queue.get()]
    in_another(lambda: [event.set().result(LIMIT), queue.put(7).result(LIMIT)])
    assert [future.result(LIMIT) for future in waiting] == [True, 7]
    first = barrier.wait()
    second = in_another(barrier.wait)
    assert {first.result(LIMIT), second.result(LIMIT)} == {0, 1}


def test_a_call_outlives_the_thread_that_made_it(counters: Any) -> None:
    event = counters.Event()
    waiting = in_another(event.wait)
    event.set()
    assert waiting.result(LIMIT) is True


def test_the_connection_of_a_thread_ends_with_it(counters: Any) -> None:
    counter = counters.Counter()
    before = threading.active_count()
    for _ in range(3):
        in_another(lambda: counter.add(1).result(LIMIT))
    assert counter.add(1).result(LIMIT) == 4
    eventually(lambda: threading.active_count() == before + 1)  # the reader of this thread's


def test_callbacks_may_call_and_their_operators_wait(counters: Any) -> None:
    counter, values, done = counters.Counter(), counters.list([1, 2]), threading.Event()
    found: list[Any] = []
    before = threading.active_count()

    def step(future: Any) -> None:
        found.append((future.result(), len(values), str(values)))
        if len(found) < 50:
            counter.add(1).add_done_callback(step)
        else:
            done.set()

    counter.add(1).add_done_callback(step)
    assert done.wait(LIMIT)
    assert found == [(number + 1, 2, "[1, 2]") for number in range(50)]
    assert threading.active_count() <= before + 2  # one line for this thread, one for all callbacks


def test_a_call_within_a_call_has_a_line_of_its_own(counters: Any) -> None:
    counter = counters.Counter()
    found: list[int] = []

    class Calls:
        def __reduce__(self) -> Any:
            found.append(counter.add(1).result(LIMIT))
            return int, ("5",)

    assert counter.add(Calls()).result(LIMIT) == 6
    assert found == [1] and counter.add(1).result(LIMIT) == 7


def test_a_call_that_is_interrupted_costs_later_ones_nothing(counters: Any) -> None:
    class Interrupted:
        def __reduce__(self) -> Any:
            raise KeyboardInterrupt

    counter = counters.Counter()
    assert counter.add(1).result(LIMIT) == 1
    waiting = counter.wait()
    with pytest.raises(KeyboardInterrupt):
        counter.add(Interrupted())
    with pytest.raises(ConnectionAbortedError, match="interrupted"):
        waiting.result(LIMIT)
    assert [future.result(LIMIT) for future in [counter.add(1) for _ in range(3)]] == [2, 3, 4]


@pytest.mark.parametrize("padding", [0, 1 << 20])
@pytest.mark.parametrize("kind", [OSError, EOFError, ValueError, SystemExit])
def test_what_unpickling_a_result_raises_is_that_calls_and_no_others(
    kind: type[BaseException], padding: int, counters: Any
) -> None:
    counter = counters.Counter()
    futures = [counter.broken(kind, padding), counter.add(1)]
    error = futures[0].exception(LIMIT)
    assert type(error) is kind and str(error) == "of unpickling" and not isinstance(error, ManagerLost)
    assert futures[1].result(LIMIT) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # a fork where threads run
def test_a_forked_child_has_connections_of_its_own(counters: Any) -> None:
    counter = counters.Counter()
    assert counter.add(1).result(LIMIT) == 1
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def child() -> None:
        nonlocal counter
        result = counter.add(1).result(LIMIT)
        counter = None
        writer.send(result)

    process = context.Process(target=child)
    process.start()
    assert reader.poll(LIMIT) and reader.recv() == 2
    process.join(LIMIT)
    assert process.exitcode == 0
    process.close()
    for end in (reader, writer):
        end.close()
    assert counter.add(1).result(LIMIT) == 3


def test_a_manager_that_several_threads_use_first_starts_once(nothing_left_behind: None) -> None:
    manager: Any = AsyncCounters()
    found: list[int] = []
    begin = threading.Barrier(4)

    def use() -> None:
        begin.wait(LIMIT)
        found.append(manager.Counter().pid().result(LIMIT))

    threads = [in_thread(use) for _ in range(4)]
    for thread in threads:
        thread.join(LIMIT)
    assert len(found) == 4 and len(set(found)) == 1
    manager.shutdown()
    manager.join()


def test_a_pool_has_ended_when_its_block_has_been_left(counters: Any) -> None:
    with counters.Pool(1) as pool:
        assert pool.apply(abs, (-1,)).result(LIMIT) == 1
    assert "TERMINATE" in str(pool)


def test_a_proxy_of_the_same_object_calls_beside_it(counters: Any) -> None:
    queue = counters.Queue()
    waiting = queue.get()
    pickle.loads(pickle.dumps(queue)).put(1)
    assert waiting.result(LIMIT) == 1
