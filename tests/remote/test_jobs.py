"""Jobs: how they start, or do not; what they cost; and what tasks in them may do."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import alive
from tenacity import Retrying, stop_after_attempt

import fiberexec
from fiberexec import BrokenExecutor, ConfigError, FiberExecutor, LaunchError
from fiberexec._hub.launch import DOOR
from fiberexec.backends.base import Exit, Job, JobEnded
from fiberexec.testing._agents import AgentBackend

LIMIT = 60.0
FULL = os.environ.get("FIBEREXEC_CAMPAIGN") == "full"
MIB = 1 << 20


# -- starting


def test_many_agents_join_work_and_leave(make: Any, jobs: Any, until: Any) -> None:
    count, tasks = (200, 20_000) if FULL else (50, 3000)
    executor = make(count, min_workers=count)
    until(lambda: executor.stats().idle == count, 600 if FULL else LIMIT, "all agents are there")
    agents = jobs.agents()
    assert len(agents) == count
    assert sum(executor.map(int, range(tasks), chunksize=1)) == tasks * (tasks - 1) // 2
    executor.shutdown()
    until(lambda: not any(alive(agent.pid) for agent in agents))


def test_an_agent_is_small_and_does_nothing_when_there_is_nothing_to_do(make: Any, jobs: Any, hub: Any) -> None:
    executor = make(3, min_workers=3)
    list(executor.map(abs, range(1000)))
    agents = jobs.agents()
    assert agents and all(agent.memory_info().rss <= 40 * MIB for agent in agents), [a.memory_info().rss / MIB for a in agents]
    watched = [*agents, hub()]
    time.sleep(1)  # what the tasks left to do
    before = [sum(process.cpu_times()[:2]) for process in watched]
    time.sleep(3)
    used = [sum(process.cpu_times()[:2]) - was for process, was in zip(watched, before)]
    assert max(used) <= 0.15, used


def test_a_launch_that_fails_is_tried_again_unless_that_is_final(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start, tried = AgentBackend.start, []

    def fails(backend: AgentBackend, job: Job) -> None:
        tried.append(job.id)
        if len(tried) < 3:
            raise LaunchError("the cluster is being maintained")
        start(backend, job)

    monkeypatch.setattr(AgentBackend, "start", fails)
    executor = make(1)
    assert executor.submit(int, "4").result(LIMIT) == 4
    assert len(tried) == 3 and executor.stats().failed_launches == 2

    def refuses(backend: AgentBackend, job: Job) -> None:
        raise LaunchError("there is no such image; build it", final=True)

    monkeypatch.setattr(AgentBackend, "start", refuses)
    error = make(1).submit(int).exception(10)
    assert isinstance(error, BrokenExecutor) and "no such image; build it" in str(error)


def test_an_address_that_is_not_this_hosts_is_said_at_once() -> None:
    elsewhere = "192.0.2.1"  # of nobody: kept for documentation
    with FiberExecutor(1, backend="agents", backend_options={"address": elsewhere}) as executor:
        error = executor.submit(int).exception(LIMIT)
    assert isinstance(error, BrokenExecutor), error
    assert elsewhere in str(error.__cause__) and "one of this host's own" in str(error.__cause__)


def test_a_job_that_is_too_small_for_a_worker_is_tried_three_times(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = Exit(-9, "OOMKilled", "it took more than its limit of 10 MiB")

    def starved(backend: AgentBackend, job: str, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        backend._ended.put(JobEnded(job, killed))

    monkeypatch.setattr(AgentBackend, "_wait", starved)
    executor = make(1, backend_options={"python": shutil.which("true")})
    error = executor.submit(int).exception(LIMIT)
    assert isinstance(error, BrokenExecutor) and "limit of 10 MiB" in str(error.__cause__), error
    assert executor.stats().failed_launches == 3


def test_a_slow_start_holds_up_no_other(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start, go = AgentBackend.start, threading.Event()

    def slow(backend: AgentBackend, job: Job) -> None:
        if job.id.endswith("-1"):
            go.wait(LIMIT)
        start(backend, job)

    monkeypatch.setattr(AgentBackend, "start", slow)
    executor = make(2)
    futures = [executor.submit(int, str(number)) for number in range(10)]
    assert [future.result(LIMIT) for future in futures] == list(range(10))
    go.set()


def test_an_executor_that_ends_while_its_jobs_start_leaves_none(jobs: Any, until: Any) -> None:
    for _ in range(3):
        began = time.monotonic()
        executor = FiberExecutor(3, backend="agents")
        for number in range(3):
            executor.submit(int, number)
        executor.kill_workers()
        executor.shutdown()
        assert time.monotonic() - began < 15
    until(lambda: not jobs.below())


def test_a_backend_that_never_says_that_a_job_has_ended_does_not_hold_up_a_shutdown(
    make: Any, jobs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AgentBackend, "_wait", lambda backend, job, process: process.wait())
    executor = make(2)
    list(executor.map(abs, range(4)))
    began = time.monotonic()
    executor.shutdown()
    assert 9 < time.monotonic() - began < 30
    assert not jobs.below()


def test_a_job_that_exits_at_once_says_its_last_words(make: Any) -> None:
    says = "import sys; print('the licence server is away', file=sys.stderr); sys.exit(9)"
    twice = Retrying(stop=stop_after_attempt(2), reraise=True)
    executor = make(1, backend_options={"prefix": [sys.executable, "-c", says]}, launch_retry=twice)
    error = executor.submit(int).exception(LIMIT)
    assert isinstance(error, BrokenExecutor)
    assert "the licence server is away" in str(error) and "9" in str(error), error


def test_a_job_whose_end_proves_that_no_other_can_do_better_is_the_last(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "the image has no fiberexec: RUN pip install fiberexec"
    monkeypatch.setattr(
        AgentBackend, "_wait", lambda backend, job, process: backend._ended.put(JobEnded(job, Exit(process.wait()), said))
    )
    executor = make(1, backend_options={"prefix": [sys.executable, "-c", "raise SystemExit(1)"]})
    error = executor.submit(int).exception(10)
    assert isinstance(error, BrokenExecutor) and str(error.__cause__) == said
    assert executor.stats().failed_launches == 1


def test_a_job_that_never_shows_up_is_given_up_after_startup_timeout_with_what_is_known_of_it(
    make: Any, jobs: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    jobs.silent = True
    monkeypatch.setattr(AgentBackend, "explain", lambda backend, job: f"{job} waits for a node")
    began = time.monotonic()
    executor = make(1, startup_timeout=8)
    error = executor.submit(int).exception(LIMIT)
    assert isinstance(error, BrokenExecutor) and "startup_timeout" in str(error)
    assert "waits for a node" in str(error.__cause__)
    assert time.monotonic() - began > 7
    assert "waits for a node" in caplog.text  # in half the time already


def test_a_job_that_nobody_can_explain_is_given_up_after_startup_timeout(
    make: Any, jobs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.silent = True
    monkeypatch.setattr(AgentBackend, "explain", lambda backend, job: time.sleep(5))
    error = make(1, startup_timeout=1).submit(int).exception(LIMIT)
    assert isinstance(error, BrokenExecutor) and "startup_timeout" in str(error)


def test_who_waits_for_the_way_to_this_host_is_told_so(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reach, go = AgentBackend.reach, threading.Event()

    def slow(backend: AgentBackend, port: int, program: str) -> tuple[str, ...]:
        go.wait(LIMIT)
        return reach(backend, port, program)

    monkeypatch.setattr(AgentBackend, "reach", slow)
    try:
        error = make(1, startup_timeout=4).submit(int).exception(LIMIT)
    finally:
        go.set()
    assert isinstance(error, BrokenExecutor) and "jobs reach this host is being made" in str(error.__cause__), error


def other_python() -> str | None:
    mine = sys.version_info[:2]
    for path in [*os.environ.get("TOX_DISCOVER", "").split(os.pathsep), *map(shutil.which, ["python3.12", "python3.11"])]:
        if path and os.access(path, os.X_OK):
            code = "import sys, pynng; print(*sys.version_info[:2])"
            asked = subprocess.run([path, "-c", code], capture_output=True, text=True)
            if asked.returncode == 0 and tuple(map(int, asked.stdout.split())) != mine:
                return path
    return None


def test_a_job_with_another_python_is_refused_by_name(make: Any) -> None:
    python = other_python()
    if python is None:
        pytest.skip("no other Python with pynng; name one in TOX_DISCOVER")
    executor = make(1, backend_options={"python": python})
    error = executor.submit(int).exception(LIMIT)
    mine = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    assert isinstance(error, BrokenExecutor) and "FROM python:" in str(error) and mine in str(error), error


def test_options_that_make_no_sense_are_refused_at_once(make: Any) -> None:
    with pytest.raises(ConfigError, match="prefix"):
        make(1, backend_options={"pyhton": "x"})
    with pytest.raises(ConfigError, match="plain"):
        make(1, backend_options={"python": object()})


# -- what tasks may do


def nested(levels: int) -> list[str]:
    """The jobs in which this runs, from the outermost on."""
    here = os.environ["FIBEREXEC_JOB"]
    if levels == 1:
        return [here]
    with FiberExecutor(1, backend="agents") as executor:
        return [here, *executor.submit(nested, levels - 1).result(LIMIT)]


def test_an_executor_in_a_task_has_jobs_of_its_own_three_levels_deep(make: Any, jobs: Any, until: Any) -> None:
    executor = make(1)
    found = executor.submit(nested, 3).result(LIMIT)
    assert len(set(found)) == 3
    until(lambda: len(jobs.agents()) <= 1, what="the inner jobs have gone")


def test_an_executor_in_a_task_that_dies_leaves_no_jobs(make: Any, jobs: Any, until: Any) -> None:
    def dies() -> None:
        inner = FiberExecutor(1, backend="agents")
        assert inner.submit(int).result(LIMIT) == 0
        os._exit(3)

    executor = make(1, max_worker_losses=1)
    assert isinstance(executor.submit(dies).exception(LIMIT), fiberexec.WorkerLost)
    until(lambda: len(jobs.agents()) <= 1, what="the inner job has gone")
    assert executor.submit(int, "3").result(LIMIT) == 3


def test_a_task_may_fork(make: Any) -> None:
    def forks() -> int:
        pid = os.fork()
        if not pid:
            os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert make(1).submit(forks).result(LIMIT) == 7


def test_the_driver_may_fork_while_jobs_work(make: Any) -> None:
    executor = make(1)
    future = executor.submit(time.sleep, 0.5)
    pid = os.fork()
    if not pid:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert future.result(LIMIT) is None


def test_a_task_that_holds_the_gil_for_longer_than_driver_timeout_is_not_given_up(make: Any) -> None:
    def holds() -> int:
        import ctypes

        ctypes.PyDLL(None).sleep(8)  # a PyDLL keeps the lock
        return os.getpid()

    executor = make(1, driver_timeout=4, max_worker_losses=1)
    assert executor.submit(holds).result(LIMIT) == executor.submit(os.getpid).result(LIMIT)


def test_a_driver_that_holds_the_gil_for_longer_than_driver_timeout_loses_nothing(make: Any) -> None:
    import ctypes

    executor = make(1, driver_timeout=4, max_worker_losses=1)
    before = executor.submit(os.getpid).result(LIMIT)
    future = executor.submit(os.getpid)
    ctypes.PyDLL(None).sleep(8)
    assert future.result(LIMIT) == before == executor.submit(os.getpid).result(LIMIT)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux changes another process' limits")
def test_an_agent_without_a_descriptor_to_spare_shuts_its_door_and_works_on(make: Any, jobs: Any, until: Any) -> None:
    executor = make(1)
    assert executor.submit(int, "1").result(LIMIT) == 1
    [agent] = jobs.agents()
    [door] = Path(agent.environ()["TMPDIR"]).glob(f"*/{DOOR}")
    before = resource.prlimit(agent.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, (agent.num_fds(), before[1]))
    callers = [socket.socket(socket.AF_UNIX) for _ in range(20)]
    try:
        for caller in callers:
            caller.connect(str(door))
        spent = sum(agent.cpu_times()[:2])
        time.sleep(2)
        assert sum(agent.cpu_times()[:2]) - spent < 0.3
        assert executor.submit(int, "2").result(LIMIT) == 2
        resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, before)
        until(lambda: agent.num_fds() >= before[0] or len(agent.net_connections("unix")) > 20, what="it lets them in")
    finally:
        for caller in callers:
            caller.close()
    assert executor.submit(lambda: FiberExecutor(1, backend="local").submit(int, "3").result()).result(LIMIT) == 3


def test_nobody_sees_the_secrets_of_an_agent(make: Any, jobs: Any) -> None:
    """Neither in its arguments nor in its environment."""
    executor = make(1)
    worker = psutil.Process(executor.submit(os.getpid).result(LIMIT))
    secret = jobs.started[0]["key"].split("\n")[1]
    for process in [jobs.agents()[0], worker]:
        assert secret not in " ".join(process.cmdline()) + " ".join(process.environ().values())


@pytest.mark.parametrize(("given", "said"), [({}, True), ({"max_workers": 2}, False)])
def test_how_many_workers_there_may_be_is_said_where_nobody_has_said_it(
    given: dict[str, int], said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "fiberexec"), FiberExecutor(backend="agents", **given):
        pass
    assert ("at most" in caplog.text) == said
