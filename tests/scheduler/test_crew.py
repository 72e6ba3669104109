"""Workers come when they are needed, go when they are not, and an executor that can have none says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from fiberexec._scheduler import events as ev
from fiberexec._states import IDLE
from fiberexec.backends.base import Exit
from fiberexec.testing import Attempt, Refusal, Simulation

Make = Callable[..., Simulation]
NO = OSError("no quota")


def broken_because(sim: Simulation) -> str:
    assert sim.scheduler.broken is not None
    return str(sim.scheduler.broken)


# -- how many


@pytest.mark.parametrize(("items", "workers"), [(1, 1), (3, 3), (100, 5)])
def test_workers_start_on_demand_up_to_the_most(simulate: Make, items: int, workers: int) -> None:
    sim = simulate(5, work=lambda item, attempt: Attempt(0.01))
    sim.submit(sim.profile(), items)
    sim.run()
    assert sim.launched == workers


def test_tasks_that_come_one_by_one_start_no_more_workers_than_there_are_tasks(simulate: Make) -> None:
    sim = simulate(8, work=lambda item, attempt: Attempt(1.0))
    for _ in range(3):
        sim.submit(sim.profile(), 1)
    sim.run()
    assert sim.launched == 3


def test_the_least_are_there_without_a_task(simulate: Make) -> None:
    sim = simulate(4, min_workers=2, idle_timeout=1.0)
    sim.tell(ev.Tick())
    sim.run(until=100.0)
    assert len(sim.workers) == 2 and sim.launched == 2


def test_idle_workers_go_after_the_idle_timeout_down_to_the_least(simulate: Make) -> None:
    sim = simulate(5, min_workers=2, idle_timeout=1.0, work=lambda item, attempt: Attempt(0.01))
    sim.submit(sim.profile(), 50)
    sim.run()
    assert len(sim.workers) == 5
    end = sim.now
    sim.run(until=end + 0.9)
    assert len(sim.workers) == 5
    sim.run(until=end + 2.5)
    assert len(sim.workers) == 2 and sim.launched == 5, "none went that had to be replaced"


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("timeout", [0.0, 1e-9])
def test_an_idle_timeout_of_nothing_lets_workers_work(simulate: Make, least: int, timeout: float) -> None:
    sim = simulate(2, min_workers=least, idle_timeout=timeout, work=lambda item, attempt: Attempt(0.01))
    sim.run(until=1e6)  # a computer's clock may be so large that it does not notice a nanosecond
    sim.submit(sim.profile(), 3)
    sim.run(until=sim.now + 10)
    assert set(sim.outcomes.values()) == {"value"} and len(sim.outcomes) == 3
    assert sim.launched <= 4 and len(sim.workers) == least


def test_a_busy_worker_is_not_idle(simulate: Make) -> None:
    sim = simulate(1, idle_timeout=1.0, work=lambda item, attempt: Attempt(0.8))
    sim.submit(sim.profile(), 10)
    sim.run()
    assert sim.launched == 1


def test_without_an_idle_timeout_workers_stay(simulate: Make) -> None:
    sim = simulate(3)
    sim.submit(sim.profile(), 3)
    sim.run(until=1e6)
    assert len(sim.workers) == 3


def test_timers_do_not_pile_up_with_short_lived_workers(simulate: Make) -> None:
    sim = simulate(2, max_tasks_per_child=1, launch=lambda n: 0.001, work=lambda item, attempt: Attempt(0.001))
    sim.submit(sim.profile(), 300)
    sim.run()
    limits = sim.scheduler.limits
    alive = 2 * limits.grace / 0.002 * 2  # kills that are still due
    assert len(sim.scheduler._agenda._later) <= min(alive, 300) + 10


# -- launches that fail


def test_a_launch_that_is_refused_is_tried_again_when_that_makes_sense(simulate: Make) -> None:
    sim = simulate(1, launch=lambda n: 0.05 if n > 3 else Refusal(NO, 10.0))
    sim.submit(sim.profile(), 1)
    sim.run()
    assert sim.outcomes == {1: "value"} and sim.now == pytest.approx(30.05, abs=0.1)
    assert len(sim.warnings) == 3 and "no quota" in sim.warnings[0]
    assert sim.scheduler.failed_launches == 3


def test_a_final_refusal_without_a_worker_breaks_the_executor(simulate: Make) -> None:
    sim = simulate(2, launch=lambda n: Refusal(NO))
    sim.submit(sim.profile(), 10)
    sim.run()
    assert set(sim.outcomes.values()) == {"broken"} and sim.scheduler.broken is NO


def test_a_final_refusal_beside_a_worker_is_a_warning(simulate: Make) -> None:
    sim = simulate(2, launch=lambda n: 0.05 if n == 1 else Refusal(NO), work=lambda item, attempt: Attempt(1.0))
    sim.submit(sim.profile(), 1)
    sim.run(until=0.5)
    sim.submit(sim.profile(), 10)
    sim.run()
    assert set(sim.outcomes.values()) == {"value"}
    assert "no quota" in sim.warnings[0] and len(sim.warnings) <= 3, "not tried again at every event"


def test_launches_that_are_refused_together_are_one_warning(simulate: Make) -> None:
    sim = simulate(40, launch=lambda n: Refusal(NO, 10.0) if 1 < n <= 40 else 0.05, work=lambda item, attempt: Attempt(1.0))
    sim.submit(sim.profile(), 1)
    sim.run(until=0.5)
    sim.submit(sim.profile(), 39)
    sim.run(until=5.0)
    assert sim.scheduler.failed_launches > 20
    assert len(sim.warnings) == 1 and "no quota" in sim.warnings[0]
    sim.run()
    assert set(sim.outcomes.values()) == {"value"}


def test_a_worker_that_is_never_ready_breaks_the_executor_at_the_startup_timeout(simulate: Make) -> None:
    sim = simulate(2, launch=lambda n: math.inf, startup_timeout=20.0)
    sim.submit(sim.profile(), 2)
    sim.run(until=30.0)
    assert set(sim.outcomes.values()) == {"broken"} and "startup_timeout=20" in broken_because(sim)
    assert not sim.scheduler.fleet.workers


def test_a_late_worker_beside_others_is_given_up_with_a_warning(simulate: Make) -> None:
    sim = simulate(2, launch=lambda n: 0.05 if n == 1 else math.inf, startup_timeout=5.0, work=lambda i, a: Attempt(2.0))
    sim.submit(sim.profile(), 6)
    sim.run()
    assert set(sim.outcomes.values()) == {"value"} and "startup_timeout" in sim.warnings[0]
    assert all(w.state is IDLE for w in sim.scheduler.fleet.workers.values()), "the late one is still there"


def die_young(sim: Simulation, launches: Callable[[int], bool]) -> None:
    """Workers of these launches end before they are ready."""
    start = sim._start

    def killed(worker: Any) -> None:
        if launches(worker.id):
            sim.workers[worker.id] = worker
            sim.tell(ev.WorkerStarted(worker.id, worker.job, worker.pool))
            sim.kill(worker.id, Exit(1, log="ImportError: numpy"))
        else:
            start(worker)

    sim._start = killed  # type: ignore[method-assign]


def test_workers_that_die_young_three_times_in_a_row_break_the_executor(simulate: Make) -> None:
    sim = simulate(8)
    die_young(sim, lambda worker: True)
    sim.submit(sim.profile(), 100)
    sim.run()
    assert set(sim.outcomes.values()) == {"broken"} and "ImportError: numpy" in broken_because(sim)
    assert sim.launched == 24, "workers that were launched together are one try"


def test_an_accident_that_hits_all_young_workers_is_one_try(simulate: Make) -> None:
    sim = simulate(8)
    die_young(sim, lambda worker: worker <= 8)
    sim.submit(sim.profile(), 100)
    sim.run()
    assert set(sim.outcomes.values()) == {"value"}


def test_a_worker_that_gets_ready_ends_the_row_of_failures(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: Attempt(0.01, "crash" if attempt == 1 else "value"))
    die_young(sim, lambda worker: worker % 3 != 0)
    sim.submit(sim.profile(), 1)
    sim.run()
    assert sim.outcomes == {1: "value"} and sim.launched == 6


def test_an_initializer_that_fails_breaks_the_executor_with_its_cause(simulate: Make) -> None:
    sim = simulate(2)
    start = sim._start

    def fail(worker: Any) -> None:
        sim.workers[worker.id] = worker
        sim.tell(ev.WorkerStarted(worker.id, worker.job, worker.pool))
        sim.tell(ev.WorkerReady(worker.id, ValueError("initializer")))

    sim._start = fail  # type: ignore[method-assign]
    sim.submit(sim.profile(), 10)
    sim.run()
    assert start is not fail
    assert set(sim.outcomes.values()) == {"broken"} and broken_because(sim) == "initializer"
    sim.run(until=sim.now + 10.0)
    assert not sim.workers


# -- the end


def test_closing_lets_everything_finish_and_leaves_nobody(simulate: Make) -> None:
    sim = simulate(3, work=lambda item, attempt: Attempt(0.5, "error" if attempt == 1 else "value"))
    sim.submit(sim.profile(retry=lambda attempt, outcome: 5.0 if outcome == "error" else None), 1, tasks=10)
    sim.close()
    sim.run()
    assert set(sim.outcomes.values()) == {"value"}
    assert sim.scheduler.finished and not sim.workers


def test_closing_does_not_wait_for_workers_that_are_still_starting(simulate: Make) -> None:
    sim = simulate(2, launch=lambda n: 500.0 if n == 2 else 0.05)
    sim.submit(sim.profile(), 2)
    sim.close()
    sim.run()
    assert sim.scheduler.finished and sim.now < 1.0


def test_a_worker_that_hangs_on_its_way_out_is_killed(simulate: Make) -> None:
    sim = simulate(1)
    sim.submit(sim.profile(), 1)
    sim.run()
    worker = next(iter(sim.workers.values()))
    worker.running = 99  # it does not come to read that it is to go
    sim.close()
    sim.run()
    assert sim.scheduler.finished
    assert sim.now == pytest.approx(0.05 + 2 * sim.scheduler.limits.grace, abs=0.1)


@pytest.mark.parametrize("kill", [True, False])
def test_what_breaks_settles_everything_and_ends_everybody(simulate: Make, kill: bool) -> None:
    sim = simulate(3, work=lambda item, attempt: Attempt(math.inf, stubborn=True))
    sim.submit(sim.profile(), 10)
    sim.submit(sim.profile(timeout=100.0), 1, tasks=3)
    sim.run(until=1.0)
    sim.tell(ev.Broken(RuntimeError("told so"), kill))
    assert set(sim.outcomes.values()) == {"broken"} and len(sim.outcomes) == 13
    sim.run()
    assert sim.scheduler.finished
    assert sim.now == pytest.approx(1.0 if kill else 1.0 + sim.scheduler.limits.grace, abs=0.01)


def test_a_worker_that_has_finished_is_idle(simulate: Make) -> None:
    sim = simulate(2, work=lambda item, attempt: Attempt(0.0001))
    sim.submit(sim.profile(), 500)
    sim.run()
    assert {worker.state for worker in sim.scheduler.fleet.workers.values()} == {IDLE}


def test_a_worker_whose_host_is_taken_away_finishes_its_item_and_gets_no_other(simulate: Make) -> None:
    sim = simulate(2, work=lambda item, attempt: Attempt(1.0))
    sim.submit(sim.profile(max_losses=1), 6)
    sim.run(until=0.5)
    leaving = next(iter(sim.workers))
    sim.tell(ev.WorkerLeaving(leaving))
    sim.run(until=1.4)
    assert leaving not in sim.workers, "it ended when its item was done"
    sim.run()
    assert set(sim.outcomes.values()) == {"value"} and len(sim.outcomes) == 6
    assert max(sim.attempts.values()) == 1 and sim.scheduler.lost == 0


def test_what_a_leaving_worker_has_not_begun_moves_for_free(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: Attempt(5.0) if item == 30 else Attempt(0.00002))
    sim.submit(sim.profile(max_losses=1), 60)
    sim.run(until=1.0)
    (leaving,) = sim.workers
    sim.tell(ev.WorkerLeaving(leaving))
    sim.run(until=4.0)
    assert len(sim.outcomes) == 29 and leaving in sim.workers
    sim.run(until=6.0)
    assert leaving not in sim.workers and set(sim.outcomes.values()) == {"value"} and len(sim.outcomes) == 60
    assert max(sim.attempts.values()) == 1


def test_what_a_leaving_worker_did_not_finish_is_charged_as_a_loss_of_the_infrastructure(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: Attempt(5.0))
    sim.submit(sim.profile(max_losses=1), 1)
    sim.run(until=1.0)
    (leaving,) = sim.workers
    sim.tell(ev.WorkerLeaving(leaving))
    sim.kill(leaving, Exit(None, "node drained", infrastructure=True))
    sim.run()
    assert sim.outcomes == {1: "lost"}, "it is not to run twice"
