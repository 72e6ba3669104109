"""Contexts, start methods, and what of multiprocessing goes on working."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import selectors
import subprocess
import sys
import threading
from typing import Any

import pytest

from fiberexec import mp
from fiberexec._hub import launch
from fiberexec.mp import _jobs

from .helpers import LIMIT, exit_code, run

# -- contexts


@pytest.fixture
def unset() -> Any:
    mp.set_start_method(None, force=True)
    yield
    mp.set_start_method(None, force=True)


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver", "local"])
def test_contexts_are_had_by_a_start_method_or_a_backend(method: str) -> None:
    found: Any = mp.get_context(method)
    assert found.get_start_method() == method and mp.get_context(method) is found is found.get_context()
    with pytest.raises(ValueError, match="cannot set start method of concrete context"):
        found.set_start_method("spawn")
    process = found.Process(target=lambda: sys.exit(mp.get_start_method() == method and 8))
    assert issubclass(found.Process, mp.Process) and issubclass(mp.Process, multiprocessing.process.BaseProcess)
    process.start()
    assert exit_code(process) == 8
    assert type(process).__name__.lower() == f"{method}process"


def test_a_context_that_there_is_not_is_refused(unset: None) -> None:
    with pytest.raises(ValueError, match="cannot find context for 'nowhere'"):
        mp.get_context("nowhere")
    with pytest.raises(ValueError, match="cannot find context for 'nowhere'"):
        mp.set_start_method("nowhere")


def test_the_start_method_is_set_once(unset: None) -> None:
    assert mp.get_start_method(allow_none=True) is None
    mp.set_start_method("local")
    with pytest.raises(RuntimeError, match="already been set"):
        mp.set_start_method("spawn")
    assert mp.get_start_method() == "local"
    assert run(lambda: sys.exit(mp.get_start_method() == "local")).exitcode == 1
    mp.set_start_method("spawn", force=True)
    assert mp.get_start_method() == "spawn"


def test_the_module_has_every_name_of_multiprocessing() -> None:
    assert set(multiprocessing.__all__) <= set(mp.__all__) <= set(dir(mp))
    assert mp.TimeoutError is multiprocessing.TimeoutError and mp.cpu_count() == multiprocessing.cpu_count()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mp.nothing  # noqa: B018


SUBMODULES = (
    "connection", "context", "dummy", "dummy.connection", "heap", "managers", "pool", "process", "queues", "reduction",
    "resource_sharer", "resource_tracker", "shared_memory", "sharedctypes", "synchronize", "util",
)  # fmt: skip


@pytest.mark.parametrize("name", SUBMODULES)
def test_submodules_are_imported_under_multiprocessings_names(name: str) -> None:
    ours, theirs = (importlib.import_module(f"{package}.{name}") for package in ("fiberexec.mp", "multiprocessing"))
    assert set(getattr(theirs, "__all__", ())) <= set(dir(ours))


@pytest.mark.parametrize("name", ["dummy", "reduction", "resource_sharer", "resource_tracker", "util"])
def test_what_is_not_made_anew_is_multiprocessings_own_module(name: str) -> None:
    program = f"import fiberexec.mp.{name} as ours, multiprocessing.{name}; from fiberexec import mp\n"
    program += f"assert ours is mp.{name} is multiprocessing.{name}; assert '{name}' in dir(mp)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=LIMIT)


def test_pools_of_threads_are_had_from_dummy() -> None:
    from fiberexec.mp.dummy import Pool, Process

    with Pool(2) as pool:
        assert pool.map(abs, [-1, 2]) == [1, 2]
    assert issubclass(Process, threading.Thread)


def test_the_import_loads_nothing_heavy() -> None:
    program = "import sys; from fiberexec import mp; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pynng", "dill", "numpy", "multiprocessing", "threading", "logging"} & set(loaded)


# -- multiprocessing's own


@pytest.mark.leaks("multiprocessing's resource tracker stays")
def test_multiprocessings_locks_travel_as_arguments() -> None:
    lock = multiprocessing.get_context("spawn").Lock()

    def target(lock: Any) -> None:
        lock.acquire()
        sys.exit(lock.acquire(block=False) is False)

    assert run(target, lock).exitcode == 1
    assert not lock.acquire(block=False)


def test_the_loggers_level_and_what_is_logged_travel(caplog: pytest.LogCaptureFixture) -> None:
    def target() -> None:
        logging.info("from the child")
        sys.exit(mp.get_logger().getEffectiveLevel())

    logger = mp.get_logger()
    before = logger.level
    logger.setLevel(17)
    try:
        with caplog.at_level(logging.INFO):
            assert run(target).exitcode == 17
    finally:
        logger.setLevel(before)
    assert any("from the child" in record.getMessage() for record in caplog.records)


def test_what_a_child_logs_below_this_programs_level_is_not_said(caplog: pytest.LogCaptureFixture) -> None:
    def target() -> None:
        logger = logging.getLogger("talkative")
        logger.setLevel(logging.DEBUG)
        logger.debug("not for you")
        logger.warning("for you")

    assert run(target).exitcode == 0
    said = [record.getMessage() for record in caplog.records if record.name == "talkative"]
    assert len(said) == 1 and said[0].endswith(" for you")


def test_a_number_of_the_hubs_listener_that_a_process_gets_is_the_processs() -> None:
    """Another thread starts the hub and closes the listener between two looks of the thread that watches it."""
    jobs: Any = _jobs.Jobs()
    jobs._selector = selectors.PollSelector()
    fd, other = os.pipe()
    jobs._watch(fd, "hub")
    jobs._watched = {fd: "hub"}
    jobs._watch(fd, "the process")
    jobs._follow()
    assert jobs._selector.get_key(fd).data == "the process"
    jobs._selector.close()
    os.close(fd)
    os.close(other)


def test_a_child_may_be_the_first_to_use_a_shared_object() -> None:
    def target() -> None:
        queue = mp.Queue()
        process = mp.Process(target=queue.put, args=(5,))
        process.start()
        process.join()
        sys.exit(queue.get(timeout=LIMIT))

    assert run(target).exitcode == 5
    assert run(target).exitcode == 5


def test_a_hub_that_cannot_be_started_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError("no hub today")

    monkeypatch.setattr(launch, "start", refuse)
    assert run(lambda: mp.Queue().put(1)).exitcode == 1
