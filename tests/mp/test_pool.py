"""fiberexec.mp.pool: what multiprocessing's Pool promises, and what the executor under it adds."""

from __future__ import annotations

import concurrent.futures
import gc
import multiprocessing
import multiprocessing.pool
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tenacity

import fiberexec
from fiberexec import BrokenExecutor, ForkedError, ResourceError, TaskTimeout, WorkerLost, mp
from fiberexec.backends import registry
from fiberexec.mp.pool import AsyncResult, IMapIterator, IMapUnorderedIterator, MapResult, MaybeEncodingError, Pool
from fiberexec.testing import FakeBackend

LIMIT = 30.0  # seconds after which a test that waits gives up


def until(fact: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + LIMIT
    while not (found := fact()):
        assert time.monotonic() < deadline, "it did not become so"
        time.sleep(0.002)
    return found


class Log:
    """Lines in a file, in the order in which processes have written them."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.write()

    def write(self, *lines: object) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for line in lines:
            os.write(fd, f"{line}\n".encode())
        os.close(fd)

    def lines(self) -> list[str]:
        return Path(self.path).read_text().split("\n")[:-1]

    def wait(self, count: int) -> list[str]:
        return list(until(lambda: len(lines := self.lines()) >= count and lines))


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "log")


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(2) as pool:
        yield pool


def square(x: int) -> int:
    return x * x


def add(x: int, y: int = 10) -> int:
    return x + y


# -- calls and their results


def test_apply_takes_arguments_by_position_and_by_name(pool: Pool) -> None:
    assert pool.apply(add, (1,)) == 11
    assert pool.apply(add, [1], {"y": 2}) == 3
    assert pool.apply(lambda: os.getpid()) != os.getpid()


def test_maps_give_what_the_builtin_gives_for_any_iterable_and_chunksize(pool: Pool) -> None:
    expected = list(map(square, range(100)))
    for chunksize in (1, 7, 1000):
        assert pool.map(square, range(100), chunksize) == expected
        assert pool.map(square, iter(range(100)), chunksize) == expected
        assert list(pool.imap(square, range(100), chunksize)) == expected
        assert list(pool.imap(square, iter(range(100)), chunksize)) == expected
        assert sorted(pool.imap_unordered(square, {*range(100)}, chunksize)) == expected
    assert pool.map_async(square, range(100)).get(LIMIT) == expected
    assert pool.map(str, {"a": 1, "b": 2}) == ["a", "b"]


def test_starmap_takes_all_arguments_from_each_item(pool: Pool) -> None:
    assert pool.starmap(add, [(1, 2), (3,), [4, 5]]) == [3, 13, 9]
    assert pool.starmap(add, zip(range(50), range(50)), 3) == list(range(0, 100, 2))
    assert pool.starmap_async(lambda: 7, [()] * 3).get(LIMIT) == [7] * 3
    assert pool.starmap(lambda *given: given, [(object, [1]), (None,)]) == [(object, [1]), (None,)]


def test_nothing_comes_of_nothing(pool: Pool) -> None:
    assert pool.map(square, []) == [] == pool.starmap(add, [])
    assert list(pool.imap(square, [])) == [] == list(pool.imap_unordered(square, iter(())))
    heard: list[Any] = []
    result = pool.map_async(square, [], callback=heard.append)
    assert result.ready() and result.successful() and result.get() == [] and heard == [[]]


def test_many_items_come_back_in_order(pool: Pool) -> None:
    assert pool.map(square, range(100_000)) == list(map(square, range(100_000)))


def test_results_are_of_multiprocessings_kinds(pool: Pool) -> None:
    assert isinstance(pool, multiprocessing.pool.Pool)
    assert isinstance(pool.apply_async(square, (1,)), AsyncResult)
    assert isinstance(pool.map_async(square, [1]), MapResult) and issubclass(MapResult, AsyncResult)
    assert isinstance(pool.imap(square, [1]), IMapIterator)
    assert isinstance(pool.imap_unordered(square, [1]), IMapUnorderedIterator)


def test_a_result_says_when_it_is_ready_and_how_it_ended(pool: Pool, log: Log) -> None:
    def wait() -> None:
        log.wait(1)

    result = pool.apply_async(wait)
    assert not result.ready()
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(0.01)
    log.write("go")
    result.wait(LIMIT)
    assert result.ready() and result.successful() and result.get() is None
    failed = pool.apply_async(divmod, (1, 0))
    failed.wait(LIMIT)
    assert failed.ready() and not failed.successful()


def test_exceptions_arrive_with_the_traceback_of_the_worker(pool: Pool) -> None:
    def fail() -> None:
        raise KeyError("what")  # a line to be found

    with pytest.raises(KeyError, match="what") as caught:
        pool.apply(fail)
    assert "a line to be found" in str(caught.value.__cause__)


def test_a_map_whose_item_raises_raises_when_all_items_are_done(pool: Pool, log: Log) -> None:
    def run(i: int) -> None:
        if i == 0:
            raise ValueError(i)
        log.write(i)

    result = pool.map_async(run, range(20))
    with pytest.raises(ValueError, match="0"):
        result.get(LIMIT)
    assert sorted(map(int, log.lines())) == list(range(1, 20))


def test_what_arguments_raise_while_they_are_pickled_is_raised(pool: Pool) -> None:
    class Stubborn:
        def __reduce__(self) -> Any:
            raise RuntimeError("not me")

    for name in ("apply", "map", "imap"):
        with pytest.raises(RuntimeError, match="not me"):
            list(getattr(pool, name)(square, [Stubborn()]))
    with pytest.raises(pickle.PicklingError, match="lock"):
        pool.map(id, [threading.Lock()])


def test_a_result_that_cannot_be_sent_is_multiprocessings_error_and_says_why(pool: Pool) -> None:
    for kind in (MaybeEncodingError, multiprocessing.pool.MaybeEncodingError, fiberexec.PicklingError):  # type: ignore[attr-defined]
        with pytest.raises(kind, match="lock"):
            pool.apply(threading.Lock)


def test_what_an_iterable_raises_is_raised_after_the_results_before_it(pool: Pool) -> None:
    def numbers() -> Iterator[int]:
        yield from range(3)
        raise LookupError("that was all")

    with pytest.raises(LookupError):
        pool.map(square, numbers())
    for name in ("imap", "imap_unordered"):
        results = getattr(pool, name)(square, numbers())
        assert sorted([next(results), next(results), next(results)]) == [0, 1, 4]
        with pytest.raises(LookupError):
            next(results)
        with pytest.raises(StopIteration):
            next(results)


def test_one_item_that_raises_costs_imap_no_other_result(pool: Pool) -> None:
    results = pool.imap(lambda x: 12 // x, [3, 0, 4], 3)
    assert next(results) == 4
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == [3]


def test_arguments_of_the_wrong_kind_are_refused(pool: Pool) -> None:
    for name in ("apply", "map", "imap", "starmap"):
        with pytest.raises(TypeError, match="callable"):
            getattr(pool, name)(3, [])
    for name in ("map", "imap", "imap_unordered", "starmap_async"):
        with pytest.raises(ValueError, match="Chunksize"):
            getattr(pool, name)(square, [], 0)


# -- callbacks


def test_a_callback_has_run_when_its_result_is_ready(pool: Pool) -> None:
    heard: list[Any] = []
    assert pool.apply_async(square, (3,), {}, heard.append, heard.append).get(LIMIT) == 9 == heard.pop()
    with pytest.raises(ZeroDivisionError):
        pool.apply_async(divmod, (1, 0), {}, heard.append, heard.append).get(LIMIT)
    assert type(heard.pop()) is ZeroDivisionError
    assert pool.map_async(square, [1, 2], None, heard.append).get(LIMIT) == [1, 4] == heard.pop()
    pool.starmap_async(divmod, [(1, 1), (1, 0)], error_callback=heard.append).wait(LIMIT)
    assert type(heard.pop()) is ZeroDivisionError and not heard


def test_a_callback_that_raises_harms_nobody(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    def bad(value: int) -> None:
        raise (SystemExit if value else RuntimeError)(f"in the callback of {value}")

    for value in (0, 1):
        assert pool.apply_async(square, (value,), callback=bad).get(LIMIT) == value
        assert f"in the callback of {value}" in caplog.text
    assert pool.apply(square, (4,)) == 16


def test_a_callback_may_give_the_pool_more_to_do(pool: Pool) -> None:
    more: list[Any] = []
    pool.apply_async(square, (3,), callback=lambda value: more.append(pool.apply_async(square, (value,)))).wait(LIMIT)
    assert more[0].get(LIMIT) == 81


# -- imap's feeding


def test_imap_takes_each_item_only_when_the_one_before_is_on_its_way(pool: Pool) -> None:
    """An iterable may wait for the results of what it gave before."""
    arrived: list[int] = []
    heard = threading.Event()

    def numbers() -> Iterator[int]:
        yield 2
        assert heard.wait(LIMIT)
        yield arrived[-1]

    results = pool.imap(square, numbers())
    arrived.append(results.next(LIMIT))
    heard.set()
    assert results.next(LIMIT) == 16
    with pytest.raises(StopIteration):
        results.next(LIMIT)


@pytest.mark.parametrize("size", [1, 1 << 18])
def test_imap_takes_no_more_from_an_endless_iterable_than_the_workers_need(pool: Pool, log: Log, size: int) -> None:
    def wait(data: bytes) -> int:
        log.wait(1)
        return len(data)

    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield bytes(size)

    results = pool.imap(wait, endless())
    most = 65536 if size == 1 else 64
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(0.5)
    assert 8 <= taken <= most + 1
    log.write("go")
    assert [results.next(LIMIT) for _ in range(100)] == [size] * 100


def test_what_imap_was_given_is_done_though_nobody_takes_the_results(log: Log) -> None:
    pool = Pool(2)
    pool.imap_unordered(log.write, iter(range(100)))
    pool.close()
    pool.join()
    assert sorted(map(int, log.lines())) == list(range(100))


def test_workers_go_when_a_closed_pool_has_done_everything_though_nobody_joins_it(log: Log) -> None:
    pool = Pool(2)
    results = pool.imap(square, (i for i in range(3) if log.wait(1)))
    pool.close()
    assert len(pool._executor.workers()) == 2
    log.write("go")
    until(lambda: not pool._executor.workers())
    assert list(results) == [0, 1, 4]


def test_imap_says_when_a_result_takes_too_long(pool: Pool, log: Log) -> None:
    results = pool.imap(lambda _: len(log.wait(1)), [0])
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(timeout=0.01)
    log.write("go")
    assert results.next(LIMIT) == 1


def test_several_threads_may_share_an_iterator(pool: Pool) -> None:
    results = pool.imap(square, iter(range(1000)))
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.extend(results)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert sorted(found) == list(map(square, range(1000)))


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
    with Pool(3) as pool:
        assert pool.size == pool._processes == len(pool._pool) == 3
        pids = {member.pid for member in pool._pool}
        assert len(pids) == 3 and None not in pids and os.getpid() not in pids
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
        "import os, threading, time\n"
        "from fiberexec.mp.pool import Pool\n"
        "pool = Pool(2)\n"
        "def late():\n"
        "    threading.main_thread().join()\n"
        "    print(pool.apply(pow, (2, 5)), [m.pid for m in pool._pool], flush=True)\n"
        "    pool.map_async(time.sleep, [1000] * 9)\n"
        "pool.imap(time.sleep, iter(int, 1))\n"
        "threading.Thread(target=late).start()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(fiberexec.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program)], env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    value, _, pids = done.stdout.partition(" ")
    assert value == "32"
    for pid in pids.strip(" []\n").split(", "):
        until(lambda pid=pid: not os.path.exists(f"/proc/{pid}"))  # type: ignore[misc]


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
    def pid(_: int) -> int:
        return os.getpid()

    with Pool(2, maxtasksperchild=5) as pool:
        pids = pool.map(pid, range(40)) + [pool.apply(pid, (0,)) for _ in range(10)]
        assert max(map(pids.count, pids)) <= 5
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


def test_a_context_named_after_a_backend_chooses_it(elsewhere: list[Any]) -> None:
    from fiberexec.mp.context import FiberContext

    with Pool(1, context=FiberContext("elsewhere")) as pool:
        assert pool.apply(square, (2,)) == 4 and elsewhere[-1].backend == "elsewhere"
    with Pool(1, context=FiberContext("spawn")) as pool:
        assert elsewhere[-1].backend == "local"
    with Pool(1, context=multiprocessing.get_context("spawn")) as pool:
        assert elsewhere[-1].backend == "local"


def test_what_can_never_fit_is_refused_at_once(pool: Pool) -> None:
    @fiberexec.meta(cpu=10_000)
    def huge() -> None: ...

    for name in ("apply_async", "map", "imap"):
        with pytest.raises(ResourceError, match="10000"):
            getattr(pool, name)(huge, [])


# -- faults


@pytest.mark.parametrize("kind", ["map", "imap", "imap_unordered", "apply_async"])
def test_a_worker_that_is_killed_costs_its_item_another_run_and_no_other_item(pool: Pool, log: Log, kind: str) -> None:
    def run(i: int) -> int:
        log.write(i)
        if i == 50 and log.lines().count("50") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return i

    if kind == "apply_async":
        found = [result.get(LIMIT) for result in [pool.apply_async(run, (i,)) for i in range(100)]]
    else:
        found = list(getattr(pool, kind)(run, range(100)))
    assert sorted(found) == list(range(100))
    runs = log.lines()
    assert runs.count("50") == 2
    assert max(map(runs.count, runs)) == 2  # what had not left the worker is run again, once


def test_an_item_that_kills_every_worker_is_the_only_one_that_fails(pool: Pool) -> None:
    def run(i: int) -> int:
        if i == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return i

    results = pool.imap(run, range(10))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(WorkerLost):
        next(results)
    assert list(results) == list(range(4, 10))
    with pytest.raises(WorkerLost):
        pool.map(run, range(10))
    assert pool.map(square, range(3)) == [0, 1, 4]


def test_no_item_runs_again_after_its_result_has_arrived_whoever_is_killed(log: Log) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)

    def run(i: int) -> int:
        log.write(i)
        time.sleep(0.001)
        return i

    with Pool(3, max_worker_losses=100) as pool:
        arrived = []
        for i in pool.imap_unordered(run, range(600)):
            log.write(f"done {i}")
            arrived.append(i)
            if len(arrived) % 40 == 0:
                os.kill(chance.choice([member.pid for member in pool._pool if member.pid]), signal.SIGKILL)
    assert sorted(arrived) == list(range(600))
    done: set[str] = set()
    for line in log.lines():
        word, _, item = line.rpartition(" ")
        assert item not in done, f"{line} after its result"
        if word:
            done.add(item)


def test_all_workers_killed_at_once_while_they_hold_items(pool: Pool, log: Log) -> None:
    def run(i: int) -> int:
        log.write(i)
        if len(log.lines()) <= 2:
            time.sleep(LIMIT)
        return i

    result = pool.map_async(run, range(50))
    log.wait(2)
    for member in pool._pool:
        assert member.pid
        os.kill(member.pid, signal.SIGKILL)
    assert result.get(LIMIT) == list(range(50))


def make() -> Any:
    queue, array = mp.Queue(), mp.Array("i", [1, 2])
    queue.put("from a worker")
    return queue, array


def take(queue: Any) -> Any:
    return queue.get(timeout=30)


def test_what_a_task_makes_to_share_outlives_its_worker() -> None:
    with Pool(1, maxtasksperchild=1) as pool:
        queue, array = pool.apply(make)
        assert array[:] == [1, 2]
        assert pool.apply(take, (queue,)) == "from a worker"
