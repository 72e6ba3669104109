"""The command: ``ps``, ``logs``, ``kill`` and ``clean``, with a backend that does what a test wants."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from commands import HOST, dead_pid, run, told

from fiberexec import FiberExecutor, LaunchError, _platform
from fiberexec._cli import jobs, places
from fiberexec._hub import folder
from fiberexec.backends import registry
from fiberexec.backends._kubernetes_api import ApiError
from fiberexec.backends.base import Pool, Resources


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


def job(number: int, driver: str | None, program: str = "fx-1", started: float | None = None) -> dict[str, Any]:
    labels = {"fiberexec.user": str(os.getuid())}
    if driver is not None:
        labels["fiberexec.driver"] = driver
    started = time.time() if started is None else started
    row = {"id": f"{program}-{number}", "program": program, "state": "running", "host": "h", "image": "i:1"}
    return {**row, "started": int(started), "labels": labels}


def test_the_table_says_who_uses_what(fake: type[Fake]) -> None:
    Fake.jobs = [job(1, f"{dead_pid()}@{HOST}"), job(2, "77@elsewhere")]
    output = run("ps").stdout.splitlines()
    assert output[0].split() == ["JOB", "BACKEND", "STATE", "AGE", "USER", "PROGRAM", "DRIVER", "HOST", "IMAGE", "COMMAND"]
    rows = {line.split()[0]: line for line in output[1:]}
    assert "(ended)" in rows["fx-1-1"]
    assert "(ended)" not in rows["fx-1-2"]
    assert rows["fx-1-1"].index("i:1") == rows["fx-1-2"].index("i:1") == output[0].index("IMAGE")


def test_what_others_have_written_stays_on_its_line_and_does_nothing_to_the_terminal(fake: type[Fake]) -> None:
    Fake.jobs = [{**job(1, None), "image": "two\nlines\t\x1b[2J"}]
    output = run("ps", "--backend", "fake").stdout
    assert len(output.splitlines()) == 2 and "two lines ?[2J" in output


def test_ps_shows_what_a_program_in_a_job_was_started_with(fake: type[Fake]) -> None:
    Fake.jobs = [job(1, "1@fx-1-1")]
    Fake.jobs[0]["labels"] |= {"fiberexec.role": "driver", "fiberexec.command": "python train.py"}
    (row,) = told("ps", "--backend", "fake")["jobs"]
    assert (row["role"], row["command"]) == ("program", "python train.py")


def test_whose_a_worker_is_says_the_program_that_it_works_for(fake: type[Fake]) -> None:
    """Inside, they have other users, if any."""
    Fake.jobs = [job(1, "1@fx-1-1"), job(1, "12@fx-1-1", "fx-2"), job(2, "12@elsewhere", "fx-2")]
    Fake.jobs[0]["labels"] |= {"fiberexec.role": "driver", "fiberexec.user": "ann"}
    for each in Fake.jobs[1:]:
        each["labels"]["fiberexec.user"] = "0"
    users = {row["id"]: row["user"] for row in told("ps", "--backend", "fake")["jobs"]}
    assert users == {"fx-1-1": "ann", "fx-2-1": "ann", "fx-2-2": "0"}


@pytest.mark.parametrize("space, runs", [(_platform.pid_space(), False), ("of another machine", None)])
def test_whether_a_driver_runs_nobody_knows_of_another_host_of_the_same_name(
    fake: type[Fake], space: str, runs: bool | None
) -> None:
    Fake.jobs = [job(1, f"{dead_pid()}@{HOST}")]
    Fake.jobs[0]["labels"]["fiberexec.space"] = space
    assert [row["driver_runs"] for row in told("ps", "--backend", "fake")["jobs"]] == [runs]
    assert len(told("clean", "--backend", "fake")["removed"]) == (runs is False)


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


def test_a_process_of_this_host_with_the_name_of_a_program_in_a_job_has_no_part_in_its_workers(
    fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    Fake.jobs = [program_job("running"), job(1, "7@prog-1", "fx-led")]
    assert run("run", "--backend", "local", "-d", "--name", "prog-1", sys.executable, "-c", "").exit_code == 0
    lock = tmp_path / "fiberexec" / "run" / "prog-1" / "lock"
    with open(lock) as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # it has ended
    rows = [(row["backend"], row["id"], row["state"]) for row in told("ps")["jobs"] if row["role"] == "program"]
    assert rows == [("fake", "prog-1", "running"), ("local", "prog-1", "exited")]
    assert told("clean")["removed"] == []


@pytest.mark.parametrize("error", [ConnectionResetError("gone"), ApiError(0, "", "the connection broke", "")])
def test_a_backend_that_goes_while_a_log_is_read_is_no_defect(
    fake: type[Fake], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def logs(self: Fake, job: str, follow: bool = False) -> Iterator[str]:
        yield "one"
        raise error

    monkeypatch.setattr(Fake, "logs", logs)
    Fake.jobs = [job(1, None)]
    result = run("logs", "-f", "fx-1-1")
    assert result.exit_code == 1 and result.stdout == "one\n"
    assert f"fake does not answer any more ({error})" in result.output and "defect" not in result.output


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
