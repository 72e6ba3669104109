"""Which task goes where, and when: on a simulated cluster, every invariant checked after every event."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from fiberexec._scheduler import events as ev
from fiberexec.backends.base import Resources
from fiberexec.testing import Attempt, Simulation

Make = Callable[..., Simulation]


def record_sends(simulation: Simulation) -> list[ev.Send]:
    """Every Send from now on."""
    sends: list[ev.Send] = []
    receive = simulation._receive

    def note(worker: Any, send: ev.Send) -> None:
        sends.append(send)
        receive(worker, send)

    simulation._receive = note  # type: ignore[method-assign]
    return sends


def items_in(send: ev.Send) -> int:
    return sum(stop - start for _, _, start, stop in send.units)


def test_what_is_not_measured_travels_alone(simulate: Make) -> None:
    sim = simulate(4, work=lambda item, attempt: Attempt(0.00001))
    sends = record_sends(sim)
    sim.submit(sim.profile(), 1000)
    sim.run(until=0.05)
    assert [items_in(send) for send in sends] == [1, 1, 1, 1]


def test_what_takes_long_is_never_sent_ahead(simulate: Make) -> None:
    sim = simulate(3, work=lambda item, attempt: Attempt(0.002))
    sends = record_sends(sim)
    sim.submit(sim.profile(), 50)
    sim.run()
    assert {items_in(send) for send in sends} == {1}
    assert len(sends) == 50


def test_what_is_cheap_travels_in_batches_of_a_few_milliseconds(simulate: Make) -> None:
    sim = simulate(2, work=lambda item, attempt: Attempt(0.00001))
    sends = record_sends(sim)
    sim.submit(sim.profile(), 100, tasks=100)
    sim.run()
    assert len(sends) < 120
    assert max(map(items_in, sends)) <= sim.scheduler.limits.ahead / 0.00001 + 1


def test_a_busy_worker_is_sent_more_before_it_runs_dry(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: Attempt(0.0001))
    sim.submit(sim.profile(), 5000)
    sim.run()
    worker = next(iter(sim.workers.values()))
    assert worker.busy / (sim.now - 0.05) > 0.99


@pytest.mark.parametrize("seconds", [0.1, 0.005, 0.0005])
def test_even_tasks_end_within_three_percent_of_the_ideal(simulate: Make, seconds: float) -> None:
    sim = simulate(5, work=lambda item, attempt: Attempt(seconds))
    sim.submit(sim.profile(), 500)
    sim.run()
    assert sim.now - 0.05 <= 1.03 * (500 * seconds / 5)


def test_uneven_tasks_end_within_three_percent_of_the_ideal(simulate: Make) -> None:
    costs = [0.001 * 1.05**i for i in range(100)]
    random.Random(7).shuffle(costs)
    sim = simulate(5, work=lambda item, attempt: Attempt(costs[item - 1]))
    sim.submit(sim.profile(), 1, tasks=100)
    sim.run()
    ideal = max(sum(costs) / 5, max(costs))
    longest = max(costs)
    assert sim.now - 0.05 <= ideal + longest, "list scheduling's own bound"
    sim = simulate(5, work=lambda item, attempt: Attempt(sorted(costs, reverse=True)[item - 1]))
    sim.submit(sim.profile(), 1, tasks=100)
    sim.run()
    assert sim.now - 0.05 <= 1.03 * ideal


def test_nothing_waits_behind_a_slow_task_while_another_worker_is_idle(simulate: Make) -> None:
    slow = 300
    sim = simulate(2, work=lambda item, attempt: Attempt(5.0 if item == slow else 0.00002))
    sim.submit(sim.profile(), 1000)
    sim.run(until=0.5)
    assert set(range(1, 1001)) - set(sim.outcomes) == {slow}
    assert sim.attempts[slow] == 1, "what was taken back is not what was running"
    assert max(sim.attempts.values()) == 1, "nothing was run twice"
    assert sim.scheduler.freed > 0


def test_results_of_cheap_neighbours_do_not_wait_for_a_slow_one(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: Attempt(5.0 if item == 300 else 0.00002))
    sim.submit(sim.profile(), 400)
    sim.run(until=0.5)
    assert set(range(1, 300)) <= set(sim.outcomes)


def test_a_higher_priority_is_served_first(simulate: Make) -> None:
    order: list[int] = []

    def work(item: int, attempt: int) -> Attempt:
        order.append(item)
        return Attempt(0.01)

    sim = simulate(1, work=work)
    low = sim.submit(sim.profile(), 5)[0]
    high = sim.submit(sim.profile(priority=1), 5)[0]
    sim.run()
    assert order == [*range(high.id, high.id + 5), *range(low.id, low.id + 5)]


def test_of_the_same_priority_who_came_first_is_served_first(simulate: Make) -> None:
    order: list[int] = []

    def work(item: int, attempt: int) -> Attempt:
        order.append(item)
        return Attempt(0.01)

    sim = simulate(1, work=work, capacity=Resources(4.0))
    plain, heavy = sim.profile(), sim.profile(demand=Resources(1.0))
    sim.submit(plain, 3)
    sim.submit(heavy, 3)
    sim.submit(plain, 3)
    sim.run()
    assert order == list(range(1, 10))


def test_a_task_that_nobody_takes_any_more_frees_its_place(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: Attempt(0.01))
    sim.submit(sim.profile(), 1)
    many = sim.submit(sim.profile(), 1, tasks=20)
    sim.run(until=0.055)
    sim.cancel(many)
    sim.run()
    assert [sim.outcomes[i] for i in range(1, 22)] == ["value"] + ["cancelled"] * 20


def test_no_more_is_promised_than_there_is(simulate: Make) -> None:
    sim = simulate(8, work=lambda item, attempt: Attempt(0.01), workers_per_job=0, capacity=Resources(4.0, 1000))
    sim.submit(sim.profile(demand=Resources(1.5, 100)), 1, tasks=10)
    sim.submit(sim.profile(demand=Resources(0.5, 400)), 1, tasks=10)
    sim.run()  # conftest.check_promises
    assert sim.scheduler.done == 20


def test_a_big_task_is_not_starved_by_small_ones(simulate: Make) -> None:
    sim = simulate(4, work=lambda item, attempt: Attempt(0.01), workers_per_job=0, capacity=Resources(4.0))
    small = sim.profile(demand=Resources(1.0))
    sim.submit(small, 1, tasks=4)
    sim.run(until=0.055)
    big = sim.submit(sim.profile(demand=Resources(4.0)), 1)[0]

    def more() -> None:
        if big.id not in sim.outcomes:
            sim.submit(small, 1, tasks=2)
            sim.at(sim.now + 0.003, more)

    more()
    sim.run(until=0.2)
    assert sim.outcomes[big.id] == "value"


def test_small_tasks_of_another_kind_go_on_while_a_big_one_waits(simulate: Make) -> None:
    sim = simulate(
        4, work=lambda item, attempt: Attempt(1.0 if item == 1 else 0.01), workers_per_job=0, capacity=Resources(2.0)
    )
    sim.submit(sim.profile(demand=Resources(1.0)), 1)
    big = sim.submit(sim.profile(demand=Resources(2.0)), 1)[0]
    free = sim.submit(sim.profile(), 10)[0]
    sim.run(until=0.5)
    assert all(item in sim.outcomes for item in range(free.id, free.id + 10))
    assert big.id not in sim.outcomes
    sim.run()
    assert sim.outcomes[big.id] == "value"


def test_each_gpu_task_has_devices_of_its_own(simulate: Make) -> None:
    sim = simulate(4, work=lambda item, attempt: Attempt(0.01), workers_per_job=0, devices=("0", "1", "2", "3"))
    sends = record_sends(sim)
    sim.submit(sim.profile(demand=Resources(0.0, 0, 2)), 1, tasks=6)
    sim.run()
    assert all(send.devices is not None and len(send.devices) == 2 for send in sends)


def test_a_process_keeps_the_devices_it_was_bound_to_and_makes_room_for_other_needs(simulate: Make) -> None:
    sim = simulate(2, work=lambda item, attempt: Attempt(0.01), workers_per_job=0, devices=("0", "1"))
    sends = record_sends(sim)
    for gpus in (1, 1, 2, 1, 2):
        sim.submit(sim.profile(demand=Resources(0.0, 0, gpus)), 1)
        sim.run()
    bound: dict[int, Any] = {}
    for send in sends:
        assert bound.setdefault(send.worker, send.devices) == send.devices, "a process saw two sets of devices"
    assert sim.scheduler.done == 5


def test_no_more_room_is_made_than_is_needed(simulate: Make) -> None:
    sim = simulate(4, work=lambda item, attempt: Attempt(0.01), workers_per_job=0, devices=("0", "1", "2", "3"))
    sim.submit(sim.profile(demand=Resources(0.0, 0, 1)), 1, tasks=4)
    sim.run()
    sim.submit(sim.profile(demand=Resources(0.0, 0, 2)), 1)
    sim.run()
    assert sim.scheduler.done == 5 and sim.launched == 5 and len(sim.workers) == 4


def test_a_worker_gets_no_more_tasks_than_max_tasks_per_child(simulate: Make) -> None:
    ran: dict[int, int] = {}
    sim = simulate(2, work=lambda item, attempt: Attempt(0.00001), max_tasks_per_child=7)
    sends = record_sends(sim)
    sim.submit(sim.profile(), 100)
    sim.run()
    for send in sends:
        ran[send.worker] = ran.get(send.worker, 0) + items_in(send)
    assert max(ran.values()) <= 7
    assert sim.scheduler.done == 100


def test_what_was_taken_back_does_not_count_against_max_tasks_per_child(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: Attempt(0.05 if item == 30 else 0.00002), max_tasks_per_child=50)
    sim.submit(sim.profile(), 100)
    sim.run()
    assert sim.scheduler.freed > 0 and sim.launched == 2


def test_nothing_runs_twice_when_a_slow_task_ends_while_its_neighbours_are_being_recalled(simulate: Make) -> None:
    def work(item: int, attempt: int) -> Attempt:
        return Attempt(0.005 + 0.0001 * (item // 50) if item % 50 == 0 else 0.00002)

    sim = simulate(2, work=work)
    recalls = 0
    recall = sim._recall

    def count(worker: int, number: int) -> None:
        nonlocal recalls
        recalls += 1
        recall(worker, number)

    sim._recall = count  # type: ignore[method-assign]
    sim.submit(sim.profile(), 1, tasks=4000)
    sim.run()
    assert recalls > 10
    assert max(sim.attempts.values()) == 1


def test_what_took_no_time_says_nothing_about_the_cost(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: Attempt(0.002 if item < 10 else 0.0))
    profile = sim.profile()
    sim.submit(profile, 9)
    sim.run()
    known = profile.cost
    sim.submit(profile, 1)
    sim.run()
    assert profile.cost == known


def test_lanes_that_are_empty_are_forgotten(simulate: Make) -> None:
    sim = simulate(2, work=lambda item, attempt: Attempt(0.0001), capacity=Resources(1.0, 10**6))
    for size in range(300):
        sim.submit(sim.profile(demand=Resources(0.0, size + 1)), 1)
        sim.run()
    assert len(sim.scheduler.queue._lanes) <= 1


def test_the_bytes_in_one_batch_are_limited(simulate: Make) -> None:
    class Payload:
        size = 1 << 18

    sim = simulate(1, work=lambda item, attempt: Attempt(0.00001))
    sends = record_sends(sim)
    profile = sim.profile()
    sim.submit(profile, 1)
    sim.run()
    from fiberexec._scheduler import Task

    tasks = [Task(10 + i, profile, Payload()) for i in range(40)]
    sim.submitted += 40
    sim.tell(ev.Submitted(tasks))
    sim.run()
    assert max(len(send.units) for send in sends) == sim.scheduler.limits.ahead_bytes // Payload.size
