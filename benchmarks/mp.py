"""``fiberexec.mp`` beside ``multiprocessing`` (spawn): one function a workload, each on either of the two.

Where the other side is a manager's object (the lock; one of the queues), that is what ``multiprocessing`` offers for the
same reach: an object that may be sent anywhere, and that the death of a process does not leave locked.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from . import tasks
from .peers import MpSpawn

MIB = 1 << 20

MpWorkload = Callable[[Any, bool], float]


def context(peer: str) -> Any:
    """The module, or what has its names, that this peer is."""
    if peer == MpSpawn.name:
        import multiprocessing

        return multiprocessing.get_context("spawn")
    from fiberexec import mp

    return mp


def timed(times: int, run: Callable[[], object]) -> float:
    """Median seconds of a run, after one that is not counted."""
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


# -- what runs in the other process


def feed(queue: Any, item: Any, count: int, ready: Any) -> None:
    ready.send(None)
    ready.recv()
    for _ in range(count):
        queue.put(item)


def answer(connection: Any) -> None:
    """Echo whatever comes until the other end closes."""
    while True:
        try:
            connection.send(connection.recv())
        except EOFError:
            return


def pour(connection: Any, item: bytes, count: int) -> None:
    connection.recv()
    for _ in range(count):
        connection.send(item)


# -- workloads


def pool_map(mp: Any, quick: bool, count: int) -> float:
    count = count // 10 if quick else count
    with mp.Pool(2) as pool:
        pool.map(tasks.nap, [0.05] * 4, chunksize=1)

        def run() -> None:
            if len(pool.map(tasks.increment, range(count))) != count:
                raise AssertionError("map returned something else than it should")

        run()
        gc.collect()
        return count / timed(3, run)


def mp_map_1e5(mp: Any, quick: bool) -> float:
    """Items per second: ``Pool(2).map`` of 100,000 tiny items."""
    return pool_map(mp, quick, 100_000)


def mp_map_1e6(mp: Any, quick: bool) -> float:
    """Items per second: ``Pool(2).map`` of 1,000,000 tiny items."""
    return pool_map(mp, quick, 1_000_000)


def queued(mp: Any, queue: Any, item: Any, count: int) -> float:
    """Items per second: another process puts, this one gets."""
    ready, theirs = mp.Pipe()
    process = mp.Process(target=feed, args=(queue, item, count, theirs))
    process.start()
    ready.recv()
    start = time.perf_counter()
    ready.send(None)
    for _ in range(count):
        queue.get()
    rate = count / (time.perf_counter() - start)
    process.join()
    return rate


def mp_queue(mp: Any, quick: bool) -> float:
    """Items per second through a ``Queue``: small tuples."""
    return queued(mp, mp.Queue(), (1, "item"), 5_000 if quick else 50_000)


def mp_queue_manager(mp: Any, quick: bool) -> float:
    """The same against ``Manager().Queue()``."""
    if getattr(mp, "_name", "") != "spawn":
        return mp_queue(mp, quick)
    with mp.Manager() as manager:
        return queued(mp, manager.Queue(), (1, "item"), 1_000 if quick else 10_000)


def mp_queue_1m(mp: Any, quick: bool) -> float:
    """MB per second through a ``Queue``: bytes of 1 MiB."""
    return queued(mp, mp.Queue(), os.urandom(MIB), 20 if quick else 200) * MIB / 1e6


def mp_queue_64m(mp: Any, quick: bool) -> float:
    """MB per second through a ``Queue``: bytes of 64 MiB."""
    return queued(mp, mp.Queue(), os.urandom(64 * MIB), 2 if quick else 6) * 64 * MIB / 1e6


def piped(mp: Any, item: bytes, count: int) -> float:
    ours, theirs = mp.Pipe()
    process = mp.Process(target=pour, args=(theirs, item, count))
    process.start()
    ours.send(None)
    ours.recv()
    start = time.perf_counter()
    for _ in range(count - 1):
        ours.recv()
    rate = (count - 1) * len(item) / 1e6 / (time.perf_counter() - start)
    process.join()
    return rate


def mp_pipe_1m(mp: Any, quick: bool) -> float:
    """MB per second through a ``Pipe``: bytes of 1 MiB."""
    return piped(mp, os.urandom(MIB), 20 if quick else 200)


def mp_pipe_64m(mp: Any, quick: bool) -> float:
    """MB per second through a ``Pipe``: bytes of 64 MiB."""
    return piped(mp, os.urandom(64 * MIB), 3 if quick else 8)


def mp_pipe(mp: Any, quick: bool) -> float:
    """Microseconds of a round trip through a ``Pipe``."""
    count = 500 if quick else 5_000
    ours, theirs = mp.Pipe()
    process = mp.Process(target=answer, args=(theirs,))
    process.start()
    theirs.close()

    def run() -> None:
        for number in range(count):
            ours.send(number)
            ours.recv()

    seconds = timed(3, run)
    ours.close()
    process.join()
    return seconds / count * 1e6


def mp_lock(mp: Any, quick: bool) -> float:
    """Microseconds to acquire and release a lock; ``multiprocessing``'s is a manager's."""
    count = 500 if quick else 5_000

    def measure(lock: Any) -> float:
        def run() -> None:
            for _ in range(count):
                lock.acquire()
                lock.release()

        return timed(3, run) / count * 1e6

    if getattr(mp, "_name", "") != "spawn":
        return measure(mp.Lock())
    with mp.Manager() as manager:
        return measure(manager.Lock())


def mp_manager(mp: Any, quick: bool) -> float:
    """Microseconds of a call of a manager's object."""
    count = 500 if quick else 5_000
    with mp.Manager() as manager:
        shared = manager.dict(key="value")

        def run() -> None:
            for _ in range(count):
                shared["key"]

        return timed(3, run) / count * 1e6


def mp_process(mp: Any, quick: bool) -> float:
    """Milliseconds from ``start()`` to the end of ``join()`` of a process that does nothing."""

    def run() -> None:
        process = mp.Process(target=tasks.noop)
        process.start()
        process.join()

    return timed(3 if quick else 20, run) * 1e3


MP_WORKLOADS: dict[str, MpWorkload] = {
    function.__name__: function
    for function in (
        mp_map_1e5,
        mp_map_1e6,
        mp_queue,
        mp_queue_manager,
        mp_queue_1m,
        mp_queue_64m,
        mp_pipe,
        mp_pipe_1m,
        mp_pipe_64m,
        mp_lock,
        mp_manager,
        mp_process,
    )
}
