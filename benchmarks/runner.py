"""Runs cells in interleaved rounds, each in a process of its own that leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from .cell import MARK, STARTUP
from .peers import MpSpawn
from .rows import Row

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Cell:
    """What one peer did in one workload of one round: its numbers, or why there are none."""

    peer: str
    workload: str
    round: int
    numbers: dict[str, float] = field(default_factory=dict)
    error: str = ""


class Child:
    """A process of a session of its own, ended as a whole after ``limit`` seconds at the latest."""

    def __init__(self, arguments: Sequence[str], limit: float) -> None:
        self.errors: IO[bytes] = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            cwd=ROOT,
            # Installed packages are compiled; the checkout is too, unless this keeps it from being.
            env={key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"},
            start_new_session=True,
        )
        self.timer = threading.Timer(limit, self.kill)
        self.timer.daemon = True
        self.timer.start()

    def lines(self) -> Iterator[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield line.decode(errors="replace").strip()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def finish(self) -> str:
        """Wait for the end, kill what is left of the session, and return the last line of stderr."""
        code = self.process.wait()
        self.timer.cancel()
        self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.seek(0)
        tail = self.errors.read().decode(errors="replace").strip().splitlines()[-1:]
        self.errors.close()
        return tail[0] if tail else f"ended with code {code} and no word"


def run_warm(peer: str, workload: str, quick: bool, limit: float) -> dict[str, float]:
    child = Child(["-m", "benchmarks.cell", peer, workload, *(["--quick"] if quick else [])], limit)
    found = [line for line in child.lines() if line.startswith(MARK)]
    last_words = child.finish()
    if not found:
        raise RuntimeError(last_words)
    numbers: dict[str, float] = json.loads(found[0][len(MARK) :])
    return numbers


def run_startup(peer: str, quick: bool, limit: float) -> dict[str, float]:
    times, peaks = [], []
    for _ in range(2 if quick else 6):
        start = time.perf_counter()
        child = Child(["-c", STARTUP.format(peer=peer)], limit)
        lines = child.lines()
        first = next(lines, "")
        times.append(time.perf_counter() - start)
        peaks.append(next(lines, ""))
        last_words = child.finish()
        if first != "FIRST":
            raise RuntimeError(last_words)
    # The first one reads files that were not in memory, and compiles what was not compiled.
    return {"startup": statistics.median(times[1:]) * 1e3, "peak_memory": max(map(float, peaks))}


def run_cell(peer: str, workload: str, turn: int, quick: bool, limit: float) -> Cell:
    """Measure one cell; what goes wrong in it is its result, and no reason to stop."""
    cell = Cell(peer, workload, turn)
    try:
        if workload == "startup":
            cell.numbers = run_startup(peer, quick, limit)
        else:
            cell.numbers = run_warm(peer, workload, quick, limit)
    except (RuntimeError, ValueError, OSError) as error:
        cell.error = str(error)
    return cell


class Quiet:
    """Waits for a quiet machine: a short loop runs as fast as it ever did here."""

    def __init__(self) -> None:
        self.best = min(self.probe() for _ in range(10))

    def probe(self) -> float:
        start = time.perf_counter()
        children = [subprocess.Popen([sys.executable, "-ISc", "sum(range(2_000_000))"]) for _ in range(os.cpu_count() or 1)]
        for child in children:
            child.wait()
        return time.perf_counter() - start

    def wait(self, limit: float = 60.0) -> None:
        """Return when the machine is quiet, or after ``limit`` seconds."""
        end = time.monotonic() + limit
        while (took := self.probe()) > 1.3 * self.best and time.monotonic() < end:
            time.sleep(0.5)
        self.best = min(self.best, took)


def run_rounds(
    rows: Sequence[Row], peers: Sequence[str], rounds: int, quick: bool, limit: float, quiet: Quiet | None
) -> Iterator[Cell]:
    """Yield the cells as they are measured: round, workload, peer, the order of the peers rotated."""
    workloads = dict.fromkeys(row.workload for row in rows)
    for turn in range(rounds):
        for workload in workloads:
            allowed = next(row.peers for row in rows if row.workload == workload)
            able = [peer for peer in peers if (peer in allowed if allowed else peer != MpSpawn.name)]
            shift = turn % max(1, len(able))
            for peer in able[shift:] + able[:shift]:
                if quiet:
                    quiet.wait()
                yield run_cell(peer, workload, turn, quick, limit)
