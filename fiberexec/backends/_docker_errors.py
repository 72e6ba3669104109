"""What Docker's errors mean, and what to do about each: the SDK's exceptions as LaunchError."""

from __future__ import annotations

import errno
import getpass
import os
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from fiberexec._errors import LaunchError
from fiberexec.backends._image_errors import no_interpreter

FULL = "no space left on device"
MAKE_ROOM = "make room on the engine's disk: docker system df shows what takes it, docker system prune frees some"
# What the engine says, whether trying again is pointless, and what to do. The first that matches holds. "{...}" stands
# for what is known of the container.
_RULES: tuple[tuple[str, bool, str], ...] = (
    (FULL, True, MAKE_ROOM),
    (r"could not select device driver|nvidia-container|unresolvable CDI", True,
     "the engine's host needs the NVIDIA Container Toolkit for gpu=; `docker run --rm --gpus all IMAGE nvidia-smi` tries it"),
    (r"bind source path does not exist", True,
     "volumes= names a folder that the engine's host does not have: make it there, or correct the path"),
    (r"invalid mount config|invalid volume|mount denied|error while mounting volume|duplicate mount point", True,
     "correct volumes="),
    (r"network .*not found", True, "create it (docker network create NAME) or correct network="),
    (r"pull access denied|unauthorized|authentication required|denied: |no basic auth credentials|insufficient_scope", True,
     "log in to its registry (docker login), or correct image={image!r}"),
    (r"manifest unknown|manifest for .* not found|repository .* not found|no matching manifest|name unknown", True,
     "its registry has no such image (or none for this machine's kind of processor): correct image={image!r}"),
    (r"toomanyrequests|rate limit", False, "the registry limits how often anybody may pull: log in (docker login), or wait"),
    (r"invalid reference format|invalid repository name|repository name must be", True,
     "image={image!r} is no name of an image"),
    (r"lookup .*: (no such host|server misbehaving)|no such host", True,
     "the name of the registry does not resolve where the engine runs: correct image={image!r}, or the engine's DNS"),
    (r"http: server gave HTTP response to HTTPS client|x509: ", True,
     "the engine does not trust the registry: add its certificate to /etc/docker/certs.d, or list it in insecure-registries"),
    (r"dial tcp|i/o timeout|TLS handshake timeout|connection reset|unexpected EOF|context deadline exceeded", False,
     "the engine cannot reach the registry of image={image!r}: see its network and its proxy settings"),
    (r"no such image", True, "image={image!r} is not on the engine: pull or build it"),
    (r"cannot overwrite digest|does not match the specified platform", True,
     "the engine has the image for another kind of processor: build it for this one, or set platform= in backend_options"),
    (r"exec format error", True, "the image is for another kind of processor: build it for the engine's"),
    (r"range of CPUs|cpu-shares|CPU cfs", True, "correct cpu="),
    (r"memory limit|memory reservation|memoryswap|kernel memory", True, "correct memory="),
    (r"gathering device information", True, "the engine's host has no such device: correct devices= in backend_options"),
    (r"executable file not found|exec: .*(no such file|permission denied)|stat .*no such file", True, "{interpreter}"),
    (r"container name .* is already in use", False, "remove that container: docker rm -f {name}"),
    (r"unable to find user|no matching entries in passwd|unable to find group|linux spec user", True,
     "the image does not know that user: correct user= (a uid works in every image)"),
    (r"unknown runtime|unknown or invalid runtime", True,
     "the engine has no such runtime: correct runtime= in backend_options"),
    (r"address pools? .*full|no available IPv4 addresses|could not find an available", True,
     "the network has no address left: remove unused networks (docker network prune), or use a larger one"),
    (r"cannot allocate memory|resource temporarily unavailable|too many open files", False,
     "the engine's host is short of memory or processes"),
    (r"cannot unmarshal", True, "the option that it names has a value of the wrong type: correct it in backend_options"),
    (r"OCI runtime create failed", True, "correct what it names in backend_options"),
)  # fmt: skip


