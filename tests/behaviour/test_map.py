"""What map() promises: order, laziness, time, and that each item is a task of its own."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fiberexec
from fiberexec import FiberExecutor

LIMIT = 30.0


def square(x: int) -> int:
    return x * x


def hold_first(board: Any, i: int) -> int:
    if i == 0:
        board.wait("go")
    return i


def fail_on_three(x: int) -> int:
    if x % 10 == 3:
        raise ValueError(x)
    return x


@pytest.mark.parametrize("chunksize", [None, 1, 7, 5000])
@pytest.mark.parametrize("buffersize", [None, 1, 3, 64, 5000])
def test_results_come_in_order_however_they_travel(
    executor: FiberExecutor, chunksize: int | None, buffersize: int | None
) -> None:
    found = executor.map(square, range(300), chunksize=chunksize, buffersize=buffersize)
    assert list(found) == [x * x for x in range(300)]


def test_several_iterables_end_with_the_shortest(executor: FiberExecutor) -> None:
    assert list(executor.map(pow, [2, 3, 4], itertools.count(1))) == [2, 9, 64]
    assert list(executor.map(pow, [2, 3, 4], [5])) == [32]
    assert list(executor.map(lambda *args: args, "ab", [[1], [2]], ({3}, {4}))) == [("a", [1], {3}), ("b", [2], {4})]


@pytest.mark.parametrize("buffersize", [None, 4])
def test_nothing_gives_nothing(executor: FiberExecutor, buffersize: int | None) -> None:
    assert list(executor.map(square, [], buffersize=buffersize)) == []
    assert list(executor.map(square, [], [1], buffersize=buffersize)) == []
    assert list(executor.map(square, buffersize=buffersize)) == []


def test_map_submits_at_once_without_being_iterated(executor: FiberExecutor, board: Any) -> None:
    results = executor.map(board.post, ["called"] * 3)
    assert len(board.wait("called", 3)) == 3
    assert list(results) == [None] * 3


def test_an_exception_is_raised_in_its_place_and_spares_its_neighbours(executor: FiberExecutor, board: Any) -> None:
    def work(x: int) -> int:
        board.post("ran", x)
        return fail_on_three(x)

    results = executor.map(work, range(8), chunksize=8)
    assert list(itertools.islice(results, 3)) == [0, 1, 2]
    with pytest.raises(ValueError, match="3"):
        next(results)
    board.wait("ran", 4)


def test_every_item_but_the_raising_one_has_its_result(executor: FiberExecutor) -> None:
    """Seen through the futures of submit(): a chunk is transport, not fate."""
    futures = [executor.submit(fail_on_three, x) for x in range(200)]
    failed = {x for x, future in enumerate(futures) if future.exception(LIMIT) is not None}
    assert failed == set(range(3, 200, 10))
    assert executor.stats().done == 200


def test_the_time_limit_is_for_the_whole(executor: FiberExecutor, board: Any) -> None:
    assert executor.submit(int).result(LIMIT) == 0  # a worker is there
    results = executor.map(hold_first, [board] * 3, [1, 0, 2], timeout=6)
    assert next(results) == 1
    with pytest.raises(concurrent.futures.TimeoutError):
        next(results)
    board.post("go")


def test_the_time_limit_counts_from_the_call(executor: FiberExecutor, board: Any) -> None:
    began = time.monotonic()
    results = executor.map(hold_first, [board], [0], timeout=0.05)
    with pytest.raises(concurrent.futures.TimeoutError):
        list(results)
    assert time.monotonic() - began < 10
    board.post("go")


def test_a_generous_time_limit_changes_nothing(executor: FiberExecutor) -> None:
    assert list(executor.map(square, range(100), timeout=LIMIT)) == [x * x for x in range(100)]


class Source:
    """An endless iterable that knows how many items were taken."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[int]:
        for i in itertools.count():
            self.taken = i + 1
            yield i


@pytest.mark.parametrize("chunksize", [None, 1, 4])
@pytest.mark.parametrize("buffersize", [1, 2, 10])
def test_endless_input_is_read_no_further_than_the_buffer(
    executor: FiberExecutor, buffersize: int, chunksize: int | None
) -> None:
    source = Source()
    results = executor.map(square, source, buffersize=buffersize, chunksize=chunksize)
    assert source.taken <= buffersize
    for i in range(50):
        assert next(results) == i * i
        assert source.taken <= i + 1 + buffersize
    results.close()  # type: ignore[attr-defined]


def test_a_buffer_keeps_every_worker_busy(executor: FiberExecutor, board: Any) -> None:
    """Two items meet, so they run at the same time although only two may be under way."""

    def meet(i: int) -> int:
        board.meet(f"pair {i // 2}", 2)
        return i

    results = executor.map(meet, itertools.count(), buffersize=2)
    assert list(itertools.islice(results, 2)) == [0, 1]
    results.close()  # type: ignore[attr-defined]


