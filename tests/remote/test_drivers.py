"""A driver that dies, ends or stops, and what becomes of its hub, its jobs and their tasks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import alive

LIMIT = 30.0

PROGRAM = """
import json, os, sys, time
from pathlib import Path
from fiberexec import FiberExecutor, _launcher
from fiberexec._hub import launch

def task(number):
    (folder / f"task {os.getpid()}").touch()
    time.sleep(60)

folder = Path(sys.argv[1])
if __name__ == "__main__":
    executor = FiberExecutor(2, backend="agents", driver_timeout=3, workers_per_job=int(sys.argv[2]))
    futures = [executor.submit(task, number) for number in range(4)]
    while len(tasks := list(folder.glob("task *"))) < 2:
        time.sleep(0.01)
    agents = [process.pid for place in _launcher._launcher._places.values() for process in place.backend._processes.values()]
    told = {"hub": [launch._pid], "agent": agents, "task": [int(path.name.split()[1]) for path in tasks]}
    (folder / "unfinished").write_text(json.dumps(told))
    (folder / "unfinished").rename(folder / "told")
    [future.result() for future in futures]
"""


class Driver:
    """Another program that uses jobs."""

    def __init__(self, folder: Path, root: str, per_job: int) -> None:
        path = folder / "program.py"
        path.write_text(PROGRAM)
        self.folder = folder
        environ = {**os.environ, "PYTHONPATH": root, "TMPDIR": str(folder)}
        self.process = subprocess.Popen([sys.executable, str(path), str(folder), str(per_job)], env=environ)
        self.pids: dict[str, list[int]] = {}

    def listen(self) -> bool:
        """Whether its tasks run; then it has told who there is."""
        if (self.folder / "told").exists():
            self.pids = json.loads((self.folder / "told").read_text())
        return bool(self.pids)

    def left(self) -> list[int]:
        return [pid for pids in self.pids.values() for pid in pids if alive(pid)]

    def files(self) -> list[str]:
        return [path.name for path in self.folder.iterdir() if path.name.startswith("fiberexec")]


@pytest.fixture
def driver(until: Callable[..., Any]) -> Iterator[Callable[..., Driver]]:
    import fiberexec

    made: list[Driver] = []

    def start(per_job: int = 1) -> Driver:
        folder = tempfile.mkdtemp(prefix="driver-")  # a short path, since sockets stand there
        made.append(Driver(Path(folder), str(Path(fiberexec.__file__).parents[1]), per_job))
        until(made[-1].listen, what="its tasks run")
        return made[-1]

    yield start
    for each in made:
        each.process.kill()
        each.process.wait()
        for pid in each.left():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(each.folder)


@pytest.mark.parametrize("per_job", [1, 2])
def test_a_driver_that_is_killed_leaves_nothing(driver: Any, until: Any, per_job: int) -> None:
    program = driver(per_job)
    program.process.kill()
    until(lambda: not program.left(), 10)
    until(lambda: not program.files(), 10)


def test_a_driver_and_a_hub_that_are_killed_leave_nothing_after_driver_timeout(driver: Any, until: Any) -> None:
    program = driver()
    os.kill(program.process.pid, signal.SIGSTOP)  # it must not hear of the hub's end
    os.kill(program.pids["hub"][0], signal.SIGKILL)
    program.process.kill()
    until(lambda: not program.left(), 30)


def test_a_driver_that_ends_in_order_leaves_nothing_at_once(driver: Any, until: Any) -> None:
    program = driver()
    program.process.send_signal(signal.SIGINT)
    program.process.wait(LIMIT)
    until(lambda: not program.left() and not program.files(), 10)


def test_a_driver_that_is_stopped_for_longer_than_driver_timeout_loses_nothing(tmp_path: Path) -> None:
    """Its hub speaks for it."""
    import fiberexec

    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, subprocess, sys, time\n"
        "from fiberexec import FiberExecutor\n"
        "def work(n):\n    time.sleep(0.2)\n    return n, os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    with FiberExecutor(2, backend='agents', driver_timeout=4) as executor:\n"
        "        futures = [executor.submit(work, n) for n in range(10)]\n"
        "        first = futures[0].result()\n"
        "        goes_on = f'sleep 8; kill -CONT {os.getpid()}'\n"
        "        child = subprocess.Popen(['sh', '-c', goes_on])\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)\n"
        "        child.wait()\n"
        "        found = [future.result() for future in futures]\n"
        "        print([n for n, _ in found], len({pid for _, pid in found}), executor.stats().lost)\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(fiberexec.__file__).parents[1])}
    done = subprocess.run([sys.executable, str(program)], env=environ, capture_output=True, text=True, timeout=LIMIT)
    assert done.stdout == f"{json.dumps(list(range(10)))} 2 0\n", done.stderr
