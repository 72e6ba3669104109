"""FiberExecutor with its workers in containers of a real engine."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import services

from fiberexec import BrokenExecutor, FiberExecutor, LaunchError, WorkerLost

from .conftest import docker, eventually

FULL = os.environ.get("FIBEREXEC_CAMPAIGN") == "full"
ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.timeout(600 if FULL else 180),
    # Docker's SDK leaves the socket of a connection that is refused to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def image() -> str:
    return services.worker_image()


def executor(workers: int = 1, **arguments: Any) -> FiberExecutor:
    return FiberExecutor(workers, backend="docker", **arguments)


def containers() -> list[str]:
    return docker("ps", "-aq", "--filter", f"label=fiberexec.driver={os.getpid()}@{os.uname().nodename}").split()


def test_tasks_run_in_containers_and_nothing_is_left_of_them(image: str) -> None:
    with executor(2, image=image) as ex:
        hosts = {future.result() for future in [ex.submit(socket.gethostname) for _ in range(20)]}
        assert socket.gethostname() not in hosts
        assert {host[:12] for host in containers()} >= hosts
    eventually(lambda: not containers())


def test_containers_that_are_warm_are_used_again(image: str) -> None:
    with executor(2, image=image) as ex:
        first = {future.result() for future in [ex.submit(socket.gethostname) for _ in range(10)]}
        began = containers()
        time.sleep(1)  # nothing to do
        for _ in range(3):
            assert {future.result() for future in [ex.submit(socket.gethostname) for _ in range(10)]} <= {
                one[:12] for one in containers()
            }
        assert set(began) <= set(containers()) and len(containers()) <= 2 and ex.stats().started <= 2
        assert first <= {one[:12] for one in containers()}


def test_twenty_containers_work_at_once_and_none_is_given_up(image: str) -> None:
    """As many as this machine may take: their agents start at the same time."""
    count = 20 if FULL else 6
    with executor(count, image=image, min_workers=count) as ex:
        eventually(lambda: ex.stats().idle == count, 300 if FULL else 100)
        assert ex.stats().failed_launches == 0 and len(containers()) == count
        assert list(ex.map(abs, range(-100, 0))) == list(range(100, 0, -1))
    eventually(lambda: not containers())


def test_variables_reach_tasks_and_cannot_be_read_from_outside(image: str) -> None:
    with executor(image=image, env={"TOKEN": "no-one-may-read-this"}) as ex:
        assert ex.submit(os.getenv, "TOKEN").result() == "no-one-may-read-this"
        [one] = containers()
        assert "no-one-may-read-this" not in docker("inspect", one) + docker("logs", one)
        assert not re.search(r"BEGIN [A-Z ]*PRIVATE KEY", docker("inspect", one) + docker("top", one))


def test_a_job_that_takes_too_much_memory_is_lost_with_its_limit_and_the_executor_goes_on(image: str) -> None:
    with executor(image=image, memory="200Mi", max_worker_losses=1) as ex:
        error = ex.submit(bytearray, 1 << 30).exception()
        assert isinstance(error, WorkerLost)
        assert error.reason == "OOMKilled"
        assert ex.submit(abs, -1).result() == 1


def test_a_container_that_is_killed_costs_its_task_an_attempt(image: str, tmp_path: Path) -> None:
    with executor(image=image) as ex:
        future = ex.submit(time.sleep, 8)
        eventually(lambda: any(worker.task for worker in ex.workers()))
        [one] = containers()
        docker("kill", one)
        assert future.result() is None
        assert ex.stats().lost == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"image": "no-such-image:1", "backend_options": {"pull": "never"}}, "docker pull no-such-image:1"),
        ({"backend_options": {"volumes": {"/no/such/folder": "/x"}}}, "bind source path does not exist"),
        ({"gpu": 1}, "NVIDIA Container Toolkit"),
        ({"image": "bare"}, "RUN pip install fiberexec=="),
    ],
    ids=["image", "volume", "gpu", "no fiberexec"],
)
def test_an_executor_that_cannot_have_workers_says_why_within_seconds(
    arguments: dict[str, Any], said: str, image: str
) -> None:
    given = {"image": image, **arguments}
    if given["image"] == "bare":
        given["image"] = services.bare_image()
    start = time.monotonic()
    with executor(**given) as ex:
        error = ex.submit(abs, -1).exception()
        assert ex.stats().failed_launches == 1  # one is enough to know
    assert time.monotonic() - start < 60
    assert isinstance(error, BrokenExecutor) and isinstance(error.__cause__, LaunchError)
    assert said in str(error.__cause__)


def test_no_engine_says_so_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///no/such/docker.sock")
    with executor(image="some:image") as ex:
        error = ex.submit(abs, -1).exception()
    assert isinstance(error, BrokenExecutor) and "unix:///no/such/docker.sock (from DOCKER_HOST)" in str(error.__cause__)


def test_another_python_is_named_with_both_sides(image: str) -> None:
    other = "3.12" if sys.version_info[:2] != (3, 12) else "3.11"
    with executor(image=services.worker_image(other)) as ex:
        error = ex.submit(abs, -1).exception()
    assert isinstance(error, BrokenExecutor), error
    text = str(error.__cause__)
    assert other in text and "{}.{}".format(*sys.version_info[:2]) in text


DRIVER = """
import sys, time
from fiberexec import FiberExecutor
from fiberexec._hub import launch
ex = FiberExecutor(3, backend="docker", image=sys.argv[1], driver_timeout=6)
futures = [ex.submit(time.sleep, 600) for _ in range(3)]
while not all(future.running() for future in futures):
    time.sleep(0.05)
print(launch._pid, flush=True)
time.sleep(600)
"""


@contextmanager
def driver(image: str) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """A program with three containers at work: its process, its hub's pid, and what finds its containers."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", DRIVER, image]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            hub = int(process.stdout.readline())
            yield process, hub, f"label=fiberexec.driver={process.pid}@{os.uname().nodename}"
        finally:
            process.kill()


@pytest.mark.parametrize("again", range(5 if FULL else 1))
def test_a_driver_that_is_killed_leaves_no_container(image: str, again: int) -> None:
    with driver(image) as (process, _, label):
        assert len(docker("ps", "-q", "--filter", label).split()) == 3
        process.send_signal(signal.SIGKILL)
        eventually(lambda: docker("ps", "-aq", "--filter", label) == "")


@pytest.mark.parametrize("again", range(5 if FULL else 1))
def test_a_driver_that_is_killed_together_with_its_hub_leaves_nothing_that_runs_and_the_next_sweeps(
    image: str, again: int
) -> None:
    with driver(image) as (process, hub, label):
        assert len(docker("ps", "-q", "--filter", label).split()) == 3
        os.kill(process.pid, signal.SIGSTOP)  # it must not hear of the hub's end
        os.kill(hub, signal.SIGKILL)
        process.send_signal(signal.SIGKILL)
        eventually(lambda: docker("ps", "-q", "--filter", label) == "", 6 + 30)  # of which the engine takes its part
        process.wait(10)
        assert docker("ps", "-aq", "--filter", label)
        with executor(image=image) as ex:
            assert ex.submit(abs, -1).result() == 1
            eventually(lambda: docker("ps", "-aq", "--filter", label) == "")


def test_the_example_has_the_same_table_as_locally(image: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "code_metrics.py"), "--workers", "2", "--limit", "60"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "--backend", "docker", "--image", image],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the parallel and the serial answer are identical\n")
    assert json.dumps(done.stdout).count("can't be parsed") >= 1
