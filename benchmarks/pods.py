"""What a driver in a pod measures of its pods: ``python -m benchmarks.pods [--workers N] [--rounds N] [--idle SECONDS]``.

Started in a cluster by the module cluster. Prints one line for each figure, a name and JSON, and for the idle time a
line at its begin and one at its end: who counts calls of the API server is somebody else.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time

from fiberexec import FiberExecutor


def container_start() -> tuple[str, float]:
    """In a task: this host's name, and the time at which its container's first process was started.

    That is when the container came to run: the cluster says it later, and in whole seconds.
    """
    with open("/proc/uptime") as uptime, open("/proc/1/stat") as stat:
        boot = time.time() - float(uptime.read().split()[0])
        ticks = int(stat.read().rpartition(")")[2].split()[19])
    return socket.gethostname(), boot + ticks / os.sysconf("SC_CLK_TCK")


def nap(seconds: float) -> tuple[str, float]:
    """The same, slowly: so that every worker gets its share."""
    time.sleep(seconds)
    return container_start()


def say(figure: str, **values: float) -> None:
    print(f"FIGURE {figure} {json.dumps(values)}", flush=True)


def first_result() -> None:
    """Seconds from a container's start to the first task's result, and from submit()."""
    begun = time.time()
    with FiberExecutor(1) as executor:
        _, started = executor.submit(container_start).result()
        now = time.time()
        say("first_result", from_running=now - started, from_submit=now - begun)


def joined(workers: int) -> None:
    """Seconds from the last container's start until all workers have joined."""
    begun = time.time()
    with FiberExecutor(workers, min_workers=workers) as executor:
        while sum(worker.state != "starting" for worker in executor.workers()) < workers:
            time.sleep(0.02)
        now = time.time()
        starts: dict[str, float] = {}
        while len(starts) < workers:
            starts.update(executor.map(nap, [0.2] * (2 * workers)))
        say("joined", workers=workers, from_last_start=now - max(starts.values()), from_first=now - begun)


def idle(seconds: float) -> None:
    """An executor with two workers that has nothing to do."""
    with FiberExecutor(2, min_workers=2) as executor:
        list(executor.map(nap, [0.1] * 4))
        time.sleep(2)  # what is new has been seen
        say("idle_begins", seconds=seconds)
        time.sleep(seconds)
        say("idle_ends", seconds=seconds)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pods")
    parser.add_argument("--workers", type=int, default=50, metavar="N", help="that join (default 50)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="first results (default 5)")
    parser.add_argument("--idle", type=float, default=60.0, metavar="S", help="seconds (default 60)")
    options = parser.parse_args()
    for _ in range(options.rounds):
        first_result()
    joined(options.workers)
    idle(options.idle)


if __name__ == "__main__":
    main()
