"""Many consumers on one JoinableQueue while a random one is killed every 200 ms.

Every item is begun at least once, and what a consumer has marked as done is never delivered again.
"""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fiberexec import mp
from fiberexec._hub import launch
from fiberexec.mp import _jobs

BOUND = 60.0  # seconds for what has to end


@pytest.fixture(autouse=True)
def no_jobs_left() -> Iterator[None]:
    yield
    _jobs.close()
    launch.close()


def consume(queue: Any, diary: str) -> None:
    fd = os.open(f"{diary}/{os.getpid()}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    while (item := queue.get()) is not None:
        os.write(fd, b"begun %d\n" % item)
        queue.task_done()
        os.write(fd, b"done %d\n" % item)
    queue.task_done()


class Crew:
    """Consumers, one of whom is killed and replaced every 200 ms."""

    def __init__(self, size: int, period: float, rng: random.Random, queue: Any, diary: str) -> None:
        self.killed = 0
        self._period = period  # seconds between two kills
        self._rng = rng
        self._arguments = queue, diary
        self._processes = [self._start() for _ in range(size)]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._kill)
        self._thread.start()

    def _start(self) -> Any:
        process = mp.Process(target=consume, args=self._arguments)
        process.start()
        return process

    def _kill(self) -> None:
        while not self._over.wait(self._period):
            place = self._rng.randrange(len(self._processes))
            self._processes[place].kill()
            self._processes[place].join(BOUND)
            assert self._processes[place].exitcode == -9
            self.killed += 1
            self._processes[place] = self._start()

    def stop_killing(self) -> None:
        self._over.set()
        self._thread.join(BOUND)

    def dismiss(self, queue: Any) -> None:
        for _ in self._processes:
            queue.put(None)
        for process in self._processes:
            process.join(BOUND)
        assert {process.exitcode for process in self._processes} == {0}


def test_items_are_done_while_consumers_are_killed(
    size: Callable[[int, int], int], rng: random.Random, tmp_path: Path
) -> None:
    count = size(10_000, 1_000_000)
    queue = mp.JoinableQueue()
    crew = Crew(size(10, 100), size(10, 200) / 1000, rng, queue, str(tmp_path))  # 10,000 items take less than 200 ms
    try:
        for item in range(count):
            queue.put(item)
        joined = threading.Thread(target=queue.join, daemon=True)
        joined.start()
        joined.join(size(60, 1800))
        assert not joined.is_alive(), "items are lost: nobody marks them as done"
    finally:
        crew.stop_killing()
    crew.dismiss(queue)
    queue.join()
    assert crew.killed, "nobody was killed"
    lines = Counter(line for file in tmp_path.iterdir() for line in file.read_text().split("\n")[:-1])
    assert not [item for item in range(count) if f"begun {item}" not in lines]
    assert not [line for line, times in lines.items() if line.startswith("done") and times > 1]
    ended = {line.split()[1] for line in lines if line.startswith("done")}
    again = {line.split()[1] for line, times in lines.items() if line.startswith("begun") and times > 1}
    # Whoever was killed between the mark and its entry in the diary has done it as well.
    assert count - crew.killed <= len(ended) <= count
    assert len(again) <= crew.killed
