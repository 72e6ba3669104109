"""The contract of backends.base.Backend as checks that run: against this package's backends, and anybody's.

Half of them drive a backend by hand, as the manager does; the others run an executor on it, and look at what the backend
said meanwhile.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from _socket import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from fiberexec._errors import TaskTimeout, WorkerLost
from fiberexec.backends.base import Backend, Ended, Probed, Recalled, Refused, Started
from fiberexec.executor import FiberExecutor
from fiberexec.testing._recorder import PATIENCE, Recorder

Factory = Callable[[], Backend]


@contextmanager
def opened(factory: Factory) -> Iterator[Recorder]:
    """A fresh backend, closed at the end; what it said is verified."""
    recorder = Recorder(factory())
    try:
        yield recorder
        recorder.verify()
    finally:
        connections = [event.connection for event in recorder.said if isinstance(event, Started)]
        recorder.close()
        for connection in connections:
            connection.close()


@contextmanager
def executing(factory: Factory, workers: int, **options: Any) -> Iterator[tuple[FiberExecutor, Recorder]]:
    """An executor on a fresh backend, shut down at the end; what the backend said is verified."""
    recorder = Recorder(factory())
    with FiberExecutor(workers, backend=recorder, **options) as executor:
        yield executor, recorder
    recorder.verify()
    assert recorder.closed == 1, "the executor closes its backend once"


def wait_for_the_end(connection: socket) -> None:
    """Read what is there until the peer has closed the stream."""
    connection.settimeout(PATIENCE)
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        raise AssertionError(f"the stream of a worker that has gone was not closed in {PATIENCE:g} s") from None


# -- by hand


def says_what_it_is(factory: Factory) -> None:
    """The attributes are there, and make sense."""
    with opened(factory) as recorder:
        backend = recorder.backend
        assert isinstance(backend, Backend), "a member of the Protocol is missing"
        assert isinstance(backend.name, str) and backend.name and isinstance(backend.host, str)
        assert backend.default_workers >= 1
        assert backend.idle_timeout is None or backend.idle_timeout > 0
        assert len(backend.largest.devices) == backend.largest.capacity.gpu
        assert backend.poll() == [], "nothing was launched, so nothing has happened"


def starts_what_is_launched(factory: Factory) -> None:
    """Each launch is answered by one Started, with a process and a stream of its own."""
    with opened(factory) as recorder:
        recorder.launch([1])
        recorder.launch([2, 3])
        started = recorder.wait(Started, 3)
        assert sorted(event.worker for event in started) == [1, 2, 3]
        assert len({(event.host, event.pid) for event in started}) == 3
        assert len({event.connection.fileno() for event in started}) == 3
        for event in started:
            assert not os.get_inheritable(event.connection.fileno()), (
                "a program that the driver starts would inherit the stream"
            )


def reports_each_end_once(factory: Factory) -> None:
    """A worker that is killed is reported once, its stream ends, and the others go on."""
    with opened(factory) as recorder:
        recorder.launch([1, 2])
        started = {event.worker: event for event in recorder.wait(Started, 2)}
        recorder.signal(1, signal.SIGKILL, True)
        (ended,) = recorder.wait(Ended, 1)
        assert ended.worker == 1 and ended.running in (0, None), f"it executed nothing: {ended}"
        assert ended.exit.code in (-signal.SIGKILL, None) and not ended.exit.infrastructure, f"it was killed: {ended}"
        wait_for_the_end(started[1].connection)
        recorder.signal(1, signal.SIGKILL, True)  # it has gone: nothing happens
        recorder.probe(1)
        recorder.recall(1, 10)
        assert recorder.peek(1) is None, "the cell of a worker that has ended says nothing"
        recorder.signal(2, signal.SIGTERM, False)
        assert {event.worker for event in recorder.wait(Ended, 2)} == {1, 2}
        recorder.poll()
        assert sum(isinstance(event, Ended) for event in recorder.said) == 2


def ends_with_its_stream(factory: Factory) -> None:
    """A worker whose stream the driver closes ends by itself."""
    with opened(factory) as recorder:
        recorder.launch([1])
        (started,) = recorder.wait(Started, 1)
        started.connection.close()
        assert recorder.wait(Ended, 1)[0].worker == 1


def gives_a_launch_up(factory: Factory) -> None:
    """SIGKILL to a worker that may not have started ends it, or its launch."""
    with opened(factory) as recorder:
        recorder.launch([1, 2])
        recorder.signal(1, signal.SIGKILL, True)
        recorder.signal(2, signal.SIGKILL, True)
        deadline = time.monotonic() + PATIENCE
        while True:
            gone = {event.worker for event in recorder.said if isinstance(event, (Ended, Refused))}
            if gone == {1, 2}:
                return
            assert time.monotonic() < deadline, f"after SIGKILL, only {gone} have gone: {recorder.said}"
            select.select(recorder.fds(), [], [], 0.01)
            recorder.poll()


def answers_probe_and_recall(factory: Factory) -> None:
    """An idle worker's cell says that nothing runs; a recall of what it never had is answered too."""
    with opened(factory) as recorder:
        recorder.launch([7])
        recorder.wait(Started, 1)
        recorder.probe(7)
        (probed,) = recorder.wait(Probed, 1)
        assert (probed.worker, probed.cell.running, probed.cell.claimed) == (7, 0, 0)
        recorder.recall(7, 5)
        (recalled,) = recorder.wait(Recalled, 1)
        assert recalled == Recalled(7, 5, 0)


