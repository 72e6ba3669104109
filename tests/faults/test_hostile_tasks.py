"""Tasks that do to their own process what no task should."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest

import fiberexec
from fiberexec import FiberExecutor, TaskTimeout, WorkerLost

Until = Callable[..., bool]

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
def ex() -> Iterator[FiberExecutor]:
    with FiberExecutor(1) as executor:
        yield executor
        assert executor.submit(pow, 3, 4).result(30) == 81, "the executor does not go on"


def attempt() -> tuple[int, int]:
    task = fiberexec.current_task()
    return os.getpid(), task.attempt


# -- descriptors, sessions, signals, forks, threads


def close_everything() -> None:
    os.closerange(0, 4096)


def test_a_task_that_closes_all_descriptors_is_charged_and_fails_alone(ex: FiberExecutor) -> None:
    with pytest.raises(WorkerLost):
        ex.submit(close_everything).result(30)
    assert ex.submit(attempt).result(30)[1] == 1


def close_the_standard_streams() -> str:
    for fd in (0, 1, 2):
        os.close(fd)
    sys.stdout.close()
    return "done"


def test_a_task_may_close_the_standard_streams(ex: FiberExecutor) -> None:
    assert ex.submit(close_the_standard_streams).result(30) == "done"


def new_session() -> int:
    try:
        os.setsid()
    except PermissionError:
        pass  # it leads its session already
    return os.getpid()


def test_setsid_in_a_task_changes_nothing(ex: FiberExecutor) -> None:
    pid = ex.submit(new_session).result(30)
    assert ex.submit(os.getpid).result(30) == pid


def deaf(seconds: float) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(seconds)


def test_a_task_that_ignores_sigterm_is_killed_after_the_grace(ex: FiberExecutor) -> None:
    with pytest.raises(TaskTimeout):
        ex.options(timeout=0.2).submit(deaf, 600).result(30)


def test_shutdown_does_not_wait_for_a_signal_handler_that_a_task_left_behind() -> None:
    ex = FiberExecutor(1)
    ex.submit(deaf, 0).result(30)
    ex.shutdown()


def hold_the_gil() -> None:
    import ctypes

    ctypes.PyDLL(None).sleep(600)  # PyDLL keeps the GIL, so no Python signal handler runs


def test_a_task_that_holds_the_gil_past_its_timeout_is_killed_after_the_grace(ex: FiberExecutor) -> None:
    began = time.monotonic()
    with pytest.raises(TaskTimeout):
        ex.options(timeout=0.2).submit(hold_the_gil).result(30)
    assert time.monotonic() - began < 10


def swallow() -> None:
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass


def test_a_task_that_swallows_what_stops_it_is_killed_after_the_grace(ex: FiberExecutor) -> None:
    with pytest.raises(TaskTimeout):
        ex.options(timeout=0.2).submit(swallow).result(30)


def fork_and_return() -> int:
    """The child returns as well: it is a second worker as far as it knows."""
    os.fork()
    return os.getpid()


@linux
def test_a_task_that_forks_and_lets_the_child_return_has_one_outcome(ex: FiberExecutor) -> None:
    """The child writes to the same stream; whatever comes of it, the future is done and the next task is right."""
    error = ex.submit(fork_and_return).exception(30)
    assert error is None or isinstance(error, WorkerLost)
    for number in range(20):
        assert ex.submit(abs, -number).result(30) == number


def fork_a_child_that_exits() -> str:
    pid = os.fork()
    if pid == 0:
        sys.exit(0)
    os.waitpid(pid, 0)
    return "parent"


def test_a_task_whose_forked_child_calls_sys_exit_has_one_outcome(ex: FiberExecutor) -> None:
    error = ex.submit(fork_a_child_that_exits).exception(30)
    assert error is None or isinstance(error, WorkerLost)
    for number in range(20):
        assert ex.submit(abs, -number).result(30) == number


def fork_a_child_that_leaves() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_a_task_may_fork(ex: FiberExecutor) -> None:
    assert ex.submit(fork_a_child_that_leaves).result(30) == 0


def fork_children_and_terminate_them() -> list[int]:
    ends = []
    for _ in range(100):
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
        os.kill(pid, signal.SIGTERM)  # it may not have begun yet
        ends.append(os.waitpid(pid, 0)[1])
    return ends


def test_sigterm_ends_a_child_of_a_task_at_any_moment(ex: FiberExecutor) -> None:
    assert ex.submit(fork_children_and_terminate_them).result(30) == [signal.SIGTERM] * 100


def fork_without_end(folder: str) -> None:
    try:
        while True:
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
            Path(folder, "forked").touch()
    finally:
        Path(folder, "cleaned up").touch()


def test_a_task_that_forks_is_stopped_at_any_moment(ex: FiberExecutor, until: Until, tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        future = ex.submit(fork_without_end, str(folder))
        assert until((folder / "forked").exists)
        future.terminate()
        wait([future], 30)
        assert future.cancelled() and (folder / "cleaned up").exists()


def use_multiprocessing() -> list[int]:
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(abs, [-1, -2, -3])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_task_may_use_multiprocessing(ex: FiberExecutor) -> None:
    assert ex.submit(use_multiprocessing).result(30) == [1, 2, 3]


def log_from_threads(threads: int, lines: int) -> int:
    logger = logging.getLogger("of.a.task")

    def talk(number: int) -> None:
        for line in range(lines):
            logger.warning("%d:%d", number, line)

    started = [threading.Thread(target=talk, args=(number,)) for number in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return threads * lines


def test_every_line_that_threads_of_a_task_log_arrives(ex: FiberExecutor, caplog: pytest.LogCaptureFixture) -> None:
    assert ex.submit(log_from_threads, 8, 100).result(30) == 800
    ex.submit(abs, 0).result(30)
    seen = [record.getMessage().rsplit(" ")[-1] for record in caplog.records if record.name == "of.a.task"]
    assert sorted(seen) == sorted(f"{number}:{line}" for number in range(8) for line in range(100))


def leave_a_thread_that_logs() -> None:
    def talk() -> None:
        logger = logging.getLogger("of.a.thread")
        while True:
            logger.warning("still here")
            time.sleep(0.001)

    threading.Thread(target=talk, daemon=True).start()


def test_a_thread_that_goes_on_logging_disturbs_no_later_task(
    ex: FiberExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    ex.submit(leave_a_thread_that_logs).result(30)
    for number in range(300):
        assert ex.submit(abs, -number).result(30) == number
    assert list(ex.map(abs, range(-5000, 0))) == list(range(5000, 0, -1))


def leave_a_thread_that_stays() -> None:
    threading.Thread(target=time.sleep, args=(600,)).start()


def test_a_thread_that_never_ends_does_not_keep_shutdown_from_ending() -> None:
    ex = FiberExecutor(1)
    ex.submit(leave_a_thread_that_stays).result(30)
    began = time.monotonic()
    ex.shutdown()
    assert time.monotonic() - began < 15


def jump_into_nowhere() -> None:
    import ctypes

    ctypes.CFUNCTYPE(None)(0x10)()


def test_a_jump_into_nowhere_is_a_lost_worker(ex: FiberExecutor) -> None:
    error = ex.submit(jump_into_nowhere).exception(30)
    assert isinstance(error, WorkerLost)
    assert error.exitcode == -signal.SIGSEGV


def eat() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
    hoard = []
    while True:
        hoard.append(bytearray(1 << 24))


def test_running_out_of_memory_in_a_task_is_its_own_exception(ex: FiberExecutor) -> None:
    with pytest.raises(MemoryError):
        ex.submit(eat).result(30)


# -- the task's own channel


def scribble(data: bytes) -> None:
    from fiberexec import _worker

    os.write(_worker.current._stream.fileno(), data)


@pytest.mark.parametrize(
    "data",
    [b"\0", b"x" * 100, b"FX\x01" + b"\xff" * 40, b"GET / HTTP/1.1\r\n\r\n"],
    ids=["one byte", "text", "a header", "http"],
)
def test_a_task_that_writes_on_the_workers_stream_fails_alone(ex: FiberExecutor, data: bytes) -> None:
    """Where it cannot be told from damage on the way, its worker is ended, and nobody else is harmed."""
    error = ex.submit(scribble, data).exception(30)
    assert isinstance(error, WorkerLost)


FRAMES = {
    "unknown kind": (99, ("anything",)),
    "results that are none": (11, 7),
    "results of the wrong shape": (11, [(1, 2)]),
    "results of another task": (11, [(10**6, 1, 0, b"", 0, 0.0)]),
    "more items than there are": (11, [(1, 10**6, 1, b"\x80\x04]\x94.", 0, 0.0)]),
    "log of the wrong shape": (12, (1, 2)),
    "a second ready": (10, (1, "2.7", 1, "host", None)),
    "ready of the wrong shape": (10, None),
    "a result that is no pickle": (11, [(1, 1, 0, b"\xff\xff", 0, 0.0)]),
    "a status that is none": (11, [(1, 1, 77, b"", 0, 0.0)]),
    "buffers that are missing": (11, [(1, 1, 0, b"\x80\x05\x97.", 3, 0.0)]),
    "no number": (11, [("one", 1, 0, b"", 0, 0.0)]),
    "no count": (11, [(1, 0, 0, b"", 0, 0.0)]),
    "less than none": (11, [(1, -5, 0, b"", 0, 0.0)]),
}


def forge(kind: int, message: object) -> str:
    from fiberexec import _messages, _worker

    _worker.current._stream.send(kind, _messages.encode(message))
    return "done"


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_that_says_nonsense_harms_only_the_task_that_sent_it(name: str) -> None:
    with FiberExecutor(1, max_worker_losses=1) as ex:
        forged = ex.submit(forge, *FRAMES[name])
        waiting = ex.submit(abs, -5)
        forged.exception(30)  # its own affair; only that it ends
        assert waiting.result(30) == 5
        assert ex.submit(abs, -6).result(30) == 6
