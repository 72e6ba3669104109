"""asyncio and ``concurrent.futures`` with the executor's futures: awaited, gathered, cancelled, waited for, chained."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from fiberexec import FiberExecutor

LIMIT = 20.0


@pytest.fixture
def ex() -> Iterator[FiberExecutor]:
    with FiberExecutor(2) as executor:
        yield executor


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, LIMIT))


def hold(path: Path, started: Path | None = None) -> str:
    """Run until the file is there."""
    if started is not None:
        started.touch()
    while not path.exists():
        time.sleep(0.005)
    return "held"


async def until(path: Path) -> None:
    while not path.exists():
        await asyncio.sleep(0.005)


def test_run_in_executor_leaves_the_loop_free(ex: FiberExecutor, tmp_path: Path) -> None:
    async def main() -> tuple[str, int]:
        loop = asyncio.get_running_loop()
        held = loop.run_in_executor(ex, hold, tmp_path / "go")
        other = await loop.run_in_executor(ex, functools.partial(pow, 2, 5))
        assert not held.done()
        (tmp_path / "go").touch()
        return await held, other

    assert run(main()) == ("held", 32)


def test_wrap_future_gives_results_and_exceptions(ex: FiberExecutor) -> None:
    async def main() -> list[Any]:
        futures = [ex.submit(divmod, 7, 2), ex.submit(divmod, 1, 0)]
        return await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)

    result, error = run(main())
    assert result == (3, 1)
    assert isinstance(error, ZeroDivisionError) and "divmod" not in repr(error)


def test_gather_over_many_tasks_of_local_functions(ex: FiberExecutor) -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(ex, lambda n=n: n * n) for n in range(200)))

    assert run(main()) == [n * n for n in range(200)]


def test_cancelling_an_awaited_future_cancels_the_pending_task(ex: FiberExecutor, tmp_path: Path) -> None:
    async def main() -> None:
        go = tmp_path / "go"
        running = [ex.submit(hold, go, tmp_path / str(n)) for n in range(2)]
        for n in range(2):
            await until(tmp_path / str(n))
        future = ex.submit(hold, go, tmp_path / "never")
        waiting = asyncio.ensure_future(asyncio.wait_for(asyncio.wrap_future(future), 0.05))
        with pytest.raises((TimeoutError, asyncio.TimeoutError)):
            await waiting
        assert future.cancelled()
        go.touch()
        assert [await asyncio.wrap_future(one) for one in running] == ["held", "held"]

    run(main())
    assert not (tmp_path / "never").exists()


def test_an_executor_as_the_loops_default_is_refused_as_any_process_pool(ex: FiberExecutor) -> None:
    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ex)

    with pytest.raises(TypeError):
        run(main())


def test_as_completed_yields_each_future_once_it_is_done(ex: FiberExecutor, tmp_path: Path) -> None:
    last = ex.submit(hold, tmp_path / "go")
    futures = [last, *(ex.submit(abs, -n) for n in range(5))]
    seen = []
    for future in concurrent.futures.as_completed(futures, timeout=LIMIT):
        seen.append(future.result())
        if len(seen) == 5:
            (tmp_path / "go").touch()
    assert sorted(seen[:5]) == [0, 1, 2, 3, 4] and seen[5] == "held"


def test_wait_returns_at_the_first_completed_and_at_the_first_exception(ex: FiberExecutor, tmp_path: Path) -> None:
    last = ex.submit(hold, tmp_path / "go")
    quick, failing = ex.submit(abs, -1), ex.submit(divmod, 1, 0)
    done, _ = concurrent.futures.wait([last, quick], LIMIT, concurrent.futures.FIRST_COMPLETED)
    assert done == {quick}
    done, _ = concurrent.futures.wait([last, failing], LIMIT, concurrent.futures.FIRST_EXCEPTION)
    assert done == {failing}
    (tmp_path / "go").touch()
    done, pending = concurrent.futures.wait([last, quick, failing], LIMIT)
    assert len(done) == 3 and not pending


def test_futures_of_two_kinds_of_executor_are_waited_for_together(ex: FiberExecutor) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        futures = [ex.submit(abs, -1), threads.submit(abs, -2)]
        assert {future.result() for future in concurrent.futures.as_completed(futures, timeout=LIMIT)} == {1, 2}


def test_a_chain_of_callbacks_each_submitting_the_next(ex: FiberExecutor) -> None:
    end: concurrent.futures.Future[int] = concurrent.futures.Future()

    def step(future: concurrent.futures.Future[int]) -> None:
        if future.result() == 100:
            end.set_result(threading.get_ident())
        else:
            ex.submit(int.__add__, future.result(), 1).add_done_callback(step)

    ex.submit(int).add_done_callback(step)
    assert end.result(LIMIT) != threading.get_ident()


def test_a_callback_that_raises_is_logged_and_harms_nobody(
    ex: FiberExecutor, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def fail(future: concurrent.futures.Future[Any]) -> None:
        raise ValueError("in a callback")

    future = ex.submit(hold, tmp_path / "go")
    called = threading.Event()
    future.add_done_callback(fail)
    future.add_done_callback(lambda _: called.set())
    (tmp_path / "go").touch()
    assert called.wait(LIMIT)
    assert [record.name for record in caplog.records] == ["concurrent.futures"]
    assert ex.submit(abs, -3).result(LIMIT) == 3
