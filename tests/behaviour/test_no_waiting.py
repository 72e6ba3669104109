"""Nobody waits behind another while a worker is idle, and a result does not wait for its neighbours."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest

from fiberexec import FiberExecutor

LIMIT = 30.0
Make = Callable[..., FiberExecutor]


def step(board: Any, i: int) -> int:
    """Cheap, but for the item 0, which holds its worker."""
    if i == 0:
        board.post("held", os.getpid())
        board.wait("go")
    return i


def warm(executor: FiberExecutor, board: Any) -> None:
    """Let the executor believe that a step is cheap."""
    list(executor.map(step, [board] * 500, [-1] * 500))
    for _ in range(20):
        executor.submit(step, board, -1).result(LIMIT)


def test_tasks_behind_one_that_holds_move_to_another_worker(executor: FiberExecutor, board: Any) -> None:
    warm(executor, board)
    futures = [executor.submit(step, board, i) for i in range(200)]
    assert not concurrent.futures.wait(futures[1:], LIMIT).not_done and not futures[0].done()
    board.post("go")
    assert [future.result(LIMIT) for future in futures] == list(range(200))
    assert len(board.read("held")) == 1


@pytest.mark.parametrize("chunksize", [None, 200])
@pytest.mark.parametrize("place", [0, 1, 6, 57, 150])
def test_items_behind_one_that_holds_move_to_another_worker(
    executor: FiberExecutor, board: Any, chunksize: int | None, place: int
) -> None:
    """The item that holds ends only when the one right behind it has run."""

    def work(i: int) -> int:
        if i == place:
            board.wait("next")
        if i == place + 1:
            board.post("next")
        return i

    list(executor.map(work, [-1] * 500))
    assert list(executor.map(work, range(200), chunksize=chunksize, timeout=LIMIT)) == list(range(200))


def test_items_nobody_has_measured_move_too(executor: FiberExecutor, board: Any) -> None:
    def work(i: int) -> int:
        if i == 0:
            board.wait("last")
        if i == 199:
            board.post("last")
        return i

    assert list(executor.map(work, range(200), chunksize=200, timeout=LIMIT)) == list(range(200))


def test_as_many_may_hold_as_there_are_workers_but_one(make_executor: Make, board: Any) -> None:
    executor = make_executor(3)
    warm(executor, board)
    futures = [executor.submit(step, board, 0 if i in (0, 30) else i) for i in range(100)]
    others = [future for i, future in enumerate(futures) if i not in (0, 30)]
    assert not concurrent.futures.wait(others, LIMIT).not_done
    assert not futures[0].done() and not futures[30].done()
    board.post("go")
    assert futures[0].result(LIMIT) == futures[30].result(LIMIT) == 0


def test_results_before_one_that_holds_arrive_while_it_holds(make_executor: Make, board: Any) -> None:
    executor = make_executor(1)
    warm(executor, board)
    futures = [executor.submit(step, board, i) for i in (1, 2, 3, 4, 5, 0)]
    board.wait("held")
    assert not concurrent.futures.wait(futures[:5], LIMIT).not_done
    assert not futures[5].done()
    board.post("go")
    assert futures[5].result(LIMIT) == 0


@pytest.mark.parametrize("place", [1, 7, 150, 290])
@pytest.mark.parametrize("plain", [True, False])
def test_map_hands_results_over_while_a_later_item_of_the_chunk_holds(
    make_executor: Make, board: Any, place: int, plain: bool
) -> None:
    def work(i: Any) -> int:
        if float(i) == place:
            board.post("held")
            board.wait("go")
        return int(i)

    executor = make_executor(1)
    list(executor.map(work, [-1] * 500))
    items = range(300) if plain else [Fraction(i) for i in range(300)]
    results = executor.map(work, items, chunksize=300, timeout=LIMIT)
    assert [next(results) for _ in range(place)] == list(range(place))
    assert len(board.wait("held")) == 1
    board.post("go")
    assert list(results) == list(range(place, 300))


@pytest.mark.one_host("it tells workers apart by their pids")
def test_what_is_submitted_while_one_holds_goes_elsewhere(executor: FiberExecutor, board: Any) -> None:
    warm(executor, board)
    held = executor.submit(step, board, 0)
    pid = board.wait("held")[0]
    found = [executor.submit(os.getpid).result(LIMIT) for _ in range(50)]
    assert pid not in found and not held.done()
    assert list(executor.map(step, [board] * 100, range(1, 101))) == list(range(1, 101))
    board.post("go")
    assert held.result(LIMIT) == 0


def test_a_worker_that_has_become_free_takes_over(make_executor: Make, board: Any) -> None:
    """Both workers hold, one is let go: it runs all that waits, though that may be with the other already."""
    executor = make_executor(2)
    warm(executor, board)

    def hold(name: str) -> str:
        board.post("holding")
        board.wait(name)
        return name

    held = [executor.submit(hold, name) for name in ("one", "two")]
    board.wait("holding", 2)
    futures = [executor.submit(step, board, i) for i in range(1, 100)]
    board.post("one")
    assert not concurrent.futures.wait(futures, LIMIT).not_done
    assert held[0].result(LIMIT) == "one" and not held[1].done()
    board.post("two")
    assert held[1].result(LIMIT) == "two"


def test_slow_tasks_start_on_all_workers_at_once(make_executor: Make, board: Any) -> None:
    def meet(i: int) -> int:
        board.meet(f"round {i // 4}", 4)
        return i

    executor = make_executor(4)
    assert list(executor.map(meet, range(12), timeout=LIMIT)) == list(range(12))
    futures = [executor.submit(meet, i) for i in range(12, 24)]
    assert [future.result(LIMIT) for future in futures] == list(range(12, 24))


def test_none_runs_twice_when_it_is_moved(make_executor: Make, board: Any) -> None:
    """Three items wait for the one behind them; the fourth worker runs what was in line there."""
    executor = make_executor(4)

    def work(i: int) -> int:
        if i in (5, 40, 77):
            board.post("slow", i)
            board.wait(f"other {i}")
        if i - 1 in (5, 40, 77):
            board.post(f"other {i - 1}")
        if i > 80:
            board.post("ran", i)
        return i

    list(executor.map(work, [-1] * 300))
    assert list(executor.map(work, range(120), chunksize=120, timeout=LIMIT)) == list(range(120))
    assert sorted(board.read("ran")) == list(range(81, 120)) and sorted(board.read("slow")) == [5, 40, 77]
