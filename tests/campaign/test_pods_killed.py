"""Pods of a real cluster that are killed at random, in every way, while thousands of tasks run in them."""

from __future__ import annotations

import importlib
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import clusters
import pytest
import services
from services import cluster

from fiberexec import FiberExecutor, WorkerLost
from fiberexec._scheduler import core
from fiberexec.backends._kubernetes_api import Api, ApiError

FULL = os.environ.get("FIBEREXEC_CAMPAIGN") == "full"
BOUND = 1200 if FULL else 200  # seconds after which what is not done hangs
INTERVAL = 2.0  # seconds between two kills
WORKERS = 6
WAYS = ("delete", "delete at once", "kill its first process", "kill its worker", "out of memory")
BLAMED = WAYS[2:]  # nobody can tell these from what a task does to its worker
RESTARTS = ("kube-apiserver", "kubelet", "kube-apiserver") if FULL else ("kube-apiserver",)


# A module of its own, which pods get from here: they have no tests.
VICTIMS = """
import os, platform, signal, time
from fiberexec import current_task

def work(number, fatal):
    # Notes in its own diary when it begins and ends; dies if that is what it is for.
    me = platform.node()
    with open(f"/diary/{me}.{os.getpid()}", "a", buffering=1) as file:
        file.write(f"begin {number}\\n")
        if fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            os.unlink(f"/diary/eat.{me}")
        except FileNotFoundError:
            time.sleep(0.05)
        else:
            bytearray(1 << 31)  # eight times what its pod may take
        file.write(f"end {number}\\n")
    return number, number * number, current_task().id
"""


class Killer:
    """Kills a random pod every INTERVAL seconds, each in a random way."""

    def __init__(self, space: str, diary: Path, rng: random.Random) -> None:
        self.killed: list[tuple[str, str]] = []  # pods, and how
        self._gone: set[str] = set()  # of those, without any that live on with another worker
        self._seen: list[dict[str, Any]] = []  # pods
        self._api = Api(None, 1)
        self._space, self._diary, self._rng = space, diary, rng
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            due = max(due + INTERVAL, time.monotonic())
            self._kill()
        self._api.close()

    def _call(self, method: str, pod: str = "", **body: Any) -> Any:
        try:
            path = f"/api/v1/namespaces/{self._space}/pods/{pod}".rstrip("/")
            return self._api.call(
                method, path, {} if pod else {"labelSelector": "fiberexec.job"}, body or None, patience=0.0, read=5.0
            )
        except ApiError as error:
            print(f"{method} {pod}: {error}")  # the API server is being restarted, or the pod has gone
            return None

    def _kill(self) -> None:
        self._seen = (self._call("GET") or {"items": self._seen})["items"]
        names = {one["metadata"]["name"]: one for one in self._seen if _is_up(one)}
        names = {name: pod for name, pod in names.items() if name not in self._gone}
        at_work = [name for name in sorted(names) if any(self._diary.glob(f"{name}.*"))]
        if not at_work:
            return
        name, how = self._rng.choice(at_work), self._rng.choice(WAYS)
        if how == "out of memory":
            (self._diary / f"eat.{name}").touch()
        elif how.startswith("delete"):
            if self._call("DELETE", name, **({"gracePeriodSeconds": 0} if how.endswith("at once") else {})) is None:
                return
        else:
            pids = _processes(names[name])
            if not pids:
                return
            try:
                os.kill(pids[0] if "first" in how else pids[-1], signal.SIGKILL)
            except ProcessLookupError:
                return
        self.killed.append((name, how))
        if how.startswith("delete") or "first" in how:
            self._gone.add(name)


def _is_up(pod: dict[str, Any]) -> bool:
    states = pod.get("status", {}).get("containerStatuses") or [{}]
    return "running" in states[0].get("state", {}) and "deletionTimestamp" not in pod["metadata"]


def _processes(pod: dict[str, Any]) -> list[int]:
    """The pod's own, as this machine numbers them: its agent, its fork server, its worker."""
    mark = pod["status"]["containerStatuses"][0]["containerID"].partition("//")[2]
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark in (folder / "cgroup").read_text():
                    inner = re.search(r"^NSpid:.*\s(\d+)$", (folder / "status").read_text(), re.MULTILINE)
                    assert inner is not None
                    found.append((int(inner[1]), int(folder.name)))
            except OSError:
                continue
    return [pid for _, pid in sorted(found)]


@pytest.fixture
def space() -> Iterator[str]:
    """One that takes volumes of the host: there the diaries are."""
    with clusters.namespace("privileged") as name:
        yield name


@pytest.fixture
def charges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool, str]]:
    """Every charge: (the task's id, whether it was its own fault, the reason)."""
    found = []
    charge = core.charge

    def noted(task: Any, executed: bool, exit: Any, limits: Any) -> bool:
        found.append((task.id, executed and not exit.infrastructure, f"{exit.reason or exit.code}"))
        return charge(task, executed, exit, limits)

    monkeypatch.setattr(core, "charge", noted)
    return found


@pytest.mark.timeout(BOUND + 300)
@pytest.mark.filterwarnings("ignore:a worker could not be started")  # its pod was killed while it came up
def test_tasks_settle_once_and_right_while_pods_are_killed_and_the_cluster_restarts(
    space: str,
    charges: list[tuple[int, bool, str]],
    size: Callable[[int, int], int],
    rng: random.Random,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = size(1000, 10_000)
    poisons = set(rng.sample(range(count), 3))
    diary, code = tmp_path / "diary", tmp_path / "code"
    for folder in (diary, code, *tmp_path.parents[:2]):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)  # workers are nobody
    (code / "victims.py").write_text(VICTIMS)
    monkeypatch.syspath_prepend(code)
    work = importlib.import_module("victims").work
    monkeypatch.setenv("KUBECONFIG", services.require_kubernetes())
    options = {
        "namespace": space,
        "advertise_address": cluster.ADDRESS,
        "volumes": {"/diary": {"hostPath": str(diary)}},
    }
    image = services.cluster_image(services.worker_image())
    settled: Counter[int] = Counter()
    began = time.monotonic()
    with FiberExecutor(WORKERS, backend="kubernetes", image=image, memory="256Mi", backend_options=options) as executor:
        executor.submit(int).result(BOUND)
        with Killer(space, diary, rng) as killer:
            futures = []
            for number in range(count):
                future = executor.submit(work, number, number in poisons)
                future.add_done_callback(lambda _, number=number: settled.update([number]))
                futures.append(future)
            for turn, name in enumerate(RESTARTS):
                futures[(turn + 1) * count // (len(RESTARTS) + 1)].exception(BOUND)
                services.restart(name)
            outcomes: list[Any] = [future.exception(BOUND) or future.result() for future in futures]
        stats = executor.stats()
    print(f"{count} tasks in {time.monotonic() - began:.0f} s, {dict(Counter(how for _, how in killer.killed))}, {stats}")
    print(Counter(charge[1:] for charge in charges))
    assert len(killer.killed) >= size(2, 30)
    assert set(settled.values()) == {1} and len(settled) == count
    ids = {}
    for number, outcome in enumerate(outcomes):
        if number in poisons:
            assert isinstance(outcome, WorkerLost), outcome
            assert (outcome.exitcode, outcome.losses) == (-signal.SIGKILL, 3)
            ids[outcome.task_id] = number
        else:
            assert not isinstance(outcome, BaseException), f"{number}: {outcome}"
            assert outcome[:2] == (number, number * number)
            ids[outcome[2]] = number
    judge(diary, killer.killed, Counter(ids[task] for task, blamed, _ in charges if blamed and task in ids), poisons)


def judge(diary: Path, killed: list[tuple[str, str]], charged: Counter[int], poisons: set[int]) -> None:
    """Who was executing when its worker was killed is charged with it, and nobody else is."""
    executing: Counter[int] = Counter()
    between = 0
    for pod in {pod for pod, _ in killed}:
        ways = [how for each, how in killed if each == pod]
        workers = sorted(diary.glob(f"{pod}.*"), key=lambda path: path.stat().st_mtime)
        if any(how.startswith("delete") for how in ways):
            workers.pop()  # whose end nobody is charged with
        lasts = [path.read_text().split("\n")[-2].split() for path in workers]
        open_ones = [int(number) for word, number in lasts if word == "begin" and int(number) not in poisons]
        executing.update(open_ones)
        between += max(0, sum(how in BLAMED for how in ways) - len(open_ones))
    for number, times in executing.items():
        assert charged[number] >= times, f"task {number} was executing in a killed worker and is not charged"
    assert all(charged[number] == 3 for number in poisons)
    unexplained = sum(max(0, times - executing[number]) for number, times in charged.items() if number not in poisons)
    assert unexplained <= between, f"{unexplained} charges for {between} kills between two tasks"
