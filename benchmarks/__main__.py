"""The command line: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from . import weight
from .peers import BASE, PEERS, is_installed
from .report import Report, show
from .rows import ELSEWHERE, ROWS, chosen
from .runner import Cell, Quiet, run_rounds

MARKER = "<!-- results: written by python -m benchmarks --page -->"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="fiberexec beside its peers, in one run")
    parser.add_argument("--row", action="append", default=[], metavar="NAME", help="only this row (repeatable)")
    parser.add_argument("--peer", action="append", default=[], choices=list(PEERS), help="only this peer (repeatable)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="interleaved rounds (default 3)")
    parser.add_argument("--quick", action="store_true", help="one round with small counts: a smoke run, no measurement")
    parser.add_argument("--gate", action="store_true", help="before each cell, wait up to a minute for a quiet machine")
    parser.add_argument("--prio", action="store_true", help="as root on Linux: a high weight on a machine in use")
    parser.add_argument("--limit", type=float, default=180.0, metavar="S", help="kill a cell after S seconds (default 180)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write every cell to this JSON file; add to it if there")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the tables into this page, below its marker")
    parser.add_argument("--list", action="store_true", help="name the rows and peers, measure nothing")
    options = parser.parse_args()
    try:
        options.rows = chosen(options.row)
    except ValueError as error:
        parser.error(str(error))
    if options.prio:
        if not hasattr(os, "geteuid") or os.geteuid() != 0:
            parser.error("--prio needs root")
        os.environ[weight.VARIABLE] = "1"
    if options.page and MARKER not in options.page.read_text():
        parser.error(f"{options.page} has no line {MARKER}")
    if options.rounds < (0 if options.save else 1):
        parser.error("--rounds must be at least 1, or 0 to show what --save has")
    return options


def pick_peers(named: list[str], needed: set[str]) -> list[str]:
    """Return the peers to measure, in their usual order: those named, those that a ratio needs, and fiberexec."""
    usual = {*named, BASE, "fiberexec"} if named else {name for name, peer in PEERS.items() if not peer.optional}
    wanted = usual | needed
    for name in sorted(wanted):
        if not is_installed(name):
            print(f"{name} is not installed and is left out", file=sys.stderr)
    return [name for name in PEERS if name in wanted and is_installed(name)]


def main() -> None:
    """Measure, say so cell by cell on stderr, and print the tables on stdout."""
    options = parse()
    if options.list:
        print("rows: ", ", ".join(row.key for row in (*ROWS, *ELSEWHERE)))
        print("peers:", ", ".join(f"{name}{'' if is_installed(name) else ' (not installed)'}" for name in PEERS))
        return
    peers = pick_peers(options.peer, {row.against for row in options.rows if row.against})
    rounds = 1 if options.quick else options.rounds
    quiet = Quiet() if options.gate else None
    cells: list[Cell] = []
    if options.save and options.save.exists():
        cells = [Cell(**cell) for cell in json.loads(options.save.read_text())]
    first = 1 + max((cell.round for cell in cells), default=-1)
    for cell in run_rounds(options.rows, peers, rounds, options.quick, options.limit, quiet):
        cell.round += first
        cells.append(cell)
        numbers = ", ".join(f"{key} {show(value)}" for key, value in cell.numbers.items())
        print(
            f"round {cell.round} {cell.peer:13} {numbers or f'{cell.workload} failed: {cell.error}'}",
            file=sys.stderr,
        )
        if options.save:
            options.save.write_text(json.dumps([asdict(cell) for cell in cells]))
    report = Report(options.rows, peers, cells).markdown()
    print(report)
    if options.page:
        above, _, _ = options.page.read_text().partition(MARKER)
        options.page.write_text(f"{above}{MARKER}\n\n{report}\n")


if __name__ == "__main__":
    main()
