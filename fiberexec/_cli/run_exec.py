"""Commands in a pod that runs, with what goes in and comes out of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import IO, Any

from fiberexec._errors import FiberError
from fiberexec.backends import _kubernetes_config
from fiberexec.backends import _kubernetes_errors as errors
from fiberexec.backends._kubernetes_api import ApiError

_PIECE = 1 << 16
_SILENT = 600.0  # seconds for which a command may say nothing
_STATUS = 3  # the channel that says how it ended


class Exec:
    """Runs commands in pods of a namespace. Needs the right to create pods/exec."""

    def __init__(self, context: str | None, namespace: str) -> None:
        self._context = context
        self._namespace = namespace

    def run(
        self,
        pod: str,
        container: str,
        command: list[str],
        stdin: IO[bytes] | None = None,
        take: Callable[[str], object] | None = None,
    ) -> bytes:
        """What a command writes to stdout, unless ``take`` gets that, as it comes.

        Raises FiberError if the command fails, with what it writes to stderr.
        """
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
                try:
                    broken = _write(channel, stdin)
                    errors = _read(channel, take or out.append)
                    failure = _failure(channel.read_channel(_STATUS), broken)
                finally:
                    channel.close()
        except Exception as error:
            raise FiberError(f"Kubernetes: a command cannot be run in pod {pod}: {_said(error, self._namespace)}") from error
        if failure:
            raise FiberError(f"Kubernetes: in pod {pod}: {errors.strip() or failure}")
        return "".join(out).encode()


def _write(channel: Any, stdin: IO[bytes] | None) -> str:
    """Send all of ``stdin``; why that broke off, "" if it did not. A command that has ended may have said why."""
    try:
        while stdin is not None and (piece := stdin.read(_PIECE)):
            channel.write_stdin(piece)
    except (OSError, import_module("websocket").WebSocketException) as error:
        return str(error) or type(error).__name__
    return ""


def _read(channel: Any, take: Callable[[str], object]) -> str:
    """Pass on what comes on stdout until the end; what came on stderr."""
    errors: list[str] = []
    heard = time.monotonic()
    goes_on = True
    while goes_on:
        goes_on = channel.is_open()
        if goes_on:
            channel.update(timeout=1)
        for said, to in ((channel.read_stdout(timeout=0), take), (channel.read_stderr(timeout=0), errors.append)):
            if said:
                to(said)
                heard = time.monotonic()
        if time.monotonic() > heard + _SILENT:
            raise FiberError(f"nothing has been heard of it for {_SILENT:g} seconds")
    return "".join(errors)


def _failure(status: str, broken: str) -> str:
    """What went wrong, as the cluster says it; "" if nothing did. What the kubelet cannot do is no exit code."""
    import json

    try:
        told = json.loads(status)
    except ValueError:
        return " ".join(status.split()) or f"the connection broke{f' ({broken})' if broken else ''}"
    if told.get("status") == "Success":
        return ""
    return str(told.get("message") or "it failed")


def _said(error: Exception, namespace: str) -> str:
    text = " ".join(str(error).replace('\\"', '"').split())
    if "is forbidden" in text:
        refusal = ApiError(403, "Forbidden", text, "")
        return str(errors.explained(refusal, "that", namespace, rules=errors.RUN)).removeprefix("Kubernetes: ")
    return text
