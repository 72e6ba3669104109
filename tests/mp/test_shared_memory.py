"""Shared memory by name: it lives until it is unlinked, whichever process made it, attached it or ended."""

from __future__ import annotations

import subprocess
import sys
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest

from fiberexec import FiberExecutor, _platform, mp
from fiberexec._serialize import dumps, loads
from fiberexec.mp.shared_memory import ShareableList, SharedMemory


@pytest.fixture(autouse=True, scope="module")
def tracker() -> None:
    """Start multiprocessing's tracker, which stays to the end."""
    resource_tracker.ensure_running()


def count(memory: Any) -> None:
    memory = SharedMemory(memory) if isinstance(memory, str) else memory
    memory.buf[0] += 1
    memory.close()


def test_children_that_attach_and_end_leave_the_memory_to_the_others() -> None:
    memory: Any = SharedMemory(create=True, size=100)
    try:
        for each in (memory, memory.name, memory):
            process = mp.Process(target=count, args=(each,))
            process.start()
            process.join(60)
            assert process.exitcode == 0
        assert memory.buf[0] == 3
        SharedMemory(memory.name).close()
    finally:
        memory.close()
        memory.unlink()
    with pytest.raises(FileNotFoundError):
        SharedMemory(memory.name)


def test_memory_and_lists_made_by_a_task_outlive_its_worker() -> None:
    def make() -> tuple[Any, Any]:
        memory: Any = SharedMemory(create=True, size=10)
        memory.buf[3] = 7
        return memory, ShareableList(["text", 5, None])

    with FiberExecutor(1) as executor:
        memory, values = executor.submit(make).result(60)
    assert memory.buf[3] == 7 and list(values) == ["text", 5, None]
    again = loads(*dumps(values))
    again[1] = 6
    assert values[1] == 6
    for each in (memory, values.shm, again.shm):
        each.close()
    memory.unlink()
    values.shm.unlink()


def test_a_worker_can_unlink_what_another_made() -> None:
    def unlink(memory: SharedMemory) -> None:
        memory.close()
        memory.unlink()

    with FiberExecutor(2) as executor:
        memory = executor.submit(SharedMemory, None, True, 10).result(60)
        memory.close()
        executor.submit(unlink, SharedMemory(memory.name, track=False)).result(60)
    with pytest.raises(FileNotFoundError):
        SharedMemory(memory.name)


def test_the_trackers_have_nothing_to_say(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from fiberexec import FiberExecutor\n"
        "from fiberexec.mp.shared_memory import ShareableList, SharedMemory\n"
        "def work(memory, values):\n"
        "    memory.buf[0] = values[0] = 5\n"
        "    mine = SharedMemory(create=True, size=5)\n"
        "    mine.close(); mine.unlink()\n"
        "memory, values = SharedMemory(create=True, size=10), ShareableList([1])\n"
        "with FiberExecutor(1) as executor:\n"
        "    executor.submit(work, memory, values).result()\n"
        "print(memory.buf[0], values[0])\n"
        "for each in memory, values.shm: each.close(); each.unlink()\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("5 5\n", "")


def test_on_another_host_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SharedMemory(create=True, size=10)
    pickled = dumps(memory)
    memory.close()
    memory.unlink()
    with pytest.raises(FileNotFoundError):
        loads(*pickled)
    monkeypatch.setattr(_platform, "host_name", lambda: "elsewhere")
    with pytest.raises(FileNotFoundError, match="one host"):
        loads(*pickled)
