"""A thousand pods, and a server that is away for as long as it takes."""

from __future__ import annotations

import gc
import os
import signal
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
import services
from services import cluster

from fiberexec import FiberExecutor

from .conftest import Place, eventually
from .fake import NAMESPACE, Fake

PODS = f"/namespaces/{NAMESPACE}/pods$"
SOON = 30.0  # seconds
FULL = os.environ.get("FIBEREXEC_CAMPAIGN") == "full"
AWAY = 120.0 if FULL else 1.0  # seconds, of a fake server
AWAY_INDEED = 30.0 if FULL else 8.0  # of the real one


def test_a_thousand_pods_join_in_one_list_and_one_watch(fake: Fake, one: Place) -> None:
    with ThreadPoolExecutor(16) as pool:
        jobs = list(pool.map(lambda number: one.start(number, ""), range(1000)))
    assert (fake.count("GET", PODS, watch=""), fake.count("GET", PODS, watch="1")) == (1, 1)
    fake.compact()
    fake.end_watches()
    for job in jobs:
        fake.end(job)
    for job in jobs:
        one.end(job, 30)
    assert fake.count("GET", PODS, watch="") <= 4  # at most one list more, in pages
    assert one.backend._jobs == {}


def test_memory_is_flat_while_a_thousand_pods_say_something_again_and_again(fake: Fake, one: Place) -> None:
    with ThreadPoolExecutor(16) as pool:
        jobs = list(pool.map(lambda number: one.start(number, ""), range(1000)))

    def traced() -> int:
        """Bytes, when all has been seen that was said."""
        for turn, job in enumerate(jobs):
            fake.say(job, message=f"{turn} {time.monotonic()}")
        last = fake.pods[jobs[-1]]["status"]["message"]
        eventually(lambda: one.backend._jobs[jobs[-1]].pod["status"].get("message") == last)
        fake.compact()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        first = [traced() for _ in range(3)][2]  # until nothing is new any more
        later = [traced() for _ in range(3)][2]
    finally:
        tracemalloc.stop()
    assert later < 1.1 * first + (1 << 18), f"{first} and {later} bytes"
    assert fake.count("GET", PODS, watch="") <= 4
    for job in jobs:
        fake.end(job)
    for job in jobs:
        one.end(job, SOON)
    assert one.backend._jobs == {}


@pytest.mark.timeout(300)
def test_a_server_that_is_away_ends_no_job_and_what_happened_is_told_when_it_is_back(fake: Fake, one: Place) -> None:
    kept, ended, gone = (one.start(number, "") for number in range(3))
    fake.down()
    fake.end(ended, 4)
    fake.vanish(gone)
    time.sleep(AWAY)  # the outage itself
    assert one.ended == []
    fake.up()
    assert one.end(ended, 30).code == 4
    assert one.end(gone, 30).infrastructure
    fake.end(kept)
    assert one.end(kept, SOON).code == 0


@pytest.mark.timeout(300)
def test_a_server_that_does_not_answer_costs_a_running_program_nothing(
    own_space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", services.require_kubernetes())
    options: dict[str, Any] = {"namespace": own_space, "advertise_address": cluster.ADDRESS}
    image = services.cluster_image(services.worker_image())
    with FiberExecutor(2, backend="kubernetes", image=image, backend_options=options) as executor:
        assert list(executor.map(abs, range(10), chunksize=1)) == list(range(10))
        both = [executor.submit(time.sleep, 1.0) for _ in range(4)]
        eventually(lambda: executor.stats().started == 2)
        wait(both)
        server = int((cluster.HERE / "kube-apiserver.pid").read_text().split()[0])
        os.kill(server, signal.SIGSTOP)
        try:
            end = time.monotonic() + AWAY_INDEED
            while time.monotonic() < end:
                assert list(executor.map(abs, range(10), chunksize=1)) == list(range(10))
                executor.submit(time.sleep, 0.2).result(SOON)
        finally:
            os.kill(server, signal.SIGCONT)
        stats = executor.stats()
        assert (stats.started, stats.workers, stats.lost, stats.failed_launches) == (2, 2, 0, 0)
