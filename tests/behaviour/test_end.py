"""How an executor ends: shutdown(), the with block, terminate_workers(), kill_workers(), initializers, worn workers."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from fiberexec import BrokenExecutor, FiberExecutor

LIMIT = 30.0
Make = Callable[..., FiberExecutor]


def hold(board: Any, name: str = "held") -> str:
    board.post(name, os.getpid())
    board.wait("go")
    return name


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# -- shutdown


@pytest.mark.one_host("it looks at its workers' processes")
def test_shutdown_waits_for_all_tasks_and_leaves_no_worker(make_executor: Make) -> None:
    executor = make_executor(2)
    futures = [executor.submit(pow, 2, i) for i in range(50)]
    pids = {worker.pid for worker in executor.workers()} - {0}
    executor.shutdown()
    assert [future.result(0) for future in futures] == [2**i for i in range(50)]
    assert executor.workers() == [] and not any(map(is_alive, pids))


def test_shutdown_without_wait_returns_at_once_and_the_tasks_end(make_executor: Make, board: Any) -> None:
    executor = make_executor(1)
    running = executor.submit(hold, board)
    pending = executor.submit(int, "7")
    board.wait("held")
    executor.shutdown(wait=False)
    assert not running.done() and not pending.done()
    board.post("go")
    assert running.result(LIMIT) == "held" and pending.result(LIMIT) == 7


def test_shutdown_can_cancel_what_waits(make_executor: Make, board: Any) -> None:
    executor = make_executor(1)
    running = executor.submit(hold, board)
    board.wait("held")
    pending = [executor.submit(int) for _ in range(20)]
    called: list[Any] = []
    pending[0].add_done_callback(called.append)
    executor.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in pending) and called == [pending[0]]
    board.post("go")
    assert running.result(LIMIT) == "held"
    executor.shutdown()


def test_shutdown_ends_a_map_that_is_being_consumed(make_executor: Make, board: Any) -> None:
    executor = make_executor(1)
    results = executor.map(hold, [board] * 3)
    board.wait("held")
    executor.shutdown(wait=False, cancel_futures=True)
    board.post("go")
    assert next(results) == "held"
    with pytest.raises(concurrent.futures.CancelledError):
        list(results)


def test_shutdown_may_be_called_often_and_by_many(make_executor: Make) -> None:
    executor = make_executor(2)
    future = executor.submit(int)
    threads = [threading.Thread(target=executor.shutdown) for _ in range(4)]
    for thread in threads:
        thread.start()
    executor.shutdown()
    for thread in threads:
        thread.join(LIMIT)
    executor.shutdown(wait=True, cancel_futures=True)
    assert future.result(0) == 0 and not any(thread.is_alive() for thread in threads)


def test_shutdown_of_an_executor_that_was_never_used(make_executor: Make) -> None:
    executor = make_executor(2)
    executor.shutdown()
    assert executor.workers() == [] and executor.stats().started == 0


def test_nothing_is_taken_after_shutdown(make_executor: Make) -> None:
    executor = make_executor(2)
    executor.shutdown()
    for use in (executor.submit, executor.map, executor.options(timeout=5).submit):
        with pytest.raises(RuntimeError, match="after shutdown") as caught:
            use(int, ())
        assert not isinstance(caught.value, concurrent.futures.BrokenExecutor)


def test_leaving_the_block_waits(make_executor: Make) -> None:
    with make_executor(2) as executor:
        futures = [executor.submit(pow, 2, i) for i in range(10)]
    assert [future.result(0) for future in futures] == [2**i for i in range(10)]


def test_an_exception_that_leaves_the_block_waits_too(make_executor: Make, board: Any) -> None:
    with pytest.raises(ZeroDivisionError), make_executor(1) as executor:
        running, pending = executor.submit(hold, board), executor.submit(int)
        board.wait("held")
        threading.Thread(target=board.post, args=("go",)).start()
        raise ZeroDivisionError
    assert running.result(0) == "held" and pending.result(0) == 0


def test_an_interrupt_that_leaves_the_block_cancels_and_terminates(make_executor: Make, board: Any) -> None:
    def stoppable() -> None:
        try:
            hold(board)
        finally:
            board.post("cleaned up")

    began = 0.0
    with pytest.raises(KeyboardInterrupt), make_executor(2) as executor:
        running = [executor.submit(stoppable) for _ in range(2)]
        pending = [executor.submit(int) for _ in range(10)]
        board.wait("held", 2)
        began = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - began < 20
    assert all(future.cancelled() for future in running + pending)
    assert len(board.read("cleaned up")) == 2


def test_an_interrupt_ends_tasks_that_wait_for_their_next_attempt(make_executor: Make) -> None:
    import tenacity

    retry = tenacity.Retrying(wait=tenacity.wait_fixed(600))
    with pytest.raises(KeyboardInterrupt), make_executor(1) as executor:
        future = executor.options(retry=retry).submit(int, "x")
        while not executor.stats().delayed:
            time.sleep(0.002)
        raise KeyboardInterrupt
    assert future.cancelled()


@pytest.mark.one_host("it looks at its workers' processes")
@pytest.mark.parametrize("place", ["deciding", "writing"])
def test_an_interrupt_in_the_midst_of_submit_ends_the_executor(
    make_executor: Make, board: Any, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A Ctrl-C comes anywhere: where it leaves half a decision or half a message nothing can go on, but nobody waits."""
    executor = make_executor(2)
    running = executor.submit(hold, board)
    executor.submit(int).result(LIMIT)
    (pid,) = board.wait("held")
    caller = threading.current_thread()
    manager: Any = executor._manager
    (idle,) = manager.scheduler.fleet.idle
    connection = manager.switchboard.connections[idle]
    owner, name = (manager.scheduler.queue, "extend") if place == "deciding" else (connection, "_pack")
    method = getattr(owner, name)

    def interrupted(*args: Any) -> Any:
        found = method(*args)
        if threading.current_thread() is caller:
            monkeypatch.undo()
            raise KeyboardInterrupt  # the task is queued and not counted, or sent and in no message
        return found

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        executor.submit(int)
    assert isinstance(running.exception(LIMIT), BrokenExecutor)
    executor.shutdown()
    assert not is_alive(pid)
    with pytest.raises(BrokenExecutor):
        executor.submit(int)


