"""Programs as containers of a Docker engine, whose workers are containers beside them.

    run ─► create, put in the code and what is to be run, start ─► a container: its first process is run_first
                                                                     └─ the program, which asks the same engine for workers

The program's container has the engine's socket, since it starts containers: who may use that has the rights of root on the
engine's host. No worker has it.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
import queue
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import IO, Any

from fiberexec import _config, _platform
from fiberexec._cli import run_code, run_first
from fiberexec._cli.run_base import COMMAND, DRIVER, MARK, ROLE, Fate, Put, Wanted, followed, shown, variables
from fiberexec._errors import ConfigError, FiberError
from fiberexec.backends import _docker_errors as errors
from fiberexec.backends import _docker_options as options
from fiberexec.backends import _images
from fiberexec.backends._docker_engine import Engine, remove, sdk
from fiberexec.backends._docker_images import Images
from fiberexec.backends._image_errors import verdict

SOCKET = "/var/run/docker.sock"
_FOLDER = f"/{run_code.HOME}"
_AGAIN = 1.0  # seconds between attempts to reach an engine that has gone
_PATIENCE = 60.0  # seconds of them
_LATE = 120.0  # seconds: what fails only then had been answered before, since no answer at all takes half of that
_MADE = 3.0  # seconds in which a container appears that nobody waits for any more
_LOOK = 0.1  # seconds between looks for it, or at one that may have ended
_LAST = 4096  # bytes of output that are kept, to be judged
_logger = logging.getLogger("fiberexec")


class DockerPlace:
    """See run_base.Place. Raises ConfigError without Docker's SDK."""

    name = "docker"
    where = ""

    def __init__(self) -> None:
        try:
            import_module("docker")
        except ImportError as error:
            raise ConfigError(f'--backend docker needs Docker\'s SDK: pip install "fiberexec[docker]" ({error})') from None
        self._engine = Engine(4)
        self._last: dict[int, bytes] = {}
        self._python = ""  # of the image, as far as it says

    # -- starting

    def start(self, wanted: Wanted, said: Callable[[str], None]) -> None:
        ready = image_of(self._engine, wanted, "docker", said)
        checked = options.check(wanted.size._replace(image=ready))
        try:
            client = self._engine.client()
            image = Images(checked).ready(client)
            self._python = image.python
            self._run(client, wanted, checked, image.name)
        except FiberError:
            raise
        except Exception as error:
            if getattr(error, "status_code", 0) == 409:
                raise ConfigError(f"there is a container {wanted.name!r} already: give another --name") from None
            raise self._engine.failed(error, f"starting container {wanted.name}", ready, wanted.name) from error

    def _run(self, client: Any, wanted: Wanted, checked: options.Options, image: str) -> None:
        socket = _socket_of(client, self._engine.url())
        host = dict(checked.host)
        host["init"] = False  # its first process does that
        host["mounts"] = [*host.get("mounts", ()), {"type": "bind", "source": socket, "target": SOCKET}]
        groups = [str(os.stat(socket).st_gid)] if os.path.exists(socket) else []
        host["group_add"] = [*host.get("group_add", ()), *groups]
        command = [checked.python or "python", "-m", run_first.__name__, _FOLDER]
        mark = os.urandom(8).hex()
        api = client.api
        try:
            made = api.create_container(
                image,
                command if checked.entrypoint is None else None,
                entrypoint=None if checked.entrypoint is None else [*checked.entrypoint, *command],
                name=wanted.name,
                user=checked.user,
                labels={**checked.labels, **_labels(wanted), MARK: mark},
                host_config=api.create_host_config(**host),
                **{**checked.container, "hostname": wanted.name},  # its workers tell by it whose they are
            )["Id"]
            with run_code.packed(wanted.code, _spec(wanted, image)) as archive:
                api.put_archive(made, "/", archive)
            api.start(made)
        except BaseException as error:
            _undo(client, wanted.name, mark, 0.0 if isinstance(error, Exception) else _MADE)
            raise

    # -- a program that is there

    def follow(self, name: str, put: Put) -> Fate:
        ends: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def run(descriptor: int) -> None:
            try:
                self._stream(name, descriptor, put)
                ends.put(None)
            except BaseException as error:
                ends.put(error)

        for descriptor in (1, 2):
            threading.Thread(target=run, args=(descriptor,), daemon=True).start()
        for _ in (1, 2):
            if (error := ends.get()) is not None:
                raise error
        state = self._patiently(f"waiting for {name}", lambda api: _ended(api, name))
        if state is None:
            raise FiberError(f"container {name} was removed by somebody before it had ended")
        return self._fate(name, state)

    def _stream(self, name: str, descriptor: int, put: Put) -> None:
        """Pass on one of its streams until it has ended: what was passed on before a break is left out after it.

        What has ended is read once more: engines forget the last line of a log that they follow, if it has no end.
        """
        passed = 0
        which = {"stdout": descriptor == 1, "stderr": descriptor == 2}

        def read(api: Any) -> bool:
            nonlocal passed
            behind = passed
            runs = api.inspect_container(name)["State"].get("Running")
            for piece in api.logs(name, stream=True, follow=runs, **which):
                new = piece[behind:]
                behind = max(0, behind - len(piece))
                if new:
                    put(descriptor, new)
                    passed += len(new)
                    self._last[descriptor] = (self._last.get(descriptor, b"") + new)[-_LAST:]
            return not runs

        while not self._patiently(f"reading what {name} writes", read, gone=True, got=lambda: passed):
            time.sleep(_LOOK)

    def _patiently(self, doing: str, ask: Callable[[Any], Any], gone: Any = None, got: Callable[[], int] = int) -> Any:
        """What the engine answers, which may be away for a while; ``gone`` if there is no such container.

        It is away from the first failure on, and again after one that came late, or after more was ``got``.
        """
        end, before = 0.0, 0
        while True:
            began = time.monotonic()
            try:
                return ask(self._engine.client().api)
            except sdk().NotFound:
                return gone
            except Exception as error:
                now = time.monotonic()
                if not end or got() > before or now > began + _LATE:
                    end, before = now + _PATIENCE, got()
                if not errors.is_outage(error) or now > end:
                    raise self._engine.failed(error, doing) from error
                _logger.debug("Docker does not answer: %r", error)
            time.sleep(_AGAIN)

    def _fate(self, name: str, state: dict[str, Any]) -> Fate:
        code = int(state.get("ExitCode", 0))
        if code == 137 and state.get("OOMKilled"):
            return Fate(code, f"{name} took more memory than it may: give it more (--memory)")
        log = b"".join(self._last.values()).decode("utf-8", "replace")
        if code == 1 and "No module named" in log and ("fiberexec" in log or "pynng" in log):
            image = str(self._engine.client().api.inspect_container(name)["Config"]["Image"])
            return Fate(code, verdict(image, log, self._python, "docker"))
        return Fate(code)

    def lines(self, name: str, follow: bool) -> Iterator[str]:
        if follow:
            yield from followed(self, name)
            return
        try:
            text = self._engine.client().api.logs(name)
        except Exception as error:
            raise self._engine.failed(error, f"reading the log of {name}", name=name) from error
        yield from text.decode("utf-8", "replace").splitlines()

    def signal(self, name: str, number: int) -> None:
        try:
            self._engine.client().api.kill(name, signal.Signals(number).name)
        except sdk().NotFound:
            return
        except Exception as error:
            if getattr(error, "status_code", 0) != 409:  # it does not run any more
                raise self._engine.failed(error, f"sending a signal to {name}", name=name) from error
        if number == signal.SIGKILL:
            self._remove_workers(name)

    def remove(self, name: str) -> None:
        try:
            remove(self._engine.client(), name)
        except Exception as error:
            raise self._engine.failed(error, f"removing {name}", name=name) from error
        self._remove_workers(name)

    def _remove_workers(self, name: str) -> None:
        """Those of its workers that are left, if it was killed so that nobody else ends them."""
        try:
            client = self._engine.client()
            for one in client.api.containers(all=True, filters={"label": "fiberexec.driver"}):
                labels = one["Labels"]
                if labels["fiberexec.driver"].partition("@")[2] == name and labels.get(ROLE) != DRIVER:
                    remove(client, one["Id"])
        except Exception as error:
            raise self._engine.failed(error, f"removing the workers of {name}", name=name) from error

    def has(self, name: str) -> bool:
        try:
            about = self._engine.client().api.inspect_container(name)
        except sdk().NotFound:
            return False
        except Exception as error:
            raise self._engine.failed(error, f"looking for {name}", name=name) from error
        return bool(about["Config"]["Labels"].get(ROLE) == DRIVER)

    # -- files

    def fetch(self, name: str, path: str) -> IO[bytes]:
        import tempfile

        where = self._path(name, path)
        try:
            api = self._engine.client().api
            pieces, about = api.get_archive(name, where)
            if about["linkTarget"]:
                pieces, _ = api.get_archive(name, posixpath.join(posixpath.dirname(where), about["linkTarget"]))
            file = tempfile.TemporaryFile()
            for piece in pieces:
                file.write(piece)
        except sdk().NotFound:
            raise FiberError(f"{name} has no file or folder {where}") from None
        except Exception as error:
            raise self._engine.failed(error, f"copying from {name}", name=name) from error
        file.seek(0)
        return file

    def send(self, name: str, path: str, source: str) -> None:
        where = self._path(name, path)
        base = os.path.basename(os.path.abspath(source))
        try:
            api = self._engine.client().api
            if path.endswith("/") or self._is_folder(api, name, where):
                where = posixpath.join(where, base)
            folder = posixpath.dirname(where)
            while path.endswith("/") and not self._is_folder(api, name, folder):
                folder = posixpath.dirname(folder)  # what is below it is made
            base = posixpath.relpath(where, folder)
            with run_code.archive(run_code.tree(source, base)) as archive:
                api.put_archive(name, folder, archive)
        except sdk().NotFound as error:
            raise FiberError(f"{name} has no folder for {where}: {errors.words(error)}") from None
        except Exception as error:
            raise self._engine.failed(error, f"copying to {name}", name=name) from error

    def _is_folder(self, api: Any, name: str, path: str) -> bool:
        try:
            pieces, about = api.get_archive(name, path)
            getattr(pieces, "close", lambda: None)()
        except sdk().NotFound:
            return False
        return bool(about["mode"] & 1 << 31 or stat.S_ISDIR(about["mode"]))  # as Go marks it

    def _path(self, name: str, path: str) -> str:
        about = self._engine.client().api.inspect_container(name)
        labels, config = about["Config"]["Labels"], about["Config"]
        start = labels.get("fiberexec.folder") or config.get("WorkingDir") or "/"
        return posixpath.normpath(posixpath.join(start, path or "."))

    def close(self) -> None:
        self._engine.drop()


