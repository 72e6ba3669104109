"""``python -m fiberexec`` is the command ``fiberexec``."""

from __future__ import annotations

from fiberexec.cli import main

main(prog_name="fiberexec")
