"""A namespace of a real cluster that admits only what is restricted, and a backend whose ends are collected."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import places
import pytest
import services
from clusters import apply, get, kubectl, namespace
from services import cluster, network

from fiberexec import _config
from fiberexec.backends._kubernetes_errors import role

from .fake import Fake
from .inside import Inside
from .outside import PRELUDE, Driver, Outside

__all__ = ["DEADLINE", "SLEEP", "SLOT", "Place", "apply", "eventually", "get", "has_slots", "kubectl"]

DEADLINE = 60.0  # seconds, for what takes a few where nothing else runs
SLOT = "fiberexec.test/slot"  # something that nodes have, and of which the tests' node has so many as a test says
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


def has_slots(count: int) -> None:
    """The node has so many."""
    op = {"op": "add", "path": "/status/capacity/" + SLOT.replace("/", "~1"), "value": str(count)}
    kubectl("patch", "node", cluster.NODE, "--subresource=status", "--type=json", "-p", json.dumps([op]))
    eventually(lambda: get("node", cluster.NODE)["status"]["allocatable"].get(SLOT) == str(count))


@pytest.fixture
def slots() -> Iterator[None]:
    services.require_kubernetes()
    has_slots(2)
    yield
    op = {"op": "remove", "path": "/status/capacity/" + SLOT.replace("/", "~1")}
    kubectl("patch", "node", cluster.NODE, "--subresource=status", "--type=json", "-p", json.dumps([op]))


@pytest.fixture
def driver(own_space: str) -> Inside:
    """Starts a program in a pod of a namespace, with the rights that are advised and no others."""
    kubectl("-n", own_space, "create", "serviceaccount", "driver")
    kubectl("apply", "-f", "-", stdin=role(own_space, f"system:serviceaccount:{own_space}:driver"))
    return Inside(own_space, services.cluster_image(services.worker_image(None, "kubernetes")))


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Three hosts that reach the API server only, and that nobody reaches."""
    services.require_kubernetes()
    hosts = services.require_netns(3)[:3]
    for host in hosts:
        network.link("only", host, cluster.ADDRESS)
    yield hosts
    for host in hosts:
        subprocess.run(services.in_host(host, "iptables", "-F", "OUTPUT"), check=True)
        network.link("restore", host)


@pytest.fixture
def host(hosts: list[str]) -> str:
    """The one on which programs start that are not told another: the last, since other tests cut off the first."""
    return hosts[2]


@pytest.fixture
def outside(host: str, own_space: str, tmp_path: Path) -> Iterator[Outside]:
    """Starts a program there: outside(code)."""
    made: list[Driver] = []

    def start(code: str, *, image: str | None = None, kubeconfig: str = "", host: str = host) -> Driver:
        if image is None:
            image = services.cluster_image(services.worker_image())
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Driver(host, PRELUDE + code, folder, own_space, kubeconfig or services.require_kubernetes(), image))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """An API server for scripted faults."""
    pytest.importorskip("kubernetes")
    made = Fake()
    (tmp_path / "config").write_text(made.config())
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    yield made
    made.down()


@pytest.fixture
def one(fake: Fake) -> Iterator[Place]:
    """A backend that asks it."""
    place = Place(image="x")
    yield place
    if fake._server is not None:
        fake.node = True
        fake.before = fake.after = lambda *_: None
        place.close()


def eventually(holds: Callable[[], bool], seconds: float = DEADLINE) -> None:
    """Wait until something holds, at most so long."""
    places.eventually(holds, seconds)
