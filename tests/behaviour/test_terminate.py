"""future.terminate(): a task is stopped wherever it is, ends in CancelledError, and is never run again."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import tenacity

from fiberexec import FiberExecutor

LIMIT = 30.0
Make = Callable[..., FiberExecutor]


def hold(board: Any, name: str = "held") -> str:
    board.post(name, os.getpid())
    board.wait("go")
    return name


def is_cancelled(future: Any) -> bool:
    concurrent.futures.wait([future], LIMIT)
    return bool(future.done() and future.cancelled())


def test_a_running_task_is_stopped_and_its_worker_replaced(make_executor: Make, board: Any) -> None:
    executor = make_executor(1)
    future = executor.submit(hold, board)
    called: list[Any] = []
    future.add_done_callback(called.append)
    pid = board.wait("held")[0]
    assert future.terminate() is True
    assert is_cancelled(future)
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(LIMIT)
    assert executor.submit(os.getpid).result(LIMIT) != pid
    assert called == [future] and executor.stats().lost == 0
    assert board.read("held") == [pid]


def test_finally_blocks_run_before_the_future_is_done(executor: FiberExecutor, board: Any) -> None:
    def stoppable() -> None:
        try:
            hold(board)
        finally:
            board.post("cleaned up")

    future = executor.submit(stoppable)
    board.wait("held")
    future.terminate()
    assert is_cancelled(future)
    assert board.read("cleaned up") == [None]


def test_a_task_is_stopped_in_a_finalizer_though_python_ignores_what_is_raised_there(
    make_executor: Make, board: Any
) -> None:
    class Slow:
        def __del__(self) -> None:
            hold(board)

    def stoppable() -> None:
        try:
            Slow()
            board.wait("never")
        finally:
            board.post("cleaned up")

    executor = make_executor(1)
    future = executor.submit(stoppable)
    board.wait("held")
    future.terminate()
    assert is_cancelled(future)
    assert board.read("cleaned up") == [None]


def test_a_task_that_catches_everything_is_stopped_all_the_same(executor: FiberExecutor, board: Any) -> None:
    def stubborn() -> str:
        try:
            hold(board)
        except BaseException:
            board.post("caught")
        return "kept on"

    future = executor.submit(stubborn)
    board.wait("held")
    assert future.terminate()
    assert is_cancelled(future)
    board.wait("caught")


def test_a_task_that_ignores_sigterm_is_killed_after_the_grace(make_executor: Make, board: Any) -> None:
    def stubborn() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        hold(board)

    executor = make_executor(1)
    future = executor.submit(stubborn)
    board.wait("held")
    began = time.monotonic()
    assert future.terminate()
    assert is_cancelled(future)
    assert 1.5 < time.monotonic() - began < 10
    assert executor.submit(int).result(LIMIT) == 0


def test_a_pending_task_is_cancelled(make_executor: Make, board: Any) -> None:
    executor = make_executor(1)
    running = executor.submit(hold, board)
    board.wait("held")
    pending = executor.submit(board.post, "ran")
    called: list[Any] = []
    pending.add_done_callback(called.append)
    assert pending.terminate() is True
    assert is_cancelled(pending) and called == [pending]
    board.post("go")
    assert running.result(LIMIT) == "held"
    executor.shutdown()
    assert board.read("ran") == []


def test_a_task_that_is_done_is_left_alone(executor: FiberExecutor) -> None:
    future, failed = executor.submit(int, "3"), executor.submit(int, "x")
    concurrent.futures.wait([future, failed], LIMIT)
    assert future.terminate() is False and failed.terminate() is False
    assert future.result() == 3 and isinstance(failed.exception(), ValueError)


def test_terminating_twice_and_after_cancelling_is_harmless(make_executor: Make, board: Any) -> None:
    executor = make_executor(1)
    running = executor.submit(hold, board)
    board.wait("held")
    cancelled = executor.submit(int)
    assert cancelled.cancel()
    cancelled.terminate()
    assert running.terminate()
    running.terminate()
    running.cancel()
    assert is_cancelled(running) and cancelled.cancelled()
    running.terminate()
    assert executor.submit(int).result(LIMIT) == 0


def test_neighbours_in_a_batch_live(make_executor: Make, board: Any) -> None:
    """Cheap tasks travel together; those behind the one that is stopped run elsewhere, none twice, none charged."""

    def step(i: int, stop_at: int) -> int:
        board.post("ran", i) if i >= stop_at else None
        if i == stop_at:
            board.post("held")
            board.wait("go")
        return i

    executor = make_executor(1)
    for _ in range(50):  # measured as cheap, so that the next ones travel in batches
        executor.submit(step, -1, 0).result(LIMIT)
    futures = [executor.submit(step, i, 20) for i in range(40)]
    board.wait("held")
    assert futures[20].terminate()
    assert is_cancelled(futures[20])
    assert [f.result(LIMIT) for f in futures[:20] + futures[21:]] == [i for i in range(40) if i != 20]
    assert sorted(board.read("ran")) == list(range(20, 40))
    assert executor.stats().lost == 0


def test_a_task_next_in_line_behind_a_running_one_is_taken_back(make_executor: Make, board: Any) -> None:
    def step(i: int) -> int:
        if i == 0:
            board.post("held", os.getpid())
            board.wait("go")
        if i == 1:
            board.post("ran")
        return i

    executor = make_executor(1)
    for _ in range(50):
        executor.submit(step, -1).result(LIMIT)
    held, *behind = [executor.submit(step, i) for i in (0, 1, 2, 3)]
    board.wait("held")
    assert behind[0].terminate()
    assert is_cancelled(behind[0])
    assert not held.done()
    board.post("go")
    assert [future.result(LIMIT) for future in (held, *behind[1:])] == [0, 2, 3]
    assert board.read("ran") == [] and len(board.read("held")) == 1


def test_a_terminated_task_is_never_retried(executor: FiberExecutor, board: Any) -> None:
    view = executor.options(retry=tenacity.Retrying(), timeout=600)
    future = view.submit(hold, board)
    board.wait("held")
    assert future.terminate()
    assert is_cancelled(future)
    executor.shutdown()
    assert len(board.read("held")) == 1


def test_a_task_that_waits_for_its_next_attempt_is_cancelled(executor: FiberExecutor, eventually: Any) -> None:
    future = executor.options(retry=tenacity.Retrying(wait=tenacity.wait_fixed(600))).submit(int, "x")
    eventually(lambda: executor.stats().delayed == 1, "the task waits for its next attempt")
    assert not future.done() and not future.running()
    assert future.terminate()
    assert is_cancelled(future)
    assert executor.stats().delayed == 0


def test_a_task_whose_worker_starts_is_cancelled(make_executor: Make, board: Any) -> None:
    executor = make_executor(1, initializer=board.wait, initargs=("go",))
    future = executor.submit(board.post, "ran")
    assert future.terminate()
    assert is_cancelled(future)
    board.post("go")
    executor.shutdown()
    assert board.read("ran") == []


def test_many_tasks_at_once(make_executor: Make, board: Any) -> None:
    executor = make_executor(3)
    running = [executor.submit(hold, board) for _ in range(3)]
    pending = [executor.submit(board.post, "ran") for _ in range(30)]
    board.wait("held", 3)
    assert all(future.terminate() for future in reversed(running + pending))
    assert all(map(is_cancelled, running + pending))
    assert executor.submit(int).result(LIMIT) == 0
    assert board.read("ran") == []


def test_what_terminate_says_is_true_while_the_manager_is_busy(make_executor: Make, board: Any, eventually: Any) -> None:
    """Results that have arrived and wait behind a slow callback: either the result stands, or the future is cancelled."""
    executor = make_executor(1)
    go, busy = threading.Event(), threading.Event()
    for _ in range(50):
        executor.submit(int).result(LIMIT)
    futures = [executor.submit(int, str(i)) for i in range(20)]
    blocker = executor.submit(int)
    blocker.add_done_callback(lambda _: (busy.set(), go.wait(LIMIT)))
    more = [executor.submit(int, str(i)) for i in range(20)]
    assert busy.wait(LIMIT)
    said = [(future, future.terminate()) for future in futures + more]
    go.set()
    concurrent.futures.wait(futures + more, LIMIT)
    assert all(future.cancelled() == took for future, took in said)


def test_terminate_and_cancel_do_not_disturb_each_other(make_executor: Make, board: Any) -> None:
    executor = make_executor(1)
    go, busy = threading.Event(), threading.Event()
    first = executor.submit(int)
    first.add_done_callback(lambda _: (busy.set(), go.wait(LIMIT)))
    assert busy.wait(LIMIT)
    held = executor.submit(hold, board)
    board.wait("held")
    one, two, three = (executor.submit(int) for _ in range(3))
    assert one.terminate() and two.cancel() and three.terminate()
    go.set()
    assert is_cancelled(one) and is_cancelled(two) and is_cancelled(three)
    board.post("go")
    assert held.result(LIMIT) == "held"


def test_terminate_from_a_callback(make_executor: Make, board: Any) -> None:
    executor = make_executor(2)
    held = executor.submit(hold, board)
    board.wait("held")
    executor.submit(int).add_done_callback(lambda _: held.terminate())
    assert is_cancelled(held)


def test_views_give_futures_that_can_be_terminated(executor: FiberExecutor, board: Any) -> None:
    future = executor.options(priority=1, timeout=600).submit(hold, board)
    board.wait("held")
    assert future.terminate() and is_cancelled(future)


@pytest.mark.one_host("it looks at its workers' processes")
def test_the_children_of_a_terminated_task_die_with_it(executor: FiberExecutor, board: Any, eventually: Any) -> None:
    def parent() -> None:
        import subprocess
        import sys

        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        board.post("child", child.pid)
        hold(board)

    def is_alive(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True

    future = executor.submit(parent)
    child = board.wait("child")[0]
    board.wait("held")
    assert is_alive(child) and future.terminate() and is_cancelled(future)
    eventually(lambda: not is_alive(child), "the child is gone")


def test_a_task_with_an_executor_of_its_own_ends_with_both_their_finally_blocks(make_executor: Make, board: Any) -> None:
    def inner(board: Any) -> None:
        try:
            hold(board)
        finally:
            board.post("cleaned up", "inner")

    def outer() -> None:
        try:
            with FiberExecutor(1) as executor:
                executor.submit(inner, board).result()
        finally:
            board.post("cleaned up", "outer")

    future = make_executor(1).submit(outer)
    board.wait("held")
    assert future.terminate() and is_cancelled(future)
    assert board.read("cleaned up") == ["inner", "outer"]
