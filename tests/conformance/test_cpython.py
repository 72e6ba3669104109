"""CPython's own tests of ``concurrent.futures``, taken from the interpreter that runs this, against FiberExecutor.

Nothing is copied: the test methods are those of ``test.test_concurrent_futures``; only the names that they use for the
executor and for what surrounds it are exchanged, all in ``FiberMixin``. ``EXCLUDED`` lists what does not apply, ``CHANGED``
what FiberExecutor promises otherwise. An interpreter that ships no such tests is named and skipped.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import multiprocessing.context
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
from typing import Any
from unittest import mock

import pytest

import fiberexec
from fiberexec import FiberExecutor, WorkerLost

try:
    SUITE = importlib.import_module("test.test_concurrent_futures")
    SUPPORT = importlib.import_module("test.support")
except ImportError as error:
    pytest.skip(f"Python {sys.version.split()[0]} at {sys.base_prefix}: {error}", allow_module_level=True)

# A single module up to Python 3.11, a package after that.
MODULES = [SUITE] + [
    importlib.import_module(f"{SUITE.__name__}.{entry.name}") for entry in pkgutil.iter_modules(getattr(SUITE, "__path__", []))
]

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
# test: (what FiberExecutor raises instead of BrokenProcessPool, why)
CHANGED: dict[str, tuple[type[BaseException], str]] = {
    "test_exit_at_task_unpickle": (SystemExit, RESULT),
    "test_error_at_task_unpickle": (pickle.UnpicklingError, RESULT),
    "test_error_during_result_unpickle_in_result_handler": (pickle.UnpicklingError, RESULT),
    "test_exit_during_result_unpickle_in_result_handler": (SystemExit, RESULT),
}


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
    """A start method that the executor ignores; its primitives are a manager's, since workers are no children of multiprocessing."""

    manager: Any = None

    def Semaphore(self, value: int = 1) -> Any:  # noqa: N802
        self.manager = self.manager or self.Manager()
        return self.manager.Semaphore(value)


class Adapted(FiberExecutor):
    """FiberExecutor with the private attributes of ProcessPoolExecutor that the tests look at, made from public ones."""

    @property
    def _processes(self) -> dict[int, Handle]:
        def settled() -> bool:
            stats = self.stats()
            return len(self.workers()) >= min(self._max_workers, stats.queued + stats.running)

        wait_for(settled, "no workers for the tasks")
        return {worker.pid: Handle(worker.pid) for worker in self.workers()}

    @property
    def _broken(self) -> bool:
        try:
            self.submit(int).result()
        except fiberexec.BrokenExecutor:
            return True
        return False

    @property
    def _executor_manager_thread(self) -> Any:
        return self._manager.thread

    _call_queue = types.SimpleNamespace(join_thread=lambda: None)


Adapted.__name__ = "FiberExecutor"  # the tests write it into programs


class Futures(types.ModuleType):
    """The module ``concurrent.futures`` as the tests see it."""

    ProcessPoolExecutor = type("FiberExecutor", (Adapted,), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("concurrent.futures"), name)


def run_program(*arguments: str) -> Any:
    """Run a program of the tests with FiberExecutor in its place, and with the package under test on its path."""
    option, source = arguments
    source = source.replace("concurrent.futures import FiberExecutor", "fiberexec import FiberExecutor")
    source = source.replace("if __name__", "import multiprocessing\n            if __name__", 1)
    helper = importlib.import_module("test.support.script_helper")
    return helper.assert_python_ok(option, source, __isolated=False, PYTHONPATH=os.pathsep.join(sys.path))


class QuietMixin:
    """Without pytest's logging handlers, logging's last resort writes to stderr, where the tests look."""

    def setUp(self) -> None:
        self.enterContext(mock.patch.object(logging.getLogger(), "handlers", []))
        super().setUp()

    if sys.version_info < (3, 11):

        def enterContext(self, manager: contextlib.AbstractContextManager[Any]) -> Any:  # noqa: N802
            self.addCleanup(manager.__exit__, None, None, None)
            return manager.__enter__()


class FiberMixin(QuietMixin):
    """Takes the place of ProcessPoolForkMixin and the like."""

    executor_type = Adapted
    worker_count = 5
    executor_kwargs: dict[str, Any] = {}
    TIMEOUT = 20.0

    def setUp(self) -> None:
        names = {"BrokenProcessPool": WorkerLost, "futures": Futures("futures"), "assert_python_ok": run_program}
        for module in MODULES:
            for name in names.keys() & vars(module).keys():
                self.enterContext(mock.patch.object(module, name, names[name]))
        self.context: Context | None = None
        super().setUp()

    def get_context(self) -> Context:
        if self.context is None:
            self.context = Context()
            self.addCleanup(lambda: self.context.manager and self.context.manager.shutdown())
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
        """ProcessPoolExecutor logs, in the worker, why an initializer failed; here it is the cause of BrokenExecutor."""
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
    bases = (QuietMixin, tests) if case else (FiberMixin, tests, find("ExecutorMixin"), find("BaseTestCase"))
    skipped = {
        test: unittest.skip(why)(lambda self: None)
        for key, (_, why) in EXCLUDED.items()
        for owner, _, test in [key.partition(".")]
        if test and owner in {base.__name__ for base in tests.__mro__} and hasattr(tests, test)
    }
    return type(f"Fiber{name}", bases, {"__module__": __name__, **skipped})


globals().update({case.__name__: case for case in map(adapt, RUN) if case})


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
