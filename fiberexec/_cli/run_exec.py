"""Commands in a pod that runs, with what goes in and comes out of them."""

from __future__ import annotations

from importlib import import_module
from typing import IO, Any

from fiberexec._errors import FiberError
from fiberexec.backends import _kubernetes_config

_PIECE = 1 << 16
_LONGEST = 600.0  # seconds that one command may take
_STATUS = 3  # the channel that says how it ended


class Exec:
    """Runs commands in pods of a namespace. Needs the right to create pods/exec."""

    def __init__(self, context: str | None, namespace: str) -> None:
        self._context = context
        self._namespace = namespace

    def run(self, pod: str, container: str, command: list[str], stdin: IO[bytes] | None = None) -> bytes:
        """What a command writes to stdout. Raises FiberError if it fails, with what it writes to stderr."""
        import time

        client: Any = import_module("kubernetes.client")
        try:
            configuration, _ = _kubernetes_config.load(self._context)
            with client.ApiClient(configuration) as api:  # of its own: stream() changes it
                core = client.CoreV1Api(api)
                channel = import_module("kubernetes.stream").stream(
                    core.connect_get_namespaced_pod_exec,
                    pod,
                    self._namespace,
                    container=container,
                    command=command,
                    stdin=stdin is not None,
                    stdout=True,
                    stderr=True,
                    tty=False,
                    _preload_content=False,
                )
                out: list[str] = []
                errors: list[str] = []
                try:
                    while stdin is not None and (piece := stdin.read(_PIECE)):
                        channel.write_stdin(piece)
                    end = time.monotonic() + _LONGEST
                    while channel.is_open() and time.monotonic() < end:
                        channel.update(timeout=1)
                        out.append(channel.read_stdout(timeout=0))
                        errors.append(channel.read_stderr(timeout=0))
                    out.append(channel.read_stdout(timeout=0))
                    errors.append(channel.read_stderr(timeout=0))
                    failure = _failure(channel.read_channel(_STATUS))
                finally:
                    channel.close()
        except Exception as error:
            raise FiberError(f"Kubernetes: a command cannot be run in pod {pod}: {_said(error, self._namespace)}") from error
        if failure:
            raise FiberError(f"Kubernetes: in pod {pod}: {''.join(errors).strip() or failure}")
        return "".join(out).encode()


def _failure(status: str) -> str:
    """What went wrong, as the cluster says it; "" if nothing did. What the kubelet cannot do is no exit code."""
    import json

    try:
        told = json.loads(status)
    except ValueError:
        return " ".join(status.split()) or "the connection broke"
    if told.get("status") == "Success":
        return ""
    return str(told.get("message") or "it failed")


def _said(error: Exception, namespace: str) -> str:
    text = " ".join(str(error).split())
    if "403" in text or "Forbidden" in text:
        return (
            f"{text}. What to do: let whoever may give you the right do so: kubectl -n {namespace} create role fiberexec-exec "
            "--verb=create,get --resource=pods/exec, and a rolebinding"
        )
    return text
