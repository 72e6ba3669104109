"""How the hub starts a janitor."""

from __future__ import annotations

import json
import sys
from typing import Any


def start(program: str, remains: list[Any]) -> None:
    """Start a janitor. ``remains``: (backend, settings) of each backend that the program has used."""
    import subprocess

    package = __package__.partition(".")[0]
    root = str(sys.modules[package].__path__[0])[: -len(package)]
    path = f"sys.path[:] = [p for p in sys.path if p]; sys.path.insert(0, {root!r})"
    code = f"import sys; {path}; from {package}._janitor import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps([program, remains]).encode())
    process.stdin.close()
    process.returncode = 0  # nobody waits for it
