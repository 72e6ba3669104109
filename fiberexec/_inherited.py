"""The hub of the program that a worker belongs to, as it was told: what it takes to use it is loaded when it is used."""

from __future__ import annotations

import os

JOB = "FIBEREXEC_JOB"  # the variable that names a job's folder, in its processes
hub: tuple[str, bytes] | None = None  # see _hub.launch.Address


def in_job() -> bool:
    """Whether this process is in a job on another host, and the hub is behind its agent."""
    return JOB in os.environ
