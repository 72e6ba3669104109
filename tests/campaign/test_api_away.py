"""The API server of a real cluster does not answer for a while: nothing is lost, and only new workers have to wait."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import clusters
import pytest
import services
from services import cluster
from services.base import Daemon

from fiberexec import FiberExecutor

LIMIT = 120.0  # seconds after which what is not there does not come


@pytest.fixture
def space() -> Iterator[str]:
    with clusters.namespace() as name:
        yield name


@contextmanager
def frozen(program: str) -> Iterator[None]:
    """It keeps its connections, and says nothing."""
    pid = Daemon(program, cluster.HERE).pid()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:a worker could not be started")  # it is said while nobody answers
def test_an_api_server_that_is_away_costs_nothing_but_new_workers(
    space: str, size: Callable[[int, int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", services.require_kubernetes())
    image = services.cluster_image(services.worker_image())
    options = {"namespace": space, "advertise_address": cluster.ADDRESS}
    away = size(15, 130)  # seconds
    with FiberExecutor(3, backend="kubernetes", image=image, backend_options=options) as ex:
        use(ex, 2)
        with frozen("kube-apiserver"):
            held = ex.submit(time.sleep, away)
            done, end = 0, time.monotonic() + away
            while time.monotonic() < end or not held.done():
                done += len(list(ex.map(time.sleep, [0.1] * 20)))  # enough for a third worker, which nobody can make now
            assert ex.stats().started == 2
        use(ex, 3)
        stats = ex.stats()
    print(f"{away} s away: {done} tasks, {stats}")
    assert (stats.lost, stats.retried) == (0, 0)


def use(ex: FiberExecutor, workers: int) -> None:
    """Give them work until they are there."""
    end = time.monotonic() + LIMIT
    while ex.stats().started < workers:
        assert time.monotonic() < end, "they do not come"
        list(ex.map(time.sleep, [0.5] * workers))
