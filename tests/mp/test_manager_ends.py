"""Managers go, and what their callers hear."""

from __future__ import annotations

import concurrent.futures
import pickle
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from fiberexec import mp
from fiberexec.mp.managers import (
    AsyncManager,
    BaseManager,
    ManagerLost,
    RemoteError,
    SharedMemoryManager,
    SyncManager,
)
from fiberexec.mp.shared_memory import SharedMemory

from .counters import Counters, kill, start
from .helpers import LIMIT, in_thread

# A manager goes.


def test_a_call_that_waits_hears_that_the_manager_was_killed() -> None:
    manager = start(Counters())
    counter = manager.Counter()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(counter.wait)
        counter.add(1)
        kill(manager)
        assert isinstance(waiting.exception(LIMIT), ManagerLost)
    manager.shutdown()


def test_every_use_of_a_manager_that_has_gone_says_so() -> None:
    manager = start(SyncManager())
    shared = manager.dict(a=1)
    kill(manager)
    manager._process.join()
    for use in [lambda: shared["a"], manager.list, manager.dict, lambda: pickle.loads(pickle.dumps(shared))]:
        with pytest.raises(ManagerLost, match="start another one"):
            use()
    assert "failed" in str(shared)
    manager.shutdown()


def test_a_call_that_a_server_which_ends_does_not_take_has_no_reply() -> None:
    manager = start(Counters())
    counter = manager.Counter()
    counter.end()
    with pytest.raises(ManagerLost):
        counter.add(1)
    manager.shutdown()


class Ends:
    def __init__(self, reason: type[BaseException] | None = None) -> None:
        if reason is not None:
            raise reason("made")

    def end(self, reason: type[BaseException]) -> None:
        raise reason("called")

    def count(self) -> int:
        return 1


@pytest.mark.parametrize("reason", [SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("kind", [BaseManager, AsyncManager])
def test_a_method_that_would_end_its_thread_is_an_error_and_the_proxy_goes_on(
    kind: type[BaseManager], reason: type[BaseException], capfd: pytest.CaptureFixture[str]
) -> None:
    class Manager(kind):  # type: ignore[misc,valid-type]
        pass

    Manager.register("Ends", Ends)
    Manager.register("exit", lambda: sys, exposed=["exit"])

    def outcome(of: Any) -> Any:
        return of.result(LIMIT) if kind is AsyncManager else of

    with Manager() as manager:
        ends = manager.Ends()
        with pytest.raises(RemoteError, match=f"{reason.__name__}: called"):
            outcome(ends.end(reason))
        with pytest.raises(RemoteError, match=rf"{reason.__name__}\('made'\)"):
            manager.Ends(reason)
        with pytest.raises(RemoteError, match="SystemExit: 3"):
            outcome(manager.exit().exit(3))
        assert outcome(ends.count()) == 1
        assert outcome(manager.Ends().count()) == 1
    manager.join()
    assert capfd.readouterr().err == ""


def test_what_a_method_raises_is_its_own() -> None:
    with Counters() as manager, pytest.raises(ConnectionResetError, match="not the manager's") as caught:
        manager.Counter().fail()  # type: ignore[attr-defined]
    assert not isinstance(caught.value, ManagerLost)


@pytest.mark.parametrize("padding", [0, 1 << 20])
@pytest.mark.parametrize("kind", [OSError, EOFError, ValueError, SystemExit])
def test_what_unpickling_a_result_raises_is_its_own_and_costs_no_connection(kind: type[BaseException], padding: int) -> None:
    with Counters() as manager:
        counter, lock = manager.Counter(), manager.RLock()  # type: ignore[attr-defined]
        with lock:  # it belongs to who speaks by this connection
            with pytest.raises(kind, match="of unpickling") as caught:
                counter.broken(kind, padding)
            assert not isinstance(caught.value, ManagerLost)
            assert counter.add(1) == 1
            refused: list[bool] = []
            in_thread(lambda: refused.append(lock.acquire(False))).join()
            assert refused == [False]


def test_a_manager_whose_initializer_fails_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    manager = Counters()
    with pytest.raises(ManagerLost, match="exit code 1"):
        manager.start(lambda: 1 / 0)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_what_an_argument_raises_is_its_own(manager: SyncManager) -> None:
    class Bad:
        def __reduce__(self) -> Any:
            raise OSError("not the manager's")

    shared = manager.list()
    with pytest.raises(OSError, match="not the manager's") as caught:
        shared.append(Bad())
    assert not isinstance(caught.value, ManagerLost)
    assert len(shared) == 0


def test_an_interrupted_start_leaves_no_process(tmp_path: Path) -> None:
    def initialize() -> None:
        (tmp_path / "begun").touch()
        signal.pause()

    def interrupt(*_: object) -> None:
        if (tmp_path / "begun").exists():
            signal.setitimer(signal.ITIMER_REAL, 0)  # one Ctrl-C
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        with pytest.raises(KeyboardInterrupt):
            Counters().start(initialize)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert mp.active_children() == []


def test_an_interrupted_call_leaves_no_reply_for_the_next(manager: SyncManager) -> None:
    event, shared = manager.Event(), manager.list([1, 2, 3])
    assert event.is_set() is False

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            event.wait()
        event.set()
        assert len(shared) == 3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_manager_goes_with_the_process_that_started_it() -> None:
    def work(conn: Any) -> None:
        manager = Counters()
        manager.start()
        conn.send(manager.Counter())  # type: ignore[attr-defined]
        threading.Event().wait()

    here, there = mp.Pipe()
    process = mp.Process(target=work, args=(there,))
    process.start()
    counter = here.recv()
    assert counter.add(2) == 2
    process.kill()
    process.join()
    with pytest.raises(ManagerLost):
        while True:
            counter.add(1)
    here.close()
    there.close()


def test_a_manager_is_started_once() -> None:
    manager = start(Counters())
    with pytest.raises(mp.ProcessError, match="Already started"):
        manager.start()
    manager.shutdown()
    with pytest.raises(mp.ProcessError, match="shut down"):
        manager.start()


@pytest.mark.leaks("multiprocessing's resource tracker stays")
def test_shared_memory_goes_with_its_manager() -> None:
    with SharedMemoryManager() as manager:
        block = manager.SharedMemory(10)
        values = manager.ShareableList([1, 2])
        assert (block.size, values[1]) == (10, 2)
        block.close()
        values.shm.close()
    with pytest.raises(FileNotFoundError):
        type(block)(block.name)


@pytest.mark.leaks("multiprocessing's resource tracker stays")
def test_a_block_that_no_manager_can_take_is_not_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    unlink = SharedMemory.unlink

    def noted(block: SharedMemory) -> None:
        made.append(block.name)
        unlink(block)

    monkeypatch.setattr(SharedMemory, "unlink", noted)
    manager = start(SharedMemoryManager())
    kill(manager)
    manager._process.join()
    for make in (lambda: manager.SharedMemory(10), lambda: manager.ShareableList([1])):
        with pytest.raises(ManagerLost, match="start another one"):
            make()
    assert len(made) == 2
    for name in made:
        with pytest.raises(FileNotFoundError):
            SharedMemory(name)
    manager.shutdown()


def test_a_manager_that_is_killed_leaves_no_folder_behind() -> None:
    folder = Path(tempfile.gettempdir())
    before = set(folder.glob("pymp-*"))
    manager = mp.Manager()
    assert manager.list([1])[:] == [1]
    kill(manager)
    manager._process.join()
    assert set(folder.glob("pymp-*")) == before