def knows_nothing_of_strangers(factory: Factory) -> None:
    """Workers that were never launched are no reason to fail, and nothing is said of them."""
    with opened(factory) as recorder:
        recorder.signal(99, signal.SIGTERM, False)
        recorder.probe(99)
        recorder.recall(99, 1)
        assert recorder.peek(99) is None
        assert recorder.poll() == []


def leaves_nothing(factory: Factory) -> None:
    """close() ends what runs and what starts, at any moment, and may be called again."""
    for moment in ("before anything", "while workers start", "while workers run"):
        recorder = Recorder(factory())
        if moment != "before anything":
            recorder.launch([1, 2])
        if moment == "while workers run":
            recorder.wait(Started, 2)
        recorder.close()
        started = [event for event in recorder.said if isinstance(event, Started)]
        for event in started:
            wait_for_the_end(event.connection)
            event.connection.close()
        if recorder.name in ("local", "fake"):
            left = [event.pid for event in started if is_alive(event.pid)]
            assert not left, f"closed {moment}: processes {left} are left"
        assert not recorder.fds(), f"closed {moment}: there are descriptors to watch"
        recorder.close()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# -- through an executor


def double(number: int) -> int:
    return 2 * number


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def crash_at(number: int, fatal: int) -> int:
    if number == fatal:
        print("these are my last words", file=sys.stderr, flush=True)
        os._exit(33)
    return number


def hang(_: object) -> NoReturn:
    while True:
        time.sleep(60)


def nap_at(number: int, slow: int, seconds: float) -> int:
    if number == slow:
        time.sleep(seconds)
    return number


def runs_tasks(factory: Factory) -> None:
    """Results come back, in order, from several workers."""
    with executing(factory, 2) as (executor, recorder):
        assert executor.submit(double, 21).result(PATIENCE) == 42
        assert list(executor.map(double, range(2000), timeout=PATIENCE)) == list(range(0, 4000, 2))
    started = {event.worker for event in recorder.said if isinstance(event, Started)}
    ended = [event for event in recorder.said if isinstance(event, Ended)]
    assert {event.worker for event in ended} == started, "every worker's end was reported before the executor was done"
    codes = [event.exit.code for event in ended if event.exit.code != -signal.SIGKILL]
    assert all(code in (0, None) for code in codes), f"workers that were let go end in order: {ended}"


