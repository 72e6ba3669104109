"""Containers that are killed, and links that are cut, while thousands of tasks run: each settles once, and rightly."""

from __future__ import annotations

import collections
import json
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import services
from proxy import Proxy

from fiberexec import FiberExecutor
from fiberexec.backends.base import Job

FULL = os.environ.get("FIBEREXEC_CAMPAIGN") == "full"
BOUND = 900 if FULL else 100  # seconds after which what is not done hangs
EACH = 0.03  # seconds of a task

pytestmark = [
    pytest.mark.timeout(1500 if FULL else 200),
    # Docker's SDK leaves the socket of a connection that is refused to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:a worker could not be started"),  # its container was killed while it came up
]


# A module of its own, which containers get from here: they have no tests.
DIARY = """
import os, socket, time

def work(number):
    'Notes where it runs.'
    file = os.open(f"/diary/{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, f"{socket.gethostname()}\\n".encode())
    os.close(file)
    time.sleep(EACH)
    return number
"""


class Hunter:
    """Kills a random container each second, in one of several ways, and cuts all links every five.

    It asks the engine itself: Docker's command takes longer than a second where all processors are busy.
    """

    def __init__(self, rng: random.Random, proxy: Callable[[], Proxy | None]) -> None:
        self._rng = rng
        self._proxy = proxy
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._lock = threading.Lock()
        self.killed: set[str] = set()
        self.kills = 0  # of containers that ran until then
        self.seconds = 0
        self._label = f"fiberexec.driver={os.getpid()}@{os.uname().nodename}"

    def __enter__(self) -> Hunter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        sdk: Any = import_module("docker")
        with closing(sdk.from_env(timeout=100, max_pool_size=32)) as client, ThreadPoolExecutor(16) as pool:
            while not self._stop.wait(max(0.0, began + self.seconds + 1 - time.monotonic())):
                self.seconds += 1
                pool.submit(self._kill, client.api)
                proxy = self._proxy()
                if proxy is not None and self.seconds % (5 if FULL else 2) == 0:
                    proxy.cut()

    def _kill(self, api: Any) -> None:
        """Kill one that runs; where there is none just now, the next that does."""
        while not self._stop.is_set():
            found = [one["Id"] for one in api.containers(filters={"label": self._label, "status": "running"})]
            with self._lock:
                found = [one for one in found if one[:12] not in self.killed]
                if found:
                    victim = self._rng.choice(found)
                    self.killed.add(victim[:12])  # before: what it does from now on may be its last
                way = self._rng.choice((api.kill, partial(api.kill, signal="TERM"), partial(api.remove_container, force=True)))
            if not found:
                self._stop.wait(0.05)
                continue
            try:
                way(victim)
            except import_module("docker.errors").APIError:
                continue  # it had ended already
            with self._lock:
                self.kills += 1
            return


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The way of all agents to the hub; None until the first starts."""
    from fiberexec.backends.docker import DockerBackend

    start = DockerBackend.start
    lock = threading.Lock()
    made: list[Proxy] = []

    def watched(backend: DockerBackend, job: Job) -> None:
        told = json.loads(job.credentials)
        with lock:
            if not made:
                made.append(Proxy(host=backend.advertise()[0]))
        made[0].rewrite(told)
        start(backend, job._replace(credentials=json.dumps(told).encode()))

    monkeypatch.setattr(DockerBackend, "start", watched)
    yield lambda: made[0] if made else None
    for one in made:
        one.close()


def test_random_containers_are_killed_every_second_and_links_are_cut(
    tmp_path: Path,
    rng: random.Random,
    size: Callable[[int, int], int],
    proxy: Callable[[], Proxy | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task runs again only if the container that it ran in was killed, and each of those moves no more than one."""
    image = services.worker_image()
    (tmp_path / "diary_of_tasks.py").write_text(DIARY.replace("EACH", str(EACH)))
    monkeypatch.syspath_prepend(tmp_path)
    work = import_module("diary_of_tasks").work
    diary = tmp_path / "diary"
    diary.mkdir()
    diary.chmod(0o777)
    count = size(400, 10_000)
    settled: collections.Counter[int] = collections.Counter()
    began = time.monotonic()
    options = {"volumes": {str(diary): "/diary"}}
    with FiberExecutor(
        6, backend="docker", image=image, backend_options=options, max_worker_losses=100, driver_timeout=20
    ) as executor:
        assert executor.submit(int).result(BOUND) == 0
        with Hunter(rng, proxy) as hunter:
            futures = []
            for number in range(count):
                futures.append(executor.submit(work, number))
                futures[-1].add_done_callback(lambda _, number=number: settled.update([number]))  # type: ignore[misc]
            assert [future.result(BOUND) for future in futures] == list(range(count))
        lost = executor.stats().lost
    relay = proxy()
    assert relay is not None and relay.cuts > 0 and hunter.killed
    pace = hunter.kills / max(1, hunter.seconds)
    assert settled == collections.Counter(range(count))
    moved: collections.Counter[str] = collections.Counter()  # tasks that ran again, by the container that they ran in before
    for number in range(count):
        *before, _last = (diary / str(number)).read_text().split()
        moved.update(before)
    print(
        f"{count} tasks in {time.monotonic() - began:.0f} s, {hunter.kills} containers killed ({pace:.2f} a second), "
        f"{relay.cuts} connections cut, {lost} workers lost, {moved.total()} tasks ran again"
    )
    assert set(moved) <= hunter.killed and all(times == 1 for times in moved.values()), moved
    assert lost <= len(hunter.killed)
    assert hunter.kills and (pace >= 0.95 or not FULL)  # few in a short run on a busy machine
