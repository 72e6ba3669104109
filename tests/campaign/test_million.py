"""1,000,000 tasks through one executor: the memory of driver and workers is flat."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import psutil
import pytest

from fiberexec import FiberExecutor

ROOM = 4 << 20  # bytes by which memory may move between the first and the last part: allocators and caches settle
pytestmark = pytest.mark.timeout(3000)


class Memory:
    """Resident bytes of the driver, and of the largest of its workers, sampled as work goes on."""

    def __init__(self, executor: FiberExecutor) -> None:
        self._executor = executor
        self._driver = psutil.Process()
        self.samples: list[tuple[int, int]] = []

    def sample(self) -> None:
        gc.collect()
        workers = [worker.memory for worker in self._executor.workers()]
        self.samples.append((self._driver.memory_info().rss, max(workers, default=0)))

    def assert_flat(self) -> None:
        settled = self.samples[len(self.samples) // 5 :]
        for who, values in zip(("driver", "workers"), zip(*settled, strict=True), strict=True):
            third = len(values) // 3
            assert min(values[-third:]) - min(values[:third]) < ROOM, f"{who}: {[v >> 10 for v in values]} KiB"


def echo(number: int) -> int:
    return number


def text_of(number: int) -> str:
    return "x" * (number % 2000)


@pytest.mark.parametrize("function", [echo, text_of])
def test_memory_is_flat_over_an_endless_map(function: Callable[[int], object], size: Callable[[int, int], int]) -> None:
    count = size(50_000, 1_000_000)

    def numbers() -> Iterator[int]:
        yield from range(count)

    with FiberExecutor(2) as ex:
        memory = Memory(ex)
        for number, value in enumerate(ex.map(function, numbers(), buffersize=1000)):
            assert value == function(number)
            if number % (count // 30) == 0:
                memory.sample()
        assert ex.stats().done == count == number + 1
        memory.assert_flat()


def test_memory_is_flat_over_waves_of_submitted_tasks(size: Callable[[int, int], int]) -> None:
    count, wave = size(50_000, 1_000_000), 1000
    with FiberExecutor(2) as ex:
        memory = Memory(ex)
        for start in range(0, count, wave):
            futures = [ex.submit(echo, number) for number in range(start, start + wave)]
            assert [future.result(60) for future in futures] == list(range(start, start + wave))
            del futures
            if start // wave % max(1, count // wave // 30) == 0:
                memory.sample()
        assert ex.stats().done == count
        memory.assert_flat()


def test_memory_is_flat_over_tasks_that_fail(size: Callable[[int, int], int]) -> None:
    count, wave = size(5_000, 100_000), 500
    with FiberExecutor(2) as ex:
        memory = Memory(ex)
        for start in range(0, count, wave):
            futures = [ex.submit(int, "x" * 100) for _ in range(wave)]
            assert all(isinstance(future.exception(60), ValueError) for future in futures)
            del futures
            if start // wave % max(1, count // wave // 10) == 0:
                memory.sample()
        memory.assert_flat()


def test_memory_is_flat_over_functions_that_are_made_anew(size: Callable[[int, int], int]) -> None:
    """A notebook defines and submits functions again and again."""
    count = size(3_000, 100_000)
    with FiberExecutor(2) as ex:
        memory = Memory(ex)
        for number in range(count):
            assert ex.submit(lambda number=number: number).result(60) == number
            if number % (count // 30) == 0:
                memory.sample()
        memory.assert_flat()


def test_memory_is_flat_over_workers_that_die(size: Callable[[int, int], int]) -> None:
    import os

    count = size(60, 3_000)
    with FiberExecutor(2, max_worker_losses=1) as ex:
        memory = Memory(ex)
        descriptors = psutil.Process().num_fds()
        for number in range(count):
            assert ex.submit(os._exit, 3).exception(60) is not None
            if number % (count // 30) == 0:
                memory.sample()
        memory.assert_flat()
        assert psutil.Process().num_fds() < descriptors + 20
