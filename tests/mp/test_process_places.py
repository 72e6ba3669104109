"""Where processes run: hosts, sizes, launches that fail, and what looks after them."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import fiberexec
from fiberexec import mp
from fiberexec.backends import base, registry
from fiberexec.backends.local import LocalBackend
from fiberexec.mp import _jobs, _popen, context

from .helpers import LONG, exit_code, gone, heard, run, say

# -- places


def test_a_process_says_where_it_runs() -> None:
    process = mp.Process(target=lambda: None)
    assert [process.host, process.job_id, process.lost] == [None, None, None]
    process.start()
    exit_code(process)
    assert [process.host, process.job_id, process.lost] == [os.uname().nodename, f"local-{process.pid}", None]


def test_when_what_looks_after_processes_dies_they_are_lost_and_the_next_one_runs() -> None:
    process = mp.Process(target=time.sleep, args=(LONG,))
    process.start()
    [backend] = _jobs.get()._backends.values()
    os.kill(backend._server, signal.SIGKILL)  # type: ignore[attr-defined]
    assert exit_code(process) == 255
    assert process.lost == "the fork server died"
    assert run(lambda: sys.exit(2)).exitcode == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_in_the_thread_that_looks_after_processes_hangs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    process = mp.Process(target=time.sleep, args=(LONG,))
    process.start()
    with monkeypatch.context() as patch:
        patch.setattr(_jobs.Jobs, "_do", lambda *_: 1 / 0)
        process.kill()
        assert exit_code(process) == 255
    assert process.pid and gone(process.pid)
    assert process.lost and "division by zero" in process.lost
    assert run(lambda: sys.exit(2)).exitcode == 2


def test_start_says_that_descriptors_have_run_out_and_works_when_there_are_some() -> None:
    def target() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        refused = 0
        for spare in range(40):
            resource.setrlimit(resource.RLIMIT_NOFILE, (5 + spare, hard))
            process = mp.Process(target=int)
            try:
                process.start()
            except (OSError, fiberexec.LaunchError):
                refused += 1
            else:
                process.join()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        process = mp.Process(target=int)
        process.start()
        process.join()
        sys.exit(process.exitcode == 0 < refused and 7)

    assert run(target).exitcode == 7


def test_processes_that_are_killed_at_random_are_all_joined() -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)

    def nested() -> None:
        process = mp.Process(target=time.sleep, args=(LONG,))
        process.start()
        process.join()

    targets: list[Callable[[], object]] = [nested, int]
    for _ in range(5):
        processes = [mp.Process(target=chance.choice(targets)) for _ in range(8)]
        for process in processes:
            process.start()
            time.sleep(chance.random() / 100)
        chance.shuffle(processes)
        for process in processes:
            chance.choice([process.kill, process.terminate])()
        assert {exit_code(process) for process in processes} <= {0, -signal.SIGTERM, -signal.SIGKILL}


def test_a_launch_that_fails_is_raised_by_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    process = mp.Process(target=print)
    with pytest.raises(fiberexec.LaunchError, match=r"sys\.executable is empty"):
        process.start()
    assert process.exitcode is None and process not in mp.active_children()


def test_a_size_that_this_machine_has_not_is_refused() -> None:
    with pytest.raises(fiberexec.ResourceError, match="has no more than"):
        mp.Process(target=print, cpu=100_000).start()
    with pytest.raises(fiberexec.ConfigError, match="memory"):
        mp.Process(target=print, memory="many")
    with pytest.raises(fiberexec.ConfigError, match="gpu"):
        mp.Process(target=print, gpu=-1)


def test_meta_of_the_target_is_the_size_and_arguments_come_first() -> None:
    target = fiberexec.meta(cpu=100_000)(lambda: sys.exit(1))
    with pytest.raises(fiberexec.ResourceError, match="cpu=100000"):
        mp.Process(target=target).start()
    assert run(target, cpu=1).exitcode == 1


def test_processes_that_ask_for_gpus_share_them_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")

    def target(name: str) -> None:
        say(tmp_path / name, os.environ["CUDA_VISIBLE_DEVICES"])
        time.sleep(LONG)

    processes = [mp.Process(target=target, args=(name,), gpu=1) for name in "ab"]
    for process in processes:
        process.start()
    assert sorted(heard(tmp_path / "a") + heard(tmp_path / "b")) == ["4", "5"]
    for process in processes:
        process.kill()
        exit_code(process)


class Plain(LocalBackend):
    """Has nothing but what the Protocol asks for, and launches when it may."""

    name = "plain"
    one_pool = False
    preload = remove_at_end = None  # type: ignore[assignment]
    may_launch = threading.Event()

    def launch(self, workers: Sequence[int]) -> None:
        self.kept = getattr(self, "kept", []) + list(workers)

    def signal(self, worker: int, number: int, group: bool) -> None:
        if worker in self.kept:
            self.kept.remove(worker)
            self._events.append(base.Refused(worker, fiberexec.LaunchError("given up")))
        super().signal(worker, number, group)

    def wakeup(self) -> float | None:
        return time.monotonic() + 0.01

    def poll(self) -> list[base.JobEvent]:
        if self.may_launch.is_set():
            super().launch(self.kept)
            self.kept.clear()
        return super().poll()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A backend of that name, which launches from when the event is set."""
    module = types.ModuleType("a_backend")
    module.Plain = Plain  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_backend", module)
    monkeypatch.setitem(registry._BUILT_IN, "plain", "a_backend:Plain")
    monkeypatch.setitem(context._contexts, "plain", context.FiberContext("plain"))
    monkeypatch.setattr(_popen, "_PATIENCE", 0.01)
    monkeypatch.setattr(Plain, "may_launch", threading.Event())
    return Plain.may_launch


def plain_process(**options: Any) -> mp.Process:
    process = mp.Process(target=time.sleep, args=(LONG,), **options)
    process._context_name = "plain"
    return process


def test_start_does_not_wait_for_a_slow_backend_and_the_pid_does(plain: threading.Event) -> None:
    processes = [plain_process(cpu=cpu) for cpu in (None, 1, 1)]
    for process in processes:
        process.start()
    assert all(process.is_alive() for process in processes)
    assert set(mp.active_children()) >= set(processes)
    threading.Timer(0.05, plain.set).start()
    for process in processes:
        assert process.pid and process.host
        process.kill()
        assert exit_code(process) == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_has_not_been_launched_yet_is_given_up(plain: threading.Event, number: int) -> None:
    process = plain_process()
    process.start()
    if number == signal.SIGTERM:
        process.terminate()
    else:
        process.kill()
    assert exit_code(process) == -number and process.lost is None and process.pid is None
