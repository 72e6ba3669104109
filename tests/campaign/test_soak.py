"""Everything at once, at random: submits, maps, time limits, retries, cancels, terminations, crashes, kills of workers and of
the fork server. Every future is done in time, with an outcome that its task can have."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import tenacity

from fiberexec import FiberExecutor, FiberFuture, TaskTimeout, WorkerLost

BOUND = 120  # seconds after which a future that is not done hangs
pytestmark = pytest.mark.timeout(1200)


def spin(number: int, seconds: float) -> int:
    from time import monotonic

    end = monotonic() + seconds
    while monotonic() < end:
        pass
    return number


def sleep(number: int, seconds: float) -> int:
    time.sleep(seconds)
    return number


def fail(number: int) -> None:
    raise LookupError(number)


def die(number: int) -> None:
    os._exit(number % 200 + 1)


def large(number: int) -> bytes:
    return number.to_bytes(4, "little") * 50_000


class User:
    """One thread that submits at random and looks at what comes back."""

    def __init__(self, executor: FiberExecutor, seed: int, until: float, kills: bool) -> None:
        self._executor = executor
        self._rng = random.Random(seed)
        self._until = until
        self._lost: tuple[type[BaseException], ...] = (WorkerLost,) if kills else ()
        self.errors: list[BaseException] = []
        self.outcomes = 0
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            while time.monotonic() < self._until:
                expected = [self._submit(number) for number in range(self._rng.randint(1, 60))]
                if self._rng.random() < 0.3:
                    self._map()
                self._rng.shuffle(expected)
                for future, value, errors in expected:
                    self._look(future, value, errors)
        except BaseException as error:
            self.errors.append(error)

    def _submit(self, number: int) -> tuple[FiberFuture[Any], Any, tuple[type[BaseException], ...]]:
        rng, ex = self._rng, self._executor
        choice = rng.randrange(12)
        if choice < 4:
            return ex.submit(spin, number, rng.uniform(0, 0.003)), number, ()
        if choice == 4:
            return ex.submit(large, number), large(number), ()
        if choice == 5:
            return ex.submit(fail, number), None, (LookupError,)
        if choice == 6:
            return ex.options(max_worker_losses=rng.randint(1, 3)).submit(die, number), None, (WorkerLost,)
        if choice == 7:
            return ex.options(timeout=0.05).submit(sleep, number, 60), None, (TaskTimeout,)
        if choice == 8:
            policy = tenacity.Retrying(stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_fixed(0.01), reraise=True)
            return ex.options(retry=policy).submit(fail, number), None, (LookupError,)
        future = ex.submit(sleep, number, 0.02)
        if choice == 9:
            future.cancel()
        elif choice == 10:
            future.terminate()
        return future, number, (CancelledError,) if choice < 11 else ()

    def _look(self, future: FiberFuture[Any], value: Any, errors: tuple[type[BaseException], ...]) -> None:
        self.outcomes += 1
        try:
            assert future.result(BOUND) == value
        except (*errors, *self._lost):
            pass

    def _map(self) -> None:
        rng = self._rng
        count = rng.randint(0, 3000)
        buffersize = rng.choice([None, rng.randint(1, 500)])
        results = self._executor.map(abs, range(-count, 0), buffersize=buffersize, timeout=BOUND)
        if rng.random() < 0.3:
            next(results, None)
            results.close()  # type: ignore[attr-defined]
        else:
            assert list(results) == list(range(count, 0, -1))


def server_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


@pytest.mark.parametrize("kills", ["no kills", "workers killed", "fork server killed"])
@pytest.mark.parametrize("options", [{}, {"max_tasks_per_child": 20}, {"idle_timeout": 0.01}], ids=str)
def test_every_future_is_done_with_an_outcome_of_its_own(
    kills: str, options: dict[str, Any], size: Callable[[int, int], int], rng: random.Random
) -> None:
    if kills == "fork server killed" and sys.platform != "linux":
        pytest.skip("looks into /proc")
    until = time.monotonic() + size(2, 60)
    with FiberExecutor(3, **options) as ex:
        users = [User(ex, rng.getrandbits(32), until, kills != "no kills") for _ in range(3)]
        for user in users:
            user.thread.start()
        while any(user.thread.is_alive() for user in users):
            users[0].thread.join(rng.uniform(0.02, 0.4))
            pids = [worker.pid for worker in ex.workers() if worker.pid]
            if kills != "no kills" and pids and time.monotonic() < until:
                try:
                    pid = rng.choice(pids)
                    os.kill(pid if kills == "workers killed" else server_of(pid), signal.SIGKILL)
                except (OSError, IndexError):
                    continue  # it ended by itself
            if time.monotonic() > until + BOUND + 10:
                break
        for user in users:
            assert not user.errors, user.errors
            assert not user.thread.is_alive(), "hangs"
            assert user.outcomes
        assert ex.submit(abs, -3).result(BOUND) == 3
        stats = ex.stats()
        assert (stats.queued, stats.delayed) == (0, 0)
