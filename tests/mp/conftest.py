"""Every test of fiberexec.mp ends what looks after its processes, so that what is left behind shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import elsewhere
import pytest

from fiberexec import mp
from fiberexec._hub import launch
from fiberexec.mp import _jobs, heap
from fiberexec.mp.managers import SyncManager
from fiberexec.mp.pool import Pool

from . import carriers
from .helpers import Gate, Log


@pytest.fixture(autouse=True)
def no_jobs_left(nothing_left_behind: None) -> Iterator[None]:
    """End the processes that a test has started, the thread that looks after them, and the hub."""
    yield
    _jobs.close()
    heap.forget()
    launch.close()


# Modules whose tests run on every backend that is reachable, but for those that the marker ``one_host(reason)`` keeps back.
EVERYWHERE = {
    "test_asyncmanager", "test_condition", "test_hub_faults", "test_hub_memory", "test_manager_ends", "test_managers",
    "test_pool", "test_pool_faults", "test_pool_life", "test_process", "test_process_family", "test_queues", "test_ring",
    "test_sharedctypes", "test_synchronize",
}  # fmt: skip
# And those whose tests are about processes in jobs.
ELSEWHERE = {"test_elsewhere", "test_elsewhere_memory", "test_elsewhere_queues"}
BACKENDS = ["local", "agents", *elsewhere.FURTHER]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name, one_host = metafunc.module.__name__.rpartition(".")[2], metafunc.definition.get_closest_marker("one_host")
    if name in ELSEWHERE:
        metafunc.parametrize("backend", ["agents"] if one_host else BACKENDS[1:], indirect=True)
    elif name in EVERYWHERE and not one_host:
        metafunc.parametrize("backend", BACKENDS, indirect=True)


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest, no_settings: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where processes run in this test."""
    name: str = getattr(request, "param", "local")
    if name in elsewhere.NAMES:
        elsewhere.enter(name, request, monkeypatch)
    elif name != "local":
        monkeypatch.setenv("FIBEREXEC_BACKEND", name)
    return name


@pytest.fixture(scope="session")
def space() -> Iterator[str]:
    yield from elsewhere.spaces()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    made = Gate(tmp_path / "gate")
    yield made
    made.close()


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "log")


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(2) as pool:
        yield pool


@pytest.fixture
def manager(nothing_left_behind: None) -> Iterator[SyncManager]:
    with mp.Manager() as manager:
        yield manager
    manager.join()  # or pytest keeps its Process


@pytest.fixture
def carrier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What Pipe() makes in this test."""
    backend: str = getattr(request, "param", carriers.LOCAL)
    monkeypatch.setattr(carriers, "backend", backend)
    return backend


@pytest.fixture
def folder_of_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """multiprocessing would make one and keep it to the end."""
    monkeypatch.setitem(mp.current_process()._config, "tempdir", str(tmp_path))  # type: ignore[attr-defined]
