"""The rows of the table: what is measured, against whom, and what is to be reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .peers import BASE, MpSpawn


@dataclass(frozen=True)
class Row:
    """One row.

    ``cell`` is the workload that measures it (several rows may come out of one cell), ``key`` the number that
    it looks at.  ``against`` names the peer that the number is divided by; empty where the number is a ratio,
    or the figure, itself.
    """

    key: str
    title: str
    unit: str
    target: float
    higher: bool = True
    against: str = BASE
    cell: str = ""
    peers: tuple[str, ...] = ()  # only these, where the others can't do it at all
    digits: int = 2

    @property
    def workload(self) -> str:
        """The workload whose cell measures this row."""
        return self.cell or self.key

    def is_met(self, ratio: float) -> bool:
        """Say whether this ratio reaches the target."""
        return ratio >= self.target if self.higher else ratio <= self.target

    def goal(self) -> str:
        """The target as the table shows it."""
        bound = "≥" if self.higher else "≤"
        number = f"{self.target:,.0f}" if self.target >= 1000 else f"{self.target:g}x"
        return f"{bound} {number}" + (f" {self.against}" if self.against else "")


OURS = ("fiberexec",)
LOKY = ("loky", "fiberexec")
LINK = (BASE, "dask", "fiberexec")
PODS = ("dask", "fiberexec")
DOCKER = ("agents", "fiberexec")
BOTH: Any = {"against": MpSpawn.name, "peers": (MpSpawn.name, "fiberexec")}
# fmt: off
ROWS = (
    Row("latency", "latency of `submit().result()`", "µs", 0.6, higher=False),
    Row("submit", "`submit()` of 10,000 tiny tasks", "tasks/s", 7),
    Row("closure", "the same with a `__main__` closure", "tasks/s", 6, against="loky", peers=LOKY),
    Row("map_1e5", "`map` of 1e5 tiny items", "items/s", 1, against="mp.Pool"),
    Row("map_1e6", "`map` of 1e6 tiny items", "items/s", 1, against="mp.Pool"),
    Row("uneven", "`map` of uneven tasks, 5 workers, over the ideal", "x", 1.03, False, against="", digits=3),
    Row("nap100", "`map` of 100 ms tasks, 5 workers, over the ideal", "x", 1.03, False, against="", digits=3),
    Row("echo_1m", "echo of 1 MiB bytes, pipelined", "MB/s", 3),
    Row("echo_64m", "echo of a 64 MiB array, one at a time", "MB/s", 15),
    Row("startup", "fresh interpreter to first result", "ms", 1.8, False),
    Row("shutdown", "shutdown of an idle pool", "ms", 2, False),
    Row("peak_memory", "peak memory of the driver", "MiB", 1.5, False, cell="startup"),
    Row("million_memory", "1e6 items by `map`: memory, end/start", "x", 1.05, False, "", "million", OURS),
    Row("million_time", "... time for an item, end/start", "x", 1.2, False, "", "million", OURS),
    Row("waves_memory", "1e6 submits in 100 waves: memory, end/start", "x", 1.05, False, "", "waves", OURS),
    Row("waves_time", "... time for a task, end/start", "x", 1.2, False, "", "waves", OURS),
    Row("scheduler", "the scheduler alone, 1,000 workers, batches", "tasks/s", 250_000, True, "", peers=OURS),
    Row("scheduler_flat", "... cost of a task, 1,000 over 10", "x", 1.25, False, "", "scheduler", OURS),
    Row("link_latency", "over the link with mutual TLS: latency", "µs", 4.5, False, peers=LINK),
    Row("link_submit", "... `submit()` of 10,000 tiny tasks", "tasks/s", 5, peers=LINK),
    Row("link_echo_64m", "... echo of a 64 MiB array, one at a time", "MB/s", 0.7, peers=LINK),
    Row("link_beside", "... a small task beside 64 MiB ones, p99", "ms", 20, False, "", peers=("fiberexec",), digits=1),
    Row("mp_map_1e5", "`mp.Pool.map` of 1e5 tiny items", "items/s", 1, **BOTH),
    Row("mp_map_1e6", "`mp.Pool.map` of 1e6 tiny items", "items/s", 1, **BOTH),
    Row("mp_queue", "`mp.Queue`, small items", "items/s", 1, **BOTH),
    Row("mp_queue_manager", "`mp.Queue`, small items, over `Manager().Queue()`", "items/s", 10, **BOTH),
    Row("mp_queue_1m", "`mp.Queue`, 1 MiB", "MB/s", 1, **BOTH),
    Row("mp_queue_64m", "`mp.Queue`, 64 MiB", "MB/s", 1, **BOTH),
    Row("mp_pipe", "`mp.Pipe`, round trip", "µs", 1.2, False, **BOTH),
    Row("mp_pipe_1m", "`mp.Pipe`, 1 MiB", "MB/s", 1, **BOTH),
    Row("mp_pipe_64m", "`mp.Pipe`, 64 MiB", "MB/s", 1, **BOTH),
    Row("mp_lock", "`mp.Lock`, acquire and release, over a manager's", "µs", 1.2, False, **BOTH),
    Row("mp_manager", "call of a `mp.Manager`'s object", "µs", 1, False, **BOTH),
    Row("mp_process", "`mp.Process`, start to exit", "ms", 1, False, **BOTH),
)
# These need an image and services, so they are measured where they are named: see the modules peers and cluster.
ELSEWHERE = (
    Row("docker_latency", "in containers, over agents in subprocesses: latency", "µs", 1.05, False, "agents", peers=DOCKER),
    Row("docker_submit", "... `submit()` of 10,000 tiny tasks", "tasks/s", 0.95, against="agents", peers=DOCKER),
    Row("docker_echo_64m", "... echo of a 64 MiB array, one at a time", "MB/s", 0.95, against="agents", peers=DOCKER),
    Row("pods_latency", "in pods of one cluster: latency", "µs", 1, False, "dask", peers=PODS),
    Row("pods_submit", "... `submit()` of 10,000 tiny tasks", "tasks/s", 1, against="dask", peers=PODS),
    Row("pods_map_1e5", "... `map` of 1e5 tiny items", "items/s", 1, against="dask", peers=PODS),
    Row("pods_echo_1m", "... echo of 1 MiB bytes, pipelined", "MB/s", 1, against="dask", peers=PODS),
    Row("pods_echo_64m", "... echo of a 64 MiB array, one at a time", "MB/s", 1, against="dask", peers=PODS),
)
# fmt: on


def chosen(names: list[str]) -> tuple[Row, ...]:
    """Return the rows with these names, all that need nothing for no name; ValueError names one that does not exist."""
    if not names:
        return ROWS
    rows = (*ROWS, *ELSEWHERE)
    known = {row.key for row in rows} | {row.workload for row in rows}
    for name in names:
        if name not in known:
            raise ValueError(f"no row {name!r}: there are {', '.join(row.key for row in rows)}")
    return tuple(row for row in rows if row.key in names or row.workload in names)
