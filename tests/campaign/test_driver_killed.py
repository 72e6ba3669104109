"""SIGKILL of the driver at a random moment: no worker outlives it by 2 s, and nothing is left in any file system."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

GONE = 15.0  # seconds
LONGEST = 0.8  # seconds after its start that the driver lives, at most: its start, its work and its end are all in it
MARK = "TEST_OF_DRIVER"
DRIVER = """
import subprocess, sys, time
from fiberexec import FiberExecutor

def work(n):
    return bytes(n)

def start_a_child():
    subprocess.Popen(["sleep", "600"], start_new_session=True)

def hold():
    import ctypes
    ctypes.PyDLL(None).usleep(300_000)

kind = sys.argv[1]
print("up", flush=True)
while True:
    with FiberExecutor(3) as ex:
        if kind == "submit":
            for future in [ex.submit(work, n) for n in range(2000)]:
                future.result()
        elif kind == "map":
            list(ex.map(work, [100] * 20_000))
        elif kind == "large":
            list(ex.map(work, [1 << 24] * 4))
        elif kind == "children":
            list(ex.map(lambda _: start_a_child(), range(3)))
            list(ex.map(time.sleep, [0.1] * 6))
        elif kind == "gil":
            list(ex.map(lambda _: hold(), range(6)))
        elif kind == "losses":
            for _ in range(20):
                ex.options(max_worker_losses=1).submit(__import__("os")._exit, 3).exception()
"""
KINDS = ["submit", "map", "large", "children", "gil", "losses", "gil portable", "map portable"]


def named_sockets() -> set[str]:
    with open("/proc/net/unix") as file:
        return {line.split()[7] for line in file if len(line.split()) > 7}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_when_the_driver_is_killed(
    kind: str,
    size: Callable[[int, int], int],
    rng: random.Random,
    left: Callable[[str, float], dict[int, str]],
    tmp_path: Path,
    package_root: str,
) -> None:
    sockets = named_sockets()
    program = tmp_path / "driver.py"
    program.write_text(DRIVER)
    temporary, home = tmp_path / "tmp", tmp_path / "home"
    temporary.mkdir()
    home.mkdir()
    for round in range(size(2, 100)):
        mark = uuid.uuid4().hex
        word, _, portable = kind.partition(" ")
        places = {"TMPDIR": str(temporary), "HOME": str(home), "XDG_RUNTIME_DIR": str(home)}
        python = {"FIBEREXEC_PORTABLE": "1" if portable else "", "PYTHONPATH": package_root}
        environment = {**os.environ, **places, **python, MARK: mark}
        shared = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
        delay = rng.uniform(0, LONGEST)
        driver = subprocess.Popen(
            [sys.executable, str(program), word], env=environment, cwd=home, stdout=subprocess.PIPE
        )
        with driver:
            if round % 4:  # most rounds look at what comes after the start
                assert driver.stdout is not None
                assert driver.stdout.readline() == b"up\n"
            time.sleep(delay)  # the random moment
            driver.kill()
        found = left(mark, GONE)
        for pid in found:
            os.kill(pid, 9)
        assert not found, f"{delay:.3f} s after its start"
        assert not list(temporary.iterdir())
        assert not list(home.iterdir())
        if shared or os.path.isdir("/dev/shm"):
            assert not [name for name in set(os.listdir("/dev/shm")) - shared if "fiber" in name]
    assert not [name for name in named_sockets() - sockets if str(tmp_path) in name]
