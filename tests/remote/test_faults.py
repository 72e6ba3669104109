"""Whatever dies or stops, in a job or around it: every task ends once, as it should, and nothing is left."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import alive

from fiberexec import BrokenExecutor, WorkerLost
from fiberexec._hub import launch

LIMIT = 30.0


def once(path: str, then: str = "") -> int:
    """Says that it runs; the first time it also waits for its end, or does what it is told."""
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    if len(Path(path).read_text().split()) == 1:
        if then == "kill agent":
            os.kill(psutil.Process().parent().parent().pid, signal.SIGKILL)
        time.sleep(60)
    return os.getpid()


def runs(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.fixture
def started(tmp_path: Path, until: Callable[..., Any]) -> Callable[..., Any]:
    """Submit a task that waits in its first attempt, and return (future, the worker's pid) when it does."""
    numbers = iter(range(100))

    def start(executor: Any) -> tuple[Any, int, Path]:
        path = tmp_path / f"runs {next(numbers)}"
        future = executor.submit(once, str(path))
        until(lambda: runs(path), what="the task runs")
        return future, runs(path)[0], path

    return start


# -- one process of a job


def test_a_worker_that_is_killed_costs_its_own_task_a_charge(make: Any, started: Any) -> None:
    executor = make(1, max_worker_losses=1)
    future, pid, _ = started(executor)
    os.kill(pid, signal.SIGKILL)
    error = future.exception(LIMIT)
    assert isinstance(error, WorkerLost) and error.exitcode == -signal.SIGKILL
    assert executor.submit(int, "7").result(LIMIT) == 7


def test_a_worker_that_is_killed_is_replaced_in_its_job(make: Any, jobs: Any, started: Any) -> None:
    executor = make(1)
    future, pid, path = started(executor)
    agents = [agent.pid for agent in jobs.agents()]
    os.kill(pid, signal.SIGKILL)
    assert future.result(LIMIT) != pid and len(runs(path)) == 2
    assert [agent.pid for agent in jobs.agents()] == agents


def test_a_fork_server_that_is_killed_is_nobodys_fault(make: Any, started: Any) -> None:
    executor = make(1, max_worker_losses=2)
    future, pid, path = started(executor)
    os.kill(psutil.Process(pid).ppid(), signal.SIGKILL)
    assert future.result(LIMIT) != pid and len(runs(path)) == 2
    assert not alive(pid)


def test_a_child_that_outlives_its_worker_does_not_hide_the_workers_end(make: Any) -> None:
    """It has inherited the worker's stream, and is in no group of the worker's."""

    def leave_a_child() -> None:
        pid = os.fork()
        if not pid:
            os.setsid()
            time.sleep(3)
            os._exit(0)
        os._exit(5)

    executor = make(1, max_worker_losses=1)
    began = time.monotonic()
    error = executor.submit(leave_a_child).exception(LIMIT)
    assert isinstance(error, WorkerLost) and error.exitcode == 5
    assert time.monotonic() - began < 20


# -- a whole job


def test_an_agent_that_is_killed_takes_its_workers_with_it_and_its_tasks_run_again(
    make: Any, jobs: Any, started: Any, until: Any
) -> None:
    executor = make(2)
    (future, pid, path), (other, far, _) = started(executor), started(executor)
    agent = psutil.Process(pid).parent().parent()
    agent.kill()
    assert future.result(LIMIT) != pid and len(runs(path)) == 2
    until(lambda: not alive(pid))
    assert not other.done() and alive(far)
    os.kill(far, signal.SIGKILL)
    assert other.result(LIMIT)


def test_who_dies_with_others_in_one_job_is_a_suspect_and_the_culprit_alone_is_charged(
    make: Any, tmp_path: Path, until: Any
) -> None:
    """Four at once in one job; one of them ends the job whenever it runs."""

    def innocent(number: int) -> tuple[int, int]:
        import fiberexec

        (tmp_path / f"here {number}").touch()
        while len(list(tmp_path.glob("here*"))) < 4:
            time.sleep(0.01)
        task = fiberexec.current_task()
        assert task is not None
        return number, task.attempt

    def culprit() -> None:
        (tmp_path / "here c").touch()
        while len(list(tmp_path.glob("here*"))) < 4:
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(psutil.Process().parent().parent().pid, signal.SIGKILL)
        time.sleep(60)

    executor = make(4, workers_per_job=4, max_worker_losses=2)
    others = [executor.submit(innocent, number) for number in range(3)]
    guilty = executor.submit(culprit)
    error = guilty.exception(LIMIT)
    assert isinstance(error, WorkerLost)
    assert [future.result(LIMIT)[0] for future in others] == [0, 1, 2]


def test_a_job_that_is_told_to_end_finishes_what_runs_and_begins_nothing_more(
    make: Any, jobs: Any, tmp_path: Path, until: Any
) -> None:
    def work(number: int) -> tuple[int, int]:
        (tmp_path / f"begun {number}").touch()
        while not (tmp_path / "go").exists():
            time.sleep(0.01)
        return number, os.getppid()

    executor = make(2, workers_per_job=2, max_worker_losses=1)
    futures = [executor.submit(work, number) for number in range(6)]
    until(lambda: len(list(tmp_path.glob("begun*"))) == 2)
    first = jobs.agents()[0]
    first.terminate()
    until(lambda: executor.stats().queued == 4)
    time.sleep(0.2)  # for what must not begin
    assert len(list(tmp_path.glob("begun*"))) == 2
    server = first.children()[0].pid
    (tmp_path / "go").touch()
    where = dict(future.result(LIMIT) for future in futures)
    assert sorted(number for number, ppid in where.items() if ppid == server) == [0, 1]
    until(lambda: not alive(first.pid))
    assert executor.stats().lost == 0


def test_a_job_that_is_taken_away_charges_nobody(make: Any, jobs: Any, started: Any) -> None:
    """SIGTERM, and SIGKILL before the task has ended, as `docker stop` does it."""
    executor = make(1, max_worker_losses=2)
    for _ in range(2):
        future, pid, path = started(executor)
        agent = psutil.Process(pid).parent().parent()
        agent.terminate()
        time.sleep(0.3)  # it has to hear the one before the other
        agent.kill()
        assert future.result(LIMIT) != pid and len(runs(path)) == 2


def test_a_job_that_is_taken_away_leaves_when_its_grace_is_over(make: Any, jobs: Any, started: Any, until: Any) -> None:
    executor = make(1, env={"FIBEREXEC_GRACE": "0.5"})
    future, pid, path = started(executor)
    agent = psutil.Process(pid).parent().parent()
    agent.terminate()
    until(lambda: not alive(agent.pid), 10)  # and not in 25 s
    assert future.result(LIMIT) != pid and len(runs(path)) == 2


def test_an_idle_job_that_is_told_to_end_ends(make: Any, jobs: Any, until: Any) -> None:
    executor = make(1)
    assert executor.submit(int).result(LIMIT) == 0
    agent = jobs.agents()[0]
    agent.terminate()
    until(lambda: not alive(agent.pid), 10)
    assert executor.submit(int, "5").result(LIMIT) == 5


# -- the hub


def test_without_the_hub_every_future_ends_and_says_why_and_the_jobs_go(
    make: Any, jobs: Any, started: Any, hub: Any, until: Any
) -> None:
    executor = make(2, driver_timeout=3)
    futures = [started(executor)[0] for _ in range(2)] + [executor.submit(int) for _ in range(50)]
    processes = jobs.below()
    assert len(processes) >= 6
    hub().kill()
    for future in futures:
        error = future.exception(LIMIT)
        assert isinstance(error, BrokenExecutor) and "hub" in str(error), error
    until(lambda: not any(alive(process.pid) for process in processes), 10)
    with pytest.raises(BrokenExecutor, match="hub"):
        executor.submit(int)


@pytest.mark.parametrize("attempt", range(8))
def test_who_waits_for_a_worker_when_the_hub_is_closed_hears_so(make: Any, started: Any, attempt: int) -> None:
    """By whichever of its connections the executor hears of the end first."""
    executor = make(1, driver_timeout=3)
    future, _, _ = started(executor)
    launch.close()
    error = future.exception(LIMIT)
    assert isinstance(error, BrokenExecutor) and "hub" in str(error), error


# -- what is stopped, and goes on


@pytest.mark.parametrize("who", ["agent", "hub"])
def test_what_is_stopped_for_less_than_driver_timeout_costs_nothing(
    make: Any, jobs: Any, hub: Any, stopped: Any, who: str, tmp_path: Path
) -> None:
    executor = make(2, driver_timeout=6, max_worker_losses=1)
    list(executor.map(abs, range(10)))
    pids = [agent.pid for agent in jobs.agents()] if who == "agent" else [hub().pid]
    counted = tmp_path / "counted"

    def count(number: int) -> int:
        with open(counted, "a") as file:
            file.write(f"{number}\n")
        return number

    futures = [executor.submit(count, number) for number in range(100)]
    for pid in pids:
        stopped(pid)
    futures += [executor.submit(count, number) for number in range(100, 200)]
    time.sleep(2.5)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    assert [future.result(LIMIT) for future in futures] == list(range(200))
    assert sorted(map(int, counted.read_text().split())) == list(range(200))


def test_an_agent_that_is_stopped_for_longer_loses_its_tasks_to_others_and_charges_nobody(
    make: Any, jobs: Any, started: Any, stopped: Any, until: Any
) -> None:
    executor = make(1, driver_timeout=1, max_worker_losses=2)
    future, pid, path = started(executor)
    agent = jobs.agents()[0].pid
    stopped(agent)
    assert future.result(LIMIT) != pid and len(runs(path)) == 2
    until(lambda: not alive(pid) and not alive(agent))


def test_a_hub_that_is_stopped_for_longer_than_driver_timeout_loses_no_task(
    make: Any, jobs: Any, started: Any, stopped: Any, hub: Any, until: Any
) -> None:
    """The agents end themselves, and what they ran runs again; nobody is charged."""
    executor = make(1, driver_timeout=1, max_worker_losses=2)
    future, pid, path = started(executor)
    agent = jobs.agents()[0].pid
    stopped(hub().pid)
    until(lambda: not alive(pid) and not alive(agent), 10)
    os.kill(hub().pid, signal.SIGCONT)
    assert future.result(LIMIT) != pid and len(runs(path)) == 2
