"""Pool: its calls, their results, callbacks, and how imap is fed."""

from __future__ import annotations

import multiprocessing
import multiprocessing.pool
import os
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import fiberexec
from fiberexec.mp.pool import AsyncResult, IMapIterator, IMapUnorderedIterator, MapResult, MaybeEncodingError, Pool

from .helpers import LIMIT, Log, eventually


def square(x: int) -> int:
    return x * x


def add(x: int, y: int = 10) -> int:
    return x + y


# -- calls and their results


def test_apply_takes_arguments_by_position_and_by_name(pool: Pool) -> None:
    assert pool.apply(add, (1,)) == 11
    assert pool.apply(add, [1], {"y": 2}) == 3
    assert pool.apply(lambda: os.getpid()) != os.getpid()


def test_maps_give_what_the_builtin_gives_for_any_iterable_and_chunksize(pool: Pool) -> None:
    expected = list(map(square, range(100)))
    for chunksize in (1, 7, 1000):
        assert pool.map(square, range(100), chunksize) == expected
        assert pool.map(square, iter(range(100)), chunksize) == expected
        assert list(pool.imap(square, range(100), chunksize)) == expected
        assert list(pool.imap(square, iter(range(100)), chunksize)) == expected
        assert sorted(pool.imap_unordered(square, {*range(100)}, chunksize)) == expected
    assert pool.map_async(square, range(100)).get(LIMIT) == expected
    assert pool.map(str, {"a": 1, "b": 2}) == ["a", "b"]


def test_starmap_takes_all_arguments_from_each_item(pool: Pool) -> None:
    assert pool.starmap(add, [(1, 2), (3,), [4, 5]]) == [3, 13, 9]
    assert pool.starmap(add, zip(range(50), range(50)), 3) == list(range(0, 100, 2))
    assert pool.starmap_async(lambda: 7, [()] * 3).get(LIMIT) == [7] * 3
    assert pool.starmap(lambda *given: given, [(object, [1]), (None,)]) == [(object, [1]), (None,)]


def test_nothing_comes_of_nothing(pool: Pool) -> None:
    assert pool.map(square, []) == [] == pool.starmap(add, [])
    assert list(pool.imap(square, [])) == [] == list(pool.imap_unordered(square, iter(())))
    heard: list[Any] = []
    result = pool.map_async(square, [], callback=heard.append)
    assert result.ready() and result.successful() and result.get() == [] and heard == []


def test_many_items_come_back_in_order(pool: Pool) -> None:
    assert pool.map(square, range(100_000)) == list(map(square, range(100_000)))


def test_results_are_of_multiprocessings_kinds(pool: Pool) -> None:
    assert isinstance(pool, multiprocessing.pool.Pool)
    assert isinstance(pool.apply_async(square, (1,)), AsyncResult)
    assert isinstance(pool.map_async(square, [1]), MapResult) and issubclass(MapResult, AsyncResult)
    assert isinstance(pool.imap(square, [1]), IMapIterator)
    assert isinstance(pool.imap_unordered(square, [1]), IMapUnorderedIterator)


def test_a_result_says_when_it_is_ready_and_how_it_ended(pool: Pool, log: Log) -> None:
    def wait() -> None:
        log.wait(1)

    result = pool.apply_async(wait)
    assert not result.ready()
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(0.01)
    log.write("go")
    result.wait(LIMIT)
    assert result.ready() and result.successful() and result.get() is None
    failed = pool.apply_async(divmod, (1, 0))
    failed.wait(LIMIT)
    assert failed.ready() and not failed.successful()


def test_exceptions_arrive_with_the_traceback_of_the_worker(pool: Pool) -> None:
    def fail() -> None:
        raise KeyError("what")  # a line to be found

    with pytest.raises(KeyError, match="what") as caught:
        pool.apply(fail)
    assert "a line to be found" in str(caught.value.__cause__)


def test_a_map_whose_item_raises_raises_when_all_items_are_done(pool: Pool, log: Log) -> None:
    def run(i: int) -> None:
        if i == 0:
            raise ValueError(i)
        log.write(i)

    result = pool.map_async(run, range(20))
    with pytest.raises(ValueError, match="0"):
        result.get(LIMIT)
    assert sorted(map(int, log.lines())) == list(range(1, 20))


def test_what_arguments_raise_while_they_are_pickled_is_raised(pool: Pool) -> None:
    class Stubborn:
        def __reduce__(self) -> Any:
            raise RuntimeError("not me")

    for name in ("apply", "map", "imap"):
        with pytest.raises(RuntimeError, match="not me"):
            list(getattr(pool, name)(square, [Stubborn()]))
    with pytest.raises(pickle.PicklingError, match="lock"):
        pool.map(id, [threading.Lock()])


def test_a_result_that_cannot_be_sent_is_multiprocessings_error_and_says_why(pool: Pool) -> None:
    for kind in (MaybeEncodingError, multiprocessing.pool.MaybeEncodingError, fiberexec.PicklingError):  # type: ignore[attr-defined]
        with pytest.raises(kind, match="lock"):
            pool.apply(threading.Lock)


