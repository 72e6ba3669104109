"""A Docker engine for tests: the machine's own, and one that can be stopped."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import places
import pytest
import services
from services.base import wait_until

from fiberexec import _config

BRIDGE = "10.214.0.1"  # the address of an own engine's bridge
DEADLINE = 30.0  # seconds, for what takes less than one where nothing else runs


def settings(**arguments: Any) -> _config.Settings:
    """What an executor with these arguments has."""
    return _config.load(backend="docker", **arguments)


class Place(places.Place):
    """A docker backend whose ends are collected."""

    def __init__(self, **arguments: Any) -> None:
        from fiberexec.backends.docker import DockerBackend

        self.backend = DockerBackend(settings(**arguments))
        super().__init__(self.backend, DEADLINE)


@pytest.fixture
def place() -> Iterator[Callable[..., Place]]:
    """Makes Places: place(image=..., backend_options=...). Their containers go when the test ends."""
    made: list[Place] = []

    def make(**arguments: Any) -> Place:
        if "image" not in arguments:
            arguments["image"] = services.bare_image()
        made.append(Place(**arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(autouse=True)
def garbage() -> Iterator[None]:
    """Docker's SDK leaves the socket of a connection that is refused to the garbage collector."""
    yield
    gc.collect()


@pytest.fixture
def image() -> str:
    """An image with Python, without fiberexec."""
    return services.bare_image()


def docker(*arguments: str) -> str:
    """Run Docker's own command."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Engine:
    """A Docker engine of the tests' own, with one image."""

    def __init__(self, folder: Path, arguments: tuple[str, ...] = (), disk: int | None = None) -> None:
        """``disk``: how large its own is, in bytes."""
        self.folder = folder
        if disk is not None:
            (folder / "d").mkdir()
            options = f"size={disk},mode=711"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", f"{folder}/d"], check=True, timeout=30)
        self._arguments = arguments
        self.url = f"unix://{folder}/docker.sock"
        self._bridge = f"fxd{os.getpid()}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ip("link", "add", self._bridge, "type", "bridge")
        self._ip("addr", "add", f"{BRIDGE}/24", "dev", self._bridge)

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, timeout=30)

    def _run(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self._processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def docker(self, *arguments: str) -> str:
        done = subprocess.run(["docker", "-H", self.url, *arguments], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def load(self, image: str) -> None:
        """Copy an image of the machine's own engine."""
        with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as save:
            command = ["docker", "-H", self.url, "load"]
            subprocess.run(command, stdin=save.stdout, check=True, timeout=100, capture_output=True)

    def answers(self) -> bool:
        command = ["docker", "-H", self.url, "version"]
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0

    def up(self) -> None:
        if "containerd" not in self._processes:
            config = self.folder / "containerd.toml"
            config.write_text(
                f'version = 2\nroot = "{self.folder}/c"\nstate = "{self.folder}/cs"\n'
                'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
                f'[grpc]\naddress = "{self.folder}/c.sock"\n'
            )
            self._run("containerd", "containerd", "--config", str(config))
            wait_until((self.folder / "c.sock").exists, DEADLINE)
        (self.folder / "pid").unlink(missing_ok=True)
        self._run(
            "dockerd",
            *("dockerd", "--host", self.url, "--containerd", f"{self.folder}/c.sock", "--pidfile", f"{self.folder}/pid"),
            *("--data-root", f"{self.folder}/d", "--exec-root", f"{self.folder}/e", "--shutdown-timeout", "2"),
            # Without a bridge of its own it would remove that of the machine's engine.
            *("--bridge", self._bridge, "--iptables=false", "--ip-masq=false", "--ip-forward=false"),
            *self._arguments,
        )
        wait_until(self.answers, DEADLINE)
        assert self.answers(), (self.folder / "dockerd.log").read_text()[-2000:]

    def down(self, how: signal.Signals = signal.SIGTERM) -> None:
        self._stop("dockerd", how)

    def _stop(self, name: str, how: signal.Signals) -> None:
        process = self._processes.pop(name, None)
        if process is not None:
            process.send_signal(how)
            process.wait(DEADLINE)

    def remove(self) -> None:
        if "dockerd" in self._processes and self.answers():
            for one in self.docker("ps", "-aq").split():
                self.docker("rm", "-f", one)
        for name in ("dockerd", "containerd"):
            self._stop(name, signal.SIGTERM)
        with open("/proc/mounts") as mounts:
            places = [line.split()[1] for line in mounts]
        for one in sorted((one for one in places if one.startswith(str(self.folder))), reverse=True):
            subprocess.run(["umount", "-l", one], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._ip("link", "del", self._bridge)


@contextmanager
def bare_engine(*arguments: str, disk: int | None = None) -> Iterator[Engine]:
    """An engine of the tests' own that has the image of which services.bare_image() is the name."""
    image = services.bare_image()
    if os.geteuid() != 0 or not all(map(shutil.which, ("dockerd", "containerd"))):
        pytest.skip("only root can start a Docker engine of the tests' own, with dockerd and containerd")
    folder = Path(tempfile.mkdtemp(prefix="fx", dir="/var/tmp"))  # overlayfs does not work on overlayfs
    engine = Engine(folder, arguments, disk)
    try:
        engine.up()
        engine.load(image)
        yield engine
    finally:
        engine.remove()


@pytest.fixture(scope="module")
def own_engine() -> Iterator[Engine]:
    """An engine that may be stopped: nobody else uses it."""
    with bare_engine() as engine:
        yield engine


def eventually(holds: Callable[[], bool], seconds: float = DEADLINE) -> None:
    """Wait until something holds, at most so long."""
    places.eventually(holds, seconds)
