"""The command with a real Docker engine: ``ps``, ``logs``, ``kill``, ``clean`` and ``doctor``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import HOST, ROOT, run, told
from services import bare_image, require_docker, worker_image

import fiberexec

DEADLINE = 60.0  # seconds

# A driver: starts jobs 1 to n of a program, each of which runs some code, then ends at once or waits.
DRIVER = """
import os, sys
root, program, image, count, code, stays = sys.argv[1:]
sys.path.insert(0, root)
from fiberexec import _config
from fiberexec.backends import registry
from fiberexec.backends.base import Job
backend = registry.create_jobs("docker", _config.load(backend="docker", image=image))
for number in range(1, int(count) + 1):
    backend.start(Job(f"{program}-{number}", program, ("python", "-uc", code), b"{}"))
print("started", flush=True)
if int(stays):
    sys.stdin.read()
os._exit(0)
"""
WAIT = "import time; print('one'); print('two'); time.sleep(1000)"


def in_a_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As run(): where Docker's SDK fails it leaves a socket open."""
    program = f"import sys; sys.path.insert(0, {ROOT!r}); from fiberexec.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip


class Driver:
    """A process that starts jobs. It has ended when ``stays`` is false."""

    def __init__(self, program: str, count: int = 1, code: str = WAIT, stays: bool = False) -> None:
        arguments = [ROOT, program, bare_image(), str(count), code, str(int(stays))]
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "started\n"
        if not stays:
            self.process.wait(DEADLINE)
        self.name = f"{self.process.pid}@{HOST}"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A name for a program whose jobs go when the test ends."""
    require_docker()
    bare_image()
    monkeypatch.chdir(tmp_path)
    name = f"fx-test-{os.urandom(4).hex()}"
    yield name
    command = ["docker", "ps", "-aq", "--filter", f"label=fiberexec.program={name}"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE).stdout.split()
    if found:
        subprocess.run(["docker", "rm", "-f", *found], capture_output=True, check=True, timeout=DEADLINE)


def of(program: str, *arguments: str) -> dict[str, dict[str, Any]]:
    rows = told("ps", "--backend", "docker")["jobs"]
    return {row["id"]: row for row in rows if row["program"] == program}


def test_jobs_of_another_driver_are_seen_read_and_ended(program: str) -> None:
    driver = Driver(program, count=2, stays=True)
    try:
        found = of(program)
        assert set(found) == {f"{program}-1", f"{program}-2"}
        row = found[f"{program}-1"]
        assert row["driver"] == driver.name and row["driver_runs"] is True and row["state"] == "running"
        assert row["image"] == bare_image() and program in row["command"]
        assert abs(row["started"] - time.time()) < DEADLINE
        end = time.monotonic() + DEADLINE
        while (output := run("logs", f"{program}-1").stdout) != "one\ntwo\n":
            assert time.monotonic() < end, output
        assert told("clean", "--backend", "docker", "--dry-run")["removed"] == []
        assert told("kill", f"{program}-1")["ended"][0]["kind"] == "job"
        assert set(of(program)) == {f"{program}-2"}
        answer = told("kill", program)
        assert {each["kind"]: each["number"] for each in answer["ended"]} == {"driver": 1, "program": 1}
        assert answer["warnings"] == []
        assert driver.process.wait(DEADLINE) < 0
        assert not of(program)
    finally:
        driver.close()


def test_logs_follow_a_job_to_its_end(program: str) -> None:
    Driver(program, code="import time\nfor i in range(4): print(i); time.sleep(0.3)").close()
    assert run("logs", "-f", f"{program}-1").stdout == "0\n1\n2\n3\n"


def test_clean_removes_what_a_dead_driver_left(program: str) -> None:
    driver = Driver(program, count=2)
    driver.close()
    (row, _) = of(program).values()
    assert row["driver"] == driver.name and row["driver_runs"] is False
    assert "(ended)" in run("ps", "--backend", "docker").output
    removed = told("clean", "--backend", "docker")["removed"]
    assert {"backend": "docker", "program": program, "driver": driver.name, "number": 2} in removed
    assert not of(program)
    assert told("clean", "--backend", "docker")["removed"] == []


def test_an_engine_that_is_away_is_a_line(program: str, tmp_path: Path) -> None:
    away = f"unix://{tmp_path}/none.sock"
    result = in_a_process("ps", DOCKER_HOST=away)
    assert result.returncode == 0
    assert result.stdout.startswith("JOB")
    assert "docker: not asked" in result.stderr and "DOCKER_HOST" in result.stderr
    assert "Traceback" not in result.stderr
    result = in_a_process("kill", f"{program}-1", DOCKER_HOST=away)
    assert result.returncode == 1
    assert "docker could not be asked" in result.stderr and "Traceback" not in result.stderr


# -- doctor


def findings(*arguments: str, exit_code: int) -> dict[str, dict[str, str]]:
    answer = told("doctor", "--backend", "docker", *arguments, exit_code=exit_code)
    assert answer["ok"] is (exit_code == 0)
    return {finding["check"]: finding for finding in answer["findings"]}


@pytest.fixture
def nothing_of_a_doctor_stays(program: str) -> Iterator[None]:
    yield
    found = subprocess.run(["docker", "ps", "-a", "--format", "{{.Names}}"], capture_output=True, text=True, timeout=DEADLINE)
    assert "fx-doctor" not in found.stdout


@pytest.mark.usefixtures("nothing_of_a_doctor_stays")
class TestDoctor:
    @pytest.mark.timeout(300)  # its image may have to be built
    def test_all_is_well_where_it_is(self) -> None:
        found = findings("--image", worker_image(), exit_code=0)
        expected = {"docker", "image", "image's fiberexec", "route", "clock", "link", "task"}
        assert expected <= set(found)
        assert all(found[name]["status"] == "ok" for name in expected), found

    def test_an_image_without_fiberexec_gets_a_line_for_its_dockerfile(self) -> None:
        found = findings("--image", bare_image(), exit_code=1)
        assert found["image's fiberexec"]["status"] == "broken"
        assert f"RUN pip install fiberexec=={fiberexec.__version__}" in found["image's fiberexec"]["remedy"]
        assert found["route"]["status"] == "ok"
        assert found["task"]["status"] == "skipped"

    def test_an_image_with_another_python_is_named_with_both_versions(self) -> None:
        other = "3.11" if sys.version_info[:2] == (3, 12) else "3.12"
        found = findings("--image", bare_image(other), exit_code=1)
        assert found["image"]["status"] == "broken"
        ours = f"{sys.version_info[0]}.{sys.version_info[1]}"
        assert other in found["image"]["found"] and f"FROM python:{ours}-slim" in found["image"]["remedy"]

    def test_an_image_that_is_not_there_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FIBEREXEC_BACKEND_OPTIONS", '{"pull": "never"}')
        monkeypatch.setenv("FIBEREXEC_BACKEND", "docker")
        found = findings("--image", "no/such:image", exit_code=1)
        assert found["job"]["status"] == "broken"
        assert "no/such:image" in found["job"]["found"] and "docker pull" in found["job"]["found"]

    def test_an_engine_that_is_away_says_how_to_start_it(self, tmp_path: Path) -> None:
        away = f"unix://{tmp_path}/none.sock"
        result = in_a_process("doctor", "--backend", "docker", "--image", "some:image", "--json", DOCKER_HOST=away)
        assert result.returncode == 1, result.stderr
        found = {finding["check"]: finding for finding in json.loads(result.stdout)["findings"]}
        assert found["docker"]["status"] == "broken"
        assert "start it" in found["docker"]["found"] and "DOCKER_HOST" in found["docker"]["found"]
        assert found["job"]["status"] == "skipped"

    def test_an_address_that_is_not_this_hosts_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FIBEREXEC_BACKEND", "docker")
        monkeypatch.setenv("FIBEREXEC_BACKEND_OPTIONS", '{"advertise_address": "192.0.2.7"}')
        found = findings("--image", bare_image(), exit_code=1)
        assert found["route"]["status"] == "broken"
        assert "192.0.2.7" in found["route"]["found"] and "advertise_address" in found["route"]["remedy"]
