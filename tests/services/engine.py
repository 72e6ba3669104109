"""A Docker engine, on a machine that may have neither Docker nor systemd."""

from __future__ import annotations

import os
from pathlib import Path

from .base import KEPT, STATE, Daemon, ServiceError, install, locked, need_root, run, say, succeeds

_containerd = Daemon("containerd")
_dockerd = Daemon("dockerd")
_socket = STATE / "containerd.sock"


def answers() -> bool:
    return succeeds("docker", "version", seconds=20)


def up() -> None:
    """Return when an engine answers: the one that is there, or a new one."""
    if answers():
        return
    if os.environ.get("DOCKER_HOST"):
        raise ServiceError(f"DOCKER_HOST={os.environ['DOCKER_HOST']} does not answer; unset it to start an engine here")
    need_root("starting a Docker engine")
    with locked("docker"):
        if answers():
            return
        install({"dockerd": "docker.io", "docker": "docker.io", "containerd": "containerd", "iptables": "iptables"})
        _start_containerd()
        _start_dockerd()
        say("the Docker engine answers")


def _start_containerd() -> None:
    """One of its own: dockerd would otherwise use any that listens at the usual place, and end with that one."""
    if _containerd.pid() is None:
        config = STATE / "containerd.toml"
        config.write_text(
            "version = 2\n"
            f'root = "{KEPT}/containerd"\n'
            f'state = "{STATE}/containerd"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'  # what only a kubelet asks for
            f'[grpc]\naddress = "{_socket}"\n'
        )
        _containerd.start("containerd", "--config", config)
    _containerd.wait(lambda: succeeds("ctr", "--address", _socket, "version"))


def _start_dockerd() -> None:
    if _dockerd.pid() is None:
        # Where dockerd has to switch forwarding on itself, it also drops whatever other bridges forward: virtual
        # machines, clusters, our own hosts.
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        pidfile = STATE / "dockerd.own"
        pidfile.unlink(missing_ok=True)  # of one that was killed
        _dockerd.start(
            "dockerd",
            *("--containerd", _socket, "--data-root", KEPT / "docker", "--exec-root", STATE / "docker", "--pidfile", pidfile),
            *("--shutdown-timeout", "3"),
        )
    _dockerd.wait(answers, 90)


def down() -> None:
    """End the engine that `up` started, and its containers. Images stay for the next one."""
    if _dockerd.pid() is None and _containerd.pid() is None:
        return
    need_root("stopping the Docker engine")
    with locked("docker"):
        _dockerd.stop()
        _containerd.stop()
        for mount in (STATE / "docker" / "netns").glob("*"):  # dockerd leaves its own behind
            succeeds("umount", mount)


def version() -> str:
    return run("docker", "version", "--format", "{{.Server.Version}}").strip()
