"""A thousand workers, and what is left of tasks that are done."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable

from fiberexec._scheduler.records import Task, Unit
from fiberexec.backends.base import Exit
from fiberexec.testing import Attempt, Simulation

Make = Callable[..., Simulation]


def test_a_thousand_workers_under_fire_settle_everything_once() -> None:
    chance = random.Random(11)
    poison = 7_777

    def work(item: int, attempt: int) -> Attempt:
        return Attempt(0.001, "crash") if item == poison else Attempt(chance.uniform(0.0001, 0.02))

    sim = Simulation(1000, work=work, workers_per_job=8, launch=lambda n: chance.uniform(0.5, 3.0))
    profile = sim.profile()
    sim.submit(profile, 100, tasks=200)

    def strike() -> None:
        if not sim.scheduler.open:
            return
        if sim.workers:
            victim = chance.choice(list(sim.workers.values()))
            if chance.random() < 0.3:
                sim.kill_job(victim.job, Exit(None, "node lost", infrastructure=True))
            elif chance.random() < 0.5:
                sim.kill_job(victim.job)
            else:
                sim.kill(victim.id)
        sim.at(sim.now + 0.01, strike)

    sim.at(1.0, strike)
    sim.close()
    sim.run()
    assert len(sim.outcomes) == 20_000
    assert {item for item, outcome in sim.outcomes.items() if outcome != "value"} == {poison}
    assert sim.scheduler.finished


def test_a_suspicious_job_costs_a_thousand_workers_little() -> None:
    sim = Simulation(1000, work=lambda item, attempt: Attempt(0.01), workers_per_job=8)
    sim.submit(sim.profile(), 20_000)
    sim.at(0.1, lambda: sim.kill_job("3"))
    sim.run()
    assert len(sim.outcomes) == 20_000 and set(sim.outcomes.values()) == {"value"}
    assert sim.now < 0.05 + 20_000 * 0.01 / 1000 + 0.2


def test_nothing_is_kept_of_tasks_that_are_done() -> None:
    sim = Simulation(4, work=lambda item, attempt: Attempt(0.0001), max_tasks_per_child=100)
    sizes = []
    for _ in range(4):
        profile = sim.profile(timeout=5.0, retry=lambda attempt, outcome: 0.01 if attempt == 1 else None)
        sim.submit(profile, 1, tasks=300)
        sim.submit(sim.profile(), 300)
        sim.run()
        sim.run(until=sim.now + 30.0)
        gc.collect()
        sizes.append(sum(type(thing) in (Task, Unit) for thing in gc.get_objects()))
        assert len(sim.scheduler._agenda._later) <= 1, "timers of what has ended"
    assert sizes == [sizes[0]] * 4 and sizes[0] < 10