def _undo(client: Any, name: str, mark: str, patience: float) -> None:
    """Remove a container if it is the one with this mark: another one may have its name.

    ``patience``: seconds that the engine may take to make it.
    """
    end = time.monotonic() + patience
    while True:
        try:
            if client.api.inspect_container(name)["Config"]["Labels"].get(MARK) == mark:
                remove(client, name)
            return
        except sdk().NotFound:
            if time.monotonic() > end:
                return
        except Exception as error:
            _logger.debug("container %s cannot be removed: %r", name, error)
            return
        time.sleep(_LOOK)


def image_of(engine: Engine, wanted: Wanted, extra: str, said: Callable[[str], None]) -> str:
    """The name of the program's image, built if none is given. ``extra``: of fiberexec, which starting workers needs."""
    if wanted.settings.image is not None:
        return wanted.settings.image
    told = options.check(_config.Settings(backend_options=_build_options(wanted)))
    recipe = _images.find(os.getcwd(), wanted.dockerfile or told.dockerfile, told.base_image, told.build_args, extra)
    said(f"the image is that of {recipe.source}")
    try:
        return _images.build(engine.client(), recipe, told.build_args, None, lambda line: said(f"build: {line}"))
    except FiberError:
        raise
    except Exception as error:
        raise engine.failed(error, f"building the image of {recipe.source}") from error


