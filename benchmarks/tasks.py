"""The functions that workers run.  In a module, so that every peer may pickle them by reference."""

from __future__ import annotations

import os
import time
from typing import Any


def noop(*_arguments: Any) -> None:
    """Do nothing."""


def increment(number: int) -> int:
    """Return the number after this one."""
    return number + 1


def echo(value: Any) -> Any:
    """Return the argument."""
    return value


def nap(seconds: float) -> float:
    """Sleep, and return the seconds that it really took."""
    start = time.perf_counter()
    time.sleep(seconds)
    return time.perf_counter() - start


def whoami(pause: float) -> tuple[str, int]:
    """Sleep, so that every worker gets its share, and return this process's host and id."""
    time.sleep(pause)
    return os.uname().nodename, os.getpid()
