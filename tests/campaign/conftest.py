"""Campaigns: small counts, unless FIBEREXEC_CAMPAIGN=full. FIBEREXEC_SEED repeats."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

FULL = os.environ.get("FIBEREXEC_CAMPAIGN") == "full"
SEED = os.environ.pop("FIBEREXEC_SEED", None)  # no setting of the package, so it must not stay there


@pytest.fixture
def size() -> Callable[[int, int], int]:
    """``size(small, full)`` is the count that applies now."""
    return lambda small, full: full if FULL else small


@pytest.fixture
def rng() -> random.Random:
    """A random source whose seed is printed, and so shown when the test fails."""
    seed = int(SEED) if SEED is not None else int.from_bytes(os.urandom(4), "little")
    print(f"seed: FIBEREXEC_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def package_root() -> str:
    """The folder that holds the package under test."""
    import fiberexec

    return str(Path(fiberexec.__file__).resolve().parent.parent)


def marked(mark: str) -> dict[int, str]:
    """Command lines, by pid, of the live processes whose environment carries the mark."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it ended while we looked, or it is not ours
    return found


@pytest.fixture
def left() -> Callable[[str, float], dict[int, str]]:
    """``left(mark, within)``: the processes with this mark that are still there after so many seconds."""

    def look(mark: str, within: float) -> dict[int, str]:
        deadline = time.monotonic() + within
        while (found := marked(mark)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    return look
