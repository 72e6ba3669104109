"""The command: ``ps``, ``logs``, ``kill`` and ``clean``, on this host and with a backend that does what a test wants."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner, Result

import fiberexec
from fiberexec import FiberExecutor, LaunchError, WorkerLost, _platform
from fiberexec._cli import jobs, places, processes, show
from fiberexec._hub import folder
from fiberexec.backends import registry
from fiberexec.backends.base import Pool, Resources
from fiberexec.cli import main

HOST = _platform.host_name()
ROOT = str(Path(fiberexec.__file__).parents[1])
DEADLINE = 30.0  # seconds


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert "Traceback" not in result.output
    return result


def told(*arguments: str, exit_code: int = 0) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def ids() -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in told("ps", "--backend", "local")["jobs"]}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Fake:
    """A JobBackend that has the jobs that a test gives it."""

    name = "fake"
    largest = Pool("fake", Resources(1))
    default_workers = 1
    idle_timeout = None
    jobs: ClassVar[list[dict[str, Any]]] = []
    error: ClassVar[BaseException | None] = None
    blocked: ClassVar[threading.Event | None] = None
    done: ClassVar[list[Any]] = []

    def __init__(self, settings: Any, max_workers: int | None = None) -> None:
        assert settings.backend == "fake"

    def advertise(self) -> tuple[str, ...]:
        return ("127.0.0.1",)

    def reach(self, port: int, program: str) -> tuple[str, ...]:
        raise AssertionError

    def start(self, job: Any) -> None:
        raise AssertionError

    def watch(self, report: Any) -> None:
        raise AssertionError

    def terminate(self, jobs: Any) -> None:
        self.done.append(("terminate", *jobs))

    def explain(self, job: str) -> str:
        return ""

    def list(self) -> Any:
        if self.blocked is not None:
            self.blocked.wait()
        if self.error is not None:
            raise self.error
        return self.jobs

    def logs(self, job: str, follow: bool = False) -> Iterator[str]:
        if job == "fx-1-9":
            raise KeyError("a defect")
        yield f"follow={follow}\n"
        yield "two"

    def remove(self, program: str) -> int:
        self.done.append(("remove", program))
        return sum(job["program"] == program for job in self.jobs)

    def close(self) -> None:
        self.done.append(("close",))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    module = types.ModuleType("fiberexec_fake_backend")
    module.Fake = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(registry, "_BUILT_IN", {"fake": f"{module.__name__}:Fake", "local": registry._BUILT_IN["local"]})
    monkeypatch.setattr(Fake, "jobs", [])
    monkeypatch.setattr(Fake, "done", [])
    return Fake


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def job(number: int, driver: str | None, program: str = "fx-1", started: float | None = None) -> dict[str, Any]:
    labels = {"fiberexec.user": str(os.getuid())}
    if driver is not None:
        labels["fiberexec.driver"] = driver
    started = time.time() if started is None else started
    row = {"id": f"{program}-{number}", "program": program, "state": "running", "host": "h", "image": "i:1"}
    return {**row, "started": int(started), "labels": labels}


# -- workers of this host


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


def test_the_table_says_who_uses_what(fake: type[Fake]) -> None:
    Fake.jobs = [job(1, f"{dead_pid()}@{HOST}"), job(2, "77@elsewhere")]
    output = run("ps").stdout.splitlines()
    assert output[0].split() == ["JOB", "BACKEND", "STATE", "AGE", "USER", "PROGRAM", "DRIVER", "HOST", "IMAGE", "COMMAND"]
    rows = {line.split()[0]: line for line in output[1:]}
    assert "(ended)" in rows["fx-1-1"]
    assert "(ended)" not in rows["fx-1-2"]
    assert rows["fx-1-1"].index("i:1") == rows["fx-1-2"].index("i:1") == output[0].index("IMAGE")


def test_kill_ends_a_worker_of_this_host_at_once() -> None:
    with FiberExecutor(1, backend="local", max_worker_losses=1) as ex:
        pid = ex.submit(os.getpid).result()
        future = ex.submit(time.sleep, DEADLINE)
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
    end = time.monotonic() + 5
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


# -- jobs elsewhere


def test_ps_has_stable_keys(fake: type[Fake]) -> None:
    Fake.jobs = [job(1, f"{os.getpid()}@{HOST}")]
    answer = told("ps")
    assert set(answer) == {"jobs", "problems"}
    (row,) = (row for row in answer["jobs"] if row["backend"] == "fake")
    keys = "id backend state driver driver_runs program user host image started command role".split()
    assert list(row) == keys
    assert row["driver_runs"] is True and "pytest" in row["command"]
    assert ("close",) in Fake.done


def test_a_job_of_which_little_is_known_is_shown(fake: type[Fake]) -> None:
    Fake.jobs = [{"id": "fx-2-1", "program": "fx-2", "state": "running"}]
    (row,) = told("ps", "--backend", "fake")["jobs"]
    assert row["driver_runs"] is None and row["started"] is None and row["driver"] == ""
    assert run("ps", "--backend", "fake").exit_code == 0


def test_a_backend_that_cannot_be_reached_is_a_line_of_ps_and_no_failure(
    fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fake, "error", LaunchError("no engine answers: start it"))
    result = run("ps")
    assert result.exit_code == 0
    assert "fake: not asked: no engine answers: start it" in result.output
    assert told("ps")["problems"] == [{"backend": "fake", "problem": "no engine answers: start it"}]
    assert run("ps", "--backend", "fake").exit_code == 1


def test_a_backend_that_never_answers_is_given_up(fake: type[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(Fake, "blocked", release)
    monkeypatch.setattr(places, "_PATIENCE", 0.2)
    try:
        (problem,) = told("ps")["problems"]
    finally:
        release.set()
    assert "0.2 seconds" in problem["problem"]


def test_a_defect_of_a_backend_is_a_message(fake: type[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    Fake.jobs = [job(9, None)]
    result = run("logs", "fx-1-9")
    assert result.exit_code == 1
    assert "Error: KeyError: 'a defect'" in result.output
    monkeypatch.setattr(Fake, "error", KeyError("another"))
    assert "KeyError" in told("ps")["problems"][0]["problem"]


def test_logs_are_lines(fake: type[Fake]) -> None:
    Fake.jobs = [job(1, None)]
    assert run("logs", "fx-1-1").stdout == "follow=False\ntwo\n"
    lines = run("logs", "-f", "--json", "fx-1-1").stdout.splitlines()
    assert [json.loads(line) for line in lines] == [
        {"job": "fx-1-1", "line": "follow=True"},
        {"job": "fx-1-1", "line": "two"},
    ]


def test_only_jobs_have_logs(fake: type[Fake]) -> None:
    Fake.jobs = [job(1, None), job(2, None)]
    result = run("logs", "fx-1")
    assert result.exit_code == 1
    assert "fx-1-1, fx-1-2" in result.output
    with FiberExecutor(1, backend="local") as ex:
        pid = ex.submit(os.getpid).result()
        result = run("logs", f"local-{pid}")
    assert result.exit_code == 1
    assert f"{os.getpid()}@{HOST}" in result.output


def test_kill_of_a_job_ends_that_job(fake: type[Fake]) -> None:
    Fake.jobs = [job(1, None), job(2, None)]
    assert told("kill", "fx-1-2")["ended"] == [{"target": "fx-1-2", "backend": "fake", "kind": "job", "number": 1}]
    assert Fake.done == [("terminate", "fx-1-2"), ("close",)]


def test_kill_of_a_program_whose_driver_is_elsewhere_ends_its_jobs_and_warns(fake: type[Fake]) -> None:
    Fake.jobs = [job(1, "77@elsewhere"), job(2, "77@elsewhere"), job(1, "77@elsewhere", "fx-2")]
    answer = told("kill", "fx-1")
    assert answer["ended"] == [{"target": "fx-1", "backend": "fake", "kind": "program", "number": 2}]
    assert "77@elsewhere" in answer["warnings"][0]
    assert ("remove", "fx-2") not in Fake.done


def test_clean_removes_what_dead_drivers_left_and_nothing_else(fake: type[Fake]) -> None:
    dead = f"{dead_pid()}@{HOST}"
    Fake.jobs = [
        *(job(number, dead, "fx-dead") for number in (1, 2)),
        job(1, f"{os.getpid()}@{HOST}", "fx-runs"),
        job(1, "77@elsewhere", "fx-elsewhere"),
        job(1, None, "fx-unknown"),
        *(job(number, driver, "fx-half") for number, driver in ((1, dead), (2, f"{os.getpid()}@{HOST}"))),
    ]
    removed = [{"backend": "fake", "program": "fx-dead", "driver": dead, "number": 2}]
    answer = told("clean", "--backend", "fake", "--dry-run")
    assert set(answer) == {"dry_run", "removed", "spared", "problems"}
    assert answer["removed"] == removed and answer["dry_run"] is True
    assert [row["program"] for row in answer["spared"]] == ["fx-elsewhere", "fx-unknown"]
    assert Fake.done == [("close",)]
    assert told("clean", "--backend", "fake")["removed"] == removed
    assert [what for what in Fake.done if what[0] == "remove"] == [("remove", "fx-dead")]
    assert len(told("clean", "--backend", "fake", "--all")["removed"]) == 5
    output = run("clean", "--backend", "fake").output
    assert "2 jobs of fx-dead" in output
    assert "77@elsewhere, which may run, or whose end nobody has seen; --all" in output


def program_job(state: str) -> dict[str, Any]:
    """What `fiberexec run` starts: a driver in a job."""
    row = job(1, "1@prog-1", "prog")
    return {**row, "state": state, "labels": {**row["labels"], "fiberexec.role": "driver"}}


def test_what_a_program_in_a_job_left_is_removed_when_that_has_ended(fake: type[Fake]) -> None:
    worker = job(1, "7@prog-1", "fx-led")
    Fake.jobs = [program_job("running"), worker]
    assert told("clean", "--backend", "fake")["removed"] == []
    assert {row["id"]: row["role"] for row in told("ps", "--backend", "fake")["jobs"]} == {
        "prog-1": "program",
        "fx-led-1": "worker",
    }
    Fake.jobs = [program_job("exited"), worker]
    answer = told("clean", "--backend", "fake")
    assert [each["program"] for each in answer["removed"]] == ["fx-led"]
    assert [row["id"] for row in answer["spared"]] == ["prog-1"]  # somebody may want to see how it ended


def test_kill_of_a_program_in_a_job_ends_its_workers_too(fake: type[Fake]) -> None:
    Fake.jobs = [program_job("running"), job(1, "7@prog-1", "fx-led"), job(1, "7@other", "fx-other")]
    assert [each["target"] for each in told("kill", "prog-1")["ended"]] == ["prog-1", "fx-led"]
    assert Fake.done == [("terminate", "prog-1"), ("remove", "fx-led"), ("close",)]


def test_clean_of_a_backend_that_does_not_answer_fails(fake: type[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fake, "error", LaunchError("no engine answers: start it"))
    assert run("clean", "--backend", "fake").exit_code == 1
    assert run("clean").exit_code == 0


def test_clean_removes_the_folders_of_dead_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(jobs, "_ALWAYS", str(tmp_path))  # not those of this machine
    (left := tmp_path / "fiberexec-hub-left0000").mkdir(mode=0o700)
    (left / "something").touch()
    (used := tmp_path / "fiberexec-hub-used0000").mkdir(mode=0o700)
    lock = folder._lock(str(used))
    try:
        ours = {"backend": "local", "program": str(left), "driver": "", "number": 1}
        assert ours in told("clean", "--backend", "local", "--dry-run")["removed"]
        assert left.exists()
        assert ours in told("clean", "--backend", "local")["removed"]
        assert not left.exists() and used.exists()
    finally:
        os.close(lock)
        used.rmdir()


def test_an_unknown_backend_is_an_error_that_names_the_others() -> None:
    result = run("ps", "--backend", "dockr")
    assert result.exit_code == 2
    assert "docker" in result.output


def test_settings_that_are_wrong_are_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIBEREXEC_MAX_WORKERS", "none")
    for command in ("ps", "clean", "config"):
        result = run(command)
        assert result.exit_code == 1
        assert "FIBEREXEC_MAX_WORKERS" in result.output
