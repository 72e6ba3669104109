"""What is measured: one function a workload, each on a warm peer, each returning one number.

A workload that would take a slow peer too long does fewer tasks (``fitting``): every number is a rate or a
time per unit, so they still compare.
"""

from __future__ import annotations

import gc
import heapq
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from . import tasks
from .peers import Peer

MIB = 1 << 20
SEED = 20240607

Workload = Callable[[Peer, bool], float]


def fitting(count: int, trial: int, run: Callable[[int], object], cap: float = 8.0) -> int:
    """Return how many of ``count`` a peer can do in about ``cap`` seconds, judged by a trial run."""
    start = time.perf_counter()
    run(trial)
    each = (time.perf_counter() - start) / trial
    return max(trial, min(count, int(cap / each)))


def latency(peer: Peer, quick: bool) -> float:
    """Median microseconds of ``submit().result()``."""
    times = []
    for _ in range(100 if quick else 500):
        start = time.perf_counter()
        peer.wait([peer.submit(tasks.noop)])
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def submitted(peer: Peer, function: Callable[..., Any], quick: bool, count: int) -> float:
    """Tasks per second from the first ``submit`` to the last result."""

    def run(number: int) -> None:
        peer.wait([peer.submit(function, i) for i in range(number)])

    count = fitting(count // 10 if quick else count, 100, run)
    gc.collect()
    start = time.perf_counter()
    run(count)
    return count / (time.perf_counter() - start)


def submit(peer: Peer, quick: bool) -> float:
    """Tasks per second: 10,000 tiny tasks."""
    return submitted(peer, tasks.noop, quick, 10_000)


def closure(peer: Peer, quick: bool) -> float:
    """Tasks per second: 10,000 calls of a closure that is defined in ``__main__``."""
    return submitted(peer, sys.modules["__main__"].make_closure(), quick, 10_000)


def mapped(peer: Peer, quick: bool, count: int) -> float:
    def run(number: int) -> None:
        got = peer.map(tasks.increment, range(number))
        if len(got) != number or got[-1] != number:
            raise AssertionError("map returned something else than it should")

    count = fitting(count // 10 if quick else count, 1000, run)
    gc.collect()
    start = time.perf_counter()
    run(count)
    return count / (time.perf_counter() - start)


def map_1e5(peer: Peer, quick: bool) -> float:
    """Items per second: ``list(map(increment, range(100_000)))``, the peer's default chunking."""
    return mapped(peer, quick, 100_000)


def map_1e6(peer: Peer, quick: bool) -> float:
    """Items per second: ``list(map(increment, range(1_000_000)))``, the peer's default chunking."""
    return mapped(peer, quick, 1_000_000)


def ideal_makespan(durations: Sequence[float], workers: int) -> float:
    """Seconds that a perfect executor needs: every item goes to the first worker that is free, at no cost."""
    free = [0.0] * workers
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def times_ideal(peer: Peer, durations: list[float], workers: int) -> float:
    """Time over what a perfect executor needs for the same naps, each as long as it really was."""
    peer.map(tasks.nap, [0.001] * workers)
    start = time.perf_counter()
    taken = peer.map(tasks.nap, durations)
    return (time.perf_counter() - start) / ideal_makespan(taken, workers)


def uneven(peer: Peer, quick: bool) -> float:
    """Time over the ideal (about 1.5 s): nine naps of 2 ms to one of 60 ms, shuffled, on five workers."""
    count = 200 if quick else 1000
    durations = [0.06 if i % 10 == 0 else 0.002 for i in range(count)]
    random.Random(SEED).shuffle(durations)
    return times_ideal(peer, durations, 5)


def nap100(peer: Peer, quick: bool) -> float:
    """Time over the ideal: naps of 100 ms, ten for each of five workers."""
    return times_ideal(peer, [0.1] * (10 if quick else 50), 5)


def echo_1m(peer: Peer, quick: bool) -> float:
    """MB per second, one way: bytes of 1 MiB, all submitted, then awaited; the median of three turns after a first."""
    content = os.urandom(MIB)
    count = 20 if quick else 200
    # Distinct objects: a pickle that holds one object twice would carry it once.
    payloads = [bytes(bytearray(content)) for _ in range(count)]

    def run(number: int) -> None:
        got = peer.wait([peer.submit(tasks.echo, payload) for payload in payloads[:number]])
        if got[-1] != content:
            raise AssertionError("the echo differs")

    times = []
    for _ in range(4):
        start = time.perf_counter()
        run(count)
        times.append(time.perf_counter() - start)
    return count * MIB / 1e6 / statistics.median(times[1:])  # the first has the system find 200 MiB for the results


def echo_64m(peer: Peer, quick: bool) -> float:
    """MB per second, one way: a numpy array of 64 MiB, one at a time, every page of the result read."""
    import numpy

    array = numpy.arange(8 * MIB, dtype="f8")
    expected = float(array[::512].sum())
    times = []
    for _ in range(3 if quick else 7):
        start = time.perf_counter()
        (got,) = peer.wait([peer.submit(tasks.echo, array)])
        same = float(got[::512].sum()) == expected
        times.append(time.perf_counter() - start)
        if not same:
            raise AssertionError("the echo differs")
        del got
    return 64 * MIB / 1e6 / statistics.median(times[1:])


def shutdown(peer: Peer, quick: bool) -> float:
    """Milliseconds: shut down a warm, idle pool."""
    times = []
    for turn in range(1 if quick else 5):
        if turn:
            peer.open(2)
            peer.warm(2)
        time.sleep(0.2)  # so that the pool is idle, its threads too
        start = time.perf_counter()
        peer.close()
        times.append(time.perf_counter() - start)
    peer.open(2)  # the cell closes what it opened
    return statistics.median(times) * 1e3


def beside(peer: Peer, quick: bool) -> float:
    """Milliseconds that the slowest hundredth of small tasks takes while one 64 MiB array after the other is echoed."""
    import threading

    import numpy as np

    array = np.zeros(64 * MIB, np.uint8)
    over = threading.Event()

    def echo() -> None:
        while not over.is_set():
            peer.wait([peer.submit(tasks.echo, array)])

    thread = threading.Thread(target=echo)
    thread.start()
    times = []
    try:
        for _ in range(100 if quick else 1000):
            start = time.perf_counter()
            peer.wait([peer.submit(tasks.noop)])
            times.append(time.perf_counter() - start)
    finally:
        over.set()
        thread.join()
    return statistics.quantiles(times, n=100)[-1] * 1e3


WORKLOADS: dict[str, Workload] = {
    function.__name__: function
    for function in (
        latency,
        submit,
        closure,
        map_1e5,
        map_1e6,
        uneven,
        nap100,
        echo_1m,
        echo_64m,
        beside,
        shutdown,
    )
}