def test_what_an_iterable_raises_is_raised_after_the_results_before_it(pool: Pool) -> None:
    def numbers() -> Iterator[int]:
        yield from range(3)
        raise LookupError("that was all")

    with pytest.raises(LookupError):
        pool.map(square, numbers())
    for name in ("imap", "imap_unordered"):
        results = getattr(pool, name)(square, numbers())
        assert sorted([next(results), next(results), next(results)]) == [0, 1, 4]
        with pytest.raises(LookupError):
            next(results)
        with pytest.raises(StopIteration):
            next(results)


def test_one_item_that_raises_costs_imap_no_other_result(pool: Pool) -> None:
    results = pool.imap(lambda x: 12 // x, [3, 0, 4], 3)
    assert next(results) == 4
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == [3]


def test_arguments_of_the_wrong_kind_are_refused(pool: Pool) -> None:
    for name in ("apply", "map", "imap", "starmap"):
        with pytest.raises(TypeError, match="callable"):
            getattr(pool, name)(3, [])
    for name in ("map", "imap", "imap_unordered", "starmap_async"):
        with pytest.raises(ValueError, match="Chunksize"):
            getattr(pool, name)(square, [], 0)


# -- callbacks


def test_a_callback_has_run_when_its_result_is_ready(pool: Pool) -> None:
    heard: list[Any] = []
    assert pool.apply_async(square, (3,), {}, heard.append, heard.append).get(LIMIT) == 9 == heard.pop()
    with pytest.raises(ZeroDivisionError):
        pool.apply_async(divmod, (1, 0), {}, heard.append, heard.append).get(LIMIT)
    assert type(heard.pop()) is ZeroDivisionError
    assert pool.map_async(square, [1, 2], None, heard.append).get(LIMIT) == [1, 4] == heard.pop()
    pool.starmap_async(divmod, [(1, 1), (1, 0)], error_callback=heard.append).wait(LIMIT)
    assert type(heard.pop()) is ZeroDivisionError and not heard


def test_a_callback_that_raises_harms_nobody(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    def bad(value: int) -> None:
        raise (SystemExit if value else RuntimeError)(f"in the callback of {value}")

    for value in (0, 1):
        assert pool.apply_async(square, (value,), callback=bad).get(LIMIT) == value
        assert f"in the callback of {value}" in caplog.text
    assert pool.apply(square, (4,)) == 16


def test_a_callback_may_give_the_pool_more_to_do(pool: Pool) -> None:
    more: list[Any] = []
    pool.apply_async(square, (3,), callback=lambda value: more.append(pool.apply_async(square, (value,)))).wait(LIMIT)
    assert more[0].get(LIMIT) == 81


# -- imap's feeding


def test_imap_takes_each_item_only_when_the_one_before_is_on_its_way(pool: Pool) -> None:
    """An iterable may wait for the results of what it gave before."""
    arrived: list[int] = []
    heard = threading.Event()

    def numbers() -> Iterator[int]:
        yield 2
        assert heard.wait(LIMIT)
        yield arrived[-1]

    results = pool.imap(square, numbers())
    arrived.append(results.next(LIMIT))
    heard.set()
    assert results.next(LIMIT) == 16
    with pytest.raises(StopIteration):
        results.next(LIMIT)


@pytest.mark.parametrize("size", [1, 1 << 18])
def test_imap_takes_no_more_from_an_endless_iterable_than_the_workers_need(pool: Pool, log: Log, size: int) -> None:
    def wait(data: bytes) -> int:
        log.wait(1)
        return len(data)

    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield bytes(size)

    results = pool.imap(wait, endless())
    most = 65536 if size == 1 else 64
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(0.5)
    eventually(lambda: taken >= 8)
    assert taken <= most + 1
    log.write("go")
    assert [results.next(LIMIT) for _ in range(100)] == [size] * 100


def test_what_imap_was_given_is_done_though_nobody_takes_the_results(log: Log) -> None:
    pool = Pool(2)
    pool.imap_unordered(log.write, iter(range(100)))
    pool.close()
    pool.join()
    assert sorted(map(int, log.lines())) == list(range(100))


def test_workers_go_when_a_closed_pool_has_done_everything_though_nobody_joins_it(log: Log) -> None:
    pool = Pool(2)
    results = pool.imap(square, (i for i in range(3) if i == 0 or log.wait(1)))
    assert results.next(LIMIT) == 0  # elsewhere workers come when there is work
    pool.close()
    assert pool._executor.workers()
    log.write("go")
    eventually(lambda: not pool._executor.workers())
    assert list(results) == [1, 4]


def test_imap_says_when_a_result_takes_too_long(pool: Pool, log: Log) -> None:
    results = pool.imap(lambda _: len(log.wait(1)), [0])
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(timeout=0.01)
    log.write("go")
    assert results.next(LIMIT) == 1


def test_several_threads_may_share_an_iterator(pool: Pool) -> None:
    results = pool.imap(square, iter(range(1000)))
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.extend(results)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert sorted(found) == list(map(square, range(1000)))
