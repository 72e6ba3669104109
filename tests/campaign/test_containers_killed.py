"""Containers that are killed, and links that are cut, while thousands of tasks run: each settles once, and rightly."""

from __future__ import annotations

import collections
import importlib
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=100).stdout.strip()


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
    """Kills a random container each second, in one of several ways, and cuts all links every five."""

    def __init__(self, rng: random.Random, proxy: Callable[[], Proxy | None]) -> None:
        self._rng = rng
        self._proxy = proxy
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.killed: set[str] = set()
        self._label = f"label=fiberexec.driver={os.getpid()}@{os.uname().nodename}"

    def __enter__(self) -> Hunter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        began, second = time.monotonic(), 0
        with ThreadPoolExecutor(8) as pool:  # Docker's own command may take longer than a second
            while not self._stop.wait(max(0.0, began + second + 1 - time.monotonic())):
                second += 1
                pool.submit(self._kill)
                proxy = self._proxy()
                if proxy is not None and second % (5 if FULL else 2) == 0:
                    proxy.cut()

    def _kill(self) -> None:
        found = [one for one in docker("ps", "-q", "--filter", self._label).split() if one not in self.killed]
        if found:
            victim = self._rng.choice(found)
            self.killed.add(victim)  # before: what it does from now on may be its last
            docker(*self._rng.choice((("kill",), ("rm", "-f"), ("kill", "-s", "TERM"))), victim)


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
    work = importlib.import_module("diary_of_tasks").work
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
    assert settled == collections.Counter(range(count))
    moved: collections.Counter[str] = collections.Counter()  # tasks that ran again, by the container that they ran in before
    for number in range(count):
        *before, _last = (diary / str(number)).read_text().split()
        moved.update(before)
    print(
        f"{count} tasks in {time.monotonic() - began:.0f} s, {len(hunter.killed)} containers killed, {relay.cuts} connections "
        f"cut, {lost} workers lost, {moved.total()} tasks ran again"
    )
    assert set(moved) <= hunter.killed and all(times == 1 for times in moved.values()), moved
    assert lost <= len(hunter.killed)
