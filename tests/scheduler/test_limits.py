"""Time limits, stopping by hand, retries."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest

from fiberexec._scheduler import events as ev
from fiberexec.testing import Attempt, Simulation

Make = Callable[..., Simulation]
HANG = Attempt(math.inf)
TINY = Attempt(0.00002)


# -- time limits


def test_a_task_ends_at_its_time_limit(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: HANG)
    sim.submit(sim.profile(timeout=3.0), 1)
    sim.run()
    assert sim.outcomes == {1: "timeout"}
    assert sim.now == pytest.approx(0.05 + 3.0, abs=0.01)


def test_a_task_that_ignores_sigterm_is_killed_after_the_grace(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: Attempt(math.inf, stubborn=True))
    sim.submit(sim.profile(timeout=1.0), 1)
    sim.run()
    assert sim.outcomes == {1: "timeout"}
    assert sim.now == pytest.approx(0.05 + 1.0 + sim.scheduler.limits.grace, abs=0.01)


def test_a_time_limit_is_for_the_item_alone(simulate: Make) -> None:
    sim = simulate(2, work=lambda item, attempt: HANG if item % 100 == 0 else TINY)
    sim.submit(sim.profile(timeout=0.5, max_losses=1), 300)
    sim.run()
    assert {i for i, o in sim.outcomes.items() if o == "timeout"} == {100, 200, 300}
    assert {o for i, o in sim.outcomes.items() if i % 100} == {"value"}
    assert sim.scheduler.lost == 0, "a worker that was stopped is charged to nobody"


def test_a_limit_that_is_shorter_than_a_stall_is_for_the_item_alone(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: HANG if item == 100 else TINY)
    sim.submit(sim.profile(timeout=0.002, max_losses=1), 300)
    sim.run()
    assert [item for item, outcome in sim.outcomes.items() if outcome != "value"] == [100]
    assert sim.outcomes[100] == "timeout"


def test_a_limit_counts_from_the_items_own_start(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: Attempt(0.09))
    sim.submit(sim.profile(timeout=0.1), 20)
    sim.run()
    assert set(sim.outcomes.values()) == {"value"}


def test_a_shorter_limit_is_kept_after_a_longer_one(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: HANG if item == 2 else TINY)
    sim.submit(sim.profile(timeout=1000.0), 1)
    sim.run()
    sim.submit(sim.profile(timeout=0.2), 1)
    sim.run()
    assert sim.outcomes == {1: "value", 2: "timeout"}
    assert sim.now < 1.0


def test_looking_at_limits_costs_no_timer_a_task(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: Attempt(0.002))
    sim.submit(sim.profile(timeout=1000.0), 200)
    sim.run(until=0.4)
    assert len(sim.scheduler._agenda._later) < 20


def test_a_time_limit_is_retried_only_if_the_policy_says_so(simulate: Make) -> None:
    asked: list[object] = []

    def again(attempt: int, outcome: object) -> float | None:
        asked.append(outcome)
        return 0.1 if outcome is None and attempt < 3 else None

    sim = simulate(1, work=lambda item, attempt: TINY if item == 1 and attempt == 2 else HANG)
    sim.submit(sim.profile(timeout=0.1, retry=again), 1)
    sim.submit(sim.profile(timeout=0.1, retry=lambda attempt, outcome: None), 1)
    sim.run()
    assert sim.outcomes == {1: "value", 2: "timeout"}
    assert asked == [None, "value"]


# -- stopping by hand


def test_terminate_ends_what_waits_at_once(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: HANG)
    _, second = sim.submit(sim.profile(), 1, tasks=2)
    sim.run(until=1.0)
    sim.terminate(second)
    assert sim.outcomes == {2: "cancelled"} and 2 not in sim.attempts


def test_terminate_stops_what_runs_and_charges_nobody(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: HANG)
    (task,) = sim.submit(sim.profile(max_losses=1, retry=lambda attempt, outcome: 0.0), 1)
    sim.run(until=1.0)
    sim.terminate(task)
    sim.run()
    assert sim.outcomes == {1: "cancelled"} and sim.scheduler.lost == 0 and sim.attempts == {1: 1}


def test_terminate_takes_back_what_is_next_in_line_without_harm_to_what_runs(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: Attempt(0.004) if item == 30 else TINY)
    tasks = sim.submit(sim.profile(), 1, tasks=60)
    sim.run(until=0.0515)
    worker = next(iter(sim.workers.values()))
    assert worker.waiting
    sim.terminate(tasks[35])
    sim.run()
    assert sim.outcomes[36] == "cancelled" and 36 not in sim.attempts
    assert sum(outcome == "value" for outcome in sim.outcomes.values()) == 59
    assert max(sim.attempts.values()) == 1 and sim.scheduler.lost == 0


def test_terminating_a_whole_batch_recalls_it_once(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: HANG if item == 30 else TINY)
    tasks = sim.submit(sim.profile(), 1, tasks=60)
    sim.run(until=0.0515)
    recalls: list[int] = []
    recall = sim._recall
    sim._recall = lambda worker, number: (recalls.append(number), recall(worker, number))  # type: ignore[method-assign]
    for task in tasks[29:]:
        sim.terminate(task)
    sim.run()
    assert len(recalls) == 1
    assert {item for item, outcome in sim.outcomes.items() if outcome == "cancelled"} == set(range(30, 61))


def test_terminate_of_what_runs_in_a_batch_stops_that_and_nothing_else(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: HANG if item == 30 else TINY)
    tasks = sim.submit(sim.profile(), 1, tasks=60)
    sim.run(until=0.0515)
    sim.terminate(tasks[29])
    sim.run()
    assert sim.outcomes[30] == "cancelled"
    assert sum(outcome == "value" for outcome in sim.outcomes.values()) == 59
    assert max(sim.attempts.values()) == 1


def test_terminate_of_what_has_run_and_not_been_reported_does_not_stop_its_worker(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: Attempt(0.05) if item == 30 else TINY)
    tasks = sim.submit(sim.profile(), 1, tasks=60)
    sim.run(until=0.0515)
    worker = next(iter(sim.workers.values()))
    done = [number for number, _, _, _ in worker.done]
    unreported = [unit.task for unit in sim.scheduler.fleet.workers[worker.id].inflight if unit.number in done]
    assert unreported, "the case needs a result that its worker keeps back"
    sim.terminate(unreported[0])
    sim.run()
    assert sim.outcomes[unreported[0].id] == "cancelled"
    assert max(sim.attempts.values()) == 1, "what was running at the time ran once"
    assert sim.outcomes[tasks[29].id] == "value"


def test_terminate_ends_a_task_that_waits_for_its_next_attempt(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: Attempt(0.001, "error"))
    (task,) = sim.submit(sim.profile(retry=lambda attempt, outcome: 100.0), 1)
    sim.run(until=1.0)
    assert sim.scheduler.delayed == 1
    sim.terminate(task)
    assert sim.outcomes == {1: "cancelled"} and sim.scheduler.delayed == 0


def test_terminate_of_what_is_done_changes_nothing(simulate: Make) -> None:
    sim = simulate(1)
    (task,) = sim.submit(sim.profile(), 1)
    sim.run()
    sim.terminate(task)
    assert sim.outcomes == {1: "value"}


# -- retries


def test_thousands_wait_for_their_next_attempt_at_once(simulate: Make) -> None:
    sim = Simulation(2, work=lambda item, attempt: Attempt(0.0001, "error" if attempt == 1 else "value"))
    sim.submit(sim.profile(retry=lambda attempt, outcome: 60.0 if outcome == "error" else None), 1, tasks=5000)
    sim.run(until=50.0)
    assert sim.scheduler.delayed == 5000 and not sim.outcomes
    sim.run()
    assert sim.now == pytest.approx(60.3, abs=0.5)
    assert set(sim.outcomes.values()) == {"value"} and sim.scheduler.retried == 5000


def test_what_breaks_while_a_policy_is_being_asked_settles_that_task_too(simulate: Make) -> None:
    def ask(attempt: int, outcome: object) -> float:
        sim.tell(ev.Broken(RuntimeError("meanwhile")))
        return 1.0

    sim = simulate(1, work=lambda item, attempt: Attempt(0.001, "error"))
    sim.submit(sim.profile(retry=ask), 1)
    sim.run()
    assert sim.outcomes == {1: "broken"}


def test_a_delay_is_kept(simulate: Make) -> None:
    starts: list[float] = []

    def work(item: int, attempt: int) -> Attempt:
        starts.append(sim.now)
        return Attempt(0.01, "error")

    sim = simulate(1, work=work)
    sim.submit(sim.profile(retry=lambda attempt, outcome: float(attempt) if attempt < 4 else None), 1)
    sim.run()
    assert [b - a for a, b in pairwise(starts)] == pytest.approx([1.01, 2.01, 3.01])
    assert sim.outcomes == {1: "error"}
