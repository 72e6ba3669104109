"""One cell: a process that opens one peer, warms it up, runs one workload and prints its numbers as JSON.

Run by the runner as ``python -m benchmarks.cell PEER WORKLOAD [--quick]``.  The closure row needs a
function of ``__main__``, and in this process that is this module.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from . import weight
from .memory import million, waves
from .mp import MP_WORKLOADS, context
from .peers import PEERS, STAND_INS
from .workloads import WORKLOADS

MARK = "RESULT "
FIVE_WORKERS = ("uneven", "nap100")


def make_closure() -> Callable[[int], int]:
    """Return a function that can only travel by value."""
    offset = 41

    def closure(number: int) -> int:
        return number + offset

    return closure


def scheduler(quick: bool) -> dict[str, float]:
    """The scheduler alone: no peer, no processes."""
    from .scheduler import measure

    tasks = 50_000 if quick else 500_000
    many, few = measure(1000, tasks), measure(10, tasks)
    return {"scheduler": many, "scheduler_flat": few / many}


def measure_cell(peer_name: str, workload: str, quick: bool) -> dict[str, float]:
    """Return the numbers of one cell, by name."""
    if workload == "scheduler":
        return scheduler(quick)
    if workload in MP_WORKLOADS:
        if weight.is_asked():
            weight.raise_all()
        return {workload: MP_WORKLOADS[workload](context(peer_name), quick)}
    place, _, task = workload.partition("_")
    if place not in STAND_INS:
        place, task = "", workload
    peer = {**PEERS, **STAND_INS.get(place, {})}[peer_name]()
    workers = 5 if workload in FIVE_WORKERS else 2
    peer.open(workers)
    peer.warm(workers)
    if weight.is_asked():
        weight.raise_all()
    long_runs = {"million": million, "waves": waves}
    if workload in long_runs:
        numbers = long_runs[workload](peer, quick)
    else:
        numbers = {workload: WORKLOADS[task](peer, quick)}
    peer.close()
    return numbers


def main() -> None:
    """Measure the cell that the arguments name."""
    peer_name, workload, *options = sys.argv[1:]
    print(MARK + json.dumps(measure_cell(peer_name, workload, "--quick" in options)), flush=True)


# The start-up row runs this with ``python -c`` in a fresh interpreter: the only cell that is not warm.
STARTUP = """
from benchmarks.peers import PEERS
from benchmarks.tasks import noop
peer = PEERS[{peer!r}]()
peer.open(2)
peer.wait([peer.submit(noop)])
print("FIRST", flush=True)
from benchmarks.memory import peak_mib
print(peak_mib(), flush=True)
peer.close()
"""

if __name__ == "__main__":
    main()
