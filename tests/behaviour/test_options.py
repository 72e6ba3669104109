"""options(): views are Executors that nest; priorities; losses that are not re-run; what is refused."""

from __future__ import annotations

import concurrent.futures
import os
import time
from collections.abc import Callable
from typing import Any

import pytest

import fiberexec
from fiberexec import ConfigError, FiberExecutor, TaskTimeout, WorkerLost

LIMIT = 30.0
Make = Callable[..., FiberExecutor]


def hold(board: Any, name: str = "held") -> str:
    board.post(name, os.getpid())
    board.wait("go")
    return name


def test_a_view_is_an_executor(executor: FiberExecutor) -> None:
    view = executor.options(priority=2)
    assert isinstance(view, concurrent.futures.Executor) and isinstance(view, fiberexec.ExecutorView)
    future = view.submit(pow, 2, 5)
    assert isinstance(future, fiberexec.FiberFuture) and future.result(LIMIT) == 32
    assert list(view.map(abs, [-1, -2], buffersize=1)) == [1, 2]
    assert view._max_workers == executor._max_workers


def test_views_nest_and_what_is_not_named_stays(make_executor: Make, board: Any) -> None:
    executor = make_executor(2)
    outer = executor.options(timeout=0.2)
    inner = outer.options(priority=1)
    assert isinstance(inner.submit(hold, board).exception(LIMIT), TaskTimeout)
    free = inner.options(timeout=None)
    future = free.submit(hold, board, "free")
    board.wait("free")
    assert isinstance(outer.submit(hold, board).exception(LIMIT), TaskTimeout)
    board.post("go")
    assert future.result(LIMIT) == "free"


def test_views_share_the_workers(make_executor: Make) -> None:
    executor = make_executor(1)
    views = [executor, executor.options(priority=1), executor.options(timeout=LIMIT).options(max_worker_losses=1)]
    assert len({view.submit(os.getpid).result(LIMIT) for view in views}) == 1


def test_shutting_a_view_down_shuts_the_executor_down(make_executor: Make) -> None:
    executor = make_executor(1)
    with executor.options(priority=1) as view:
        future = view.submit(int, "3")
    assert future.done() and future.result() == 3
    with pytest.raises(RuntimeError):
        view.submit(int)


def test_higher_priorities_go_first_and_equals_keep_their_order(make_executor: Make, board: Any) -> None:
    executor = make_executor(1)
    held = executor.submit(hold, board)
    board.wait("held")
    plan = [(0, "a"), (5, "b"), (-1, "c"), (5, "d"), (0, "e"), (9, "f")]
    futures = [executor.options(priority=p).submit(board.post, "ran", name) for p, name in plan]
    board.post("go")
    concurrent.futures.wait([held, *futures], LIMIT)
    assert board.read("ran") == ["f", "b", "d", "a", "e", "c"]


def post_slowly(board: Any, value: int) -> None:
    """Slow enough not to travel in batches."""
    time.sleep(0.003)
    board.post("ran", value)


def test_tasks_of_one_priority_run_first_come_first_served_whatever_their_options(make_executor: Make, board: Any) -> None:
    executor = make_executor(1, memory=512)
    views = [executor, executor.options(timeout=LIMIT), executor.options(cpu=1), executor.options(memory=1), executor]
    held = executor.submit(hold, board)
    board.wait("held")
    futures = [views[i % 5].submit(post_slowly, board, i) for i in range(20)]
    board.post("go")
    concurrent.futures.wait([held, *futures], LIMIT)
    assert board.read("ran") == list(range(20))


def test_priority_applies_to_map(make_executor: Make, board: Any) -> None:
    executor = make_executor(1)
    held = executor.submit(hold, board)
    board.wait("held")
    late = executor.map(board.post, ["ran"] * 3, ["low"] * 3)
    early = executor.options(priority=1).map(board.post, ["ran"] * 3, ["high"] * 3)
    board.post("go")
    list(late), list(early)
    assert held.result(LIMIT) == "held"
    assert board.read("ran") == ["high"] * 3 + ["low"] * 3


# -- losses


