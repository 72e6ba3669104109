"""Pool: workers die."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from typing import Any

import pytest

from fiberexec import WorkerLost, mp
from fiberexec.mp.pool import Pool

from .helpers import LIMIT, Log, kill


def square(x: int) -> int:
    return x * x


def add(x: int, y: int = 10) -> int:
    return x + y


# -- faults


@pytest.mark.parametrize("kind", ["map", "imap", "imap_unordered", "apply_async"])
def test_a_worker_that_is_killed_costs_its_item_another_run_and_no_other_item(pool: Pool, log: Log, kind: str) -> None:
    def run(i: int) -> int:
        log.write(i)
        if i == 50 and log.lines().count("50") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return i

    if kind == "apply_async":
        found = [result.get(LIMIT) for result in [pool.apply_async(run, (i,)) for i in range(100)]]
    else:
        found = list(getattr(pool, kind)(run, range(100)))
    assert sorted(found) == list(range(100))
    runs = log.lines()
    assert runs.count("50") == 2
    assert max(map(runs.count, runs)) == 2  # what had not left the worker is run again, once


def test_an_item_that_kills_every_worker_is_the_only_one_that_fails(pool: Pool) -> None:
    def run(i: int) -> int:
        if i == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return i

    results = pool.imap(run, range(10))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(WorkerLost):
        next(results)
    assert list(results) == list(range(4, 10))
    with pytest.raises(WorkerLost):
        pool.map(run, range(10))
    assert pool.map(square, range(3)) == [0, 1, 4]


def test_no_item_runs_again_after_its_result_has_arrived_whoever_is_killed(log: Log) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)

    def run(i: int) -> int:
        log.write(i)
        time.sleep(0.001)
        return i

    with Pool(3, max_worker_losses=100) as pool:
        arrived = []
        for i in pool.imap_unordered(run, range(600)):
            log.write(f"done {i}")
            arrived.append(i)
            if len(arrived) % 40 == 0:
                with contextlib.suppress(ProcessLookupError):  # it had been killed before
                    kill(chance.choice([member for member in pool._pool if member.pid]))
    assert sorted(arrived) == list(range(600))
    done: set[str] = set()
    for line in log.lines():
        word, _, item = line.rpartition(" ")
        assert item not in done, f"{line} after its result"
        if word:
            done.add(item)


def test_all_workers_killed_at_once_while_they_hold_items(pool: Pool, log: Log) -> None:
    def run(i: int) -> int:
        log.write(i)
        if len(log.lines()) <= 2:
            time.sleep(LIMIT)
        return i

    result = pool.map_async(run, range(50))
    log.wait(2)
    for member in pool._pool:
        kill(member)
    assert result.get(LIMIT) == list(range(50))


def make() -> Any:
    queue, array = mp.Queue(), mp.Array("i", [1, 2])
    queue.put("from a worker")
    return queue, array


def take(queue: Any) -> Any:
    return queue.get(timeout=30)


def test_what_a_task_makes_to_share_outlives_its_worker() -> None:
    with Pool(1, maxtasksperchild=1) as pool:
        queue, array = pool.apply(make)
        assert array[:] == [1, 2]
        assert pool.apply(take, (queue,)) == "from a worker"
