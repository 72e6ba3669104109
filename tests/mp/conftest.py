"""Every test of fiberexec.mp ends what looks after its processes, so that what is left behind shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fiberexec._hub import launch
from fiberexec.mp import _jobs, heap


@pytest.fixture(autouse=True)
def no_jobs_left(nothing_left_behind: None) -> Iterator[None]:
    """End the processes that a test has started, the thread that looks after them, and the hub."""
    yield
    _jobs.close()
    heap.forget()
    launch.close()
