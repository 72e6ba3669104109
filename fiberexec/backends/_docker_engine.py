"""The Docker engine: where it is, how it is reached, and the few calls that the SDK leaves half done."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import threading
from importlib import import_module
from typing import Any
from urllib.parse import SplitResult, urlsplit

from fiberexec._errors import LaunchError
from fiberexec.backends import _docker_errors as errors
from fiberexec.backends._containers import address_towards
from fiberexec.backends.base import Resources

_TIMEOUT = 60.0  # seconds that the engine may take for an answer
_logger = logging.getLogger("fiberexec")
_SOCKET = "unix:///var/run/docker.sock"
_HERE = ("localhost", "127.0.0.1", "::1")


class Engine:
    """The engine that the SDK finds: DOCKER_HOST, else the current context, else the usual socket. Any thread may call."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._lock = threading.Lock()
        self._client: Any = None
        self._answered = False  # the engine has, once
        self._room: Resources | None = None  # what its host has

    def client(self) -> Any:
        """The SDK's client. Raises what the SDK raises while no engine answers, LaunchError where there can be none."""
        with self._lock:
            if self._client is None:
                self._address()
                self._client = import_module("docker").from_env(timeout=_TIMEOUT, max_pool_size=4 * self._at_once)
                self._answered = True
            return self._client

    def must_be_open(self) -> None:
        """Raise what the SDK raises if the engine takes no new connections: one that is stopping still answers on old ones."""
        import_module("docker").from_env(timeout=_TIMEOUT).close()

    def drop(self) -> None:
        """Close the client's connections; the next call opens others."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def url(self) -> str:
        """Where the engine is."""
        if host := os.environ.get("DOCKER_HOST"):
            return host
        try:
            return str(import_module("docker").ContextAPI.get_current_context().Host or _SOCKET)
        except Exception:  # of a configuration that the SDK complains about itself, when it is asked for a client
            return _SOCKET

    def _address(self) -> SplitResult:
        """url() in its parts, as the SDK understands it. Raises LaunchError."""
        url = self.url()
        try:
            return urlsplit(str(import_module("docker.utils").parse_host(url)))
        except (sdk().DockerException, ValueError) as error:
            source = "DOCKER_HOST" if os.environ.get("DOCKER_HOST") else "Docker's context"
            raise LaunchError(
                f"Docker: {url!r} (from {source}) is no address of an engine: {errors.words(error)}. What to do: give it one "
                "such as unix:///var/run/docker.sock, tcp://host:2376 or ssh://user@host, or unset it for the engine of this "
                "machine",
                final=True,
            ) from None

    def must_hold(self, size: Resources) -> None:
        """Raise LaunchError if the engine's host has less than a container is to have, or what the SDK raises.

        For the cpus Docker would say so itself, later; more memory than there is it would take for no limit at all.
        """
        if self._room is None:
            info = self.client().info()
            self._room = Resources(info.get("NCPU") or 0, info.get("MemTotal") or 0)
        has = self._room
        if size.cpu > has.cpu > 0 or size.memory > has.memory > 0:
            raise LaunchError(
                f"Docker: a container of {_amount(size)} fits nowhere: the engine at {self.url()} has {_amount(has)}. What to "
                "do: correct cpu= and memory= (or @meta of the function), or use the engine of a larger machine",
                final=True,
            )

    def failed(self, error: Exception, doing: str, image: str = "", name: str = "") -> LaunchError:
        """What an exception means: see _docker_errors."""
        return errors.explained(error, doing, url=self.url(), image=image, name=name, new=not self._answered)

    def gateway(self, network: str) -> tuple[str, ...]:
        """The addresses under which containers of a network reach this host. Raises LaunchError."""
        parts = self._address()
        if parts.scheme not in ("http+unix", "npipe") and parts.hostname not in _HERE:
            raise LaunchError(
                f"the Docker engine is on another host ({self.url()}), and its containers must reach this one: say under "
                'which address, backend_options={"advertise_address": ...}',
                final=True,
            )
        if network == "host":
            return ("127.0.0.1",)
        try:
            client = self.client()
            if client.info().get("OperatingSystem") == "Docker Desktop":
                return ("127.0.0.1", "host.docker.internal")  # its containers are in a virtual machine, which forwards
            found = client.api.inspect_network("bridge" if network == "default" else network)
        except Exception as error:
            raise self.failed(error, f"looking at network {network!r}") from error
        for config in (found.get("IPAM") or {}).get("Config") or ():
            subnet = ipaddress.ip_network(config.get("Subnet") or "::1", strict=False)
            # Not every engine names the gateway; this host's own address in the network is what counts.
            towards = str(config.get("Gateway") or subnet[1 % subnet.num_addresses])
            if subnet.version == 4 and (address := address_towards(towards)):
                return (address,)
        raise LaunchError(
            f"network {network!r} has no gateway that this host knows: say under which address its containers reach this "
            'host, backend_options={"advertise_address": ...}',
            final=True,
        )


def _amount(size: Resources) -> str:
    parts = [f"cpu={size.cpu:g}"] * bool(size.cpu) + [f"memory={size.memory / 2**20:.0f} MiB"] * bool(size.memory)
    return ", ".join(parts)


def sdk() -> Any:
    """The SDK's exceptions."""
    return import_module("docker.errors")


def remove(client: Any, container: str) -> None:
    """Kill and remove a container; nothing to do where it is gone, or going."""
    try:
        client.api.remove_container(container, force=True, v=True)
    except sdk().NotFound:
        pass
    except sdk().APIError as error:
        if error.status_code != 409:  # somebody else removes it just now
            raise


def shut(stream: Any) -> None:
    """Close a stream of the engine's answers. Any thread may, while another reads."""
    try:
        stream.close()
    except Exception as error:  # it has ended, or SSH carries it: then it ends with its connection
        _logger.debug("closing a stream of Docker's: %r", error)
    try:
        stream._response.close()  # what the SDK keeps open
    except Exception as error:
        _logger.debug("closing the connection of a stream of Docker's: %r", error)


def write(stdin: Any, data: bytes) -> None:
    """Send all of a container's stdin, and end it."""
    # TLS and SSH have an object of their own; else it is a file that can only be read, around a socket.
    channel = stdin if hasattr(stdin, "sendall") else socket.socket(fileno=os.dup(stdin.fileno()))
    try:
        channel.sendall(data)
        channel.shutdown(socket.SHUT_WR)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the container has ended already, and will be reported
    finally:
        channel.close()
