"""Who is charged when a worker dies, and that nobody runs for ever."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fiberexec._scheduler import events as ev
from fiberexec.backends.base import Exit
from fiberexec.testing import Attempt, Simulation

Make = Callable[..., Simulation]
CRASH = Attempt(0.0001, "crash")
TINY = Attempt(0.00002)
NODE_DRAINED = Exit(None, "node drained", infrastructure=True)


def lost_items(sim: Simulation) -> set[int]:
    return {item for item, outcome in sim.outcomes.items() if outcome == "lost"}


def lose_cells(sim: Simulation) -> None:
    """From now on nobody knows what a dead worker was executing."""
    tell = sim.tell
    sim.tell = lambda event: tell(event._replace(running=None) if isinstance(event, ev.WorkerEnded) else event)  # type: ignore[method-assign]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_poison_item_fails_alone_at_its_limit(simulate: Make, limit: int) -> None:
    sim = simulate(4, work=lambda item, attempt: CRASH if item == 500 else TINY)
    sim.submit(sim.profile(max_losses=limit), 1000)
    sim.run()
    assert lost_items(sim) == {500}
    assert sim.attempts[500] == sim.scheduler.lost == limit
    assert len(sim.outcomes) == 1000


def test_what_was_next_in_line_is_not_charged(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: Attempt(10.0) if item == 20 else TINY)
    sim.submit(sim.profile(max_losses=1), 40)
    sim.run(until=0.0515)
    worker = next(iter(sim.workers.values()))
    assert worker.running and worker.waiting, "the death must hit a batch"
    sim.kill(worker.id)
    sim.run()
    assert lost_items(sim) == {20}
    assert max(sim.attempts.values()) == 1 or all(sim.outcomes[i] == "value" for i in range(1, 41) if i != 20)


def test_the_death_of_an_idle_worker_is_charged_to_nobody(simulate: Make) -> None:
    sim = simulate(2, min_workers=2)
    sim.submit(sim.profile(max_losses=1), 4)
    sim.run()
    for worker in list(sim.workers):
        sim.kill(worker)
    sim.submit(sim.profile(max_losses=1), 4)
    sim.run()
    assert set(sim.outcomes.values()) == {"value"} and sim.scheduler.lost == 0


def test_an_attempt_that_was_lost_counts_as_an_attempt(simulate: Make) -> None:
    seen: list[int] = []

    def work(item: int, attempt: int) -> Attempt:
        seen.append(attempt)
        return CRASH if attempt < 3 else TINY

    sim = simulate(1, work=work)
    sim.submit(sim.profile(), 1)
    sim.run()
    assert seen == [1, 2, 3] and sim.outcomes == {1: "value"}


def test_suspects_run_alone_until_the_culprit_shows(simulate: Make) -> None:
    sim = simulate(4, work=lambda item, attempt: CRASH if item == 30 else Attempt(0.0002), workers_per_job=4)
    sim.submit(sim.profile(max_losses=2), 60)
    lose_cells(sim)
    sim.run()
    assert lost_items(sim) == {30}
    assert sim.attempts[30] == 3, "once among others, twice alone"
    assert len(sim.outcomes) == 60


def test_nothing_that_may_have_run_runs_again_where_that_is_turned_off(simulate: Make) -> None:
    sim = simulate(4, work=lambda item, attempt: CRASH if item == 30 else Attempt(0.0002), workers_per_job=4)
    sim.submit(sim.profile(max_losses=1), 60)
    lose_cells(sim)
    sim.run()
    assert 30 in lost_items(sim) and set(sim.attempts.values()) == {1}
    assert len(sim.outcomes) == 60


def test_a_loss_by_the_infrastructure_ends_a_task_that_must_run_once(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: Attempt(1.0))
    sim.submit(sim.profile(max_losses=1), 1)
    sim.run(until=0.5)
    sim.kill(next(iter(sim.workers)), NODE_DRAINED)
    sim.run()
    assert sim.outcomes == {1: "lost"} and sim.attempts[1] == 1


def test_a_job_that_dies_whole_charges_no_innocent_item(simulate: Make) -> None:
    sim = simulate(8, work=lambda item, attempt: Attempt(0.01), workers_per_job=4)
    sim.submit(sim.profile(max_losses=2), 200)
    for number in range(5):
        sim.at(0.06 + 0.1 * number, lambda: sim.kill_job(next(iter(sim.workers.values())).job))
    sim.run()
    assert set(sim.outcomes.values()) == {"value"}


def test_a_suspect_finds_an_empty_job_however_much_there_is_to_do(simulate: Make) -> None:
    sim = simulate(8, work=lambda item, attempt: Attempt(0.01 + 0.003 * (item % 5)), workers_per_job=4)
    profile = sim.profile()
    sim.submit(profile, 8)
    sim.run(until=0.055)
    sim.kill_job("0")
    suspects = {task.id + task.start for task in sim.scheduler.queue.waiting()}
    assert len(suspects) == 4

    def more() -> None:
        if not suspects <= set(sim.outcomes):
            sim.submit(profile, 1, tasks=8)
            sim.at(sim.now + 0.005, more)

    more()
    sim.run(until=1.0)
    assert suspects <= set(sim.outcomes)


def test_a_job_that_was_kept_for_a_suspect_is_used_again_when_there_is_none(simulate: Make) -> None:
    sim = simulate(8, work=lambda item, attempt: Attempt(1.0), workers_per_job=4, launch=lambda n: 0.05 if n <= 8 else 60.0)
    profile = sim.profile()
    sim.submit(profile, 8)
    sim.run(until=0.1)
    sim.kill_job("0")
    assert sim.scheduler.fleet._closed_jobs == {"1"}, "the only job that is left is getting empty for the suspects"
    sim.cancel()
    sim.submit(profile, 8)
    sim.run(until=2.1)
    assert not sim.scheduler.fleet._closed_jobs
    assert sum(worker.running > 0 for worker in sim.workers.values()) == 4


def test_losses_by_the_infrastructure_are_counted_apart(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: Attempt(1.0), max_infrastructure_losses=5)
    sim.submit(sim.profile(max_losses=2), 1)

    def drain() -> None:
        for worker in list(sim.workers.values()):
            if worker.running:
                sim.kill(worker.id, NODE_DRAINED)
        if not sim.outcomes:
            sim.at(sim.now + 0.1, drain)

    drain()
    sim.run()
    assert sim.outcomes == {1: "lost"} and sim.attempts[1] == 5


def test_a_task_survives_losses_by_the_infrastructure_below_the_limit(simulate: Make) -> None:
    sim = simulate(1, work=lambda item, attempt: Attempt(0.05))
    sim.submit(sim.profile(max_losses=2), 3)
    for number in range(19):
        sim.at(0.06 + 0.06 * number, lambda: [sim.kill(w, NODE_DRAINED, running=False) for w in list(sim.workers)])
    sim.run()
    assert set(sim.outcomes.values()) == {"value"}


def test_work_that_no_worker_can_even_take_in_ends(simulate: Make) -> None:
    """A worker that dies of what it receives has executed nothing; still it does not go on for ever."""
    sim = simulate(2, work=lambda item, attempt: TINY)
    receive = sim._receive

    def choke(worker: object, send: ev.Send) -> None:
        if any(task.id == 7 for _, task, _, _ in send.units):
            sim.at(sim.now, lambda: sim.kill(send.worker))
        else:
            receive(worker, send)  # type: ignore[arg-type]

    sim._receive = choke  # type: ignore[method-assign,assignment]
    sim.submit(sim.profile(), 1, tasks=40)
    sim.run(events=100_000)
    assert lost_items(sim) == {7}
    assert len(sim.outcomes) == 40


def test_deaths_at_random_cost_no_result_and_charge_nothing_that_did_not_run(simulate: Make) -> None:
    import random

    chance = random.Random(3)
    sim = simulate(4, work=lambda item, attempt: Attempt(chance.choice((0.00001, 0.0002, 0.002))))
    sim.submit(sim.profile(max_losses=50), 25, tasks=40)
    charged: list[int] = []

    def kill() -> None:
        if sim.workers:
            worker = chance.choice(list(sim.workers.values()))
            if worker.running:
                charged.append(worker.running)
            sim.kill(worker.id)
        if sim.scheduler.open:
            sim.at(sim.now + 0.02, kill)

    sim.at(0.06, kill)
    sim.run()
    assert len(sim.outcomes) == 1000 and set(sim.outcomes.values()) == {"value"}
    assert sim.scheduler.lost == len(charged)
