"""What a worker on another host does first: it gets ready to be sent the user's own code and files."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SHIPPED = "shipped"  # a file in the job's folder: the digest of what ``ship`` named


def enter(job: str, excuse: Callable[[float | None], None]) -> None:
    """``job`` is the folder of the job; ``excuse`` is told of requests, see install(). Raises OSError, HubLost."""
    from fiberexec._bundle import install, unpack

    folder = os.path.join(job, "code")
    install(_ask, folder, excuse=excuse)
    try:
        with open(os.path.join(job, SHIPPED), encoding="ascii") as file:
            digest = file.read()
    except FileNotFoundError:
        return
    place = os.path.join(folder, digest)
    if not os.path.isdir(place):
        place = unpack(digest, _request("shipped")[1], folder)
    os.chdir(place)
    sys.path.insert(0, place)


def _ask(name: str) -> tuple[str, bytes] | None:
    digest, archive = _request("code", name)
    return None if digest is None else (digest, archive)


def _request(op: str, *args: object) -> tuple[str | None, bytes]:
    from fiberexec._hub import client, launch
    from fiberexec._hub.wire import HUB

    digest, buffers = client.request(launch.address(), (op, HUB, args))
    return digest, bytes(buffers[0]) if buffers else b""
