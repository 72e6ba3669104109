"""The command ``fiberexec`` as a process of its own, with or without a terminal."""

from __future__ import annotations

import os
import pty
import pwd
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import fiberexec

ROOT = str(Path(fiberexec.__file__).parents[1])
EXAMPLES = Path(__file__).parents[1] / "examples"
DEADLINE = 180.0  # seconds, for what takes a few where nothing else runs

# A program that waits to be interrupted, and one with two workers that both have something to do, until it is interrupted.
WAITS = """
import sys, time
print("up", flush=True)
try:
    time.sleep(1000)
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(9)
"""
WORKS = """
import sys, time
from fiberexec import FiberExecutor
with FiberExecutor(2) as ex:
    tasks = [ex.submit(time.sleep, 1000) for _ in range(2)]
    while sum(worker.state == "busy" for worker in ex.workers()) < 2:
        time.sleep(0.05)
    print("up", flush=True)
    tasks[0].result()
"""
# The ancestor's example, with its number of samples. Its workers ask for less, so that all four find a place on one machine.
PI = """
import random
import fiberexec
import fiberexec.mp

@fiberexec.meta(cpu=0.1)
def inside(p):
    x, y = random.random(), random.random()
    return x * x + y * y < 1

def main():
    NUM_SAMPLES = int(1e6)
    pool = fiberexec.mp.Pool(processes=4)
    count = sum(pool.map(inside, range(0, NUM_SAMPLES)))
    print("Pi is roughly {}".format(4.0 * count / NUM_SAMPLES))

if __name__ == "__main__":
    main()
"""


# Where the ancestor's image has it: in the home of root.
PI_PATH = os.path.join(pwd.getpwuid(0).pw_dir, "pi_estimation.py")


def until(holds: Callable[[], object]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.1)


class Runner:
    """Runs the command in a folder, with a place of its own for what programs of this host leave."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.folder = folder
        (folder / ".git").mkdir(exist_ok=True)  # what is above belongs to somebody else
        self.env = {**os.environ, "PYTHONPATH": ROOT, "XDG_STATE_HOME": str(folder / ".state"), **env}

    def program(self, name: str, text: str) -> None:
        """Write a file into the folder."""
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)

    def __call__(self, *arguments: str, code: int | None = None) -> subprocess.CompletedProcess[str]:
        """Run it to its end; ``code`` is the exit code that it must have."""
        done = subprocess.run(
            _command(*arguments), cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=DEADLINE
        )
        assert code is None or done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def begin(self, *arguments: str, terminal: bool = False) -> Running:
        """Start it."""
        return Running(_command(*arguments), self.folder, self.env, terminal)


class Running:
    """The command while it runs. With a terminal that is its stdin and stderr, and this its other end."""

    def __init__(self, command: list[str], folder: Path, env: Mapping[str, str], terminal: bool) -> None:
        self._terminal = -1
        slave = subprocess.DEVNULL
        if terminal:
            self._terminal, slave = pty.openpty()
        self._errors = subprocess.DEVNULL if not terminal else slave
        self.process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=slave, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True
        )
        if terminal:
            os.close(slave)
        self.out = ""
        self.err = ""

    def expect(self, pattern: str, *, error: bool = False) -> None:
        """Wait until it has written something to stdout, or to its terminal."""
        assert self.process.stdout is not None
        end = time.monotonic() + DEADLINE
        fds = [self.process.stdout.fileno(), *([self._terminal] if self._terminal >= 0 else [])]
        while not re.search(pattern, self.err if error else self.out):
            assert fds, f"{pattern!r} never came:\n{self.out}\n{self.err}"
            ready, _, _ = select.select(fds, [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{pattern!r} has not come:\n{self.out}\n{self.err}"
            for fd in ready:
                try:
                    data = os.read(fd, 65536).decode()
                except OSError:  # a terminal that nobody has any more
                    data = ""
                if not data:
                    fds.remove(fd)
                elif fd == self._terminal:
                    self.err += data
                else:
                    self.out += data

    def interrupt(self) -> None:
        """What Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)

    def answer(self, text: str) -> None:
        """Type a line."""
        os.write(self._terminal, f"{text}\n".encode())

    def end(self, *codes: int) -> str:
        """Wait for its end; it must have one of these exit codes. Returns all of stdout."""
        assert self.process.stdout is not None
        try:
            found = self.process.wait(DEADLINE)
            self.out += self.process.stdout.read().decode()
        finally:
            self.close()
        assert found in codes, f"exit code {found}\n{self.out}\n{self.err}"
        return self.out

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        if self._terminal >= 0:
            os.close(self._terminal)
            self._terminal = -1


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fiberexec", *arguments]
