"""A high scheduling weight for a benchmark on a machine that others use too: Linux, as root.

Linux shares the processor among sessions first (autogroups), where plain niceness has no say. Some peers give each worker
a session of its own, so every process of a cell is raised, once all its workers are there. The start-up is measured without
it: there is no moment at which all processes are there.
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "BENCHMARKS_PRIO"  # set: cells raise themselves
NICE = -15


def is_asked() -> bool:
    """Say whether this run is to have a high weight."""
    return VARIABLE in os.environ


def raise_weight(pid: int) -> None:
    """Raise the session of one process."""
    try:
        Path(f"/proc/{pid}/autogroup").write_text(str(NICE))
        os.setpriority(os.PRIO_PROCESS, pid, NICE)
    except OSError:
        pass  # it has ended, or this kernel has no autogroups


def raise_all() -> None:
    """Raise this process and everything below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended meanwhile
        children.setdefault(parent, []).append(int(entry.parent.name))
    pending = [os.getpid()]
    while pending:
        pid = pending.pop()
        raise_weight(pid)
        pending += children.get(pid, [])