def test_without_a_buffer_all_input_is_taken_at_once(executor: FiberExecutor) -> None:
    source = iter(range(100))
    executor.map(square, source)
    assert next(source, None) is None


def test_a_lazy_source_may_raise(executor: FiberExecutor) -> None:
    def source() -> Iterator[int]:
        yield from range(5)
        raise OSError("the input ended badly")

    with pytest.raises(OSError, match="badly"):
        list(executor.map(square, source()))
    assert executor.submit(square, 3).result(LIMIT) == 9
    found = []
    with pytest.raises(OSError, match="badly"):
        for result in executor.map(square, source(), buffersize=2):
            found.append(result)
    assert found == [0, 1, 4, 9, 16][: len(found)]


def test_an_iterator_that_is_dropped_cancels_what_waits(
    make_executor: Callable[..., Any], board: Any, eventually: Any
) -> None:
    executor = make_executor(1)
    results = executor.map(hold_first, [board] * 5000, range(5000))
    eventually(lambda: executor.stats().running, "the first item runs")
    next_one = iter(results)
    threading.Thread(target=board.post, args=("go",)).start()
    assert next(next_one) == 0
    results.close()
    eventually(lambda: executor.stats().queued == 0, "nothing waits any more")
    assert executor.submit(square, 2).result(LIMIT) == 4


@pytest.mark.parametrize("buffersize", [None, 4])
def test_an_iterator_that_was_read_to_its_end_cancels_nothing(
    executor: FiberExecutor, monkeypatch: pytest.MonkeyPatch, buffersize: int | None
) -> None:
    """To look for what is left would take time with everything that waits."""
    dropped: list[Any] = []
    monkeypatch.setattr(executor._manager, "drop", dropped.append)
    assert list(executor.map(square, range(20), buffersize=buffersize)) == [x * x for x in range(20)]
    assert not dropped
    partly = executor.map(square, range(20))
    next(partly)
    partly.close()  # type: ignore[attr-defined]
    assert len(dropped) == 1


def test_a_buffer_holds_where_somebody_watches_submit(executor: FiberExecutor) -> None:
    """As progress bars do: they put a submit() of their own into the object."""
    watched: list[Any] = []

    def watch(*args: Any) -> Any:
        watched.append(args)
        return FiberExecutor.submit(executor, *args)

    executor.submit = watch  # type: ignore[method-assign,assignment]
    assert list(executor.map(square, range(3))) == [0, 1, 4] and len(watched) == 3
    source = itertools.chain(range(50), map(pytest.fail, ["it was read further than the buffer"]))
    assert list(itertools.islice(executor.map(square, source, buffersize=3), 40)) == [x * x for x in range(40)]


def test_items_are_tasks_with_ids_of_their_own(executor: FiberExecutor) -> None:
    def mine(x: int) -> tuple[int, int]:
        task = fiberexec.current_task()
        assert task is not None
        return task.id, task.attempt

    found = list(executor.map(mine, range(500)))
    ids = [identity for identity, _ in found]
    assert len(set(ids)) == 500 and ids == sorted(ids)
    assert {attempt for _, attempt in found} == {1}
    assert ids == list(range(ids[0], ids[0] + 500))


def test_an_item_that_cannot_travel_fails_in_its_place(executor: FiberExecutor) -> None:
    items = [1, 2, threading.Lock(), 4]
    results = executor.map(str, items)
    assert [next(results), next(results)] == ["1", "2"]
    with pytest.raises(Exception, match="lock"):
        next(results)


def test_large_items_and_large_numbers_of_items(executor: FiberExecutor) -> None:
    big = [bytes([i]) * (1 << 20) for i in range(12)]
    assert list(executor.map(len, big)) == [1 << 20] * 12
    assert sum(executor.map(square, range(50_000))) == sum(x * x for x in range(50_000))


@pytest.mark.parametrize("wrong", [{"chunksize": 0}, {"chunksize": -1}, {"buffersize": 0}, {"buffersize": -3}])
def test_sizes_below_one_are_refused(executor: FiberExecutor, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        executor.map(square, [1], **wrong)


@pytest.mark.parametrize("wrong", [{"buffersize": 1.5}, {"buffersize": "4"}, {"chunksize": 1.5}, {"chunksize": "4"}])
def test_sizes_that_are_no_integers_are_refused(executor: FiberExecutor, wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        executor.map(square, [1], **wrong)


@pytest.mark.one_host("it tells workers apart by their pids")
def test_map_runs_elsewhere_and_on_all_workers(executor: FiberExecutor, board: Any) -> None:
    def where(i: int) -> int:
        board.meet("both", 2)
        return os.getpid()

    assert len({os.getpid(), *executor.map(where, range(2))}) == 3
