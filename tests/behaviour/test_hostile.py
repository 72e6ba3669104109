"""What can't travel fails alone, at once, and says which attribute path holds it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from fiberexec import FiberExecutor, PicklingError, WorkerLost

LIMIT = 30.0
Make = Callable[..., FiberExecutor]


class Job:
    def __init__(self, what: Any) -> None:
        self.settings = {"items": [1, what]}


class Raises:
    def __reduce__(self) -> Any:
        raise LookupError("not today")


class Exits:
    def __reduce__(self) -> Any:
        raise SystemExit(4)


def give(kind: str) -> Any:
    return Job(threading.Lock()) if kind == "lock" else Job(Raises())


@pytest.mark.parametrize(
    ("what", "named"),
    [
        (threading.Lock(), "lock"),
        (Raises(), "not today"),
        (Exits(), "SystemExit"),
        ((i for i in ()), "generator"),
        (open, None),
    ],
)
def test_an_argument_that_cannot_travel_fails_its_future_at_once(
    make_executor: Make, what: Any, named: str | None
) -> None:
    executor = make_executor(1)
    future = executor.submit(str, Job(what))
    if named is None:  # a control: this one can
        assert future.exception(LIMIT) is None
        return
    assert future.done()
    error = future.exception()
    assert isinstance(error, PicklingError)
    assert "args[0].settings['items'][1]" in str(error) and named in str(error)
    assert executor.workers() == [] and executor.stats().queued == 0
    assert executor.submit(int, "5").result(LIMIT) == 5


def test_a_keyword_argument_is_named(executor: FiberExecutor) -> None:
    error = executor.submit(dict, good=1, bad=Job(threading.Lock())).exception(LIMIT)
    assert isinstance(error, PicklingError) and "kwargs['bad'].settings['items'][1]" in str(error)


def test_a_function_that_cannot_travel_names_what_holds_it(executor: FiberExecutor) -> None:
    job = Job(threading.Lock())

    def work() -> Any:
        return job

    error = executor.submit(work).exception(LIMIT)
    assert isinstance(error, PicklingError)
    assert "work" in str(error) and "settings['items'][1]" in str(error) and "lock" in str(error)


def test_map_with_a_function_that_cannot_travel_says_so(executor: FiberExecutor) -> None:
    lock = threading.Lock()
    with pytest.raises(PicklingError, match="lock"):
        list(executor.map(lambda x: lock, range(3)))
    assert list(executor.map(abs, [-1])) == [1]


@pytest.mark.parametrize("kind", ["lock", "raises"])
def test_a_result_that_cannot_travel_fails_its_task_alone(make_executor: Make, kind: str) -> None:
    executor = make_executor(1)
    pid = executor.submit(os.getpid).result(LIMIT)
    error = executor.submit(give, kind).exception(LIMIT)
    assert isinstance(error, PicklingError)
    assert "result" in str(error) and ".settings['items'][1]" in str(error)
    assert executor.submit(os.getpid).result(LIMIT) == pid and executor.stats().lost == 0


def test_one_of_many_fails_alone(executor: FiberExecutor) -> None:
    futures = [executor.submit(str, threading.Lock() if i == 50 else i) for i in range(100)]
    assert isinstance(futures[50].exception(LIMIT), PicklingError)
    assert [future.result(LIMIT) for future in futures[:50] + futures[51:]] == [str(i) for i in range(100) if i != 50]

    def work(i: int) -> Any:
        return threading.Lock() if i == 20 else i

    results = executor.map(work, range(40), chunksize=40)
    assert [next(results) for _ in range(20)] == list(range(20))
    with pytest.raises(PicklingError):
        next(results)
    futures = [executor.submit(work, i) for i in range(40)]
    assert [i for i, future in enumerate(futures) if future.exception(LIMIT) is not None] == [20]


# -- unpickling in the worker


class Unpickles:
    """Does something to the process that unpickles it."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.what = function, args

    def __reduce__(self) -> Any:
        return self.what


