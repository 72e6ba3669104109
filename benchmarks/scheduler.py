"""The scheduler alone: simulated workers that answer at once, events in batches, no processes and no sockets.

Times are of the processor, so that other programs on the machine don't count; the scheduler never waits.
Run ``python -m benchmarks.scheduler`` for a table over the number of workers, and for where the time goes.
"""

from __future__ import annotations

import argparse
import gc
from collections import deque
from time import thread_time

from fiberexec._scheduler import Limits, Profile, Scheduler, Task
from fiberexec._scheduler import events as ev
from fiberexec.backends.base import Pool, Resources

BATCH = 1000  # tasks in one Submitted event
AHEAD = 100_000  # tasks that the program has submitted before they are needed, at least
WINDOWS = 10  # parts of a measurement; the best of them counts, the least disturbed by what else runs
ROUNDS = 100  # tasks a worker that pass before the measurement begins
COST = 100e-6  # seconds that a worker says it took for a task
OUTCOME = (0, b"", ())


class Bench:
    """A scheduler, its clock, and workers that have an answer ready for whatever they are sent."""

    def __init__(self, workers: int) -> None:
        self.scheduler = Scheduler(Limits(max_workers=workers, min_workers=workers))
        self.now = 0.0
        self.spent = 0.0  # seconds inside the scheduler
        self.answers: deque[ev.Replied | ev.RecallDone] = deque()
        pool = Pool("bench", Resources(workers, 0, 0))
        self.tell(ev.Tick())
        for worker in list(self.scheduler.fleet.workers):
            self.tell(ev.WorkerStarted(worker, f"job-{worker}", pool))
            self.tell(ev.WorkerReady(worker))

    def tell(self, event: object) -> None:
        start = thread_time()
        actions = self.scheduler.handle(event, self.now)
        took = thread_time() - start
        self.spent += took
        self.now += took
        for action in actions:
            if type(action) is ev.Send:
                records = [(number, stop - begin, OUTCOME, COST) for number, _, begin, stop in action.units]
                self.answers.append(ev.Replied(action.worker, records))
            elif type(action) is ev.Recall:
                self.answers.append(ev.RecallDone(action.worker, action.number))  # everything was claimed

    def run(self, tasks: list[Task]) -> None:
        """Submit tasks as a program does that is always ahead of its workers."""
        first = 0
        while first < len(tasks):
            if self.scheduler.queue.items < AHEAD:
                self.tell(ev.Submitted(tasks[first : first + BATCH]))
                first += BATCH
            else:
                self.answer()

    def answer(self) -> None:
        """Let the worker that has waited longest say what became of its batch."""
        self.tell(self.answers.popleft())


def measure(workers: int, tasks: int) -> float:
    """Return tasks a second once every worker is busy: each is submitted, assigned, answered and settled by itself."""
    bench = Bench(workers)
    profile = Profile("bench")
    bench.tell(ev.Submitted([Task(0, profile)]))
    bench.answer()  # now its cost is known
    total = AHEAD + ROUNDS * workers + tasks
    ready = [Task(number, profile) for number in range(1, total + 1)]
    collecting = gc.isenabled()
    gc.disable()  # the tasks of this benchmark are all alive at once; those of a program come and go
    try:
        bench.run(ready[:-tasks])
        rate = 0.0
        for start in range(total - tasks, total, max(1, tasks // WINDOWS)):
            done, bench.spent = bench.scheduler.done, 0.0
            bench.run(ready[start : start + max(1, tasks // WINDOWS)])
            rate = max(rate, (bench.scheduler.done - done) / bench.spent)
        while bench.answers:
            bench.answer()
    finally:
        if collecting:
            gc.enable()
    if bench.scheduler.open:
        raise RuntimeError(f"{bench.scheduler.open} tasks were not settled")
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scheduler", description=__doc__)
    parser.add_argument("--tasks", type=int, default=200_000, metavar="N", help="tasks a run (default 200,000)")
    parser.add_argument("--profile", type=int, metavar="WORKERS", help="say where the time goes with so many workers")
    options = parser.parse_args()
    if options.profile:
        import cProfile

        names = {"workers": options.profile, "tasks": options.tasks}
        cProfile.runctx("measure(workers, tasks)", globals(), names, sort="tottime")
        return
    print("| workers | tasks/s | µs a task |\n|---|---|---|")
    for workers in (1, 10, 100, 1000):
        rate = measure(workers, options.tasks)
        print(f"| {workers:,} | {rate:,.0f} | {1e6 / rate:.2f} |")


if __name__ == "__main__":
    main()
