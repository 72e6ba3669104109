"""What starts jobs goes on, whatever fails around it: its janitor, its backend's watch, drivers that look like others."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

import fiberexec
from fiberexec import BrokenExecutor, FiberExecutor, _launcher, _platform, mp
from fiberexec._hub import launch
from fiberexec.mp import _jobs
from fiberexec.testing._agents import AgentBackend

LIMIT = 30.0


# -- the janitor


@pytest.fixture
def no_jobs_left(nothing_left_behind: None) -> Iterator[None]:
    """What looks after the processes of fiberexec.mp ends before anybody looks at what is left."""
    yield
    _jobs.close()
    launch.close()


def work(queue: Any) -> None:
    """A process with a job of its own."""
    with FiberExecutor(1, backend="agents", driver_timeout=2) as executor:
        executor.submit(abs, 1).result()
        queue.put(_launcher._launcher.program)  # type: ignore[union-attr]
        executor.submit(signal.pause).result()


def left(program: str) -> list[Path]:
    return sorted(Path(tempfile.gettempdir()).glob(f"fiberexec-agents-{program}-*"))


def test_a_hub_that_can_start_no_janitor_goes_on_and_tries_again(
    no_jobs_left: None, hub: Callable[[], psutil.Process], until: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    queue = mp.Queue()
    process = mp.Process(target=work, args=(queue,))
    process.start()
    program = queue.get(timeout=LIMIT)
    assert (found := left(program))
    limits = hub().rlimit(psutil.RLIMIT_NOFILE)
    hub().rlimit(psutil.RLIMIT_NOFILE, (3, limits[1]))  # there is no descriptor for anything new
    process.kill()
    process.join(LIMIT)
    until(lambda: "has no janitor" in capfd.readouterr().err, what="the program is told")
    queue.put("it goes on")
    assert queue.get(timeout=LIMIT) == "it goes on"
    assert left(program) == found
    hub().rlimit(psutil.RLIMIT_NOFILE, limits)
    until(lambda: not left(program), what="a janitor has removed what was left")


# -- the watch


def test_jobs_whose_watch_fails_are_not_waited_for_and_it_goes_on(
    make: Any, jobs: Any, until: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No agent comes, and nobody would hear that: without a word another job is started, in which the task runs."""
    watch, watches = AgentBackend.watch, []

    def fails_once(backend: AgentBackend, report: Any) -> None:
        watches.append(backend)
        if len(watches) == 1:
            until(lambda: jobs.started)
            jobs.silent = False
            raise KeyError("a defect of this backend")
        watch(backend, report)

    monkeypatch.setattr(AgentBackend, "watch", fails_once)
    jobs.silent = True
    with caplog.at_level(logging.WARNING, "fiberexec"):
        assert make(1).submit(abs, -1).result(LIMIT) == 1
    assert len(jobs.started) == 2
    assert [record for record in caplog.records if "a defect of this backend" in record.getMessage()]
    assert len(watches) == 2 and watches[0] is watches[1]


def test_a_watch_that_always_fails_is_why_no_job_can_be_had(make: Any, jobs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(backend: AgentBackend, report: Any) -> None:
        raise KeyError("a defect of this backend")

    monkeypatch.setattr(AgentBackend, "watch", fails)
    jobs.silent = True
    error = make(1, startup_timeout=3).submit(abs, -1).exception(LIMIT)
    assert isinstance(error, BrokenExecutor)
    assert "a defect of this backend" in str(error.__cause__)


# -- what others have left


class Left:
    """A backend with jobs of a driver that has gone from this host, as far as one can see."""

    name = "left"

    def __init__(self, space: str | None) -> None:
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        self.labels = {"fiberexec.driver": f"{process.pid}@{_platform.host_name()}"}
        if space is not None:
            self.labels["fiberexec.space"] = space
        self.removed: list[str] = []

    def list(self) -> list[dict[str, Any]]:
        return [{"id": "fx-1-1", "program": "fx-1", "state": "exited", "labels": self.labels}]

    def remove(self, program: str) -> int:
        self.removed.append(program)
        return 1


@pytest.mark.parametrize("space", [_platform.pid_space(), None])
def test_what_a_dead_driver_of_this_host_left_is_removed(space: str | None) -> None:
    backend: Any = Left(space)
    _launcher._sweep(backend)
    assert backend.removed == ["fx-1"]


def test_what_has_ended_of_a_driver_elsewhere_that_calls_its_host_like_this_one_stays() -> None:
    """It may run, and be about to start more."""
    backend: Any = Left("of another machine, or of a container that has the name of its host")
    _launcher._sweep(backend)
    assert not backend.removed


@pytest.mark.skipif(not _platform.LINUX, reason="there are no namespaces")
def test_a_container_with_the_name_of_its_host_is_another_place() -> None:
    code = "from fiberexec import _platform; print(_platform.pid_space())"
    environ = {**os.environ, "PYTHONPATH": str(Path(fiberexec.__file__).parents[1])}
    found = [
        subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True, env=environ)
        for prefix in ((), ("unshare", "--pid", "--fork"))
    ]
    if found[1].returncode:
        pytest.skip(f"no namespaces may be made here: {found[1].stderr}")
    here, there = (done.stdout.strip() for done in found)
    assert here == _platform.pid_space() != there and len(there) == len(here) == 16


# -- the end


def test_what_is_left_of_jobs_is_removed_before_a_program_has_ended(
    monkeypatch: pytest.MonkeyPatch, nothing_left_behind: None, until: Callable[..., Any]
) -> None:
    monkeypatch.setattr(_launcher, "_LAST", 30.0)
    begun: list[str] = []
    done: list[str] = []
    terminate = AgentBackend.terminate

    def slow(self: AgentBackend, jobs: Sequence[str]) -> None:
        begun.extend(jobs)
        if threading.current_thread() is not threading.main_thread():  # which closes the backend
            time.sleep(1.0)  # as a busy engine
        terminate(self, jobs)
        done.extend(jobs)

    monkeypatch.setattr(AgentBackend, "terminate", slow)
    with FiberExecutor(3, backend="agents") as executor:
        list(executor.map(time.sleep, [0.1] * 3))
    until(lambda: not _launcher._launcher._jobs)  # type: ignore[union-attr]
    launch.close()
    assert begun and sorted(begun) == sorted(done)
