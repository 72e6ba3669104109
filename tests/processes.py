"""Processes as tests look at them."""

from __future__ import annotations

import psutil


def alive(pid: int) -> bool:
    """Whether a process runs. One that is stopped does; one that is only left to be reaped does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