def die_until(attempt: int, code: int = 11) -> int:
    task = fiberexec.current_task()
    assert task is not None
    if task.attempt < attempt:
        os._exit(code)
    return task.attempt


def test_a_task_that_lost_its_worker_runs_again(executor: FiberExecutor) -> None:
    assert executor.submit(die_until, 3).result(LIMIT) == 3
    assert executor.stats().lost == 2


def test_the_third_loss_is_the_last(executor: FiberExecutor) -> None:
    error = executor.submit(die_until, 4).exception(LIMIT)
    assert isinstance(error, WorkerLost)
    assert error.losses == 3 and error.exitcode == 11 and error.pid > 0 and error.host and error.task_id > 0
    assert "die_until" in str(error) and "11" in str(error) and str(error.pid) in str(error)
    assert executor.submit(int, "5").result(LIMIT) == 5


def test_max_worker_losses_1_turns_re_running_off(executor: FiberExecutor, board: Any) -> None:
    def work() -> None:
        board.post("ran")
        os._exit(1)

    error = executor.options(max_worker_losses=1).submit(work).exception(LIMIT)
    assert isinstance(error, WorkerLost) and error.losses == 1
    assert board.read("ran") == [None]


def test_more_losses_may_be_allowed(make_executor: Make) -> None:
    executor = make_executor(1, max_worker_losses=5)
    assert executor.submit(die_until, 5).result(LIMIT) == 5
    assert isinstance(executor.submit(die_until, 6).exception(LIMIT), WorkerLost)


def test_a_lost_worker_in_map_costs_its_item_alone(executor: FiberExecutor) -> None:
    def work(i: int) -> int:
        if i == 13:
            os._exit(5)
        return i

    results = executor.options(max_worker_losses=1).map(work, range(40), chunksize=40)
    found = []
    with pytest.raises(WorkerLost):
        for result in results:
            found.append(result)
    assert found == list(range(13))


def test_worker_lost_is_retried_only_by_losses_not_by_a_policy(executor: FiberExecutor, board: Any) -> None:
    """A loss is charged; a policy judges results and exceptions of attempts that ended."""
    import tenacity

    def work() -> None:
        board.post("ran")
        os._exit(1)

    policy = tenacity.Retrying(stop=tenacity.stop_after_attempt(9))
    error = executor.options(max_worker_losses=2, retry=policy).submit(work).exception(LIMIT)
    assert isinstance(error, WorkerLost)
    assert len(board.read("ran")) == 2


# -- refused


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("priority", "high"), ("priority", 1.5), ("priority", True), ("max_worker_losses", 0), ("max_worker_losses", None),
        ("cpu", -1), ("cpu", "many"), ("memory", -5), ("memory", "4Q"), ("gpu", 1.5), ("gpu", -1), ("gpu", True),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused_by_name(executor: FiberExecutor, name: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        executor.options(**{name: wrong})


def test_an_unknown_option_is_refused(executor: FiberExecutor) -> None:
    with pytest.raises(TypeError, match="timeuot"):
        executor.options(timeuot=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="timeuot"):
        executor.options(timeout=3).options(timeuot=3)  # type: ignore[call-arg]


class Integer:
    """A number as other libraries have them, numpy's for one."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


def test_numbers_of_other_libraries_are_numbers(make_executor: Make, board: Any) -> None:
    executor = make_executor(Integer(1), max_tasks_per_child=Integer(30), memory=Integer(512))
    names = ("timeout", "priority", "cpu", "memory", "max_worker_losses")
    view = executor.options(gpu=Integer(0), **dict.fromkeys(names, Integer(1)))  # type: ignore[arg-type]
    running = executor.submit(board.wait, "go")
    futures = [executor.submit(board.post, "ran", "first"), view.submit(board.post, "ran", "second")]
    board.post("go")
    for future in [running, *futures]:
        future.result(LIMIT)
    assert board.read("ran") == ["second", "first"]
    found = executor.map(abs, range(20), timeout=Integer(30), chunksize=Integer(2), buffersize=Integer(4))
    assert list(found) == list(range(20))
