"""Is memory flat, and the time for a task too, over a million tasks through one executor?"""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import time

from . import tasks
from .peers import Peer

KIB_PER_MIB = 1024


def peak_mib() -> float:
    """Return the most memory that this process has held, in MiB."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / KIB_PER_MIB
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / KIB_PER_MIB**2 if sys.platform == "darwin" else peak / KIB_PER_MIB


def resident_mib() -> float:
    """Return the memory that this process holds now, in MiB; without ``/proc``, its peak."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize() / KIB_PER_MIB**2
    except OSError:
        return peak_mib()


class Flatness:
    """Samples of memory and time along a long run, compared between its beginning and its end."""

    def __init__(self, samples: int) -> None:
        self.tenth = max(1, samples // 10)
        self.memory: list[float] = []
        self.times: list[float] = []
        self.last = time.perf_counter()

    def sample(self) -> None:
        now = time.perf_counter()
        self.times.append(now - self.last)
        self.memory.append(resident_mib())
        self.last = time.perf_counter()

    def results(self, name: str, count: int) -> dict[str, float]:
        """Return the end over the beginning: peak memory after the first tenth over that in it, median times.

        The first sample's time is left out: it fills the pipeline.
        """
        return {
            f"{name}_memory": max(self.memory[self.tenth :]) / max(self.memory[: self.tenth]),
            f"{name}_time": statistics.median(self.times[-self.tenth :]) / statistics.median(self.times[1 : self.tenth + 1]),
            f"{name}_rate": count / sum(self.times),
            f"{name}_mib": max(self.memory),
        }


def million(peer: Peer, quick: bool) -> dict[str, float]:
    """1,000,000 items through one ``map(buffersize=1000)``."""
    count, step = (100_000, 1000) if quick else (1_000_000, 10_000)
    gc.collect()
    flat = Flatness(count // step)
    for expected, got in enumerate(peer.pool.map(tasks.increment, range(count), buffersize=1000), 1):
        if got != expected:
            raise AssertionError(f"item {expected - 1} gave {got}")
        if expected % step == 0:
            flat.sample()
    return flat.results("million", count)


def waves(peer: Peer, quick: bool) -> dict[str, float]:
    """1,000,000 calls of ``submit``, in waves of 10,000."""
    count, step = (100_000, 1000) if quick else (1_000_000, 10_000)
    gc.collect()
    flat = Flatness(count // step)
    for start in range(0, count, step):
        futures = [peer.submit(tasks.increment, number) for number in range(start, start + step)]
        if peer.wait(futures) != list(range(start + 1, start + step + 1)):
            raise AssertionError("a wave gave wrong results")
        del futures
        flat.sample()
    return flat.results("waves", count)
