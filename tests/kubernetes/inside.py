"""Drivers in pods of the cluster."""

from __future__ import annotations

from typing import Any

from clusters import apply, kubectl

RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
PERSON = {"runAsNonRoot": True, "runAsUser": 4321, "seccompProfile": {"type": "RuntimeDefault"}}
HEAD = """
import os, platform, signal, sys, threading, time
from fiberexec import FiberExecutor
if __name__ == "__main__":
"""


class Inside:
    """Starts programs in pods of a namespace, as its service account "driver"."""

    def __init__(self, space: str, image: str) -> None:
        self.space = space
        self._image = image

    def __call__(self, code: str, after: int = 0, name: str = "driver", token: bool = True) -> str:
        """Start one; the name of its pod, which stays for ``after`` seconds when the program has ended."""
        program = HEAD + "".join(f"    {line}\n" for line in code.strip().splitlines())
        meta = {"name": name, "namespace": self.space}
        apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"program.py": program}})
        container: dict[str, Any] = {
            "name": "main",
            "image": self._image,
            "command": ["sh", "-c", "python -u /program/program.py; sleep $AFTER"],  # a first process cannot kill itself
            "env": [{"name": "HOME", "value": "/tmp"}, {"name": "AFTER", "value": str(after)}],
            "securityContext": RESTRICTED,
            "volumeMounts": [{"name": "program", "mountPath": "/program"}],
        }
        spec = {
            "restartPolicy": "Never",
            "serviceAccountName": "driver",
            "automountServiceAccountToken": token,
            "securityContext": PERSON,
            "containers": [container],
            "volumes": [{"name": "program", "configMap": {"name": name}}],
        }
        apply({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
        return name

    def said(self, name: str) -> str:
        """What one has written."""
        return kubectl("-n", self.space, "logs", name)

    def phase(self, name: str) -> str:
        return kubectl("-n", self.space, "get", "pod", name, "-o", "jsonpath={.status.phase}")
