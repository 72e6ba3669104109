"""The command with workers of this host: ``ps``, ``logs``, ``kill``, and whether a driver still runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import HOST, ROOT, dead_pid, run, told
from places import eventually

from fiberexec import FiberExecutor, WorkerLost, _platform
from fiberexec._cli import jobs, processes, show

DEADLINE = 30.0  # seconds


def ids() -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in told("ps", "--backend", "local")["jobs"]}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=["linux", "portable"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "portable":
        monkeypatch.setattr(_platform, "LINUX", False)
    elif not _platform.LINUX:
        pytest.skip("this is not Linux")


def fork() -> int:
    """In a task: a child that is no worker."""
    pid = os.fork()
    if pid == 0:
        time.sleep(DEADLINE)
        os._exit(0)
    return pid


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_ps_shows_the_workers_of_an_executor_and_nothing_else(system: None) -> None:
    before = time.time()
    with FiberExecutor(2, min_workers=2, backend="local") as ex:
        child = ex.submit(fork).result()
        eventually(lambda: all(worker.pid for worker in ex.workers()), DEADLINE)
        found = ids()
        ours = {name: row for name, row in found.items() if row["driver"] == f"{os.getpid()}@{HOST}"}
        assert set(ours) == {f"local-{worker.pid}" for worker in ex.workers()}
        assert f"local-{child}" not in found
        for row in ours.values():
            assert row["backend"] == "local" and row["state"] == "running" and row["driver_runs"] is True
            assert row["program"] == row["driver"] and row["host"] == HOST
            assert "pytest" in row["command"]
            assert before - 3 <= row["started"] <= time.time() + 3
        os.kill(child, signal.SIGKILL)
    assert not set(ours) & set(ids())


def test_ps_does_not_take_the_workers_of_an_agent_for_ones_of_this_host() -> None:
    with FiberExecutor(1, backend="agents") as ex:
        pid = ex.submit(os.getpid).result()
        assert f"local-{pid}" not in ids()


def test_kill_ends_a_worker_of_this_host_at_once() -> None:
    with FiberExecutor(1, backend="local", max_worker_losses=1) as ex:
        pid = ex.submit(os.getpid).result()
        future = ex.submit(time.sleep, 600)
        end = time.monotonic() + DEADLINE
        while not any(worker.task for worker in ex.workers()):
            assert time.monotonic() < end
        assert told("kill", f"local-{pid}") == {
            "ended": [{"target": f"local-{pid}", "backend": "local", "kind": "job", "number": 1}],
            "warnings": [],
        }
        with pytest.raises(WorkerLost) as caught:
            future.result(DEADLINE)
        assert caught.value.pid == pid and caught.value.exitcode == -signal.SIGKILL


DRIVER = """
import sys; sys.path.insert(0, {root!r})
import time
from fiberexec import FiberExecutor
with FiberExecutor(1, backend="local") as ex:
    print(ex.submit(__import__("os").getpid).result(), flush=True)
    time.sleep({seconds})
"""


def test_kill_ends_a_program_with_its_driver() -> None:
    program = DRIVER.format(root=ROOT, seconds=DEADLINE)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            worker = f"local-{driver.stdout.readline().strip()}"
            name = ids()[worker]["program"]
            assert name == f"{driver.pid}@{HOST}"
            result = run("kill", name)
            assert result.exit_code == 0, result.output
            assert f"driver {name} ended" in result.stdout
            assert driver.wait(DEADLINE) == -signal.SIGTERM
        finally:
            driver.kill()
    end = time.monotonic() + DEADLINE
    while worker in ids():
        assert time.monotonic() < end, "the worker is still there"


def test_a_driver_that_does_not_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_END_TIMEOUT", 0.2)
    program = "import signal; signal.signal(15, signal.SIG_IGN)\n" + DRIVER.format(root=ROOT, seconds=DEADLINE)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            driver.stdout.readline()
            assert f"kill -KILL {driver.pid}" in told("kill", f"{driver.pid}@{HOST}")["warnings"][0]
            assert driver.poll() is None
        finally:
            driver.kill()


def test_kill_and_logs_of_what_is_not_there_say_so() -> None:
    for command in ("kill", "logs"):
        result = run(command, "fx-nope-1", "--backend", "local")
        assert result.exit_code == 1
        assert "'fx-nope-1'" in result.output and "fiberexec ps" in result.output


# -- whether a driver still runs


def test_a_driver_runs_if_its_process_does_and_is_old_enough() -> None:
    table = processes.table()
    ours = f"{os.getpid()}@{HOST}"
    assert processes.runs(ours, time.time(), table) is True
    assert processes.runs(ours, time.time() - 10 * 86400, table) is None  # the number of another one, or the clock was set
    assert processes.runs(f"{os.getpid()}@elsewhere", time.time(), table) is None
    assert processes.runs("", time.time(), table) is None
    assert processes.runs(f"{dead_pid()}@{HOST}", time.time(), processes.table()) is False


def test_a_driver_that_nobody_has_collected_does_not_run(system: None) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read()  # until it ends
    end = time.monotonic() + DEADLINE
    while (runs := processes.runs(f"{process.pid}@{HOST}", time.time(), processes.table())) is not False:
        assert runs is True and time.monotonic() < end
    process.communicate()


def test_a_process_of_that_number_in_a_container_may_be_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    pid = dead_pid()
    monkeypatch.setattr(processes, "_inner", lambda other: [pid])
    assert processes.runs(f"{pid}@{HOST}", time.time(), processes.table()) is None


def test_times_of_ps_are_read() -> None:
    assert [processes._seconds(text) for text in ("00:07", "01:00", "02:00:01", "3-00:00:00")] == [7, 60, 7201, 3 * 86400]


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0s"), (0.9, "0s"), (59, "59s"), (61, "1m1s"), (7260, "2h1m"), (90000, "1d1h")]
)
def test_ages_are_short(seconds: float, text: str) -> None:
    assert show.age(seconds) == text
