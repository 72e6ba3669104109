"""The command ``fiberexec`` in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

import fiberexec
from fiberexec import _platform
from fiberexec.cli import main

HOST = _platform.host_name()
ROOT = str(Path(fiberexec.__file__).parents[1])


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert "Traceback" not in result.output
    return result


def told(*arguments: str, exit_code: int = 0) -> Any:
    """What it says as JSON."""
    result = run(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def dead_pid() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid
