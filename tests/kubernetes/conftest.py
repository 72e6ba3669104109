"""A namespace of a real cluster that admits only what is restricted, and a backend whose ends are collected."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import services
from services import cluster

from fiberexec import _config
from fiberexec.backends.base import Exit, Job, JobEnded

DEADLINE = 60.0  # seconds, for what takes a few where nothing else runs
SLEEP = "import time; print('up', flush=True); time.sleep(600)"
_numbers = itertools.count(1)


def kubectl(*arguments: str, stdin: str | None = None) -> str:
    command = [str(cluster.HERE / "bin" / "kubectl"), "--kubeconfig", services.require_kubernetes(), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, input=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def get(*arguments: str) -> Any:
    """An object of the cluster, or a list of them."""
    return json.loads(kubectl("get", *arguments, "-o", "json"))


def apply(*things: dict[str, Any]) -> None:
    kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(things)}))


def new_namespace() -> str:
    name = f"fx-{os.getpid()}-{next(_numbers)}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    kubectl("-n", name, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
    return name


@pytest.fixture(scope="session")
def space() -> Iterator[str]:
    """A namespace in which every pod must pass the restricted Pod Security Standard."""
    services.require_kubernetes()
    name = new_namespace()
    yield name
    kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def own_space() -> Iterator[str]:
    """One of the test's own."""
    services.require_kubernetes()
    name = new_namespace()
    yield name
    kubectl("delete", "namespace", name, "--wait=false")


class Place:
    """A backend whose ends are collected by a thread, as the launcher does."""

    def __init__(self, **arguments: Any) -> None:
        from fiberexec.backends.kubernetes import KubernetesBackend

        self.backend = KubernetesBackend(_config.load(backend="kubernetes", **arguments))
        self.program = f"test-{os.getpid()}-{next(_numbers)}"
        self._changed = threading.Condition()
        self._ended: list[JobEnded] = []
        self._thread = threading.Thread(target=self.backend.watch, args=(self._report,), name="watch")
        self._thread.start()

    def _report(self, ended: list[JobEnded]) -> None:
        with self._changed:
            self._ended += ended
            self._changed.notify_all()

    @property
    def ended(self) -> list[JobEnded]:
        with self._changed:
            return list(self._ended)

    def job(self, number: int, code: str, credentials: bytes = b"x") -> Job:
        return Job(f"{self.program}-{number}", self.program, ("python", "-c", code), credentials)

    def start(self, number: int, code: str, credentials: bytes = b"x") -> str:
        job = self.job(number, code, credentials)
        self.backend.start(job)
        return job.id

    def end(self, job: str, seconds: float = DEADLINE) -> Exit:
        """How the job ended. Waits until it has."""

        def found() -> list[Exit]:
            return [one.exit for one in self._ended if one.job == job]

        with self._changed:
            assert self._changed.wait_for(found, seconds), f"{job} has not ended: {self.backend.explain(job)}"
            assert len(found()) == 1
            return found()[0]

    def says(self, job: str, text: str) -> None:
        """Wait until a job has written a line that contains the text."""
        self.runs(job)
        assert any(text in line for line in self.backend.logs(job, follow=True))

    def runs(self, job: str) -> None:
        """Wait until a job is running."""
        eventually(lambda: any(one["id"] == job and one["state"] == "running" for one in self.backend.list()))

    def close(self) -> None:
        try:
            self.backend.remove(self.program)
        finally:
            self.backend.close()
            self._thread.join(DEADLINE)
            assert not self._thread.is_alive()


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Callable[..., Place]]:
    """Makes Places: place(image=..., backend_options=...). Their pods go when the test ends."""
    monkeypatch.setenv("KUBECONFIG", services.require_kubernetes())
    made: list[Place] = []

    def make(**arguments: Any) -> Place:
        if "image" not in arguments:
            arguments["image"] = services.cluster_image(services.bare_image())
        given = arguments.setdefault("backend_options", {})
        if "namespace" not in given:
            given["namespace"] = request.getfixturevalue("space")
        made.append(Place(**arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()


def eventually(holds: Callable[[], bool], seconds: float = DEADLINE) -> None:
    """Wait until something holds, at most so long."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.05)