def _build_options(wanted: Wanted) -> dict[str, Any]:
    given = wanted.settings.backend_options
    return {name: given[name] for name in ("base_image", "build_args", "dockerfile") if name in given}


def _socket_of(client: Any, url: str) -> str:
    """The path of the engine's socket where the engine is: an address of another host is none of a container's."""
    if url.startswith("unix://") and client.info().get("OperatingSystem") != "Docker Desktop":
        return url[len("unix://") :]
    return SOCKET


def _spec(wanted: Wanted, image: str) -> bytes:
    spec = {
        "command": wanted.command,
        "env": variables(wanted, image, DOCKER_HOST=f"unix://{SOCKET}"),
        "folder": _folder(wanted),
    }
    return json.dumps(spec).encode()


def _folder(wanted: Wanted) -> str:
    """Where the program starts; "" for where the image says."""
    return "" if wanted.code is None else posixpath.join(_FOLDER, run_code.CODE, wanted.code.folder).rstrip("/")


def _labels(wanted: Wanted) -> dict[str, str]:
    return {
        ROLE: DRIVER,
        "fiberexec.program": wanted.name,
        "fiberexec.job": wanted.name,
        "fiberexec.user": _platform.user_name(os.getuid()),
        "fiberexec.started": str(int(time.time())),
        "fiberexec.driver": f"1@{wanted.name}",
        "fiberexec.folder": _folder(wanted),
        COMMAND: shown(wanted.command),
    }


def _ended(api: Any, name: str) -> Any:
    api.wait(name, timeout=None)
    return api.inspect_container(name)["State"]
