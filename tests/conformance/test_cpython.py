"""CPython's own tests of ``concurrent.futures``, taken from the interpreter that runs this, against FiberExecutor.

Nothing is copied: the test methods are those of ``test.test_concurrent_futures``; only the names that they use for the
executor and for what surrounds it are exchanged, all in ``FiberMixin``. ``EXCLUDED`` lists what does not apply,
``CHANGED`` what FiberExecutor promises otherwise. An interpreter that ships no such tests is named and skipped.
"""

from __future__ import annotations

import concurrent.futures.process
import contextlib
import gc
import importlib
import logging
import multiprocessing
import multiprocessing.context
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import pickle
import pkgutil
import signal
import sys
import time
import types
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest

import fiberexec
from fiberexec import FiberExecutor, WorkerLost
from fiberexec._serialize._exceptions import RemoteTraceback

try:
    SUITE = importlib.import_module("test.test_concurrent_futures")
    SUPPORT = importlib.import_module("test.support")
except ImportError as error:
    pytest.skip(f"Python {sys.version.split()[0]} at {sys.base_prefix}: {error}", allow_module_level=True)

# A single module up to Python 3.11, a package after that.
MODULES = [SUITE]
for entry in pkgutil.iter_modules(getattr(SUITE, "__path__", [])):
    MODULES.append(importlib.import_module(f"{SUITE.__name__}.{entry.name}"))

RUN = [
    "ProcessPoolExecutorTest",
    "ProcessPoolShutdownTest",
    "WaitTests",
    "AsCompletedTests",
    "InitializerMixin",
    "FailingInitializerMixin",
    "ExecutorDeadlockTest",
    "FutureTests",
]

THREADS = "tests the threads of ThreadPoolExecutor; what it shares with other executors is run by the classes above"
# class or class.test: (since which Python it exists, why it does not apply)
EXCLUDED: dict[str, tuple[tuple[int, ...], str]] = {
    "ThreadPoolExecutorTest": ((3, 10), THREADS),
    "ThreadPoolShutdownTest": ((3, 10), THREADS),
    "ThreadPoolWaitTests": ((3, 10), THREADS),
    "FailingInitializerResourcesTest": ((3, 12), "tests multiprocessing's resource tracker, which is not used"),
    "ProcessPoolExecutorTest.test_killed_child": (
        (3, 10),
        "expects a killed worker to break the executor; here the executor goes on and the task runs again",
    ),
    "ProcessPoolExecutorTest.test_max_tasks_per_child_defaults_to_spawn_context": (
        (3, 11),
        "multiprocessing's start methods are not used: mp_context has no effect, with max_tasks_per_child too",
    ),
    "ProcessPoolExecutorTest.test_python_finalization_error": (
        (3, 13),
        "lets the start of a second thread fail, a queue feeder of multiprocessing; FiberExecutor has no such thread",
    ),
}

RESULT = "an exception is a result, wherever it is raised: it costs no worker"
# test: (what FiberExecutor raises instead, why)
CHANGED: dict[str, tuple[type[BaseException], str]] = {
    "test_exit_at_task_unpickle": (SystemExit, RESULT),
    "test_error_at_task_unpickle": (pickle.UnpicklingError, RESULT),
    "test_error_during_result_unpickle_in_result_handler": (pickle.UnpicklingError, RESULT),
    "test_exit_during_result_unpickle_in_result_handler": (SystemExit, RESULT),
    "test_exit_during_result_pickle_on_worker": (
        fiberexec.PicklingError,
        "what cannot be pickled is said with its place in the result; the SystemExit is the cause",
    ),
}

# test: why it begins with a worker that has started
WARM = {"test_cancel_futures": "counts on a running task, and until a worker has started none is running"}


def find(name: str) -> Any:
    """The class of that name in CPython's tests; None where this version has none."""
    return next((vars(module)[name] for module in MODULES if name in vars(module)), None)


class Handle:
    """What the tests want of a ``multiprocessing.Process``, given a pid."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def join(self) -> None:
        wait_for(lambda: not Path(f"/proc/{self.pid}").exists(), f"process {self.pid} goes on")


def wait_for(condition: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.005)


class Context(multiprocessing.context.SpawnContext):
    """A start method, which the executor ignores. What is inherited otherwise is a manager's here, and can be sent."""

    manager: Any = None

    def Semaphore(self, value: int = 1) -> Any:
        self.manager = self.manager or self.Manager()
        return self.manager.Semaphore(value)

    def close(self) -> None:
        manager, self.manager = self.manager, None
        if manager is not None:
            manager.shutdown()


class Adapted(FiberExecutor):
    """FiberExecutor with those private attributes of ProcessPoolExecutor that the tests look at."""

    @property
    def _processes(self) -> dict[int, Handle]:
        def settled() -> bool:
            nonlocal workers
            stats, workers = self.stats(), self.workers()
            enough = min(self._max_workers, stats.queued + stats.running)
            return len(workers) >= enough and all(worker.pid for worker in workers)

        workers: list[fiberexec.WorkerInfo] = []
        wait_for(settled, "no workers for the tasks")
        return {worker.pid: Handle(worker.pid) for worker in workers}

    @property
    def _broken(self) -> bool:
        try:
            self.submit(int).result()
        except fiberexec.BrokenExecutor:
            return True
        return False

    @property
    def _executor_manager_thread(self) -> Any:
        return self._manager._thread

    _call_queue = types.SimpleNamespace(join_thread=lambda: None)


Adapted.__name__ = "FiberExecutor"  # the tests write it into programs


