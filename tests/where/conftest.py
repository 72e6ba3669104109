"""Real programs as subprocesses: run one to its end, or talk to it while it runs, and find every process it leaves."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

DEADLINE = 30.0  # seconds until a program that should have ended is called hung; an ordinary run takes 0.3 s
GONE = 15.0  # seconds that processes may outlive their driver on a busy machine; what is promised: test_end.py
MARK = "FIBEREXEC_TEST_PROGRAM"


def package_root() -> str:
    """The folder that holds the fiberexec package under test: a checkout or site-packages."""
    import fiberexec

    return str(Path(fiberexec.__file__).resolve().parent.parent)


def marked(mark: str) -> dict[int, str]:
    """Command lines, by pid, of the live processes whose environment carries the mark (zombies have no environment)."""
    found = {}
    if sys.platform == "linux":
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    if mark.encode() in (folder / "environ").read_bytes():
                        found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue  # it ended while we looked, or it is not ours
    else:
        listing = subprocess.run(["ps", "-Eax", "-o", "pid=,command="], capture_output=True, text=True, check=True)
        for line in listing.stdout.splitlines():
            if mark in line:
                pid, command = line.split(None, 1)
                found[int(pid)] = command
    return found


class Program:
    """A program in a session of its own. ``out`` grows while it runs; ``wait()`` sets ``code`` and ``err``."""

    def __init__(self, argv: Sequence[str], cwd: Path, stdin: str | None, stderr: Path, env: dict[str, str]) -> None:
        self.mark = uuid.uuid4().hex
        self.out = ""
        self.err = ""
        self.code: int | None = None
        self._stderr = stderr
        path = os.pathsep.join(filter(None, [package_root(), os.environ.get("PYTHONPATH")]))
        with stderr.open("wb") as errors:
            self._process = subprocess.Popen(
                argv,
                cwd=cwd,
                env={**os.environ, "PYTHONPATH": path, MARK: self.mark, **env},
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                start_new_session=True,
            )
        self.pid = self._process.pid
        if stdin is not None:
            assert self._process.stdin is not None
            self._process.stdin.write(stdin.encode())
            self._process.stdin.close()

    def _read(self, deadline: float) -> bool:
        """Read what the program has written; False at the end of its output."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            self.kill()
            raise AssertionError(f"no more output in time; so far:\n{self.out}\nstderr:\n{self.err}")
        data = os.read(self._process.stdout.fileno(), 65536)
        self.out += data.decode()
        return bool(data)

    def expect(self, text: str, times: int = 1) -> None:
        """Wait until the program has written ``text`` to stdout that many times."""
        deadline = time.monotonic() + DEADLINE
        while self.out.count(text) < times:
            if not self._read(deadline):
                self.wait()
                raise AssertionError(f"{text!r} was never written:\n{self.out}\nstderr:\n{self.err}")

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the program, or to its process group as a terminal does."""
        (os.killpg if group else os.kill)(self.pid, number)

    def left(self, but: Sequence[int] = (), within: float = GONE) -> dict[int, str]:
        """The processes that the program left behind and that are still there after ``within`` seconds."""
        deadline = time.monotonic() + within
        while True:
            found = {pid: line for pid, line in marked(self.mark).items() if pid not in but}
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.02)

    def wait(self, within: float = DEADLINE) -> Program:
        """Wait for the program's own end; ``out``, ``err`` and ``code`` are whole then, if nothing was left behind."""
        try:
            self.code = self._process.wait(within)
        except subprocess.TimeoutExpired:
            state = marked(self.mark)
            self.kill()
            texts = f"stdout:\n{self.out}\nstderr:\n{self.err}"
            raise AssertionError(f"still running after {within} s: {state}\n{texts}") from None
        finally:
            self.err = self._stderr.read_text()
        return self

    def finish(self, but: Sequence[int] = ()) -> Program:
        """Wait for the program's end, assert that no process is left (but those named), read its output to the end."""
        self.wait()
        left = self.left(but)
        assert not left, f"left behind: {left}\nstdout:\n{self.out}\nstderr:\n{self.err}"
        if not but:
            deadline = time.monotonic() + GONE
            while self._read(deadline):
                pass
        return self

    def kill(self) -> None:
        """End whatever is still there."""
        for pid in marked(self.mark):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait(DEADLINE)
        self.err = self._stderr.read_text()

    def close(self) -> None:
        self.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()


Start = Callable[..., Program]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """``start(*arguments, stdin=, cwd=, flags=, **environment)`` starts this interpreter; what is left is killed."""
    programs: list[Program] = []

    def start_program(
        *arguments: str, stdin: str | None = None, cwd: Path = tmp_path, flags: Sequence[str] = (), **env: str
    ) -> Program:
        stderr = tmp_path / f"stderr-{len(programs)}"
        programs.append(Program([sys.executable, *flags, *arguments], cwd, stdin, stderr, env))
        return programs[-1]

    yield start_program
    for program in programs:
        program.close()


@pytest.fixture
def script(start: Start, tmp_path: Path) -> Start:
    """``script(source, ...)`` writes the source to a file and starts it as ``start`` does."""

    def start_script(source: str, *arguments: str, **options: object) -> Program:
        path = tmp_path / "program.py"
        path.write_text(source)
        return start(str(path), *arguments, **options)

    return start_script
