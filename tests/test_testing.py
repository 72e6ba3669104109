"""fiberexec.testing: the backend checks, on the backends of this package and on broken ones; FakeBackend's faults."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from tenacity import Retrying, stop_after_attempt, wait_fixed

from fiberexec import BrokenExecutor, FiberExecutor, WorkerLost, _config
from fiberexec.backends.base import Backend, Ended, JobEvent, Probed, Recalled, Started
from fiberexec.backends.local import LocalBackend
from fiberexec.testing import BACKEND_CHECKS, Exit, FakeBackend, Refusal, Resources, _check, _recorder, check_backend

Check = Callable[[Callable[[], Backend]], None]


def local() -> LocalBackend:
    return LocalBackend(_config.load(), 3)


def fake() -> FakeBackend:
    return FakeBackend(3, workers_per_job=2)


def late_fake() -> FakeBackend:
    return FakeBackend(3, latency=0.05, launch=lambda n: 0.1 * (n % 2))


@pytest.mark.parametrize("factory", [local, fake, late_fake])
@pytest.mark.parametrize("check", BACKEND_CHECKS.values(), ids=BACKEND_CHECKS)
def test_the_backends_of_this_package_keep_the_contract(
    check: Check, factory: Callable[[], Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_recorder, "AT_ONCE", 20.0)  # the machine may be busy
    check(factory)


def test_the_local_backend_keeps_the_contract_without_what_only_linux_has() -> None:
    program = (
        "from fiberexec import _config, _platform\n"
        "from fiberexec.backends.local import LocalBackend\n"
        "from fiberexec.testing import _recorder, check_backend\n"
        "_recorder.AT_ONCE = 20.0\n"
        "assert not _platform.LINUX\n"
        "check_backend(lambda: LocalBackend(_config.load(), 3))\n"
        "print('kept')\n"
    )
    environment = {**os.environ, "FIBEREXEC_PORTABLE": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.stdout == "kept\n", done.stderr


# -- backends that break their promises


class Blocks(FakeBackend):
    def launch(self, workers: Sequence[int]) -> None:
        time.sleep(1.0)
        super().launch(workers)


class TellsTheEndTwice(FakeBackend):
    def poll(self) -> list[JobEvent]:
        events = super().poll()
        return events + [event for event in events if isinstance(event, Ended)]


class HidesTheEnd(FakeBackend):
    def poll(self) -> list[JobEvent]:
        return [event for event in super().poll() if not isinstance(event, Ended)]


class NeverProbes(FakeBackend):
    def poll(self) -> list[JobEvent]:
        return [event for event in super().poll() if not isinstance(event, Probed)]


class RecallsSomethingElse(FakeBackend):
    def poll(self) -> list[JobEvent]:
        return [e._replace(number=e.number + 1) if isinstance(e, Recalled) else e for e in super().poll()]


class KnowsNoCells(FakeBackend):
    def poll(self) -> list[JobEvent]:
        return [e._replace(running=None) if isinstance(e, Ended) else e for e in super().poll()]


class NamesNoDevice(FakeBackend):
    def __init__(self) -> None:
        super().__init__(3, devices=("a",))
        self.largest = self.largest._replace(devices=())


class StaysOpen(FakeBackend):
    def close(self) -> None:
        pass


BROKEN = {
    Blocks: "starts_what_is_launched",
    TellsTheEndTwice: "reports_each_end_once",
    HidesTheEnd: "reports_each_end_once",
    NeverProbes: "answers_probe_and_recall",
    RecallsSomethingElse: "answers_probe_and_recall",
    KnowsNoCells: "says_what_was_executing",
    NamesNoDevice: "says_what_it_is",
    StaysOpen: "leaves_nothing",
}


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeBackend]]:
    """Short of patience; whatever was made is really closed in the end."""
    monkeypatch.setattr(_check, "PATIENCE", 2.0)
    monkeypatch.setattr(_recorder, "PATIENCE", 2.0)
    monkeypatch.setattr(_recorder, "AT_ONCE", 0.5)
    made: list[FakeBackend] = []
    yield made
    for backend in made:
        FakeBackend.close(backend)


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_backend_that_breaks_a_promise_fails_its_check(kind: type, backends: list[FakeBackend]) -> None:
    def factory() -> FakeBackend:
        backends.append(kind() if kind is NamesNoDevice else kind(3))
        return backends[-1]

    with pytest.raises(AssertionError):
        BACKEND_CHECKS[BROKEN[kind]](factory)


def test_check_backend_names_the_check_that_failed(monkeypatch: pytest.MonkeyPatch, backends: list[FakeBackend]) -> None:
    def factory() -> FakeBackend:
        backends.append(NamesNoDevice())
        return backends[-1]

    with pytest.raises(AssertionError, match=r"^says_what_it_is: "):
        check_backend(factory)


# -- FakeBackend


def pid() -> int:
    return os.getpid()


def begin(path: Path) -> None:
    """Say that this task runs, and run on."""
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(60)


def lines_of(path: Path, count: int) -> list[str]:
    """The lines of a file, as soon as it has so many."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= count:
            return lines
        time.sleep(0.005)
    raise AssertionError(f"{path} did not get {count} lines")


