"""Every Python block of the README and of the docs runs as it stands, and prints what the page says.

A fenced ``python`` block is run as a script of its own, in an empty folder. If the next thing after it is a
fenced ``text`` block, that is what it must print; "..." stands for any text, as in doctest. A block that is
no program has the line ``<!-- not run: reason -->`` right above it.
"""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DEADLINE = 60  # seconds
# Errors, but for what Python 3.12 and later say of os.fork() in a process with threads: a page shows that.
WARNINGS = ("-W", "error", "-W", "ignore:This process:DeprecationWarning")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ \t]*$\n?", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (.+) -->\n$")


class Block(NamedTuple):
    page: str
    line: int
    code: str
    output: str | None
    not_run: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    fences = list(FENCE.finditer(text))
    for fence, following in zip_longest(fences, fences[1:]):
        if fence[1] == "python":
            adjacent = following is not None and not text[fence.end() : following.start()].strip()
            output = following[2] if following is not None and adjacent and following[1] == "text" else None
            reason = NOT_RUN.search(text[: fence.start()])
            line = text.count("\n", 0, fence.start()) + 2
            found.append(Block(page.name, line, fence[2], output, reason[1] if reason else ""))
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]


def test_ci_runs_the_command_that_the_readme_gives_for_the_tests() -> None:
    commands = re.findall(r"^python3 -m venv .+$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text()


def test_the_pages_have_blocks() -> None:
    assert {"README.md", "getting-started.md", "retries.md", "failures.md"} <= {block.page for block in BLOCKS}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_a_block_runs_and_prints_what_the_page_says(block: Block, tmp_path: Path) -> None:
    if block.not_run:
        compile(block.code, block.page, "exec")
        pytest.skip(block.not_run)
    program = tmp_path / "block.py"
    program.write_text("\n" * (block.line - 1) + block.code)  # tracebacks have the page's line numbers
    folder = tmp_path / "empty"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, *WARNINGS, str(program)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if block.output is not None:
        same = doctest.OutputChecker().check_output(block.output, done.stdout, doctest.ELLIPSIS)
        assert same, f"the page says:\n{block.output}\nbut it prints:\n{done.stdout}\n{done.stderr}"
