"""The services do what tests count on: see README.md beside this file."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import services
from services import images, network

HERE = Path(__file__).parent
RUNNING = "{}.{}".format(*sys.version_info[:2])
VERSIONS = "import fiberexec, json, sys; print(json.dumps([sys.version_info[:3], fiberexec.__file__]))"


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(HERE), *arguments], capture_output=True, text=True, timeout=300)


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def in_image(image: str, *command: str) -> str:
    return docker("run", "--rm", "--network", "none", image, *command)


# Where something is missing


@pytest.mark.parametrize(("required", "outcome"), [([], pytest.skip.Exception), (["docker"], pytest.fail.Exception)])
def test_a_test_without_its_engine_says_what_is_missing_and_how_to_start_it(
    required: list[str], outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("docker")
    monkeypatch.setattr(services, "_REQUIRED", required)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    with pytest.raises(outcome, match=r"no Docker engine answers: .*python3 tests/services docker up"):
        services.require_docker()


def test_a_python_that_is_not_on_this_machine_is_an_error() -> None:
    done = call("image", "--python", "3.99", "never-made")
    assert done.returncode == 1
    assert "there is no Python 3.99 on this machine" in done.stderr


def test_an_engine_that_is_set_and_does_not_answer_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    done = call("docker", "up")
    assert done.returncode == 1
    assert "DOCKER_HOST=unix:///nowhere/docker.sock does not answer" in done.stderr


# Docker


def test_what_runs_is_left_as_it_is() -> None:
    services.require_docker()
    before = docker("info", "--format", "{{.ID}} {{.SystemTime}}").split()[0]
    assert call("docker", "up").returncode == 0
    assert docker("info", "--format", "{{.ID}}") == before


def test_a_worker_image_has_this_python_and_the_package_that_is_imported_here() -> None:
    import fiberexec

    image = services.worker_image()
    version, path = json.loads(in_image(image, "python", "-W", "error", "-c", VERSIONS))
    assert version == list(sys.version_info[:3])
    there = in_image(image, "cat", path)
    assert there == Path(fiberexec.__file__).read_text().strip()


def test_a_worker_image_has_what_fiberexec_requires_and_its_command() -> None:
    image = services.worker_image()
    assert in_image(image, "python", "-c", "import click, cryptography, dill, pynng, tenacity") == ""
    assert in_image(image, "fiberexec", "--help").startswith("Usage: fiberexec")


def test_a_worker_image_is_built_once_for_the_same_content(tmp_path: Path) -> None:
    services.require_docker()
    package = tmp_path / "shapes"
    package.mkdir()

    def built(content: str) -> tuple[str, str]:
        (package / "__init__.py").write_text(content)
        image = call("worker", str(package), "tenacity").stdout.strip()
        assert in_image(image, "python", "-c", "import shapes, tenacity; print(shapes.sides)") == content.split()[-1]
        return image, docker("image", "inspect", "--format", "{{.Created}}", image)

    first = built("sides = 3")
    assert built("sides = 4") != first
    assert built("sides = 3") == first


def test_an_image_may_have_another_python() -> None:
    services.require_docker()
    other = next((minor for minor in ("3.11", "3.12", "3.10", "3.13") if minor != RUNNING and has_python(minor)), None)
    if other is None:
        pytest.skip(f"this machine has no Python but {RUNNING}")
    image = services.worker_image(other)
    version, _ = json.loads(in_image(image, "python", "-c", VERSIONS))
    assert ".".join(map(str, version[:2])) == other


def has_python(minor: str) -> bool:
    try:
        return images.find_python(minor).minor == minor
    except services.base.ServiceError:
        return False


def test_a_bare_image_has_requirements_but_not_fiberexec() -> None:
    image = services.bare_image(None, "tenacity")
    code = "import importlib.util as u; print(*(bool(u.find_spec(name)) for name in ('tenacity', 'pip', 'fiberexec')))"
    assert in_image(image, "python", "-c", code) == "True True False"


# Registry


def test_an_image_can_be_pushed_and_pulled() -> None:
    name = f"{services.require_registry()}/fiberexec-test/{uuid.uuid4().hex}:1"
    docker("tag", services.bare_image(), name)
    try:
        docker("push", name)
        docker("rmi", name)
        docker("pull", name)
        assert in_image(name, "python", "-c", "print('pulled')") == "pulled"
    finally:
        docker("rmi", name)


# Hosts

ECHO = """
import socket
server = socket.create_server(("0.0.0.0", 7000))
print("listening", flush=True)
while True:
    connection, _ = server.accept()
    while data := connection.recv(100):
        connection.sendall(data)
"""
TIMEOUT = 0.3  # seconds; an answer takes microseconds


@pytest.fixture
def echo() -> Iterator[tuple[str, str]]:
    """Two hosts; the first one has an echo server at port 7000."""
    first, second = services.require_netns(2)
    command = services.in_host(first, sys.executable, "-I", "-c", ECHO)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "listening\n"
            yield first, second
        finally:
            for host in (first, second):
                network.link("restore", host)
            server.kill()


def ask(connection: socket.socket, timeout: float) -> bytes:
    connection.settimeout(timeout)
    connection.sendall(b"?")
    return connection.recv(100)


def answers_from(host: str, to: str) -> bool:
    """Whether the one host gets a new connection to the other's echo server."""
    code = f"import socket; socket.create_connection(({network.address(to)!r}, 7000), {TIMEOUT})"
    return subprocess.run(services.in_host(host, sys.executable, "-I", "-c", code), capture_output=True).returncode == 0


def test_dropped_packets_vanish_silently_and_the_connection_goes_on_when_restored(echo: tuple[str, str]) -> None:
    first, second = echo
    with socket.create_connection((network.address(first), 7000), 5) as connection:
        assert ask(connection, 5) == b"?"
        network.link("drop", first)
        with pytest.raises(TimeoutError):
            ask(connection, TIMEOUT)
        assert not answers_from(second, first)
        network.link("restore", first)
        connection.settimeout(20)
        assert connection.recv(100) == b"?"
    assert answers_from(second, first)


def test_a_partition_between_two_hosts_concerns_no_other(echo: tuple[str, str]) -> None:
    first, second = echo
    network.link("drop", first, second)
    assert not answers_from(second, first)
    assert answers_from(network.DRIVER, first)


def test_a_cut_cable_is_seen_by_its_host(echo: tuple[str, str]) -> None:
    first, second = echo
    network.link("cut", first)
    assert not answers_from(second, first)
    with socket.socket() as connection:
        connection.settimeout(TIMEOUT)
        with pytest.raises(OSError):
            connection.connect((network.address(first), 7000))
    carrier = subprocess.run(services.in_host(first, "ip", "link", "show", "fx0"), capture_output=True, text=True).stdout
    assert "NO-CARRIER" in carrier
    network.link("restore", first)
    assert answers_from(second, first)
