"""Workers that are killed at random while thousands of small tasks run: every outcome is right, and so is the blame."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fiberexec
from fiberexec import FiberExecutor, WorkerLost

INTERVAL = 0.2  # seconds between two kills
BOUND = 300  # seconds after which what is not done hangs


class Killer:
    """Kills a random worker every INTERVAL seconds, until it is told to stop."""

    def __init__(self, executor: FiberExecutor, rng: random.Random) -> None:
        self.killed: list[int] = []
        self._executor = executor
        self._rng = rng
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            pids = [worker.pid for worker in self._executor.workers() if worker.pid]
            if pids:
                pid = self._rng.choice(pids)
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                self.killed.append(pid)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def work(diary: str, number: int, seconds: float) -> tuple[int, int, int]:
    """Work, and write down when it begins and ends, in this worker's own diary, by which the blame is judged."""
    from time import monotonic

    task = fiberexec.current_task()
    fd = os.open(f"{diary}/{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, b"begin %d %d\n" % (number, task.attempt))
    end = monotonic() + seconds
    while monotonic() < end:
        pass
    os.write(fd, b"end %d %d\n" % (number, task.attempt))
    os.close(fd)
    return number, number * number, task.attempt


def die(diary: str, number: int, seconds: float) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def judge(diary: Path, killed: list[int], attempts: dict[int, int]) -> None:
    """Each charge has a killed worker that was in the midst of that very attempt, or of none that was written down."""
    last = {pid: ("\n" + (diary / str(pid)).read_text()).split("\n")[-2] for pid in killed if (diary / str(pid)).exists()}
    executing = Counter(line.split()[1] for line in last.values() if line.startswith("begin"))
    between = sum(not line.startswith("begin") for line in last.values()) + len(killed) - len(last)
    charged = {str(number): count - 1 for number, count in attempts.items() if count > 1}
    for number, count in executing.items():
        assert charged.get(number, 0) >= count, f"task {number} was executing in a killed worker and is not charged"
    unexplained = sum(max(0, count - executing[number]) for number, count in charged.items())
    assert unexplained <= between, f"{unexplained} charges for {between} kills between two tasks"


def test_tasks_settle_once_and_right_while_workers_are_killed(
    size: Callable[[int, int], int], rng: random.Random, tmp_path: Path
) -> None:
    count = size(1500, 10_000)
    poisons = set(rng.sample(range(count), 3))
    settled: Counter[int] = Counter()
    with FiberExecutor(2) as ex:
        with Killer(ex, rng) as killer:
            futures = []
            for number in range(count):
                function = die if number in poisons else work
                view = ex if number in poisons else ex.options(max_worker_losses=20)  # new workers import this module first
                future = view.submit(function, str(tmp_path), number, rng.uniform(0, 0.002))
                future.add_done_callback(lambda _, number=number: settled.update([number]))
                futures.append(future)
            outcomes: list[Any] = [future.exception(BOUND) or future.result() for future in futures]
        assert ex.stats().queued == ex.stats().running == 0
    attempts = {}
    for number, outcome in enumerate(outcomes):
        if number in poisons:
            assert isinstance(outcome, WorkerLost), outcome
            assert (outcome.exitcode, outcome.losses) == (-signal.SIGKILL, 3)
            assert outcome.pid and outcome.host and outcome.task_id
        else:
            assert outcome[:2] == (number, number * number)
            attempts[number] = outcome[2]
    assert set(settled.values()) == {1} and len(settled) == count
    assert killer.killed, "nobody was killed"
    judge(tmp_path, killer.killed, attempts)


def test_a_map_is_right_while_workers_are_killed(
    size: Callable[[int, int], int], rng: random.Random, tmp_path: Path
) -> None:
    count = size(1500, 10_000)
    with FiberExecutor(2, max_worker_losses=20) as ex, Killer(ex, rng) as killer:
        pauses = [rng.uniform(0, 0.002) for _ in range(count)]
        results = list(ex.map(work, [str(tmp_path)] * count, range(count), pauses, timeout=BOUND))
    assert [(number, square) for number, square, _ in results] == [(n, n * n) for n in range(count)]
    judge(tmp_path, killer.killed, {number: attempts for number, _, attempts in results})


def square(number: int) -> int:
    return number * number


def test_a_map_of_tiny_items_is_right_while_workers_are_killed(
    size: Callable[[int, int], int], rng: random.Random
) -> None:
    """Batches of thousands: what is lost with them runs again, what has arrived does not.

    A fresh worker imports this module as part of its first item, which so may well meet several of 300 kills.
    """
    with FiberExecutor(2, max_worker_losses=20) as ex, Killer(ex, rng) as killer:
        until = time.monotonic() + size(2, 60)
        while time.monotonic() < until:
            assert sum(ex.map(square, range(20_000), timeout=BOUND)) == sum(n * n for n in range(20_000))
    assert killer.killed
