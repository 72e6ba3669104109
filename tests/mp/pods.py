"""A namespace of a real cluster for the processes of tests, and where they meet those of this machine."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import services
from services import cluster


def kubectl(*arguments: str) -> None:
    command = [str(cluster.HERE / "bin" / "kubectl"), "--kubeconfig", services.require_kubernetes(), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@contextmanager
def namespace() -> Iterator[str]:
    """One that admits pods with a folder of this machine."""
    name = f"fx-mp-{os.getpid()}"
    kubectl("create", "namespace", name)
    try:
        kubectl("-n", name, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


def settings(space: str, image: str, folder: str) -> dict[str, str]:
    """The environment of a program whose processes are to be pods of that namespace, which see that folder of this machine."""
    options = {
        "namespace": space,
        "advertise_address": cluster.ADDRESS,
        "user": os.getuid(),
        "volumes": {folder: {"hostPath": folder}},
    }
    return {
        "KUBECONFIG": services.require_kubernetes(),
        "FIBEREXEC_IMAGE": services.cluster_image(image),
        "FIBEREXEC_BACKEND_OPTIONS": json.dumps(options),
    }
