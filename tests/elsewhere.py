"""Containers and pods for suites that run on every backend: what a program's environment must be to have them.

``TEST_BACKENDS`` names backends beside those that are always there: ``docker``, ``kubernetes``, ``outpost`` (pods as a program
has them that is outside the cluster). Each makes a suite take half an hour; images are made while its first test waits.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import services
from clusters import namespace
from services import cluster

NAMES = os.environ.get("TEST_BACKENDS", "").split()
FURTHER = [pytest.param(name, marks=pytest.mark.timeout(400)) for name in NAMES]
LIMIT = 90.0 if NAMES else 30.0  # seconds after which a test that waits gives up
IN_A_POD = os.environ.get("KUBERNETES_SERVICE_HOST", "")  # then all comes from this pod: the namespace, the image, the address


def spaces() -> Iterator[str]:
    """A namespace for pods that see a folder of this machine; "" in a pod, which has one."""
    if IN_A_POD:
        yield ""
        return
    with namespace("privileged") as name:
        yield name


def address() -> str:
    """Where those backends' jobs reach this process."""
    if not NAMES:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # which sends nothing, and chooses the address that others see
        return str(probe.getsockname()[0])


def backend(name: str) -> str:
    """The backend of a name."""
    return "kubernetes" if name == "outpost" else name


def enter(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a test the environment of a program whose jobs are there."""
    space = "" if name == "docker" else request.getfixturevalue("space")
    for variable, value in _settings(name, space).items():
        monkeypatch.setenv(variable, value)


def _settings(name: str, space: str) -> dict[str, str]:
    """The environment of a program whose jobs are there. They see the folder of temporary files, where tests and jobs meet."""
    folder = tempfile.gettempdir()
    variables = {"FIBEREXEC_BACKEND": backend(name)}
    options: dict[str, Any]
    if name == "docker":
        options = {"volumes": {folder: {"bind": folder, "mode": "rw"}}, "user": str(os.getuid())}
    else:
        options = {"user": os.getuid(), "volumes": {folder: {"hostPath": folder}}}
    if IN_A_POD:
        variables["KUBERNETES_SERVICE_HOST"] = IN_A_POD
    else:
        image = services.worker_image(None, "numpy", "psutil", "pytest")
        if name != "docker":
            image = services.cluster_image(image)
            variables["KUBECONFIG"] = services.require_kubernetes()
            options["namespace"] = space
        if name == "kubernetes":
            options["advertise_address"] = cluster.ADDRESS
        variables["FIBEREXEC_IMAGE"] = image
    return {**variables, "FIBEREXEC_BACKEND_OPTIONS": json.dumps(options)}
