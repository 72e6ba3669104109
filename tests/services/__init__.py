"""Real services for tests: `from services import require_docker, worker_image`.

A test asks for what it needs. Where that does not run, the test is skipped with the command that starts it; where
TEST_SERVICES_REQUIRED names it, as in CI, the test fails. Nothing is started by a test; images are built when one first asks.
"""

from __future__ import annotations

import configparser
import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from . import cluster, network, registry

_HERE = Path(__file__).resolve().parent
_PROJECT = _HERE.parent.parent
# What is missing is settled by what was set when the tests began.
_REQUIRED = os.environ.get("TEST_SERVICES_REQUIRED", "").split()


def require_docker() -> None:
    """The test needs a Docker engine and Docker's SDK for Python."""
    if not _installed("docker"):
        _missing("docker", "Docker's SDK for Python is not installed", "pip install docker")
    problem = _engine_problem(os.environ.get("DOCKER_HOST"))
    if problem:
        _missing("docker", f"no Docker engine answers: {problem}", _command("docker", "up"))


def require_registry() -> str:
    """The test needs an image registry; its address, which is the first part of the names of its images."""
    require_docker()
    if not registry.answers():
        _missing("registry", f"no registry answers at {registry.ADDRESS}", _command("registry", "up"))
    return registry.ADDRESS


def require_netns(number: int = 2) -> list[str]:
    """The test needs that many hosts fx1, fx2, ... and to change their links, which is root's; their names."""
    if os.geteuid() != 0:
        _missing("netns", "only root may use network namespaces", "sudo pytest")
    if len(network.hosts()) < number:
        _missing("netns", f"the hosts fx1 to fx{number} are not up", _command("netns", "up", str(max(3, number))))
    return network.hosts()[:number]


def require_kubernetes() -> str:
    """The test needs a Kubernetes cluster, and its SDK for Python; the path of the cluster's kubeconfig."""
    if not _installed("kubernetes"):
        _missing("kubernetes", "Kubernetes' SDK for Python is not installed", "pip install kubernetes")
    if not cluster.answers():
        _missing("kubernetes", "no Kubernetes cluster answers", _command("kubernetes", "up"))
    return str(cluster.KUBECONFIG)


@functools.cache
def cluster_image(image: str) -> str:
    """Give an image of the Docker engine to the cluster, where it needs no pulling; its name."""
    _services("kubernetes", "load", image)
    return image


def restart(program: str) -> None:
    """Kill one of the cluster's programs, and start it as it was; returns when it answers again."""
    _services("kubernetes", "restart", program)


@functools.cache
def worker_image(python: str | None = None, *requirements: str) -> str:
    """The name of an image with the fiberexec that is imported here, what it requires, and more requirements.

    python: a minor version like "3.12"; None for the running one.
    """
    require_docker()
    import fiberexec

    package = Path(fiberexec.__file__).parent
    wanted = [line for line in _settings()["options"]["install_requires"].splitlines() if line]
    return _services("worker", *_option(python), "--", str(package), *wanted, *requirements)


@functools.cache
def bare_image(python: str | None = None, *requirements: str) -> str:
    """The name of an image with Python, pip and requirements, and without fiberexec."""
    require_docker()
    version = python or f"{sys.version_info[0]}.{sys.version_info[1]}"
    tag = re.sub(r"[^\w.-]+", "-", "-".join((version, *requirements)))
    return _services("image", *_option(python), "--", f"fiberexec-test/bare:{tag}", *requirements)


def in_host(host: str, *command: str) -> list[str]:
    """The command line that runs a command on one of the hosts."""
    return list(command) if host == network.DRIVER else ["ip", "netns", "exec", host, *command]


def _option(python: str | None) -> list[str]:
    return ["--python", python] if python else []


def _settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(_PROJECT / "setup.cfg")
    return parser


@functools.cache
def _engine_problem(_host: str | None) -> str:
    """Why Docker's own way of finding an engine leads to none; empty where it does."""
    # In a process of its own: Docker's SDK leaves a socket open where it fails.
    code = "import docker; docker.from_env(timeout=20).ping()"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=100)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


def _services(*arguments: str) -> str:
    """Run the command line of this folder; what it printed."""
    done = subprocess.run([sys.executable, str(_HERE), *arguments], capture_output=True, text=True, timeout=600)
    if done.returncode:
        import pytest  # the command line works without it

        pytest.fail(done.stderr.strip(), pytrace=False)
    return done.stdout.strip()


def _command(*arguments: str) -> str:
    return " ".join(("sudo python3", os.path.relpath(_HERE, _PROJECT), *arguments))


def _installed(package: str) -> bool:
    """Whether that package is there; a folder of tests of the same name is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _missing(service: str, what: str, remedy: str) -> NoReturn:
    text = f"{what}; start it by: {remedy}" if "services" in remedy else f"{what}; try: {remedy}"
    import pytest

    if service in _REQUIRED:
        pytest.fail(f"{text} (TEST_SERVICES_REQUIRED says that it must be there)", pytrace=False)
    pytest.skip(text)
