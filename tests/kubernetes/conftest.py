"""A namespace of a real cluster that admits only what is restricted, and a backend whose ends are collected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import places
import pytest
import services
from clusters import apply, get, kubectl, namespace

from fiberexec import _config

__all__ = ["DEADLINE", "SLEEP", "Place", "apply", "eventually", "get", "kubectl"]

DEADLINE = 60.0  # seconds, for what takes a few where nothing else runs
SLEEP = "import time; print('up', flush=True); time.sleep(600)"


@pytest.fixture(scope="session")
def space() -> Iterator[str]:
    """A namespace in which every pod must pass the restricted Pod Security Standard."""
    with namespace() as name:
        yield name


@pytest.fixture
def own_space() -> Iterator[str]:
    """One of the test's own."""
    with namespace() as name:
        yield name


class Place(places.Place):
    """A kubernetes backend whose ends are collected."""

    def __init__(self, **arguments: Any) -> None:
        from fiberexec.backends.kubernetes import KubernetesBackend

        self.backend = KubernetesBackend(_config.load(backend="kubernetes", **arguments))
        super().__init__(self.backend, DEADLINE)

    def says(self, job: str, text: str) -> None:
        """Wait until a job has written a line that contains the text."""
        self.runs(job)
        super().says(job, text)

    def runs(self, job: str) -> None:
        """Wait until a job is running."""
        eventually(lambda: any(one["id"] == job and one["state"] == "running" for one in self.backend.list()))


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
    places.eventually(holds, seconds)
