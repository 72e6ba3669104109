"""The lifecycles in docs/architecture.md are the tables of the code."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from fiberexec import _states

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"


def drawn(table: dict[str, dict[str, str]]) -> str:
    """A lifecycle as a Markdown table: one row a state, one column an event."""
    events = list(dict.fromkeys(event for steps in table.values() for event in steps))
    rows = [["", *events], ["---"] * (len(events) + 1)]
    rows += [[f"**{state}**", *(steps.get(event, "") for event in events)] for state, steps in table.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def on_the_page(name: str, text: str) -> str:
    """The rows that follow the marker of a table."""
    found = re.search(rf"<!-- states: {name} -->\n((?:\|.*\n)*)", text)
    assert found is not None, f"docs/architecture.md has no marker for {name}"
    return found[1]


@pytest.mark.parametrize("name", ["TASK", "WORKER"])
def test_the_page_shows_the_table_of_the_code(name: str) -> None:
    expected = drawn(getattr(_states, name))
    assert on_the_page(name, PAGE.read_text()) == expected, f"run python {Path(__file__).name} to write it"


def write() -> None:
    """Write the tables into the page."""
    text = PAGE.read_text()
    for name in ("TASK", "WORKER"):
        marker = f"<!-- states: {name} -->\n"
        text = text.replace(marker + on_the_page(name, text), marker + drawn(getattr(_states, name)))
    PAGE.write_text(text)


if __name__ == "__main__":
    sys.exit(write())