def again(attempts: int) -> Retrying:
    return Retrying(stop=stop_after_attempt(attempts), wait=wait_fixed(0.01))


def test_a_refusal_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    backend = FakeBackend(1, launch=lambda n: 0.0 if n == 3 else Refusal(OSError("no quota"), 0.0))
    with caplog.at_level(logging.WARNING), FiberExecutor(1, backend=backend, launch_retry=again(5)) as executor:
        assert executor.submit(pid).result(30) == backend.pids[3]
        assert executor.stats().failed_launches == 2
    assert "no quota" in caplog.text


def test_a_final_refusal_breaks_an_executor_without_workers() -> None:
    error = PermissionError("pods is forbidden")
    with FiberExecutor(1, backend=FakeBackend(1, launch=lambda n: Refusal(error))) as executor:
        broken = executor.submit(pid).exception(30)
    assert isinstance(broken, BrokenExecutor) and broken.__cause__ is error


def test_a_delay_is_kept() -> None:
    start = time.monotonic()
    with FiberExecutor(1, backend=FakeBackend(1, launch=lambda n: 0.4)) as executor:
        executor.submit(pid).result(30)
    assert time.monotonic() - start >= 0.4


def test_closing_gives_a_delayed_launch_up() -> None:
    start = time.monotonic()
    with FiberExecutor(2, backend=FakeBackend(2, launch=lambda n: 0.0 if n == 1 else 600.0), min_workers=2) as executor:
        executor.submit(pid).result(30)
    assert time.monotonic() - start < 30


def test_a_kill_is_reported_as_scripted(tmp_path: Path) -> None:
    backend = FakeBackend(1)
    mark = tmp_path / "begun"
    with FiberExecutor(1, backend=backend, max_worker_losses=1) as executor:
        future = executor.submit(begin, mark)
        lines_of(mark, 1)
        backend.kill(1, Exit(137, "OOMKilled"))
        error = future.exception(30)
    assert isinstance(error, WorkerLost)
    assert (error.exitcode, error.reason) == (137, "OOMKilled")


def test_a_loss_by_the_infrastructure_is_not_charged(tmp_path: Path) -> None:
    backend = FakeBackend(1)
    mark = tmp_path / "begun"
    with FiberExecutor(1, backend=backend, max_worker_losses=2) as executor:
        future = executor.submit(begin, mark)
        for worker in (1, 2, 3):
            lines_of(mark, worker)
            backend.kill(worker, Exit(None, "node drained", infrastructure=True))
        lines_of(mark, 4)
        assert future.terminate()


def test_tasks_of_a_job_that_was_lost_whole_run_again_and_are_not_charged(tmp_path: Path) -> None:
    backend = FakeBackend(2, workers_per_job=2)
    mark = tmp_path / "begun"
    with FiberExecutor(2, backend=backend, max_worker_losses=2) as executor:
        futures = [executor.submit(begin, mark), executor.submit(begin, mark)]
        lines_of(mark, 2)
        assert set(backend.jobs.values()) == {"fake-0"}
        backend.kill_job("fake-0")
        lines_of(mark, 3)
        for future in futures:
            future.terminate()
    assert all(future.cancelled() for future in futures), "neither was charged with the loss"


def test_what_happens_while_the_backend_cannot_be_reached_is_heard_later(tmp_path: Path) -> None:
    backend = FakeBackend(1)
    mark = tmp_path / "begun"
    with FiberExecutor(1, backend=backend, max_worker_losses=1) as executor:
        future = executor.submit(begin, mark)
        lines_of(mark, 1)
        backend.unreachable = True
        backend.kill(1)
        deadline = time.monotonic() + 30
        while not any(isinstance(event, Ended) for _, _, event in backend._news):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert not future.done(), "nobody knows that the worker has ended"
        backend.unreachable = False
        assert isinstance(future.exception(30), WorkerLost)


def devices() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def test_pools_have_the_capacity_and_the_devices_that_were_named() -> None:
    backend = FakeBackend(2, workers_per_job=0, capacity=Resources(4.0, 1 << 30, 2), devices=("GPU-a", "GPU-b"))
    with FiberExecutor(2, backend=backend) as executor:
        one = executor.options(gpu=1)
        assert {one.submit(devices).result(30) for _ in range(4)} <= {"GPU-a", "GPU-b"}
        with pytest.raises(Exception, match="gpu=3"):
            executor.options(gpu=3).submit(devices)


def test_a_capacity_must_count_the_devices() -> None:
    with pytest.raises(ValueError, match="gpu=2"):
        FakeBackend(1, capacity=Resources(1.0, 0, 2), devices=("a",))


def test_a_fake_on_its_own_says_who_started() -> None:
    backend = FakeBackend(1)
    recorder = _recorder.Recorder(backend)
    try:
        recorder.launch([1])
        (started,) = recorder.wait(Started, 1)
        assert (started.pid, started.job) == (backend.pids[1], backend.jobs[1])
        backend.kill(1, lose_cell=True)
        (ended,) = recorder.wait(Ended, 1)
        assert ended.running is None and ended.exit.code == -signal.SIGKILL
        started.connection.close()
    finally:
        recorder.close()
