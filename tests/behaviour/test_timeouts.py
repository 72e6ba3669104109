"""Time limits: one attempt, one item; finally blocks run, and what ignores the signal is killed."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import tenacity

import fiberexec
from fiberexec import FiberExecutor, TaskTimeout

LIMIT = 30.0
SHORT = 0.5  # seconds: a limit that is going to be exceeded
KEPT = 4.0  # seconds: a limit that other attempts keep, on a busy machine too
Make = Callable[..., FiberExecutor]


def hold(board: Any, name: str = "held") -> str:
    task = fiberexec.current_task()
    board.post(name, task and task.attempt)
    board.wait("go")
    return name


def test_a_task_over_its_limit_ends_in_task_timeout(make_executor: Make, board: Any) -> None:
    def who() -> int:
        task = fiberexec.current_task()
        assert task is not None
        return task.id

    executor = make_executor(1)
    first = executor.submit(who).result(LIMIT)
    began = time.monotonic()
    error = executor.options(timeout=SHORT).submit(hold, board).exception(LIMIT)
    took = time.monotonic() - began
    assert isinstance(error, TaskTimeout) and isinstance(error, TimeoutError)
    assert error.timeout == SHORT and error.task_id == first + 1
    assert "0.5 s" in str(error) and "hold" in str(error) and str(error.task_id) in str(error)
    assert SHORT <= took < 10
    assert executor.stats().lost == 0
    assert executor.submit(int, "4").result(LIMIT) == 4
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.task_id, again.timeout) == (str(error), error.task_id, SHORT)


def test_a_limit_that_is_kept_changes_nothing(executor: FiberExecutor) -> None:
    view = executor.options(timeout=LIMIT)
    pids = {view.submit(os.getpid).result(LIMIT) for _ in range(20)}
    assert len(pids) <= 2
    assert list(view.map(abs, range(-100, 0))) == list(range(100, 0, -1))


def test_the_executors_own_limit_is_the_default(make_executor: Make, board: Any) -> None:
    executor = make_executor(2, timeout=SHORT)
    assert isinstance(executor.submit(hold, board).exception(LIMIT), TaskTimeout)
    free = executor.options(timeout=None).submit(hold, board, "free")
    board.wait("free")
    assert isinstance(executor.options(priority=3).submit(hold, board).exception(LIMIT), TaskTimeout)
    assert not free.done()
    board.post("go")
    assert free.result(LIMIT) == "free"


def test_waiting_does_not_count(make_executor: Make, board: Any) -> None:
    """The limit is for an attempt: a task may wait for a worker much longer than that."""
    executor = make_executor(1)
    held = executor.submit(hold, board)
    board.wait("held")
    limited = executor.options(timeout=KEPT).submit(int, "5")
    time.sleep(1.2 * KEPT)  # what is being measured: time that passes while the task waits
    board.post("go")
    assert limited.result(LIMIT) == 5 and held.result(LIMIT) == "held"


def test_finally_blocks_and_context_managers_run(executor: FiberExecutor, board: Any) -> None:
    def stoppable() -> None:
        try:
            hold(board)
        finally:
            board.post("cleaned up")

    assert executor.submit(callable, hold).result(LIMIT)  # the worker has loaded this module, which may take its time
    assert isinstance(executor.options(timeout=KEPT).submit(stoppable).exception(LIMIT), TaskTimeout)
    assert board.read("cleaned up") == [None]


def test_what_a_stopped_task_returns_or_raises_does_not_count(executor: FiberExecutor, board: Any) -> None:
    def returns() -> str:
        try:
            hold(board)
        except BaseException:
            pass
        return "late"

    def raises() -> None:
        try:
            hold(board)
        finally:
            raise LookupError("late")

    view = executor.options(timeout=SHORT)
    for task in (returns, raises):
        assert isinstance(view.submit(task).exception(LIMIT), TaskTimeout)


def test_sigkill_comes_after_the_grace(make_executor: Make, board: Any) -> None:
    def stubborn() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        hold(board)

    executor = make_executor(1)
    began = time.monotonic()
    error = executor.options(timeout=KEPT).submit(stubborn).exception(LIMIT)
    assert isinstance(error, TaskTimeout)
    assert KEPT + 2.0 <= time.monotonic() - began < 20
    assert executor.submit(int).result(LIMIT) == 0


def test_unpickling_the_arguments_and_pickling_the_result_count(executor: FiberExecutor, board: Any) -> None:
    class Slow:
        def __reduce__(self) -> Any:
            return hold, (board,)

    class SlowResult:
        def __reduce__(self) -> Any:
            hold(board)
            return int, ()

    began = time.monotonic()
    for future in (executor.options(timeout=KEPT).submit(id, Slow()), executor.options(timeout=KEPT).submit(SlowResult)):
        assert isinstance(future.exception(LIMIT), TaskTimeout)
    assert len(board.read("held")) == 2  # the pickling that was stopped is not tried again
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("chunksize", [None, 20])
def test_the_limit_of_map_items_is_each_items_own(make_executor: Make, board: Any, chunksize: int | None) -> None:
    def step(i: int) -> int:
        board.post("ran", i)
        if i == 7:
            board.wait("go")
        return i

    executor = make_executor(2)
    results = executor.options(timeout=KEPT).map(step, range(20), chunksize=chunksize)
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(TaskTimeout):
        next(results)
    board.wait("ran", 20)
    assert sorted(board.read("ran")) == list(range(20))
    assert executor.stats().lost == 0


def test_many_short_items_may_take_longer_than_the_limit_together(make_executor: Make) -> None:
    executor = make_executor(1)
    nap = KEPT / 20
    results = executor.options(timeout=KEPT).map(time.sleep, [nap] * 24)
    assert list(results) == [None] * 24


def test_each_attempt_has_the_whole_limit(executor: FiberExecutor, board: Any) -> None:
    def slow_once() -> str:
        task = fiberexec.current_task()
        assert task is not None
        if task.attempt < 2:
            return hold(board)
        return f"attempt {task.attempt}"

    policy = tenacity.Retrying(stop=tenacity.stop_after_attempt(5), retry=tenacity.retry_if_exception_type(TaskTimeout))
    future = executor.options(timeout=KEPT, retry=policy).submit(slow_once)
    assert future.result(LIMIT) == "attempt 2"
    assert board.read("held") == [1]
    assert executor.stats().retried == 1


def test_a_timeout_is_retried_only_if_the_policy_matches(executor: FiberExecutor, board: Any) -> None:
    policy = tenacity.Retrying(retry=tenacity.retry_if_exception_type(ValueError), reraise=True)
    error = executor.options(timeout=SHORT, retry=policy).submit(hold, board).exception(LIMIT)
    assert isinstance(error, TaskTimeout)
    assert len(board.read("held")) <= 1


def test_a_timeout_without_a_policy_is_not_retried(executor: FiberExecutor, board: Any) -> None:
    assert isinstance(executor.options(timeout=SHORT).submit(hold, board).exception(LIMIT), TaskTimeout)
    executor.shutdown()
    assert len(board.read("held")) <= 1


def test_tasks_of_different_limits_in_one_batch(make_executor: Make, board: Any) -> None:
    """The shortest limit of what is in flight is watched, and charged to the task that is running."""
    executor = make_executor(1)
    tight, loose = executor.options(timeout=KEPT), executor.options(timeout=LIMIT)
    for view in (tight, loose):
        for _ in range(30):
            assert view.submit(int).result(LIMIT) == 0
    futures = [view.submit(int, str(i)) for i in range(30) for view in (loose, tight)]
    held = loose.submit(hold, board)
    after = [tight.submit(int, str(i)) for i in range(10)]
    board.wait("held")
    time.sleep(1.2 * KEPT)  # longer than the tight limit: what waits behind must not be charged with it
    board.post("go")
    assert held.result(LIMIT) == "held"
    assert [future.result(LIMIT) for future in futures + after] == [i // 2 for i in range(60)] + list(range(10))


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), float("inf"), "5", True])
def test_limits_that_make_no_sense_are_refused(executor: FiberExecutor, wrong: Any) -> None:
    with pytest.raises(fiberexec.ConfigError, match="timeout"):
        executor.options(timeout=wrong)
