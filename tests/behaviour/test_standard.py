"""What the standard promises of submit(), futures and the executor's end."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import gc
import os
import pickle
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import fiberexec
from fiberexec import BrokenExecutor, FiberExecutor

LIMIT = 30.0


def echo(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def hold(board: Any, name: str = "held") -> str:
    """Say that it runs, and run until the test posts "go"."""
    board.post(name, os.getpid())
    board.wait("go")
    return name


class Custom(Exception):
    def __init__(self, code: int, *, text: str) -> None:
        super().__init__(code)
        self.code = code
        self.text = text


def outer(n: int) -> int:
    return inner(n)


def inner(n: int) -> int:
    raise Custom(n, text="from the worker")


# -- submit and futures


def test_submit_returns_a_real_future_with_the_result(executor: FiberExecutor) -> None:
    future = executor.submit(echo, 1, 2, x=3)
    assert isinstance(future, concurrent.futures.Future)
    assert future.result(LIMIT) == ((1, 2), {"x": 3})
    assert future.done() and not future.running() and not future.cancelled()
    assert future.exception() is None


def test_self_and_fn_are_ordinary_keyword_arguments(executor: FiberExecutor) -> None:
    assert executor.submit(echo, self=1, fn=2).result(LIMIT) == ((), {"self": 1, "fn": 2})


def test_a_task_runs_in_another_process(executor: FiberExecutor) -> None:
    assert executor.submit(os.getpid).result(LIMIT) != os.getpid()


def test_an_exception_keeps_its_class_its_attributes_and_the_remote_traceback(executor: FiberExecutor) -> None:
    error = executor.submit(outer, 7).exception(LIMIT)
    assert type(error) is Custom
    assert (error.code, error.text, error.args) == (7, "from the worker", (7,))
    shown = "".join(traceback.format_exception(error))
    assert "in outer" in shown and "in inner" in shown
    assert shown.index("in outer") < shown.index("in inner")


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_an_exception_that_is_no_error_is_a_result_too(executor: FiberExecutor, error: BaseException) -> None:
    def raise_it() -> None:
        raise error

    pids = {executor.submit(os.getpid).result(LIMIT)}
    assert type(executor.submit(raise_it).exception(LIMIT)) is type(error)
    pids.add(executor.submit(os.getpid).result(LIMIT))
    assert executor.stats().lost == 0
    assert len(executor.workers()) <= 2 and pids <= {worker.pid for worker in executor.workers()}


def test_a_default_timeout_of_sockets_is_not_the_workers(make_executor: Callable[..., Any]) -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.05)
    try:
        with make_executor(1) as ex:
            assert ex.submit(time.sleep, 0.2).result(LIMIT) is None
    finally:
        socket.setdefaulttimeout(before)


def test_a_future_has_all_that_the_standards_own_has(executor: FiberExecutor) -> None:
    # It makes its attributes itself, with a lighter Condition: a Python that adds one must be noticed here.
    ours, theirs = vars(executor.submit(echo)), vars(concurrent.futures.Future())
    assert ours.keys() - {"_task", "_manager"} == theirs.keys()


def test_callbacks_run_in_order_with_the_future_and_after_it_is_done(executor: FiberExecutor, board: Any) -> None:
    seen: list[Any] = []
    ran = threading.Event()
    future = executor.submit(hold, board)
    future.add_done_callback(lambda f: seen.append((1, f is future, f.done())))
    future.add_done_callback(lambda f: (seen.append((2, f is future, f.done())), ran.set()))
    assert not seen
    board.post("go")
    assert ran.wait(LIMIT)
    assert seen == [(1, True, True), (2, True, True)]
    future.add_done_callback(lambda f: seen.append(3))  # at once, here
    assert seen[-1] == 3


def test_a_callback_may_submit_cancel_and_ask(executor: FiberExecutor) -> None:
    made: list[Any] = []
    ran = threading.Event()

    def chain(future: Any) -> None:
        made.append(executor.submit(echo, future.result()))
        made.append(executor.stats())
        ran.set()

    executor.submit(int, "5").add_done_callback(chain)
    assert ran.wait(LIMIT)
    assert made[0].result(LIMIT) == ((5,), {})


@pytest.mark.filterwarnings("ignore")
def test_a_callback_that_raises_harms_nobody(executor: FiberExecutor, caplog: pytest.LogCaptureFixture) -> None:
    future = executor.submit(int, "5")
    future.add_done_callback(lambda f: 1 // 0)
    assert future.result(LIMIT) == 5
    assert executor.submit(int, "6").result(LIMIT) == 6


@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt])
def test_a_callback_that_exits_harms_nobody(
    executor: FiberExecutor, monkeypatch: pytest.MonkeyPatch, raised: type[BaseException]
) -> None:
    said: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: said.append(kind))

    def exit(future: Any) -> None:
        raise raised(3)

    future = executor.submit(time.sleep, 0.1)
    future.add_done_callback(exit)
    assert future.result(LIMIT) is None
    assert executor.submit(int, "6").result(LIMIT) == 6 and said == [raised]


def test_a_callback_that_blocks_does_not_keep_others_from_submitting(executor: FiberExecutor) -> None:
    go = threading.Event()
    blocked = threading.Event()
    first = executor.submit(int, "1")
    first.add_done_callback(lambda f: (blocked.set(), go.wait(LIMIT)))
    assert blocked.wait(LIMIT)
    later = executor.submit(int, "2")
    assert not later.done()
    go.set()
    assert later.result(LIMIT) == 2


def test_cancel_takes_a_pending_task_back_and_leaves_a_running_one(make_executor: Callable[..., Any], board: Any) -> None:
    executor = make_executor(1)
    running = executor.submit(hold, board)
    board.wait("held")
    pending = [executor.submit(board.post, "ran", i) for i in range(3)]
    assert running.running() and not running.cancel()
    assert not pending[0].running()
    assert pending[1].cancel() and pending[1].cancelled() and pending[1].cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        pending[1].result(LIMIT)
    board.post("go")
    assert running.result(LIMIT) == "held"
    assert not running.cancel()
    concurrent.futures.wait(pending, LIMIT)
    assert board.read("ran") == [0, 2]


def test_a_future_that_somebody_has_marked_as_running_ends_all_the_same(executor: FiberExecutor, board: Any) -> None:
    futures = [executor.submit(hold, board) for _ in range(4)]
    board.wait("held", 2)
    for future in futures:
        future.set_running_or_notify_cancel()
    futures[2].cancel()
    futures[0].terminate()
    futures[3].terminate()
    board.post("go")
    assert futures[1].result(LIMIT) == "held"
    for future in (futures[0], futures[2], futures[3]):
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(LIMIT)


class Ends:
    """An argument that ends the executor while it is pickled."""

    executor: FiberExecutor

    def __reduce__(self) -> Any:
        self.executor.kill_workers()
        return int, ()  # the class itself would not travel: it holds an executor


def test_an_executor_that_breaks_in_the_midst_of_submit_says_so(executor: FiberExecutor) -> None:
    executor.submit(int).result(LIMIT)
    Ends.executor = executor
    try:
        with pytest.raises(RuntimeError, match=r"kill_workers|after shutdown"):  # the second if nothing was left to break
            executor.submit(echo, Ends())
    finally:
        del Ends.executor


def test_a_cancelled_future_is_seen_by_wait_as_completed_and_callbacks(
    make_executor: Callable[..., Any], board: Any
) -> None:
    executor = make_executor(1)
    running = executor.submit(hold, board)
    board.wait("held")
    pending = executor.submit(int)
    called: list[Any] = []
    pending.add_done_callback(called.append)
    waiter = concurrent.futures.as_completed([pending, running], LIMIT)
    assert pending.cancel()
    assert next(waiter) is pending and called == [pending]
    done, open_ = concurrent.futures.wait([pending, running], LIMIT, concurrent.futures.FIRST_COMPLETED)
    assert (done, open_) == ({pending}, {running})
    board.post("go")
    assert next(waiter) is running


def test_wait_knows_first_exception_and_time(executor: FiberExecutor, board: Any) -> None:
    held = executor.submit(hold, board)
    failed = executor.submit(int, "x")
    done, open_ = concurrent.futures.wait([held, failed], LIMIT, concurrent.futures.FIRST_EXCEPTION)
    assert (done, open_) == ({failed}, {held})
    assert concurrent.futures.wait([held], 0.01).not_done == {held}
    with pytest.raises(concurrent.futures.TimeoutError):
        held.result(0.01)
    board.post("go")
    assert concurrent.futures.wait([held, failed], LIMIT).not_done == set()


def test_as_completed_yields_each_as_it_ends(executor: FiberExecutor, board: Any) -> None:
    late, early = executor.submit(hold, board), executor.submit(int)
    order = []
    for future in concurrent.futures.as_completed([late, early], LIMIT):
        order.append(future)
        board.post("go")
    assert order == [early, late]


# -- references


class Tracked:
    """Something whose life can be watched; it travels as an ordinary object."""


def swallow(*args: Any) -> None:
    return None


def test_arguments_are_let_go_when_submit_has_returned(executor: FiberExecutor) -> None:
    tracked = Tracked()
    gone = weakref.ref(tracked)
    future = executor.submit(swallow, tracked)
    del tracked
    future.result(LIMIT)
    gc.collect()
    assert gone() is None


def test_results_are_let_go_with_their_future(executor: FiberExecutor) -> None:
    future = executor.submit(Tracked)
    gone = weakref.ref(future.result(LIMIT))
    other = executor.submit(int)
    other.result(LIMIT)
    del future
    gc.collect()
    assert gone() is None


def test_exceptions_are_let_go_with_their_future(executor: FiberExecutor) -> None:
    future = executor.submit(outer, 1)
    gone = weakref.ref(future.exception(LIMIT))
    executor.submit(int).result(LIMIT)
    del future
    gc.collect()
    assert gone() is None


def test_map_lets_results_go_as_they_are_handed_over(executor: FiberExecutor) -> None:
    def make(i: int) -> Tracked:
        return Tracked()

    alive: list[weakref.ref[Tracked]] = []
    for result in executor.map(make, range(40)):
        alive.append(weakref.ref(result))
        del result
        gc.collect()
        assert sum(ref() is not None for ref in alive) == 0


def live_tracked() -> int:
    gc.collect()
    return sum(type(thing).__name__ == "Tracked" for thing in gc.get_objects())


def test_a_worker_lets_arguments_and_results_go_before_the_next_task(make_executor: Callable[..., Any]) -> None:
    executor = make_executor(1)
    assert type(executor.submit(echo, Tracked()).result(LIMIT)[0][0]) is Tracked
    assert executor.submit(live_tracked).result(LIMIT) == 0
    assert type(executor.submit(outer, 1).exception(LIMIT)) is Custom
    assert executor.submit(live_tracked).result(LIMIT) == 0


# -- what the executor says of itself


def set_variable(name: str, value: str) -> None:
    os.environ[name] = value


def test_the_positional_arguments_are_those_of_the_process_pool(backend: str) -> None:
    with FiberExecutor(1, None, set_variable, ("FIBER_TEST_VALUE", "x"), backend=backend) as executor:
        assert executor.submit(os.getenv, "FIBER_TEST_VALUE").result(LIMIT) == "x"
        assert isinstance(executor, concurrent.futures.Executor)
        assert executor._max_workers == 1


def test_the_executor_and_its_views_do_not_travel(executor: FiberExecutor) -> None:
    for what in (executor, executor.options(priority=1)):
        with pytest.raises(TypeError, match="executor"):
            pickle.dumps(what)
        error = executor.submit(swallow, what).exception(LIMIT)
        assert error is not None and "executor" in str(error)


def test_a_future_does_not_travel(executor: FiberExecutor) -> None:
    future = executor.submit(int)
    error = executor.submit(echo, [future]).exception(LIMIT)
    assert "send its result" in str(error)
    with pytest.raises(TypeError, match="send its result"):
        pickle.dumps(future)


def test_its_errors_are_the_standards() -> None:
    assert issubclass(BrokenExecutor, concurrent.futures.BrokenExecutor)
    assert issubclass(fiberexec.TaskTimeout, TimeoutError)
    assert not issubclass(fiberexec.WorkerLost, concurrent.futures.BrokenExecutor)
