"""{crash, exit, raise, hang} x {unpickling the task, running it, pickling the result}, by submit() and map().

Whatever a task does, it fails alone, with the right exception, and the executor goes on.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

import fiberexec
from fiberexec import FiberExecutor, PicklingError, TaskTimeout, WorkerLost

LIMIT = 4.0  # seconds that a task which hangs is given; a fresh worker may have to import this module first
BOUND = 30  # seconds after which a future that is not done is a hang
CRASHES = {
    "segfault": -signal.SIGSEGV,
    "_exit": 3,
    "kill": -signal.SIGKILL,
}  # how, and the exit code that follows
WAYS = [*CRASHES, "exit", "raise", "hang"]
STAGES = ["unpickling", "running", "pickling"]


def misbehave(how: str) -> NoReturn:
    if how == "segfault":
        import ctypes

        ctypes.string_at(0)
    elif how == "_exit":
        os._exit(3)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "exit":
        sys.exit("bye")
    elif how == "raise":
        raise ValueError("no luck")
    from time import sleep

    while True:
        sleep(60)


class Loaded:
    """Misbehaves where it is unpickled."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> tuple[Any, ...]:
        return misbehave, (self.how,)


class Dumped:
    """Misbehaves where it is pickled."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> NoReturn:
        misbehave(self.how)


def work(item: object) -> object:
    """Do what the item says; a number comes back with the count of its attempts."""
    if isinstance(item, tuple):
        stage, how = item
        return misbehave(how) if stage == "running" else Dumped(how)
    return item, fiberexec.current_task().attempt  # no assert here: a rewritten one would bring pytest along


def hostile(stage: str, how: str) -> object:
    return Loaded(how) if stage == "unpickling" else (stage, how)


def assert_is_right(error: BaseException | None, stage: str, how: str) -> None:
    if how in CRASHES:
        assert isinstance(error, WorkerLost), repr(error)
        assert error.exitcode == CRASHES[how]
        assert error.pid > 0
        assert error.host
        assert error.losses == 1
        assert isinstance(error.reason, str)
        if how == "segfault":
            assert "Segmentation fault" in error.log
    elif how == "exit":
        assert isinstance(error, PicklingError if stage == "pickling" else SystemExit)
        assert "bye" in str(error)
    elif how == "raise":
        assert isinstance(error, PicklingError if stage == "pickling" else ValueError)
        assert "no luck" in str(error)
    else:
        assert isinstance(error, TaskTimeout)
        assert error.timeout == LIMIT


@pytest.fixture(scope="module")
def executor() -> Iterator[FiberExecutor]:
    with FiberExecutor(2, max_worker_losses=1) as ex:
        yield ex


cell = pytest.mark.parametrize(("stage", "how"), [(stage, how) for how in WAYS for stage in STAGES])


@cell
@pytest.mark.leaks("the executor is shared by the module's tests")
def test_a_hostile_task_fails_alone_and_the_executor_goes_on(
    executor: FiberExecutor, size: Callable[[int, int], int], stage: str, how: str
) -> None:
    limited = executor.options(timeout=LIMIT) if how == "hang" else executor
    for number in range(size(2, 200)):
        before = executor.submit(work, number)
        bad = limited.submit(work, hostile(stage, how))
        after = executor.submit(work, -number)
        assert_is_right(bad.exception(BOUND), stage, how)
        assert before.result(BOUND) == (number, 1)
        assert after.result(BOUND) == (-number, 1)


@cell
@pytest.mark.parametrize("place", [0, 7, 15])
@pytest.mark.leaks("the executor is shared by the module's tests")
def test_the_neighbours_of_a_hostile_item_are_unharmed(
    executor: FiberExecutor, size: Callable[[int, int], int], stage: str, how: str, place: int
) -> None:
    """One chunk of 16: what comes before is there, the exception is in its place, nobody else is charged."""
    view = executor.options(timeout=LIMIT) if how == "hang" else executor
    for _ in range(size(1, 67)):
        items: list[object] = list(range(16))
        items[place] = hostile(stage, how)
        results = view.map(work, items, chunksize=16, timeout=BOUND)
        others = view.map(work, range(100, 116), chunksize=16, timeout=BOUND)
        assert [next(results) for _ in range(place)] == [(number, 1) for number in range(place)]
        with pytest.raises(BaseException) as caught:
            next(results)
        assert_is_right(caught.value, stage, how)
        assert list(others) == [(number, 1) for number in range(100, 116)]