def says_what_was_executing(factory: Factory) -> None:
    """Of a worker that dies in a batch, exactly the item that did it is blamed, with what is known of the end."""
    with executing(factory, 1, max_worker_losses=1) as (executor, recorder):
        futures = [executor.submit(crash_at, number, 150) for number in range(300)]
        outcomes = [future.exception(PATIENCE) for future in futures]
        lost = [number for number, outcome in enumerate(outcomes) if outcome is not None]
        assert lost == [150], f"items {lost} failed, only 150 should"
        error = outcomes[150]
        assert isinstance(error, WorkerLost), repr(error)
        assert error.exitcode in (33, None), f"the exit code was 33: {error}"
        assert "these are my last words" in error.log, f"the log's end is part of the report: {error}"
    assert any(isinstance(event, Ended) and event.running for event in recorder.said)


def keeps_time_limits(factory: Factory) -> None:
    """A task that hangs ends at its limit, and its worker with it; what follows runs."""
    with executing(factory, 1) as (executor, recorder):
        executor.submit(double, 1).result(PATIENCE)
        start = time.monotonic()
        error = executor.options(timeout=0.5).submit(hang, None).exception(PATIENCE)
        assert isinstance(error, TaskTimeout), repr(error)
        assert 0.5 <= time.monotonic() - start < 0.5 + PATIENCE / 2
        assert executor.submit(double, 2).result(PATIENCE) == 4
    assert any(isinstance(event, Probed) and event.cell.running for event in recorder.said)


def takes_work_back(factory: Factory) -> None:
    """What waits behind a slow item is taken back and runs elsewhere meanwhile, once."""
    with executing(factory, 2, min_workers=2) as (executor, _):
        for number in range(50):
            executor.submit(nap_at, number, -1, 0.0).result(PATIENCE)
        futures = [executor.submit(nap_at, number, 40, 3.0) for number in range(80)]
        assert [future.result(PATIENCE) for number, future in enumerate(futures) if number != 40] == [
            number for number in range(80) if number != 40
        ]
        assert not futures[40].done(), "the others had to wait for the slow one"
        futures[40].result(PATIENCE)


def stops_a_running_task(factory: Factory) -> None:
    """future.terminate() ends a task that runs, within the grace."""
    with executing(factory, 1) as (executor, _):
        future = executor.submit(hang, None)
        deadline = time.monotonic() + PATIENCE
        while not any(worker.task for worker in executor.workers()):
            assert time.monotonic() < deadline, "workers() never names the task that runs"
            time.sleep(0.01)
        assert future.terminate()
        while not future.done():
            assert time.monotonic() < deadline, "a terminated task did not end"
            time.sleep(0.01)
        assert future.cancelled()


CHECKS = (
    says_what_it_is,
    starts_what_is_launched,
    reports_each_end_once,
    ends_with_its_stream,
    gives_a_launch_up,
    answers_probe_and_recall,
    knows_nothing_of_strangers,
    leaves_nothing,
    runs_tasks,
    says_what_was_executing,
    keeps_time_limits,
    takes_work_back,
    stops_a_running_task,
)
BACKEND_CHECKS: dict[str, Callable[[Factory], None]] = {check.__name__: check for check in CHECKS}


def check_backend(factory: Factory) -> None:
    """Check that a backend keeps the contract of ``backends.base.Backend``.

    ``factory`` makes a fresh backend at each call, with room for 3 workers. Raises AssertionError, naming the check, for
    the first promise that is broken. It takes some seconds where workers start in milliseconds. To have every check as a
    test of its own:

        @pytest.mark.parametrize("check", BACKEND_CHECKS.values(), ids=BACKEND_CHECKS)
        def test_my_backend(check): check(MyBackend)
    """
    for name, check in BACKEND_CHECKS.items():
        try:
            check(factory)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
