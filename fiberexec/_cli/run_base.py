"""What ``fiberexec run`` asks of a place where a program can run."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, Protocol

from fiberexec import _config
from fiberexec._cli.run_code import Code
from fiberexec._errors import ConfigError

Put = Callable[[int, bytes], None]  # of a descriptor, 1 or 2, and what was written there
ROLE = "fiberexec.role"  # the label of what runs a program; workers have none
DRIVER = "driver"  # its value
MARK = "fiberexec.made"  # the label, or annotation, that tells a container or a Job from another of its name
COMMAND = "fiberexec.command"  # the label, or annotation, with the program's command line


class Wanted(NamedTuple):
    """What the command line asked for."""

    backend: str
    command: tuple[str, ...]
    name: str
    env: Mapping[str, str]  # variables of the program and of its workers
    code: Code | None  # what is sent; None: nothing
    settings: _config.Settings  # of the program's executors, as far as they are set here
    size: _config.Settings  # the same with cpu, memory and gpu of the program itself
    dockerfile: str | None = None
    registry: str | None = None
    namespace: str | None = None
    service_account: str | None = None


class Fate(NamedTuple):
    """How a program ended: its exit code as a shell gives it, and what the place has to say of that."""

    code: int
    text: str = ""


class Place(Protocol):
    """Where programs run. Everything raises FiberError, which says what to do."""

    name: str  # of the backend
    where: str  # options by which commands find its programs: "", or with a space behind

    def start(self, wanted: Wanted, said: Callable[[str], None]) -> None:
        """Start a program. ``said`` gets what is worth knowing meanwhile."""

    def follow(self, name: str, put: Put) -> Fate:
        """Pass on all that a program writes, from its start to its end."""

    def lines(self, name: str, follow: bool) -> Iterator[str]:
        """The lines that a program has written; with ``follow`` until it ends."""

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a program; SIGKILL ends all that it has started too. One that has ended is left alone."""

    def remove(self, name: str) -> None:
        """Remove what is left of a program that has ended, or end it at once."""

    def has(self, name: str) -> bool:
        """Whether there is a program of this name, running or ended."""

    def fetch(self, name: str, path: str) -> IO[bytes]:
        """A tar archive of what a running program has at a path, which its working directory is the start of."""

    def send(self, name: str, path: str, source: str) -> None:
        """Copy a file or folder of this host to a running program's path."""

    def close(self) -> None:
        """Close what is open."""


def default_name(command: Sequence[str]) -> str:
    """A name that tells what runs, and is nobody else's."""
    words = [
        word for word in command if not word.startswith("-") and not re.match(r"(.*/)?(python[\d.]*|env|sh|bash)\Z", word)
    ]
    stem = os.path.basename(words[0]).removesuffix(".py") if words else "program"
    plain = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:30].strip("-") or "program"
    return f"{plain}-{os.urandom(4).hex()}"


def checked_name(name: str) -> str:
    """Return it if containers, pods and labels may be called so. Raises ConfigError."""
    if not re.match(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?\Z", name):
        raise ConfigError(f"--name must be of a-z, 0-9 and '-', at most 50, and begin with a letter, got {name!r}")
    return name


def shown(command: Sequence[str]) -> str:
    """A command as it would be typed."""
    return shlex.join(command)


def variables(wanted: Wanted, image: str = "", **more: str) -> dict[str, str]:
    """The variables of the program: the settings that are set here, so that its executors find them there."""
    import json

    found: dict[str, Any] = {}
    settings = wanted.settings
    for name, source in settings.sources.items():
        if source != _config.DEFAULT and name not in ("backend", "image", "env", "backend_options"):
            value = getattr(settings, name)
            if name == "ship":
                text = os.pathsep.join(value)
            elif name == "memory":
                text = f"{value // 2**20}" if value % 2**20 == 0 else f"{value / 2**20:.6f}Mi"
            else:
                text = "never" if value is None else str(value)
            found[name] = text
    workers = {**settings.env, **wanted.env}
    if workers:
        found["env"] = json.dumps(workers)
    # The address of this host is none of the program's, whose workers reach it where it runs.
    told = {name: value for name, value in settings.backend_options.items() if name != "advertise_address"}
    if told:
        found["backend_options"] = json.dumps(told, default=str)
    if image:
        found["image"] = image
    found["backend"] = wanted.backend
    ours = {f"{_config.PREFIX}{name.upper()}": text for name, text in found.items()}
    return {"PYTHONUNBUFFERED": "1", **ours, **more, **wanted.env}


def followed(place: Place, name: str) -> Iterator[str]:
    """The lines that a program writes, until it ends: those of its two streams as they come."""
    import queue
    import threading

    found: queue.SimpleQueue[tuple[int, bytes] | BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            place.follow(name, lambda descriptor, data: found.put((descriptor, data)))
            found.put(None)
        except BaseException as error:
            found.put(error)

    threading.Thread(target=run, name="fiberexec-follow", daemon=True).start()
    rest = {1: b"", 2: b""}
    while (item := found.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        descriptor, data = item
        *whole, rest[descriptor] = (rest[descriptor] + data).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in whole)
    yield from (text.decode("utf-8", "replace") for text in rest.values() if text)
