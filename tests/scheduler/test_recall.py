"""What is taken back from a worker, and what had better stay: on a simulated cluster whose links take their time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from fiberexec._scheduler import Profile, Task
from fiberexec._scheduler import events as ev
from fiberexec.testing import Attempt, Simulation

Make = Callable[..., Simulation]


class Payload:
    size = 1 << 20


def submit(simulation: Simulation, profile: Profile, count: int) -> list[Task]:
    """Submit tasks with large payloads."""
    tasks = [Task(simulation._next_id + i, profile, Payload()) for i in range(count)]
    simulation._next_id += count
    simulation.submitted += count
    simulation.tell(ev.Submitted(tasks))
    return tasks


def slow_links(simulation: Simulation, seconds: Callable[[], float]) -> list[int]:
    """Let each task take so long on its way, one after the other; recalls overtake them. Returns the ids of what is sent."""
    sent: list[int] = []
    free: dict[int, float] = defaultdict(float)  # when a worker's link has delivered what was sent before
    receive = simulation._receive

    def carry(worker: Any, send: ev.Send) -> None:
        sent.extend(task.id for _, task, _, _ in send.units)
        free[worker.id] = max(simulation.now, free[worker.id]) + seconds() * len(send.units)
        simulation.at(free[worker.id], lambda: receive(worker, send))

    simulation._receive = carry  # type: ignore[method-assign]
    return sent


@pytest.mark.parametrize("seconds", [0.004, 0.03, 0.3])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_tasks_arrive_however_long_their_way_is(simulate: Make, workers: int, seconds: float) -> None:
    sim = simulate(workers, work=lambda item, attempt: Attempt(0.00001))
    sent = slow_links(sim, lambda: seconds)
    submit(sim, sim.profile(), 60)
    sim.run(events=20_000)
    assert Counter(sim.outcomes.values()) == {"value": 60}
    assert len(sent) <= 3 * 60, "most of what travels is taken back before it is there"


def test_tasks_get_through_a_host_that_looks_at_its_messages_rarely(simulate: Make) -> None:
    """What it is sent and the recall of that come in together, and the worker says so before the recall is answered."""
    sim = simulate(2, work=lambda item, attempt: Attempt(0.00001))
    receive, recall = sim._receive, sim._recall

    def next_look() -> float:
        return (int(sim.now / 0.05) + 1) * 0.05

    sim._receive = lambda worker, send: sim.at(next_look(), lambda: receive(worker, send))  # type: ignore[method-assign]
    sim._recall = lambda worker, number: sim.at(next_look(), lambda: recall(worker, number))  # type: ignore[method-assign]
    sim.submit(sim.profile(), tasks=500)
    sim.run(events=20_000)
    assert Counter(sim.outcomes.values()) == {"value": 500}


def test_when_the_way_is_short_again_nobody_waits_behind_a_slow_task(simulate: Make) -> None:
    way = 0.1
    sim = simulate(2, work=lambda item, attempt: Attempt(0.5 if item == slow else 0.00001))
    slow = 0
    slow_links(sim, lambda: way)
    profile = sim.profile()
    submit(sim, profile, 60)
    sim.run(events=20_000)
    way = 0.0
    submit(sim, profile, 60)  # their replies show it
    sim.run()
    began = sim.now
    slow = submit(sim, profile, 20)[4].id
    done: dict[int, float] = {}
    settle = sim._settle

    def note(task: Task, outcome: str) -> None:
        done[task.id] = sim.now - began
        settle(task, outcome)

    sim._settle = note  # type: ignore[method-assign]
    sim.run()
    late = {task: seconds for task, seconds in done.items() if task != slow and seconds > 0.1}
    assert not late, "they waited behind the slow one"