class Substitute:
    """A module as the tests see it: some names exchanged."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.__dict__.update(names)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if name == "_module":  # asked for before it is there: while this is being unpickled in a worker
            raise AttributeError(name)
        return getattr(self._module, name)


FUTURES = Substitute(
    concurrent.futures,
    ProcessPoolExecutor=type("FiberExecutor", (Adapted,), {}),
    process=Substitute(concurrent.futures.process, _RemoteTraceback=RemoteTraceback),
)


def run_program(*arguments: str) -> Any:
    """Run a program of the tests with FiberExecutor in its place, and with the package under test on its path."""
    option, source = arguments
    source = source.replace("concurrent.futures import FiberExecutor", "fiberexec import FiberExecutor")
    helper = importlib.import_module("test.support.script_helper")
    return helper.assert_python_ok(option, source, __isolated=False, PYTHONPATH=os.pathsep.join(sys.path))


class QuietMixin:
    """Without pytest's logging handlers, logging's last resort writes to stderr, where the tests look."""

    def setUp(self) -> None:
        self.enterContext(mock.patch.object(logging.getLogger(), "handlers", []))
        super().setUp()

    if sys.version_info < (3, 11):

        def enterContext(self, manager: contextlib.AbstractContextManager[Any]) -> Any:
            self.addCleanup(manager.__exit__, None, None, None)
            return manager.__enter__()


class CollectMixin:
    """Python 3.10 counts a thread that has ended as long as its object waits for the garbage collector."""

    def tearDown(self) -> None:
        gc.collect()
        super().tearDown()


class FiberMixin(QuietMixin):
    """Takes the place of ProcessPoolForkMixin and the like."""

    executor_type = Adapted
    worker_count = 5
    executor_kwargs: ClassVar[dict[str, Any]] = {}
    TIMEOUT = 20.0

    def setUp(self) -> None:
        names = {"BrokenProcessPool": WorkerLost, "futures": FUTURES, "assert_python_ok": run_program}
        for module in MODULES:
            for name in names.keys() & vars(module).keys():
                self.enterContext(mock.patch.object(module, name, names[name]))
        self.context: Context | None = None
        super().setUp()
        if self._testMethodName in WARM:
            self.executor.submit(int).result()

    def get_context(self) -> Context:
        if self.context is None:
            self.context = Context()
            self.addCleanup(self.context.close)
        return self.context

    def tearDown(self) -> None:
        SUPPORT.environment_altered = False
        super().tearDown()
        assert not SUPPORT.environment_altered, "a thread or a child process is left"

    def _check_crash(self, error: type[BaseException], *arguments: Any, **options: Any) -> None:
        error, _ = CHANGED.get(self._testMethodName, (error, ""))
        super()._check_crash(error, *arguments, **options)

    @contextlib.contextmanager
    def _assert_logged(self, message: str) -> Iterator[None]:
        """Why an initializer failed is logged by ProcessPoolExecutor's worker; here it is BrokenExecutor's cause."""
        yield
        with self.assertRaises(fiberexec.BrokenExecutor) as caught:
            self.executor.submit(int)
        cause = caught.exception.__cause__
        self.assertIn(message, f"{type(cause).__name__}: {cause}")


def adapt(name: str) -> type[unittest.TestCase] | None:
    """The tests of that class as a test case for FiberExecutor, those that are excluded as skipped."""
    tests = find(name)
    if tests is None:
        return None
    case = issubclass(tests, unittest.TestCase)
    fixture = (find("ExecutorMixin"), CollectMixin, find("BaseTestCase"))
    bases = (QuietMixin, tests) if case else (FiberMixin, tests, *fixture)
    skipped = {
        test: unittest.skip(why)(lambda self: None)
        for key, (_, why) in EXCLUDED.items()
        for owner, _, test in [key.partition(".")]
        if test and owner in {base.__name__ for base in tests.__mro__} and hasattr(tests, test)
    }
    return type(f"Fiber{name}", bases, {"__module__": __name__, **skipped})


globals().update({case.__name__: case for case in map(adapt, RUN) if case})


@pytest.fixture(scope="module", autouse=True)
def resource_tracker() -> Iterator[None]:
    """Managers start multiprocessing's resource tracker, which stays: no single test is to blame for it."""
    multiprocessing.resource_tracker.ensure_running()
    yield
    multiprocessing.util._cleanup_tests()


def owners() -> dict[str, set[str]]:
    """The names of the tests of CPython's suite, by the class that defines them."""
    classes = {cls for module in MODULES for cls in vars(module).values() if isinstance(cls, type)}
    found = {cls.__name__: {name for name in vars(cls) if name.startswith("test")} for cls in classes}
    return {name: tests for name, tests in found.items() if tests}


def test_every_test_of_cpython_is_run_or_excluded_by_name() -> None:
    run = {base.__name__ for name in RUN if find(name) for base in find(name).__mro__}
    assert owners().keys() - run - EXCLUDED.keys() == set()


@pytest.mark.parametrize("key", EXCLUDED)
def test_an_exclusion_names_a_test_that_exists_and_says_why(key: str) -> None:
    since, why = EXCLUDED[key]
    owner, _, test = key.partition(".")
    exists = owner in owners() and (not test or test in owners()[owner])
    assert exists or sys.version_info < since, f"CPython has no {key}"
    assert len(why) > 20


@pytest.mark.parametrize("test", CHANGED)
def test_a_changed_expectation_names_a_test_that_exists(test: str) -> None:
    assert test in owners()["ExecutorDeadlockTest"]
    assert len(CHANGED[test][1]) > 20
