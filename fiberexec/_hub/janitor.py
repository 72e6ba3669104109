"""How the hub starts janitors."""

from __future__ import annotations

import json
import sys
from time import monotonic
from typing import Any

AGAIN = 2.0  # seconds between two attempts to start one
_PATIENCE = 120.0  # seconds for which that is tried


class Janitors:
    """Those that are to be started. That needs a process and descriptors, of which there may be none just now."""

    def __init__(self) -> None:
        self._due: list[tuple[str, list[Any], float, str]] = []  # program, remains, until when it is tried, what was said

    def add(self, program: str, remains: list[Any]) -> None:
        """One for this program. ``remains``: (backend, settings) of each backend that it has used."""
        self._due.append((program, remains, monotonic() + _PATIENCE, ""))

    def start(self) -> bool:
        """Start those that are due; whether this has to be called again after ``AGAIN``."""
        due, self._due = self._due, []
        for program, remains, until, said in due:
            try:
                _start(program, remains)
            except Exception as error:  # none of whatever they are may end the hub
                late = monotonic() > until
                what = "it stays until somebody calls `fiberexec clean`" if late else "it is tried again"
                text = f"fiberexec: what is left of program {program} has no janitor ({error!r}): {what}"
                if text != said:
                    _say(text)
                if not late:
                    self._due.append((program, remains, until, text))
        return bool(self._due)


def _start(program: str, remains: list[Any]) -> None:
    import subprocess

    package = __package__.partition(".")[0]
    root = str(sys.modules[package].__path__[0])[: -len(package)]
    path = f"sys.path[:] = [p for p in sys.path if p]; sys.path.insert(0, {root!r})"
    code = f"import sys; {path}; from {package}._janitor import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    process.returncode = 0  # nobody waits for it
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(json.dumps([program, remains]).encode())


def _say(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass  # nobody reads it any more
