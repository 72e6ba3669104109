"""How large containers are: what fits nowhere is refused with the engine's figures, and what was asked for can be used."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import services

import fiberexec
from fiberexec import FiberExecutor, _platform, mp
from fiberexec.mp import _jobs

docker = pytest.importorskip("docker")
LIMIT = 60.0  # seconds for what takes a few
pytestmark = [
    pytest.mark.timeout(180),  # the image may have to be built
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]


@pytest.fixture(autouse=True)
def everywhere(nothing_left_behind: None, no_settings: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FIBEREXEC_BACKEND", "docker")
    monkeypatch.setenv("FIBEREXEC_IMAGE", services.worker_image())
    yield
    _jobs.close()  # the thread that looks after processes


@pytest.fixture
def figures() -> str:
    """The engine's, as messages have them."""
    client = docker.from_env()
    try:
        info = client.info()
    finally:
        client.close()
    return f"has cpu={info['NCPU']}, memory={info['MemTotal'] / 2**20:.0f} MiB"


def by_process(**size: Any) -> str:
    """What is said of a Process; while the hub starts, start() does not wait for it."""
    process = mp.Process(target=print, **size)
    try:
        process.start()
    except fiberexec.LaunchError as error:
        return str(error)
    process.join(LIMIT)
    assert process.exitcode == 255
    return str(process.lost)


def by_pool(**size: Any) -> str:
    with mp.Pool(1, **size) as pool, pytest.raises(fiberexec.BrokenExecutor) as caught:
        pool.apply_async(abs, (1,)).get(LIMIT)
    return str(caught.value.__cause__)


def by_function(**size: Any) -> str:
    with mp.Pool(1) as pool, pytest.raises(fiberexec.BrokenExecutor) as caught:
        pool.map_async(fiberexec.meta(**size)(functools.partial(abs)), [1, 2]).get(LIMIT)
    return str(caught.value.__cause__)


def by_executor(**size: Any) -> str:
    with FiberExecutor(1, **size) as executor, pytest.raises(fiberexec.BrokenExecutor) as caught:
        executor.submit(abs, 1).result(LIMIT)
    return str(caught.value.__cause__)


@pytest.mark.parametrize("size", [{"cpu": 10_000}, {"memory": "900Ti"}], ids=["cpu", "memory"])
@pytest.mark.parametrize("ask", [by_process, by_pool, by_function, by_executor])
def test_what_fits_nowhere_is_refused_with_what_the_engine_has(
    ask: Callable[..., str], size: dict[str, Any], figures: str
) -> None:
    start = time.monotonic()
    said = ask(**size)
    assert time.monotonic() - start < 30
    assert figures in said and ("cpu=10000" in said or "memory=943718400 MiB" in said)


@pytest.mark.parametrize("size", [{"cpu": 1.5}, {"cpu": 0.3}, {"memory": "100M"}], ids=["cores", "part", "memory"])
def test_a_task_may_ask_for_all_that_its_job_was_made_with(size: dict[str, Any]) -> None:
    """A core that is not whole, and a page, count as what they were asked for: the container itself sees less."""
    with FiberExecutor(1, **size) as executor:
        assert executor.options(**size).submit(abs, -1).result(LIMIT) == 1
    with mp.Pool(1) as pool:
        assert pool.map_async(fiberexec.meta(**size)(functools.partial(abs)), [-1, -2]).get(LIMIT) == [1, 2]


def test_a_task_that_asks_for_more_than_its_container_may_use_still_runs() -> None:
    """Where the user says nothing of a job's size, what this host has was promised to it."""
    here = _platform.cpu_count()
    with FiberExecutor(1, backend_options={"cpuset_cpus": "0"}) as executor:
        assert executor.options(cpu=here).submit(abs, -1).result(LIMIT) == 1
