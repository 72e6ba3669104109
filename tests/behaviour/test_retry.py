"""Retries: tenacity's policies, asked on the driver, with nobody sleeping; and what a task knows of itself."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import tenacity
from tenacity import Retrying, retry_if_exception_type, retry_if_result, stop_after_attempt, wait_fixed

import fiberexec
from fiberexec import FiberExecutor, current_task

LIMIT = 30.0
Make = Callable[..., FiberExecutor]


def until(attempt: int) -> int:
    """Fail until the given attempt."""
    task = current_task()
    assert task is not None
    if task.attempt < attempt:
        raise ConnectionError(f"attempt {task.attempt}")
    return task.attempt


def mine() -> tuple[int, int, Any]:
    task = current_task()
    assert task is not None
    return task.id, task.attempt, task.last_exception


def test_without_a_policy_nothing_is_retried(executor: FiberExecutor) -> None:
    assert str(executor.submit(until, 2).exception(LIMIT)) == "attempt 1"
    assert executor.stats().retried == 0


def test_a_task_is_tried_again_until_it_succeeds(executor: FiberExecutor) -> None:
    assert executor.options(retry=Retrying(stop=stop_after_attempt(5))).submit(until, 4).result(LIMIT) == 4
    assert executor.stats().retried == 3 and executor.stats().done == 1


def test_the_executors_own_policy_is_the_default(make_executor: Make) -> None:
    executor = make_executor(2, retry=Retrying(stop=stop_after_attempt(3)))
    assert executor.submit(until, 3).result(LIMIT) == 3
    assert isinstance(executor.options(retry=None).submit(until, 2).exception(LIMIT), ConnectionError)


def test_retry_error_holds_the_last_attempt(executor: FiberExecutor) -> None:
    error = executor.options(retry=Retrying(stop=stop_after_attempt(3))).submit(until, 9).exception(LIMIT)
    assert isinstance(error, tenacity.RetryError)
    assert error.last_attempt.attempt_number == 3
    assert str(error.last_attempt.exception()) == "attempt 3" and str(error.__cause__) == "attempt 3"


def test_reraise_gives_the_last_exception_itself(executor: FiberExecutor) -> None:
    policy = Retrying(stop=stop_after_attempt(3), reraise=True)
    error = executor.options(retry=policy).submit(until, 9).exception(LIMIT)
    assert type(error) is ConnectionError and str(error) == "attempt 3"


def test_an_error_class_of_ones_own(executor: FiberExecutor) -> None:
    class Mine(tenacity.RetryError):
        pass

    policy = Retrying(stop=stop_after_attempt(2), retry_error_cls=Mine)
    assert type(executor.options(retry=policy).submit(until, 9).exception(LIMIT)) is Mine


def test_retry_error_callback_gives_the_result(executor: FiberExecutor) -> None:
    policy = Retrying(stop=stop_after_attempt(2), retry_error_callback=lambda state: ("gave up", state.attempt_number))
    assert executor.options(retry=policy).submit(until, 9).result(LIMIT) == ("gave up", 2)


def test_only_the_exceptions_that_match_are_retried(executor: FiberExecutor) -> None:
    policy = Retrying(retry=retry_if_exception_type(ConnectionError), stop=stop_after_attempt(9))
    view = executor.options(retry=policy)
    assert view.submit(until, 3).result(LIMIT) == 3
    assert type(view.submit(int, "x").exception(LIMIT)) is ValueError
    assert executor.stats().retried == 2


def test_a_result_may_be_a_reason(executor: FiberExecutor) -> None:
    def attempt() -> int:
        return mine()[1]

    policy = Retrying(retry=retry_if_result(lambda value: value < 3))
    assert executor.options(retry=policy).submit(attempt).result(LIMIT) == 3
    policy = Retrying(retry=retry_if_result(lambda value: True), stop=stop_after_attempt(2))
    error = executor.options(retry=policy).submit(attempt).exception(LIMIT)
    assert isinstance(error, tenacity.RetryError) and error.last_attempt.result() == 2


def test_try_again_is_retried_whatever_the_predicate_says(executor: FiberExecutor) -> None:
    def again() -> str:
        if mine()[1] < 3:
            raise tenacity.TryAgain
        return "done"

    policy = Retrying(retry=tenacity.retry_never, stop=stop_after_attempt(5))
    assert executor.options(retry=policy).submit(again).result(LIMIT) == "done"


def test_callbacks_come_in_tenacitys_order_with_its_state(executor: FiberExecutor) -> None:
    seen: list[Any] = []

    def note(name: str) -> Callable[[tenacity.RetryCallState], None]:
        return lambda state: seen.append((name, state.attempt_number, state.outcome is not None and state.outcome.failed))

    policy = Retrying(
        stop=stop_after_attempt(3), before=note("before"), after=note("after"), before_sleep=note("before_sleep")
    )
    assert executor.options(retry=policy).submit(until, 3).result(LIMIT) == 3
    expected: list[Any] = []
    local = policy.copy(
        before=lambda state: expected.append(("before", state.attempt_number, False)),
        after=lambda state: expected.append(("after", state.attempt_number, True)),
        before_sleep=lambda state: expected.append(("before_sleep", state.attempt_number, True)),
    )
    count = iter(range(1, 9))

    def same() -> int:
        attempt = next(count)
        if attempt < 3:
            raise ConnectionError
        return attempt

    local(same)
    assert seen == expected


def test_policies_see_the_function_its_arguments_and_its_exception(executor: FiberExecutor) -> None:
    seen: list[Any] = []

    def look(state: tenacity.RetryCallState) -> bool:
        assert state.outcome is not None
        seen.append((state.fn, state.args, state.kwargs, type(state.outcome.exception()), state.attempt_number))
        return False

    executor.options(retry=Retrying(retry=look)).submit(int, "x", base=7).exception(LIMIT)
    assert seen == [(int, ("x",), {"base": 7}, ValueError, 1)]


def test_what_a_policy_raises_is_the_tasks_exception(executor: FiberExecutor) -> None:
    def broken(state: tenacity.RetryCallState) -> bool:
        raise ArithmeticError("in the predicate")

    view = executor.options(retry=Retrying(retry=broken))
    assert isinstance(view.submit(int).exception(LIMIT), ArithmeticError)
    assert executor.submit(int, "5").result(LIMIT) == 5


@pytest.mark.parametrize("wrong", [float("nan"), -1.0])
def test_a_wait_that_makes_no_sense_fails_its_task_alone(executor: FiberExecutor, wrong: float) -> None:
    first = executor.options(retry=Retrying(wait=lambda state: wrong)).submit(until, 3)
    other = executor.options(retry=Retrying(wait=wait_fixed(0.01))).submit(until, 3)
    with pytest.raises(ValueError, match="0 or more seconds"):
        first.result(LIMIT)
    assert other.result(LIMIT) == 3


def test_a_policy_whose_first_callback_raises_fails_its_task_alone(executor: FiberExecutor) -> None:
    def broken(state: tenacity.RetryCallState) -> None:
        raise ArithmeticError("before the first attempt")

    view = executor.options(retry=Retrying(before=broken))
    with pytest.raises(ArithmeticError):
        view.submit(int).result(LIMIT)
    assert executor.submit(int, "5").result(LIMIT) == 5


def test_the_wait_between_attempts_is_kept(executor: FiberExecutor) -> None:
    policy = Retrying(wait=wait_fixed(0.3), stop=stop_after_attempt(3))
    began = time.monotonic()
    assert executor.options(retry=policy).submit(until, 3).result(LIMIT) == 3
    assert 0.6 <= time.monotonic() - began < 10


def test_a_wait_that_grows_asks_the_state(executor: FiberExecutor) -> None:
    asked: list[int] = []

    def wait(state: tenacity.RetryCallState) -> float:
        asked.append(state.attempt_number)
        return 0.01 * state.attempt_number

    policy = Retrying(wait=wait, stop=stop_after_attempt(9))
    assert executor.options(retry=policy).submit(until, 4).result(LIMIT) == 4
    assert asked == [1, 2, 3]


def test_stop_after_delay_counts_from_the_first_attempt(executor: FiberExecutor) -> None:
    policy = Retrying(stop=tenacity.stop_after_delay(0.3), wait=wait_fixed(0.05))
    began = time.monotonic()
    assert isinstance(executor.options(retry=policy).submit(until, 999).exception(LIMIT), tenacity.RetryError)
    assert 0.25 <= time.monotonic() - began < 10


def test_thousands_wait_at_once_without_threads_and_without_workers(executor: FiberExecutor, eventually: Any) -> None:
    count = 3000
    go = threading.Event()
    # nobody comes back before all wait: the second attempt is due when the test says so
    view = executor.options(retry=Retrying(wait=lambda state: 0.0 if go.is_set() else 600.0))
    threads = threading.active_count()
    futures = [view.submit(until, 2) for _ in range(count)]
    eventually(lambda: executor.stats().delayed == count, "all of them wait")
    assert threading.active_count() <= threads + 10  # the executor's own, and of those who start its workers
    assert executor.submit(int, "3").result(LIMIT) == 3  # the workers are free meanwhile
    assert not any(future.done() for future in futures)
    assert all(future.cancel() for future in futures)
    assert executor.stats().delayed == 0
    go.set()
    assert [future.result(LIMIT) for future in [view.submit(until, 2) for _ in range(200)]] == [2] * 200


def test_one_that_waits_holds_nobody_up(make_executor: Make) -> None:
    executor = make_executor(1)
    waiting = executor.options(retry=Retrying(wait=wait_fixed(600))).submit(until, 2)
    assert [executor.submit(int, str(i)).result(LIMIT) for i in range(20)] == list(range(20))
    assert not waiting.done()
    assert waiting.cancel()


def test_shutdown_waits_for_retries_and_can_cancel_them(make_executor: Make, eventually: Any) -> None:
    executor = make_executor(1)
    future = executor.options(retry=Retrying(wait=wait_fixed(0.2))).submit(until, 3)
    executor.shutdown()
    assert future.result(0) == 3
    executor = make_executor(1)
    future = executor.options(retry=Retrying(wait=wait_fixed(600))).submit(until, 3)
    eventually(lambda: executor.stats().delayed)
    executor.shutdown(cancel_futures=True)
    assert future.cancelled()


def test_map_retries_each_item_alone(executor: FiberExecutor, board: Any) -> None:
    def work(i: int) -> int:
        attempt = mine()[1]
        board.post("ran", [i, attempt])
        if i % 5 == 0 and attempt < 3:
            raise ConnectionError
        return i

    view = executor.options(retry=Retrying(stop=stop_after_attempt(5)))
    assert list(view.map(work, range(15), chunksize=15)) == list(range(15))
    ran = sorted(map(tuple, board.read("ran")))
    assert ran == sorted((i, attempt) for i in range(15) for attempt in range(1, 4 if i % 5 == 0 else 2))


def test_one_policy_serves_many_tasks_at_once(executor: FiberExecutor) -> None:
    policy = Retrying(stop=stop_after_attempt(4), wait=wait_fixed(0.001))
    view = executor.options(retry=policy)
    futures = [view.submit(until, 1 + i % 4) for i in range(100)]
    assert [future.result(LIMIT) for future in futures] == [1 + i % 4 for i in range(100)]


# -- current_task


def test_outside_of_a_task_there_is_none() -> None:
    assert current_task() is None


def test_the_id_is_stable_and_the_last_exception_is_there(executor: FiberExecutor, board: Any) -> None:
    def work() -> str:
        identity, attempt, last = mine()
        board.post("seen", [identity, attempt, None if last is None else [type(last).__name__, str(last)]])
        if attempt < 3:
            raise ConnectionError(f"attempt {attempt}")
        return "done"

    executor.submit(int).result(LIMIT)
    assert executor.options(retry=Retrying()).submit(work).result(LIMIT) == "done"
    seen = board.read("seen")
    assert len({identity for identity, _, _ in seen}) == 1
    assert [(attempt, last) for _, attempt, last in seen] == [
        (1, None), (2, ["ConnectionError", "attempt 1"]), (3, ["ConnectionError", "attempt 2"])
    ]  # fmt: skip


def test_after_a_time_limit_the_last_exception_says_so(executor: FiberExecutor, board: Any) -> None:
    def work() -> str:
        _, attempt, last = mine()
        if attempt == 1:
            board.wait("never")
        return type(last).__name__

    assert executor.options(retry=Retrying(), timeout=2).submit(work).result(LIMIT) == "TaskTimeout"


def test_after_a_lost_worker_the_attempt_is_counted(executor: FiberExecutor) -> None:
    def work() -> tuple[int, Any]:
        import os

        _, attempt, last = mine()
        if attempt == 1:
            os._exit(1)
        return attempt, last

    assert executor.submit(work).result(LIMIT) == (2, None)


def test_ids_are_unique_across_submit_map_and_views(executor: FiberExecutor) -> None:
    futures = [view.submit(mine) for view in (executor, executor.options(priority=1)) for _ in range(10)]
    ids = [future.result(LIMIT)[0] for future in futures]
    ids += [found[0] for found in executor.map(lambda _: mine(), range(10))]
    assert len(set(ids)) == 30


def test_a_thread_that_a_task_starts_belongs_to_the_task(executor: FiberExecutor) -> None:
    def work() -> bool:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(mine).result()[:2] == mine()[:2]

    assert executor.submit(work).result(LIMIT)


# -- what is refused


NO_POLICY = [3, "3", True, stop_after_attempt(3), tenacity.retry, tenacity.AsyncRetrying()]


@pytest.mark.parametrize("wrong", NO_POLICY, ids=lambda wrong: type(wrong).__name__)
def test_what_is_no_policy_is_refused(executor: FiberExecutor, wrong: Any) -> None:
    with pytest.raises(fiberexec.ConfigError, match="retry"):
        executor.options(retry=wrong)
