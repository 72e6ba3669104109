"""fiberexec.mp with its processes in containers: programs that print what they print on one host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import services
import shared_objects

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(180)  # the image may have to be built


@pytest.mark.parametrize("name", shared_objects.PROGRAMS)
def test_a_program_says_what_it_should(name: str, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(shared_objects.IMPORTS + shared_objects.program(name))
    environ = {
        **os.environ,
        "FIBEREXEC_BACKEND": "docker",
        "FIBEREXEC_IMAGE": services.worker_image(),
        "PYTHONPATH": str(ROOT),
    }
    found = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environ, timeout=100, check=False)
    assert (found.stdout, found.returncode) == (shared_objects.EXPECTED[name], 0), found.stderr
