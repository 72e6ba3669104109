"""Random histories: anything happens at any time, in any order that a cluster could produce."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from fiberexec._scheduler import Task
from fiberexec._scheduler import events as ev
from fiberexec._states import SENT
from fiberexec.backends.base import Exit, Resources
from fiberexec.testing import Attempt, Refusal, Simulation

FULL = os.environ.get("FIBEREXEC_CAMPAIGN") == "full"
EXAMPLES, STEPS = (2000, 100) if FULL else (80, 50)
DEMANDS = (None, None, Resources(1.0), Resources(0.5, 1 << 20), Resources(2.0, 0, 1), Resources(0.1, 0, 2))

attempts = st.builds(
    Attempt,
    seconds=st.sampled_from((0.0, 1e-5, 0.0005, 0.01, 1.0, math.inf)),
    ends=st.sampled_from(("value", "value", "value", "error", "crash")),
    stubborn=st.booleans(),
)
refusals = st.sampled_from((5.0, 1000.0, Refusal(OSError("no"), 0.1), Refusal(OSError("no"))))
launches = st.lists(st.one_of(st.just(0.0), st.just(0.05), st.just(0.05), refusals), min_size=1, max_size=5)
exits = st.builds(Exit, st.sampled_from((-9, 0, 1, None)), infrastructure=st.booleans())


class Cluster(Simulation):
    """What is to happen waits in a list, and the machine chooses what comes next."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.pending: list[Callable[[], None]] = []
        self.orderly = False
        super().__init__(*args, **kwargs)

    def at(self, due: float, function: Callable[[], None]) -> None:
        if self.orderly:
            super().at(due, function)
        else:
            self.pending.append(function)

    def order(self) -> None:
        """From now on everything goes its way, in the order of time."""
        self.orderly = True
        for function in self.pending:
            super().at(self.now, function)
        self.pending.clear()

    def disorder(self) -> None:
        """From now on anything may come next."""
        self.orderly = False
        self.pending += [function for _, _, function in sorted(self._agenda, key=lambda entry: entry[:2])]
        self._agenda.clear()


