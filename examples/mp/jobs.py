"""Workers take jobs from one queue and put results into another, until there are no more.

    python examples/mp/queue.py [jobs]

A worker that dies costs nothing: what it had taken from the `JoinableQueue` and not marked as done is
delivered to another one.
"""

from __future__ import annotations

import sys
from typing import Any

from fiberexec import mp


def work(jobs: Any, results: Any) -> None:
    """Square numbers until somebody ends this process."""
    while True:
        number = jobs.get()
        results.put((number, number * number))
        jobs.task_done()


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    jobs, results = mp.JoinableQueue(), mp.SimpleQueue()
    workers = [mp.Process(target=work, args=(jobs, results), daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    for number in range(count):
        jobs.put(number)
    jobs.join()
    squares = dict(results.get() for _ in range(count))
    print(f"{len(squares)} squares, the last of them {squares[count - 1]}")


if __name__ == "__main__":
    main()
