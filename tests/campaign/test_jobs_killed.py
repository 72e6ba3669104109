"""Jobs that are killed whole, again and again, while thousands of tasks run in them: each settles once, rightly."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fiberexec import FiberExecutor, WorkerLost
from fiberexec.testing._agents import AgentBackend

FULL = os.environ.get("FIBEREXEC_CAMPAIGN") == "full"
BOUND = 600 if FULL else 60  # seconds after which what is not done hangs


def work(diary: str, number: int) -> int:
    """Notes that it runs, and that it has run."""
    with open(f"{diary}/{number}", "a", encoding="ascii") as file:
        file.write("b")
        file.flush()
        time.sleep(0.01)
        file.write("e")
    return number


@pytest.mark.timeout(1200 if FULL else 120)
def test_a_random_job_is_killed_every_second(
    tmp_path: Path, rng: random.Random, size: Callable[[int, int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four workers, two a job: a task that is lost was running when its job was killed, and most are not."""
    agents: list[int] = []
    start = AgentBackend.start

    def watched(backend: AgentBackend, job: object) -> None:
        start(backend, job)  # type: ignore[arg-type]
        agents[:] = [process.pid for process in list(backend._processes.values())]

    monkeypatch.setattr(AgentBackend, "start", watched)
    stop = threading.Event()
    killed: list[int] = []

    def kill() -> None:
        while not stop.wait(1.0):
            pid = rng.choice(agents)
            try:
                psutil.Process(pid).kill()
                killed.append(pid)
            except psutil.NoSuchProcess:
                continue

    count = size(500, 10_000)
    with FiberExecutor(4, backend="agents", workers_per_job=2, max_worker_losses=20) as executor:
        assert executor.submit(int).result(BOUND) == 0
        thread = threading.Thread(target=kill)
        thread.start()
        try:
            futures = [executor.submit(work, str(tmp_path), number) for number in range(count)]
            lost = 0
            for number, future in enumerate(futures):
                error = future.exception(BOUND)
                if error is None:
                    assert future.result() == number
                else:
                    assert isinstance(error, WorkerLost)
                    lost += 1
        finally:
            stop.set()
            thread.join()
        assert lost == 0, "twenty kills of one task"
    assert killed
    for path in tmp_path.iterdir():
        runs = path.read_text().count("b")
        assert "e" in path.read_text() and runs <= 1 + len(killed)
    more = sum(path.stat().st_size for path in tmp_path.iterdir()) - 2 * count
    print(f"{count} tasks, {len(killed)} jobs killed, {more} more runs")
