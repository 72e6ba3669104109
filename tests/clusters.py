"""The tests' cluster as `kubectl` sees it, and namespaces of it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import services
from services import cluster

_numbers = itertools.count(1)


def kubectl(*arguments: str, stdin: str | None = None) -> str:
    command = [str(cluster.HERE / "bin" / "kubectl"), "--kubeconfig", str(cluster.KUBECONFIG), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, input=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def get(*arguments: str) -> Any:
    """An object of the cluster, or a list of them."""
    return json.loads(kubectl("get", *arguments, "-o", "json"))


def apply(*things: dict[str, Any]) -> None:
    kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(things)}))


@contextmanager
def namespace(standard: str = "restricted") -> Iterator[str]:
    """One of the test's own, in which every pod must pass this Pod Security Standard."""
    services.require_kubernetes()
    name = f"fx-{os.getpid()}-{next(_numbers)}"
    labels = {"pod-security.kubernetes.io/enforce": standard}
    apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    try:
        kubectl("-n", name, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false")
