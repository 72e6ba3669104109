"""The hub's folder: it goes with the program, and those that killed programs left go when the next one starts."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fiberexec import mp
from fiberexec._hub import folder, launch

LIMIT = 30.0  # seconds after which a test that waits gives up


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this test's hubs have their folders, and no others."""
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)
        launch.close()


def left(parent: Path) -> Path:
    """The folder of a program that was killed together with its hub."""
    script = """
        import os, signal
        from fiberexec import mp
        from fiberexec._hub import launch
        value = mp.Value("i", 1)
        os.kill(launch._pid, signal.SIGSTOP)
        print(launch._pid, launch.address().path, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, timeout=LIMIT)
    pid, path = done.stdout.split()
    os.kill(int(pid), signal.SIGKILL)
    deadline = time.monotonic() + LIMIT
    while folder._listens(path):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    found = Path(path).parent
    assert found.parent == parent and len(list(found.iterdir())) > 1
    return found


def test_what_a_program_left_that_was_killed_with_its_hub_goes_when_the_next_one_starts(parent: Path) -> None:
    old = left(parent)
    mp.Lock()
    assert list(parent.iterdir()) == [Path(launch.address().path).parent]
    assert not old.exists()


def test_what_a_program_uses_stays_and_does_not_hear_of_it(parent: Path) -> None:
    address = launch.reserve()
    folder.sweep(str(parent))
    assert select.select([launch.fileno()], [], [], 0) == ([], [], [])  # whoever connects would start the hub
    launch.start()
    folder.sweep(str(parent))
    assert Path(address.path).exists()
    assert mp.Lock().acquire(timeout=LIMIT)


def test_a_forked_child_that_ends_takes_nothing_of_it_away(parent: Path) -> None:
    address = launch.reserve()
    if not (child := os.fork()):
        os._exit(0)
    os.waitpid(child, 0)
    folder.sweep(str(parent))
    assert Path(address.path).exists()


def test_only_what_is_left_by_this_user_and_where_nobody_listens_goes(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = parent / "fiberexec-hub-used"
    used.mkdir()
    other = parent / "other"
    other.mkdir()
    link = parent / "fiberexec-hub-link"
    link.symlink_to(other)
    (parent / "fiberexec-hub-file").touch()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(used / folder.SOCKET))
        sock.listen(0)
        for _ in range(3):  # it accepts none, and soon it lets none wait
            folder.sweep(str(parent))
            assert used.exists()
    own = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: own + 1)
        folder.sweep(str(parent))
    assert used.exists()
    folder.sweep(str(parent))
    assert sorted(each.name for each in parent.iterdir()) == ["fiberexec-hub-file", "fiberexec-hub-link", "other"]


def test_a_folder_that_is_being_made_is_not_swept_away(parent: Path) -> None:
    done = threading.Event()

    def sweep() -> None:
        while not done.is_set():
            folder.sweep(str(parent))

    sweepers = [threading.Thread(target=sweep) for _ in range(2)]
    for each in sweepers:
        each.start()
    made = []
    try:
        for _ in range(100):
            made.append(folder.make())
    finally:
        done.set()
        for each in sweepers:
            each.join(LIMIT)
    assert all(os.path.isdir(path) and lock >= 0 for path, lock in made)
    for _, lock in made:
        os.close(lock)
    folder.sweep(str(parent))
    assert not list(parent.iterdir())