def test_a_defect_in_the_manager_is_said_and_nobody_waits(
    make_executor: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    executor = make_executor(1)
    future = executor.submit(time.sleep, 600)

    def fail(event: Any, now: float) -> Any:
        raise ArithmeticError("a defect")

    monkeypatch.setattr(executor._manager.scheduler, "handle", fail)
    executor._manager.switchboard.wake()
    with pytest.raises(BrokenExecutor, match="a defect"):
        future.result(LIMIT)
    monkeypatch.undo()
    executor.shutdown()
    assert [record.levelname for record in caplog.records] == ["CRITICAL"]
    assert caplog.records[0].exc_info is not None


# -- the two harder ends


@pytest.mark.one_host("it looks at its workers' processes")
@pytest.mark.parametrize("how", ["terminate_workers", "kill_workers"])
def test_ending_the_workers_ends_every_future(make_executor: Make, board: Any, how: str) -> None:
    executor = make_executor(2)
    running = [executor.submit(hold, board) for _ in range(2)]
    board.wait("held", 2)
    pending = [executor.submit(int) for _ in range(5)]
    pids = board.read("held")
    getattr(executor, how)()
    assert all(future.cancelled() for future in pending)
    for future in running:
        assert isinstance(future.exception(LIMIT), BrokenExecutor)
    with pytest.raises(RuntimeError):
        executor.submit(int)
    executor.shutdown()
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize("how", ["terminate_workers", "kill_workers"])
def test_ending_the_workers_of_an_idle_or_unused_executor(make_executor: Make, how: str) -> None:
    unused, idle = make_executor(2), make_executor(1)
    assert idle.submit(int).result(LIMIT) == 0
    for executor in (unused, idle):
        getattr(executor, how)()
        getattr(executor, how)()
        with pytest.raises(RuntimeError):
            executor.submit(int)
        executor.shutdown()
        assert executor.workers() == []


def test_terminate_workers_lets_tasks_clean_up(make_executor: Make, board: Any) -> None:
    def stoppable() -> None:
        try:
            hold(board)
        finally:
            board.post("cleaned up")

    executor = make_executor(1)
    future = executor.submit(stoppable)
    board.wait("held")
    executor.terminate_workers()
    assert isinstance(future.exception(LIMIT), BrokenExecutor)
    board.wait("cleaned up")


@pytest.mark.one_host("it looks at its workers' processes")
def test_terminate_workers_ends_workers_that_ignore_sigterm(make_executor: Make, board: Any) -> None:
    def stubborn() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        hold(board)

    executor = make_executor(1)
    future = executor.submit(stubborn)
    board.wait("held")
    executor.terminate_workers()
    assert isinstance(future.exception(LIMIT), BrokenExecutor)
    executor.shutdown()
    assert not is_alive(board.read("held")[0])


# -- initializers


def prepare(name: str) -> None:
    os.environ["FIBER_TEST_PREPARED"] = name


def test_the_initializer_runs_once_in_every_worker_before_its_tasks(make_executor: Make, board: Any) -> None:
    def setup(name: str) -> None:
        board.post("set up", os.getpid())
        prepare(name)

    def work() -> str | None:
        board.meet("both", 2)
        return os.environ.get("FIBER_TEST_PREPARED")

    executor = make_executor(2, initializer=setup, initargs=("yes",))
    futures = [executor.submit(work) for _ in range(2)]
    assert [future.result(LIMIT) for future in futures] == ["yes", "yes"]
    assert executor.submit(os.getenv, "FIBER_TEST_PREPARED").result(LIMIT) == "yes"
    assert len(board.read("set up")) == len(set(board.read("set up"))) == 2


def test_an_initializer_that_raises_breaks_the_executor_with_its_cause(make_executor: Make) -> None:
    def setup() -> None:
        raise LookupError("no such data")

    executor = make_executor(2, initializer=setup)
    futures = []
    try:
        futures = [executor.submit(int) for _ in range(10)]
    except BrokenExecutor:
        pass  # it broke while we submitted
    for future in futures:
        error = future.exception(LIMIT)
        assert isinstance(error, BrokenExecutor)
        assert isinstance(error.__cause__, LookupError) and "no such data" in str(error.__cause__)
        assert "no such data" in str(error)
    with pytest.raises(BrokenExecutor, match="no such data"):
        executor.submit(int)
    executor.shutdown()


def test_an_initializer_that_cannot_travel_is_said_at_once(make_executor: Make) -> None:
    with pytest.raises(Exception, match="lock"):
        make_executor(1, initializer=print, initargs=(threading.Lock(),)).submit(int).result(LIMIT)


def test_an_initializer_that_exits_breaks_the_executor(make_executor: Make) -> None:
    executor = make_executor(1, initializer=os._exit, initargs=(9,))
    error = executor.submit(int).exception(LIMIT)
    assert isinstance(error, BrokenExecutor)
    assert "9" in f"{error} {error.__cause__}"


# -- worn workers


def test_a_worker_is_replaced_after_its_share_of_tasks(make_executor: Make) -> None:
    executor = make_executor(1, max_tasks_per_child=3)
    pids = [executor.submit(os.getpid).result(LIMIT) for _ in range(7)]
    assert pids[0] == pids[1] == pids[2] != pids[3] == pids[4] == pids[5] != pids[6]
    assert executor.stats().lost == 0


@pytest.mark.one_host("it tells workers apart by their pids")
@pytest.mark.parametrize("share", [1, 4])
def test_the_share_holds_for_batches_and_for_map(make_executor: Make, share: int) -> None:
    executor = make_executor(2, max_tasks_per_child=share)
    futures = [executor.submit(os.getpid) for _ in range(20)]
    counted = [future.result(LIMIT) for future in futures] + list(executor.map(lambda _: os.getpid(), range(20)))
    assert max(counted.count(pid) for pid in counted) <= share


def test_a_worn_worker_ends_in_order(make_executor: Make, board: Any) -> None:
    """What a task registers with atexit runs when its worker goes."""

    def work() -> None:
        import atexit

        atexit.register(board.post, "at exit")

    executor = make_executor(1, max_tasks_per_child=1)
    executor.submit(work).result(LIMIT)
    board.wait("at exit")
