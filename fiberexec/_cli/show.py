"""How the command line prints: tables whose columns line up, times as people say them, JSON."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import click


def as_json(value: Any) -> None:
    """Print a value for programs."""
    click.echo(json.dumps(value, indent=2))


def table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows, the first of which are the headings. On a terminal, lines end where it does.

    A cell stays on its line, and does nothing to the terminal: some show what others have written.
    """
    rows = [[_on_one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for row in rows:
        line = "".join(f"{cell:{width}}  " for cell, width in zip(row, widths)) + row[-1]
        click.echo(line.rstrip()[:columns])


def _on_one_line(text: str) -> str:
    return "".join(char if char.isprintable() else " " if char.isspace() else "?" for char in text)


def note(text: str) -> None:
    """Say something beside what was asked for."""
    click.echo(text, err=True)


def age(seconds: float) -> str:
    """A time span in its two largest units."""
    whole = max(0, int(seconds))
    units = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    for (name, size), (below, small) in itertools.pairwise(units):
        if whole >= size:
            return f"{whole // size}{name}{whole % size // small}{below}"
    return f"{whole}s"
