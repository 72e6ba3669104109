"""Commands in a pod that runs, with what goes in and comes out of them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import IO, Any

from fiberexec._errors import FiberError
from fiberexec.backends import _kubernetes_config
from fiberexec.backends import _kubernetes_errors as errors
from fiberexec.backends._kubernetes_api import ApiError

_PIECE = 1 << 16
_SILENT = 600.0  # seconds for which a command may say nothing
_STDOUT, _STDERR, _STATUS = 1, 2, 3  # channels; the last says how the command ended


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
        take: Callable[[bytes], object] | None = None,
    ) -> bytes:
        """What a command writes to stdout, unless ``take`` gets that, as it comes.

        The command gets a line on stdin when ``take`` returns True: that all has come. What is on its way when a command ends
        may be lost. Raises FiberError if the command fails, with what it writes to stderr.
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
                    stdin=stdin is not None or take is not None,
                    stdout=True,
                    stderr=True,
                    tty=False,
                    _preload_content=False,
                )
                out: list[bytes] = []
                try:
                    broken = _write(channel, stdin)
                    errors, status = _read(channel, take or out.append)
                    failure = _failure(status, broken)
                finally:
                    channel.close()
        except Exception as error:
            raise FiberError(f"Kubernetes: a command cannot be run in pod {pod}: {_said(error, self._namespace)}") from error
        if failure:
            raise FiberError(f"Kubernetes: in pod {pod}: {errors.strip() or failure}")
        return b"".join(out)


def _write(channel: Any, stdin: IO[bytes] | None) -> str:
    """Send all of ``stdin``; why that broke off, "" if it did not. A command that has ended may have said why."""
    try:
        while stdin is not None and (piece := stdin.read(_PIECE)):
            channel.write_stdin(piece)
    except (OSError, import_module("websocket").WebSocketException) as error:
        return str(error) or type(error).__name__
    return ""


def _read(channel: Any, take: Callable[[bytes], object]) -> tuple[str, str]:
    """Pass on what comes on stdout until the end; what came on stderr, and how it ended.

    Frames are read as they come: the SDK's own reading keeps all that has come, and copies it again with each of them.
    """
    websocket = import_module("websocket")
    said: dict[int, list[bytes]] = {_STDERR: [], _STATUS: []}
    channel.sock.settimeout(_SILENT)
    while True:
        try:
            kind, frame = channel.sock.recv_data_frame(control_frame=True)
        except websocket.WebSocketTimeoutException:
            raise FiberError(f"nothing has been heard of it for {_SILENT:g} seconds") from None
        except (websocket.WebSocketException, OSError):
            break  # it has not said how it ended
        if kind == websocket.ABNF.OPCODE_CLOSE:
            break
        if kind not in (websocket.ABNF.OPCODE_BINARY, websocket.ABNF.OPCODE_TEXT) or len(frame.data) < 2:
            continue
        number, data = frame.data[0], frame.data[1:]
        if number == _STDOUT and take(data) is True:
            channel.write_stdin(b"\n")
        elif number in said:
            said[number].append(data)
    errors, status = (b"".join(said[number]).decode("utf-8", "replace") for number in (_STDERR, _STATUS))
    return errors, status


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