class Machine(RuleBasedStateMachine):
    def __init__(self, check: Callable[[Simulation], None]) -> None:
        super().__init__()
        self.check = check
        self.tasks: list[Task] = []
        self.behaviour: dict[int, list[Attempt]] = {}
        self.launching: list[Any] = [0.05]
        self.over = False

    @initialize(
        max_workers=st.integers(1, 4),
        min_workers=st.integers(0, 2),
        quota=st.sampled_from((None, None, 1, 3)),
        idle_timeout=st.sampled_from((None, 0.5)),
        per_job=st.sampled_from((0, 1, 1, 2)),
        launching=launches,
        devices=st.sampled_from(((), ("a", "b"))),
    )
    def start(
        self,
        max_workers: int,
        min_workers: int,
        quota: int | None,
        idle_timeout: float | None,
        per_job: int,
        launching: list[Any],
        devices: tuple[str, ...],
    ) -> None:
        self.launching = launching
        self.sim = Cluster(
            max_workers,
            work=self.work,
            launch=self.launch,
            workers_per_job=per_job,
            capacity=Resources(2.0, 1 << 21, len(devices)),
            devices=devices,
            min_workers=min(min_workers, max_workers),
            max_tasks_per_child=quota,
            idle_timeout=idle_timeout,
            startup_timeout=60.0,
        )
        self.sim.after_event = lambda: self.check(self.sim)

    def work(self, item: int, attempt: int) -> Attempt:
        plan = self.behaviour.get(item, [])
        tried = self.sim.attempts[item]
        return Attempt(0.0002) if self.over or tried > len(plan) else plan[tried - 1]

    def launch(self, n: int) -> Any:
        if self.over:
            return 0.01
        return self.launching[n % len(self.launching)]

    # -- the program

    @rule(
        items=st.sampled_from((1, 3, 40, 400)),
        tasks=st.integers(1, 3),
        plan=st.lists(attempts, max_size=3),
        demand=st.sampled_from(DEMANDS),
        priority=st.integers(0, 1),
        timeout=st.sampled_from((None, None, 0.1, 100.0)),
        retry=st.sampled_from((None, 0.0, 5.0)),
        max_losses=st.integers(1, 3),
    )
    def submit(
        self,
        items: int,
        tasks: int,
        plan: list[Attempt],
        demand: Resources | None,
        priority: int,
        timeout: float | None,
        retry: float | None,
        max_losses: int,
    ) -> None:
        if self.sim.scheduler.closing:
            return
        if demand is not None and demand.gpu > len(self.sim._devices):
            demand = None  # submit() refuses what never fits

        def again(attempt: int, outcome: str | None) -> float | None:
            return retry if attempt < 3 and outcome != "value" else None

        policy = None if retry is None else again
        profile = self.sim.profile(demand=demand, priority=priority, timeout=timeout, retry=policy, max_losses=max_losses)
        if retry is not None:
            items = 1
        first = self.sim._next_id
        for item in range(first, first + items * tasks):
            self.behaviour[item] = plan if items == 1 or item % 3 == 0 else []
        self.tasks += self.sim.submit(profile, items, tasks=tasks)

    @precondition(lambda self: self.tasks)
    @rule(index=st.integers(0, 1000))
    def cancel(self, index: int) -> None:
        self.sim.cancel([self.tasks[index % len(self.tasks)]])

    @precondition(lambda self: self.tasks)
    @rule(index=st.integers(0, 1000))
    def terminate(self, index: int) -> None:
        task = self.tasks[index % len(self.tasks)]
        self.sim.terminate(task)

    @rule()
    def terminate_what_is_sent(self) -> None:
        for worker in list(self.sim.scheduler.fleet.workers.values()):
            for unit in list(worker.inflight):
                if unit.task.state is SENT:
                    self.sim.terminate(unit.task)
            return

    # -- the world

    @precondition(lambda self: self.sim.pending)
    @rule(index=st.integers(0, 1000))
    def happen(self, index: int) -> None:
        self.sim.pending.pop(index % len(self.sim.pending))()

    @precondition(lambda self: self.sim.pending)
    @rule(count=st.integers(2, 30))
    def happen_in_order(self, count: int) -> None:
        for _ in range(min(count, len(self.sim.pending))):
            self.sim.pending.pop(0)()

    @rule(seconds=st.sampled_from((0.0001, 0.006, 0.2, 3.0, 100.0)))
    def all_goes_well(self, seconds: float) -> None:
        self.sim.order()
        self.sim.run(self.sim.now + seconds, events=10_000)
        self.sim.disorder()

    @rule(seconds=st.sampled_from((0.0001, 0.006, 0.2, 3.0, 100.0)))
    def time_passes(self, seconds: float) -> None:
        self.sim.now += seconds
        self.sim.tell(ev.Tick())

    @precondition(lambda self: self.sim.scheduler.wakeup() is not None)
    @rule()
    def wake_up(self) -> None:
        self.sim.now = max(self.sim.now, self.sim.scheduler.wakeup())
        self.sim.tell(ev.Tick())

    @precondition(lambda self: self.sim.workers)
    @rule(index=st.integers(0, 1000), exit=exits, known=st.booleans())
    def die(self, index: int, exit: Exit, known: bool) -> None:
        worker = list(self.sim.workers)[index % len(self.sim.workers)]
        self.sim.kill(worker, exit, running=known)

    @precondition(lambda self: self.sim.workers)
    @rule(index=st.integers(0, 1000))
    def leave(self, index: int) -> None:
        self.sim.tell(ev.WorkerLeaving(list(self.sim.workers)[index % len(self.sim.workers)]))

    @precondition(lambda self: self.sim.workers)
    @rule(index=st.integers(0, 1000))
    def flush(self, index: int) -> None:
        self.sim._flush(list(self.sim.workers.values())[index % len(self.sim.workers)])

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        chance = data.draw(st.integers(0, 39))
        if chance == 38:
            self.sim.close()
        elif chance == 39:
            self.sim.tell(ev.Broken(RuntimeError("told so"), data.draw(st.booleans())))

    def teardown(self) -> None:
        if not hasattr(self, "sim"):
            return
        self.over = True
        self.sim.order()
        for item, count in list(self.sim.attempts.items()):
            self.behaviour[item] = self.behaviour.get(item, [])[:count]
        for worker in list(self.sim.workers.values()):  # what hangs, and is not timed, would hang for ever
            if worker.running:
                self.sim.kill(worker.id)
        self.sim.close()
        self.sim.run(events=100_000)
        assert self.sim.scheduler.finished
        assert len(self.sim.outcomes) == self.sim.submitted


@pytest.mark.timeout(7200 if FULL else 120)
def test_nothing_is_lost_or_settled_twice_whatever_happens(check: Callable[[Simulation], None]) -> None:
    run_state_machine_as_test(
        lambda: Machine(check),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=not FULL,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