def explained(error: BaseException, doing: str, *, url: str, image: str = "", name: str = "", new: bool = True) -> LaunchError:
    """What an exception of the SDK means for somebody who wanted a container.

    ``doing`` is what was tried, ``url`` where the engine is. ``new``: the engine has never answered, so that waiting for it
    is not worth while.
    """
    if isinstance(error, LaunchError):
        return error
    if is_outage(error):
        return LaunchError(_outage(error, url), final=new)
    said = words(error)
    for pattern, final, remedy in _RULES:
        if re.search(pattern, said, re.IGNORECASE | re.DOTALL):
            text = remedy.format(image=image, name=name, interpreter=no_interpreter(image))
            return LaunchError(f"Docker: {doing} failed: {said}. What to do: {text}", final=final)
    status = getattr(error, "status_code", None) or 0
    return LaunchError(f"Docker: {doing} failed: {said}", final=400 <= status < 500 and status not in (408, 409, 429))


def words(error: BaseException) -> str:
    """What the engine said, without the SDK's frame around it."""
    said = getattr(error, "explanation", None) or str(error) or type(error).__name__
    return " ".join(str(said).split()).rstrip(".")


def is_outage(error: BaseException) -> bool:
    """Whether it is the engine that does not answer, and not an answer."""
    docker: Any = import_module("docker.errors")
    requests: Any = import_module("requests.exceptions")
    if isinstance(error, docker.APIError):
        return error.status_code in (502, 503, 504)  # of a proxy before it
    if isinstance(error, (requests.ConnectionError, requests.Timeout, ConnectionError, TimeoutError)):
        return True
    if isinstance(error, (requests.ChunkedEncodingError, import_module("urllib3.exceptions").HTTPError)):
        return True  # it went away in the middle of an answer: the SDK reads some of them by urllib3 itself
    return isinstance(error, docker.DockerException) and not isinstance(error, docker.InvalidArgument)


def _outage(error: BaseException, url: str) -> str:
    where = f"{url} (from DOCKER_HOST)" if os.environ.get("DOCKER_HOST") else url
    cause = next(filter(None, map(_errno, _within(error))), 0)
    kinds = {type(one).__name__ for one in _within(error)}
    if "SSLError" in kinds:
        return (
            f"Docker: {where} and this machine do not trust each other: {words(error)}. What to do: see DOCKER_CERT_PATH and "
            "DOCKER_TLS_VERIFY; REQUESTS_CA_BUNDLE, where it is set, counts instead of them"
        )
    if kinds & {"ReadTimeout", "ConnectTimeout", "ReadTimeoutError", "TimeoutError", "timeout"}:
        return (
            f"Docker: the engine at {where} does not answer in time. What to do: see whether `docker info` answers; restart "
            "the engine"
        )
    if cause in (errno.EACCES, errno.EPERM):
        return (
            f"Docker: you may not use the engine at {where} (permission denied). What to do: sudo usermod -aG docker {_me()} "
            "and log in anew; or run a rootless engine, and name it in DOCKER_HOST"
        )
    if cause == errno.ENOENT:
        said = "there is no such socket"
    elif cause == errno.ECONNREFUSED:
        said = "connection refused"
    else:
        said = words(error)
    return (
        f"Docker: no engine answers at {where}: {said}. What to do: start it (sudo systemctl start docker, or Docker "
        "Desktop), or say where it is (DOCKER_HOST, or docker context use NAME)"
    )


def _within(error: BaseException) -> Iterator[BaseException]:
    """An exception, and those that it is about: causes, contexts, arguments."""
    seen: set[int] = set()
    found: list[Any] = [error]
    while found:
        one = found.pop(0)
        if isinstance(one, BaseException) and id(one) not in seen:
            seen.add(id(one))
            yield one
            found += [*one.args, getattr(one, "reason", None), one.__cause__, one.__context__]


def _errno(error: BaseException) -> int:
    return (error.errno or 0) if isinstance(error, OSError) else 0


def _me() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "$USER"
