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


MANAGERS = """
from fiberexec import FiberExecutor
from fiberexec.mp.managers import SharedMemoryManager
from fiberexec.mp.shared_memory import SharedMemory

def work(address, key):  # makes a block by the driver's manager, and two by one of its own
    manager = SharedMemoryManager(address, key)
    manager.connect()
    block = manager.SharedMemory(10)
    block.buf[0] = 3
    with SharedMemoryManager() as own:
        values = own.ShareableList([4, "text"])
        gone = [values.shm.name, own.SharedMemory(5).name]
        values.shm.close()
    return block, gone

def is_there(name):
    try:
        SharedMemory(name, track=False).close()
    except FileNotFoundError:
        return False
    return True

with SharedMemoryManager(authkey=b"key") as manager, FiberExecutor(1) as executor:
    mine, values = manager.SharedMemory(10), manager.ShareableList([1, "text"])
    block, gone = executor.submit(work, manager.address, b"key").result()
    names = [mine.name, values.shm.name, block.name]
    print(values[1], block.buf[0], *map(is_there, names), *map(is_there, gone))
    for each in (mine, values.shm, block):
        each.close()
print(*map(is_there, names))

with SharedMemoryManager() as manager:
    mine, other = manager.SharedMemory(10), manager.SharedMemory(10)
    mine.close(), other.close()
    mine.unlink()  # which is the manager's to do
print(is_there(mine.name), is_there(other.name))

manager = SharedMemoryManager()
manager.start()
mine = manager.SharedMemory(10)
mine.close()  # the rest is done at the program's end
"""


def test_a_managers_blocks_go_with_it_and_the_trackers_have_nothing_to_say(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(MANAGERS)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout == "text 3 True True True False False\nFalse False False\nFalse False\n"


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
