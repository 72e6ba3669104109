"""Pool: its beginning and end, and its workers."""

from __future__ import annotations

import concurrent.futures
import gc
import multiprocessing
import multiprocessing.pool
import os
import pickle
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tenacity

import fiberexec
from fiberexec import BrokenExecutor, ForkedError, ResourceError, TaskTimeout
from fiberexec.backends import registry
from fiberexec.mp.pool import Pool
from fiberexec.testing import FakeBackend

from .helpers import LIMIT, Log, deserted, eventually


def square(x: int) -> int:
    return x * x


def add(x: int, y: int = 10) -> int:
    return x + y


# -- from the beginning to the end


def test_arguments_of_a_pool_are_checked() -> None:
    for processes in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            Pool(processes)
    for limit in (0, -1, 0.5, "12"):
        with pytest.raises(ValueError, match="maxtasksperchild"):
            Pool(1, maxtasksperchild=limit)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="initializer"):
        Pool(1, initializer=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Pool(1, no_such_option=1)
    with pytest.raises(ValueError, match="no backend"):
        Pool(1, backend="nowhere")


def test_all_workers_start_with_the_pool_and_libraries_find_how_many() -> None:
    with Pool(3, idle_timeout=None) as pool:
        assert pool.size == pool._processes == len(pool._pool) == 3
        workers = {(member.host, member.pid) for member in pool._pool}
        assert len(workers) == 3 and (None, None) not in workers and (platform.node(), os.getpid()) not in workers
        assert all(member.is_alive() for member in pool._pool)
        pool._repopulate_pool()
        assert repr(pool) == "<fiberexec.mp.pool.Pool state=RUN pool_size=3>"


def test_a_pool_takes_nothing_once_it_is_closed_and_finishes_what_it_has() -> None:
    pool = Pool(2)
    result = pool.map_async(square, range(1000))
    with pytest.raises(ValueError, match="still running"):
        pool.join()
    pool.close()
    for name in ("apply", "map", "imap", "starmap_async"):
        with pytest.raises(ValueError, match="not running"):
            getattr(pool, name)(square, [])
    with pytest.raises(ValueError, match="not running"), pool:
        pass
    pool.join()
    assert result.get(0) == list(map(square, range(1000)))
    pool.close()
    pool.join()
    pool.terminate()


def test_terminate_stops_what_runs_and_nobody_waits_for_ever(log: Log) -> None:
    def hang(i: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if i else signal.SIG_IGN)
        log.write(i)
        time.sleep(LIMIT)

    stuck = threading.Event()

    def source() -> Iterator[int]:
        yield 2
        stuck.wait(LIMIT)

    pool = Pool(2)
    heard: list[BaseException] = []
    one = pool.apply_async(hang, (0,), error_callback=heard.append)
    some = pool.map_async(hang, range(1, 100), error_callback=heard.append)
    results = pool.imap(hang, source())
    log.wait(2)
    began = time.monotonic()
    pool.terminate()
    assert time.monotonic() - began < 10
    pool.join()
    for outcome in (one.get, some.get, results.next, results.next):
        with pytest.raises((concurrent.futures.CancelledError, BrokenExecutor)):
            outcome(LIMIT)
    with pytest.raises(StopIteration):
        results.next(LIMIT)
    stuck.set()
    assert len(heard) == 2
    assert len(log.lines()) == 2


def test_leaving_a_with_block_terminates(log: Log) -> None:
    with Pool(2) as pool:
        result = pool.map_async(lambda _: log.wait(99), range(4))
    with pytest.raises((concurrent.futures.CancelledError, BrokenExecutor)):
        result.get(LIMIT)


def test_a_pool_that_nobody_ended_says_so_and_still_finishes() -> None:
    pool = Pool(1)
    result = pool.map_async(square, range(10))
    with pytest.warns(ResourceWarning, match="unclosed running multiprocessing pool"):
        del pool
        gc.collect()
    assert result.get(LIMIT) == list(map(square, range(10)))


def test_a_program_that_ends_with_a_busy_pool_ends_at_once(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import fcntl, os, threading, time\n"
        "from fiberexec.mp.pool import Pool\n"
        "def stay():\n"
        "    fcntl.flock(os.open(PATH, os.O_RDWR | os.O_CREAT), fcntl.LOCK_SH)\n"
        "pool = Pool(2, stay)\n"
        "def late():\n"
        "    threading.main_thread().join()\n"
        "    print(pool.apply(pow, (2, 5)), flush=True)\n"
        "    pool.map_async(time.sleep, [1000] * 9)\n"
        "pool.imap(time.sleep, iter(int, 1))\n"
        "threading.Thread(target=late).start()\n".replace("PATH", repr(str(tmp_path / "workers")))
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(fiberexec.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program)], env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout == "32\n"
    eventually(lambda: deserted(tmp_path / "workers"))


def test_a_pool_does_not_travel(pool: Pool) -> None:
    with pytest.raises(NotImplementedError, match="cannot be passed between processes"):
        pickle.dumps(pool)


def test_a_forked_child_hears_that_the_pool_is_its_parents(pool: Pool) -> None:
    results = pool.imap(time.sleep, [LIMIT])
    heard: list[Any] = []
    waiting = pool.map_async(time.sleep, [LIMIT], error_callback=heard.append)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for call in (lambda: pool.apply(square, (1,)), lambda: waiting.get(LIMIT), lambda: results.next(LIMIT)):
                with pytest.raises(ForkedError):
                    call()
            pool.terminate()
            code = len(heard)
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_task_may_have_a_pool_of_its_own(pool: Pool) -> None:
    def work(n: int) -> list[int]:
        with Pool(2) as inner:
            return inner.map(square, range(n))

    assert pool.map(work, [2, 3]) == [[0, 1], [0, 1, 4]]


# -- workers


def test_an_initializer_runs_in_every_worker_before_its_first_item(log: Log) -> None:
    def begin(word: str) -> None:
        log.write(word)
        global begun
        begun = word  # type: ignore[name-defined]

    with Pool(2, begin, ["hello"]) as pool:
        assert pool.map(lambda _: begun, range(4)) == ["hello"] * 4  # type: ignore[name-defined]
        assert log.wait(2) == ["hello"] * 2


def test_an_initializer_runs_though_the_pool_gets_nothing_to_do(log: Log) -> None:
    pool = Pool(1, log.write, ("hello",))
    pool.close()
    pool.join()
    assert log.lines() == ["hello"]


def test_an_initializer_that_raises_breaks_the_pool_instead_of_starting_workers_for_ever() -> None:
    with Pool(2, divmod, (1, 0)) as pool:
        with pytest.raises(BrokenExecutor) as caught:
            pool.map(square, range(10))
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    pool = Pool(2, divmod, (1, 0))
    pool.close()
    pool.join()


def test_a_worker_is_replaced_after_maxtasksperchild_items(log: Log) -> None:
    def worker(_: int) -> tuple[str, int]:
        return platform.node(), os.getpid()

    with Pool(2, maxtasksperchild=5) as pool:
        workers = pool.map(worker, range(40)) + [pool.apply(worker, (0,)) for _ in range(10)]
        assert max(map(workers.count, workers)) <= 5
        assert len(pool._pool) == 2


def test_items_are_retried_as_the_policy_says(log: Log) -> None:
    def flaky(i: int) -> int:
        log.write(i)
        if log.lines().count(str(i)) < 3:
            raise ConnectionError(i)
        return i

    retry = tenacity.Retrying(stop=tenacity.stop_after_attempt(3), retry=tenacity.retry_if_exception_type(OSError))
    with Pool(2, retry=retry) as pool:
        assert pool.map(flaky, range(4)) == list(range(4))
        assert list(pool.imap(flaky, iter([4, 5]))) == [4, 5]
        assert pool.apply(flaky, (6,)) == 6
        with pytest.raises(ZeroDivisionError):
            pool.apply(divmod, (1, 0))
    assert len(log.lines()) == 21


def test_a_time_limit_stops_one_item_and_no_other() -> None:
    def nap(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    with Pool(2, timeout=3.0) as pool:
        results = pool.imap(nap, [0.0, LIMIT, 0.01])
        assert next(results) == 0.0
        with pytest.raises(TaskTimeout):
            next(results)
        assert list(results) == [0.01]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Registers a backend "elsewhere" whose idle workers cost something; returns the settings that its jobs are made with."""
    made: list[Any] = []

    class Elsewhere(FakeBackend):
        def __init__(self, settings: Any, max_workers: int | None) -> None:
            super().__init__(max_workers or 2, idle_timeout=60.0)
            made.append(settings)

    monkeypatch.setattr(registry, "_factory", lambda name: Elsewhere)
    return made


@pytest.mark.one_host("its backend is one that only this program has")
def test_meta_of_the_first_function_sizes_the_jobs_of_a_pool(elsewhere: list[Any]) -> None:
    @fiberexec.meta(cpu=1, memory=1024)
    def sized(x: int) -> int:
        return x

    with Pool(2, backend="elsewhere") as pool:
        assert len(pool._pool) == 2 and pool._pool[0].pid is None
        assert pool.map(sized, [1, 2]) == [1, 2]
        assert pool.map(square, [1, 2]) == [1, 4]
        assert (elsewhere[-1].cpu, elsewhere[-1].memory, elsewhere[-1].gpu) == (1.0, 1 << 30, None)
    count = len(elsewhere)
    with Pool(2, backend="elsewhere", cpu=1) as pool:
        assert pool.map(square, [1, 2]) == [1, 4]
        assert pool.map(sized, [1, 2]) == [1, 2]
        assert len(elsewhere) == count + 1 and elsewhere[-1].memory is None


@pytest.mark.one_host("it is about which backend is chosen")
def test_a_context_named_after_a_backend_chooses_it(elsewhere: list[Any]) -> None:
    from fiberexec.mp.context import FiberContext

    with Pool(1, context=FiberContext("elsewhere")) as pool:
        assert pool.apply(square, (2,)) == 4 and elsewhere[-1].backend == "elsewhere"
    with Pool(1, context=FiberContext("spawn")) as pool:
        assert elsewhere[-1].backend == "local"
    with Pool(1, context=multiprocessing.get_context("spawn")) as pool:
        assert elsewhere[-1].backend == "local"


def test_what_can_never_fit_is_refused_at_once(backend: str) -> None:
    @fiberexec.meta(cpu=10_000)
    def huge() -> None: ...

    made_to_measure = backend not in ("local", "agents")  # unless the pool's size is given
    with Pool(2, **({"cpu": 1} if made_to_measure else {})) as pool:
        for name in ("apply_async", "map", "imap"):
            with pytest.raises(ResourceError, match="10000"):
                getattr(pool, name)(huge, [])
