"""Programs as processes of this host, each with a folder that has what it wrote and how it ended.

<state>/fiberexec/run/<name>/   lock: held as long as it runs   command   pid   out   err   exit: its code, when it has ended
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from fiberexec import _config
from fiberexec._cli import run_first
from fiberexec._cli.run_attach import uninterrupted
from fiberexec._cli.run_base import Fate, Put, Wanted, followed, shown, variables
from fiberexec._errors import ConfigError, FiberError

_PAUSE = 0.05  # seconds between looks at what it has written
_PIECE = 1 << 16


class LocalPlace:
    """See run_base.Place."""

    name = "local"
    where = ""

    def __init__(self) -> None:
        base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
        self._root = Path(base, "fiberexec", "run")

    def start(self, wanted: Wanted, said: Callable[[str], None]) -> None:
        folder = self._root / wanted.name
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700)
        except FileExistsError:
            raise ConfigError(f"there is a program {wanted.name!r} already: give another --name") from None
        except OSError as error:
            raise FiberError(f"the folder of programs cannot be made: {error}; XDG_STATE_HOME chooses another") from None
        try:
            spec = {"command": wanted.command, "env": variables(wanted), "folder": "", "note": True}
            (folder / "command").write_text(shown(wanted.command))
            (folder / run_first.EXIT).touch()
            (folder / run_first.SPEC).touch(mode=0o600)
            (folder / run_first.SPEC).write_text(json.dumps(spec))
            with uninterrupted():
                _begin(folder)
        except BaseException:  # a signal, a full disk: else the name would be taken, and what --env said lie there
            self.remove(wanted.name)
            raise

    def follow(self, name: str, put: Put) -> Fate:
        folder = self._folder(name)
        # All are opened now: another who looks on may remove them when the program has ended.
        with open(folder / "out", "rb") as out, open(folder / "err", "rb") as err, open(folder / run_first.EXIT) as exit:
            while True:
                running = self._runs(folder)
                some = False
                for descriptor, file in ((1, out), (2, err)):
                    while data := file.read(_PIECE):
                        put(descriptor, data)
                        some = True
                if not running:
                    break
                if not some:
                    time.sleep(_PAUSE)
            code = exit.read()
        return Fate(int(code)) if code else Fate(137, f"{name} was killed, and how its program ended is not known")

    def lines(self, name: str, follow: bool) -> Iterator[str]:
        if not follow:
            folder = self._folder(name)
            for file in ("out", "err"):
                yield from (folder / file).read_text(errors="replace").splitlines()
            return
        yield from followed(self, name)

    def signal(self, name: str, number: int) -> None:
        folder = self._folder(name)
        pid = int((folder / "pid").read_text())
        if not self._runs(folder):
            return
        try:
            if number == signal.SIGKILL:
                for child in _children(pid):
                    os.killpg(child, number)
            else:
                os.kill(pid, number)
        except ProcessLookupError:
            pass

    def remove(self, name: str) -> None:
        folder = self._root / name  # if another has just removed it, there is nothing to do
        while self._runs(folder):
            self.signal(name, signal.SIGKILL)
            time.sleep(_PAUSE)
        shutil.rmtree(folder, ignore_errors=True)

    def has(self, name: str) -> bool:
        return (self._root / name / "lock").exists()

    def list(self) -> list[tuple[str, bool, float, str]]:
        """(name, whether it runs, when it was started, its command) of every program of this user."""
        found = []
        for folder in sorted(self._root.glob("*")):
            try:
                started, command = (folder / "lock").stat().st_mtime, (folder / "command").read_text()
            except OSError:
                continue  # it has just been removed
            found.append((folder.name, self._runs(folder), started, command))
        return found

    def fetch(self, name: str, path: str) -> IO[bytes]:
        raise FiberError(f"{name} runs on this host, and so its files are here: copy them as any others (cp)")

    def send(self, name: str, path: str, source: str) -> None:
        raise FiberError(f"{name} runs on this host, and so its files are here: copy them as any others (cp)")

    def close(self) -> None:
        pass

    def _folder(self, name: str) -> Path:
        if not self.has(name):
            raise FiberError(f"there is no program {name!r} on this host")
        return self._root / name

    def _runs(self, folder: Path) -> bool:
        try:
            with open(folder / "lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            pass  # somebody has removed it
        return False


def _children(pid: int) -> list[int]:
    from fiberexec._cli import processes

    return [process.pid for process in processes.table().values() if process.parent == pid]


def _begin(folder: Path) -> None:
    """Start what runs a program, and note its process, by which it is ended."""
    (folder / "pid").touch()
    # Options are those of the backend beside which they were set here; what is meant for this one is in the spec.
    environ = {name: text for name, text in os.environ.items() if name != f"{_config.PREFIX}BACKEND_OPTIONS"}
    with open(folder / "lock", "w") as lock, open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [sys.executable, "-m", run_first.__name__, str(folder)],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )
        process.returncode = 0  # its lock tells when it has ended
    (folder / "pid").write_text(str(process.pid))
