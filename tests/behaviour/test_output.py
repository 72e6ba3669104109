"""What tasks print and log, and the last words of a worker that died."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

import fiberexec
from fiberexec import FiberExecutor, WorkerLost

LIMIT = 30.0
Make = Callable[..., FiberExecutor]


def me() -> tuple[int, int]:
    task = fiberexec.current_task()
    assert task is not None
    return os.getpid(), task.id


# -- logging


def log_it(level: int, text: str, *args: Any, name: str = "app.part") -> tuple[int, int]:
    logging.getLogger(name).log(level, text, *args)
    return me()


def test_logging_reaches_the_driver_with_worker_and_task_named(
    make_executor: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    executor = make_executor(1)
    pid, task = executor.submit(log_it, logging.WARNING, "%s of %d", "seven", 9).result(LIMIT)
    (record,) = [record for record in caplog.records if record.name == "app.part"]
    assert record.levelno == logging.WARNING and record.levelname == "WARNING"
    assert "seven of 9" in record.getMessage()
    assert re.search(rf"\b{pid}\b", record.getMessage()) and re.search(rf"\btask {task}\b", record.getMessage())
    assert (record.process, record.task) == (pid, task)  # type: ignore[attr-defined]
    assert record.funcName == "log_it" and record.pathname.endswith("test_output.py") and record.lineno > 0


def test_the_drivers_level_counts(make_executor: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    executor = make_executor(1)
    executor.submit(log_it, logging.DEBUG, "quiet").result(LIMIT)
    executor.submit(log_it, logging.INFO, "loud").result(LIMIT)
    said = [record.getMessage() for record in caplog.records if record.name == "app.part"]
    assert len(said) == 1 and "loud" in said[0]


def test_the_level_of_each_logger_counts(make_executor: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.ERROR, "app.quiet")
    caplog.set_level(logging.DEBUG, "app.loud")  # the last one is the handler's level too
    executor = make_executor(1)
    for name in ("app.loud", "app.quiet", "app.part"):
        for level in (logging.DEBUG, logging.INFO, logging.ERROR):
            executor.submit(log_it, level, "said", name=name).result(LIMIT)
    said = [(record.name, record.levelname) for record in caplog.records if record.name.startswith("app.")]
    loud = [("app.loud", "DEBUG"), ("app.loud", "INFO"), ("app.loud", "ERROR")]
    assert said == [*loud, ("app.quiet", "ERROR"), ("app.part", "INFO"), ("app.part", "ERROR")]


class Broken(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise LookupError("a handler of the program's own")


@pytest.mark.parametrize("where", ["handler", "filter"])
def test_a_handler_or_filter_that_raises_costs_no_task(
    make_executor: Make, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    said: list[str] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: said.append(str(error)))
    handler = Broken() if where == "handler" else logging.StreamHandler()
    if where == "filter":
        handler.addFilter(lambda record: bool(record.request_id))  # type: ignore[attr-defined]
    logger = logging.getLogger("app.part")
    logger.addHandler(handler)
    try:
        executor = make_executor(1)
        for _ in range(3):
            executor.submit(log_it, logging.ERROR, "oh").result(LIMIT)
    finally:
        logger.removeHandler(handler)
    assert len(said) == 3 and all(("program's own" if where == "handler" else "request_id") in text for text in said)


def test_a_logged_exception_brings_its_traceback(make_executor: Make, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        try:
            _ = {}["missing"]
        except KeyError:
            logging.getLogger("app.part").exception("it went wrong")

    make_executor(1).submit(fail).result(LIMIT)
    (record,) = [record for record in caplog.records if record.name == "app.part"]
    shown = logging.Formatter().format(record)
    assert "it went wrong" in shown and "Traceback" in shown and "KeyError: 'missing'" in shown


def test_what_cannot_be_pickled_can_be_logged(make_executor: Make, caplog: pytest.LogCaptureFixture) -> None:
    def work() -> None:
        logging.getLogger("app.part").error("here is %r", threading.Lock())

    make_executor(1).submit(work).result(LIMIT)
    assert any("lock" in record.getMessage() for record in caplog.records)


def test_a_message_whose_arguments_do_not_fit_harms_nobody(make_executor: Make) -> None:
    executor = make_executor(1)
    pid, _ = executor.submit(log_it, logging.ERROR, "%d and %d", "one").result(LIMIT)
    assert executor.submit(os.getpid).result(LIMIT) == pid


def test_threads_of_a_task_log_too(make_executor: Make, caplog: pytest.LogCaptureFixture) -> None:
    def work() -> None:
        threads = [threading.Thread(target=log_many, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def log_many(which: int) -> None:
        for i in range(50):
            logging.getLogger("app.part").warning("line %d-%d.", which, i)

    make_executor(1).submit(work).result(LIMIT)
    said = " ".join(record.getMessage() for record in caplog.records)
    assert all(f"line {which}-{i}." in said for which in range(4) for i in range(50))


def test_a_running_task_is_heard_at_once(make_executor: Make, board: Any, eventually: Any, caplog: Any) -> None:
    def work() -> None:
        logging.getLogger("app.part").warning("under way")
        board.wait("go")

    future = make_executor(1).submit(work)
    eventually(lambda: any("under way" in record.getMessage() for record in caplog.records))
    assert not future.done()
    board.post("go")
    future.result(LIMIT)


def test_each_task_of_a_batch_logs_under_its_own_id(make_executor: Make, caplog: pytest.LogCaptureFixture) -> None:
    def work(i: int) -> int:
        logging.getLogger("app.part").warning("item %d", i)
        return me()[1]

    ids = list(make_executor(1).map(work, range(200)))
    said = {record.task: record.getMessage() for record in caplog.records if record.name == "app.part"}  # type: ignore[attr-defined]
    assert list(said) == ids
    assert all(said[identity].endswith(f"item {i}") for i, identity in enumerate(ids))


def test_an_initializer_logs_too(make_executor: Make, caplog: pytest.LogCaptureFixture) -> None:
    def setup() -> None:
        logging.getLogger("app.part").warning("setting up")

    make_executor(1, initializer=setup).submit(int).result(LIMIT)
    assert any("setting up" in record.getMessage() for record in caplog.records)


# -- stdout and stderr


def say(text: str) -> tuple[int, int]:
    print(f"out {text}")
    print(f"err {text}", file=sys.stderr)
    os.write(1, f"raw {text}\n".encode())
    return me()


def test_stdout_and_stderr_pass_through(make_executor: Make, capfd: pytest.CaptureFixture[str]) -> None:
    executor = make_executor(1)
    executor.submit(say, "hello").result(LIMIT)
    executor.shutdown()
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["out hello", "raw hello"]
    assert err.splitlines() == ["err hello"]


def test_what_a_task_prints_is_there_when_it_is_done(
    make_executor: Make, capfd: pytest.CaptureFixture[str], eventually: Any
) -> None:
    make_executor(1).submit(say, "hello").result(LIMIT)
    seen = ["", ""]

    def read() -> bool:
        out, err = capfd.readouterr()
        seen[0] += out
        seen[1] += err
        return "out hello\n" in seen[0] and "err hello\n" in seen[1]

    eventually(read, "both lines, while the worker lives")


def test_children_of_a_task_print_too(make_executor: Make, capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        import subprocess

        subprocess.run(["sh", "-c", "echo from a child; echo and its errors >&2"], check=True)

    executor = make_executor(1)
    executor.submit(work).result(LIMIT)
    executor.shutdown()
    out, err = capfd.readouterr()
    assert out == "from a child\n" and err == "and its errors\n"


def test_much_output_is_whole(make_executor: Make, capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        for i in range(5000):
            print(f"out line {i}")
            print(f"err line {i}", file=sys.stderr)

    executor = make_executor(1)
    executor.submit(work).result(LIMIT)
    executor.shutdown()
    out, err = capfd.readouterr()
    assert out.splitlines() == [f"out line {i}" for i in range(5000)]
    assert err.splitlines() == [f"err line {i}" for i in range(5000)]


def test_lines_can_be_prefixed(
    make_executor: Make, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> tuple[int, int]:
        print("one\ntwo")
        print("half", end="")
        print(" and half")
        print("bad news", file=sys.stderr)
        sys.stdout.write("no end")
        return me()

    monkeypatch.setenv("FIBEREXEC_PREFIX_OUTPUT", "1")
    executor = make_executor(1)
    pid, task = executor.submit(work).result(LIMIT)
    executor.shutdown()
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert [line.rpartition("] ")[2] for line in lines] == ["one", "two", "half and half", "no end"]
    assert [line.rpartition("] ")[2] for line in err.splitlines()] == ["bad news"]
    for line in (*lines[:3], *err.splitlines()):
        assert str(pid) in line and f"task {task}]" in line


# -- the last words


def test_worker_lost_holds_the_last_lines_of_stderr(executor: FiberExecutor) -> None:
    def work() -> None:
        for i in range(1000):
            print(f"step {i}", file=sys.stderr)
        print("giving up", file=sys.stderr, flush=True)
        os._exit(3)

    error = executor.options(max_worker_losses=1).submit(work).exception(LIMIT)
    assert isinstance(error, WorkerLost)
    assert error.log.rstrip().endswith("step 999\ngiving up")
    assert "giving up" in str(error) and error.exitcode == 3


def test_a_crash_leaves_python_s_traceback(executor: FiberExecutor) -> None:
    def crash_here() -> None:
        import ctypes

        ctypes.string_at(0)

    error = executor.options(max_worker_losses=1).submit(crash_here).exception(LIMIT)
    assert isinstance(error, WorkerLost)
    assert "Segmentation fault" in error.log and "crash_here" in error.log
    assert error.exitcode == -11 and "SIGSEGV" in str(error)


def test_each_loss_has_its_own_log(make_executor: Make) -> None:
    def work(name: str) -> None:
        os.write(2, f"last words of {name}\n".encode())
        os._exit(1)

    view = make_executor(2).options(max_worker_losses=1)
    futures = {name: view.submit(work, name) for name in ("anna", "otto", "emil")}
    for name, future in futures.items():
        error = future.exception(LIMIT)
        assert isinstance(error, WorkerLost) and error.log == f"last words of {name}\n"