def fail() -> None:
    raise LookupError("while unpickling")


def exit_quietly() -> None:
    raise SystemExit(4)


@pytest.mark.parametrize(("harm", "expected"), [(fail, LookupError), (exit_quietly, SystemExit)])
def test_unpickling_that_raises_is_the_tasks_exception(make_executor: Make, harm: Any, expected: Any) -> None:
    executor = make_executor(1)
    pid = executor.submit(os.getpid).result(LIMIT)
    assert type(executor.submit(str, Unpickles(harm)).exception(LIMIT)) is expected
    results = executor.map(type, [1, Unpickles(harm), 3])
    assert next(results) is int
    with pytest.raises(expected):
        next(results)
    assert executor.submit(os.getpid).result(LIMIT) == pid


@pytest.mark.parametrize("harm", [(os._exit, 3), (os.abort,)])
def test_unpickling_that_kills_costs_its_task_alone(executor: FiberExecutor, harm: Any) -> None:
    view = executor.options(max_worker_losses=1)
    futures = [view.submit(str, Unpickles(*harm) if i == 5 else i) for i in range(10)]
    assert isinstance(futures[5].exception(LIMIT), WorkerLost)
    assert [future.result(LIMIT) for future in futures[:5] + futures[6:]] == [str(i) for i in range(10) if i != 5]


# -- unpickling in the driver


def result_that(harm: Any) -> Any:
    return Unpickles(harm)


@pytest.mark.parametrize(("harm", "expected"), [(fail, LookupError), (exit_quietly, SystemExit)])
def test_a_result_that_cannot_be_unpickled_is_its_tasks_exception(
    executor: FiberExecutor, harm: Any, expected: Any
) -> None:
    assert type(executor.submit(result_that, harm).exception(LIMIT)) is expected
    with pytest.raises(expected):
        list(executor.map(result_that, [harm]))
    assert executor.submit(int, "5").result(LIMIT) == 5


# -- pickling in the driver


def test_pickling_that_hangs_hangs_its_own_submit_alone(executor: FiberExecutor) -> None:
    go, hanging = threading.Event(), threading.Event()

    class Hangs:
        def __reduce__(self) -> Any:
            hanging.set()
            go.wait(LIMIT)
            return int, ()

    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(executor.submit(abs, Hangs()).result(LIMIT)))
    thread.start()
    assert hanging.wait(LIMIT)
    assert executor.submit(int, "5").result(LIMIT) == 5
    assert list(executor.map(abs, [-1, -2])) == [1, 2]
    assert executor.stats().workers > 0 and not found
    go.set()
    thread.join(LIMIT)
    assert found == [0]


def test_pickling_that_uses_the_executor_works(executor: FiberExecutor) -> None:
    class Busy:
        def __reduce__(self) -> Any:
            return int, (executor.submit(str, 7).result(LIMIT),)

    assert executor.submit(abs, Busy()).result(LIMIT) == 7


def test_an_item_source_that_exits_is_the_callers_own_matter(executor: FiberExecutor) -> None:
    items = [1, Exits(), 3]
    results = executor.map(type, items)
    assert next(results) is int
    with pytest.raises((PicklingError, SystemExit)):
        next(results)


# -- a worker that dies with a result under way


def test_a_result_that_kills_while_it_is_pickled_costs_its_task_alone(executor: FiberExecutor) -> None:
    class Kills:
        def __reduce__(self) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)
            return int, ()

    def work(i: int) -> Any:
        return Kills() if i == 3 else i

    view = executor.options(max_worker_losses=1)
    futures = [view.submit(work, i) for i in range(8)]
    error = futures[3].exception(LIMIT)
    assert isinstance(error, WorkerLost) and error.exitcode == -signal.SIGKILL
    assert [future.result(LIMIT) for future in futures[:3] + futures[4:]] == [0, 1, 2, 4, 5, 6, 7]
