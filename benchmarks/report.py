"""Turns cells into the tables: ratios are taken within a round, and the median over the rounds is shown."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence

from .rows import Row
from .runner import Cell

OURS = "fiberexec"


class Report:
    """The cells of a run, and the questions that the tables ask of them."""

    def __init__(self, rows: Sequence[Row], peers: Sequence[str], cells: Sequence[Cell]) -> None:
        self.rows, self.peers, self.cells = rows, peers, cells

    def numbers(self, row: Row, peer: str) -> dict[int, float]:
        """What this peer measured in this row, by round."""
        return {cell.round: cell.numbers[row.key] for cell in self.cells if cell.peer == peer and row.key in cell.numbers}

    def ratio(self, row: Row, peer: str) -> float | None:
        """The median over the rounds of this peer's number over that of the peer it is held against."""
        ours = self.numbers(row, peer)
        if not row.against:
            return statistics.median(ours.values()) if ours else None
        theirs = self.numbers(row, row.against)
        ratios = [ours[turn] / theirs[turn] for turn in ours if turn in theirs]
        return statistics.median(ratios) if ratios else None

    def best_other(self, row: Row) -> str:
        """The best of the other peers in this row, with its ratio."""
        found = [(ratio, peer) for peer in self.peers if peer != OURS and (ratio := self.ratio(row, peer)) is not None]
        if not found:
            return "-"
        ratio, peer = max(found) if row.higher else min(found)
        return f"{peer} {show_ratio(row, ratio)}"

    def targets(self) -> str:
        """The table of targets: is each met?"""
        lines = ["| row | what | target | fiberexec | best peer | |", "|---|---|---|---|---|---|"]
        for row in self.rows:
            ratio = self.ratio(row, OURS)
            if ratio is None:
                shown, verdict = "-", "not measured"
            else:
                shown, verdict = show_ratio(row, ratio), "met" if row.is_met(ratio) else "**missed**"
            lines.append(f"| {row.key} | {row.title} | {row.goal()} | {shown} | {self.best_other(row)} | {verdict} |")
        return "\n".join(lines)

    def absolute(self) -> str:
        """The table of what was measured: medians over the rounds, and the spread (largest over smallest)."""
        lines = [f"| row | unit | {' | '.join(self.peers)} |", "|---|---|" + "---|" * len(self.peers)]
        for row in self.rows:
            shown = []
            for peer in self.peers:
                values = list(self.numbers(row, peer).values())
                if not values:
                    shown.append("-")
                    continue
                spread = f" ±{(max(values) / min(values) - 1) * 50:.0f}%" if len(values) > 1 else ""
                shown.append(show(statistics.median(values), row.digits) + spread)
            lines.append(f"| {row.key} | {row.unit} | {' | '.join(shown)} |")
        return "\n".join(lines)

    def failures(self) -> list[str]:
        """One line for each cell that gave no number, and why."""
        return [f"{cell.workload} of {cell.peer}, round {cell.round}: {cell.error}" for cell in self.cells if cell.error]

    def markdown(self) -> str:
        """The whole report."""
        parts = [machine(), self.targets(), self.absolute()]
        if failures := self.failures():
            parts.append("Cells without a result:\n\n" + "\n".join(f"- {line}" for line in failures))
        return "\n\n".join(parts)

    def missed(self) -> list[str]:
        """The names of the rows that were measured and miss their target."""
        return [row.key for row in self.rows if (ratio := self.ratio(row, OURS)) is not None and not row.is_met(ratio)]


def show(value: float, digits: int = 2) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{digits}f}" if value < 10 else f"{value:.1f}"


def show_ratio(row: Row, ratio: float) -> str:
    return f"{ratio:,.0f}" if row.target >= 1000 else f"{ratio:.{row.digits}f}x"


def machine() -> str:
    """Describe what this ran on."""
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, "
        f"{platform.python_implementation()} {platform.python_version()}"
    )
