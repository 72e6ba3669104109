"""The tests of fiberexec.mp, run in a pod, so that all their processes are pods beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import clusters
import pytest
from services import cluster_image, require_kubernetes, worker_image

TESTS = Path(__file__).resolve().parents[1]
MODULES = ["pool_faults", "queues", "asyncmanager", "condition", "manager_ends", "managers", "pool", "pool_life", "process"]
MODULES += ["process_family", "hub_faults", "hub_memory", "ring", "sharedctypes", "synchronize", "elsewhere"]
MODULES += ["elsewhere_memory", "elsewhere_queues"]


@pytest.mark.timeout(7200)
def test_the_tests_of_mp_pass_in_a_pod(size: Callable[[int, int], int], tmp_path: Path) -> None:
    kubeconfig = require_kubernetes()
    image = cluster_image(worker_image(None, "kubernetes", "numpy", "psutil", "pytest", "pytest-timeout"))
    modules = [f"tests/mp/test_{name}.py" for name in MODULES[: size(1, len(MODULES))]]
    folder = tempfile.gettempdir()
    with clusters.namespace("privileged") as namespace:  # its pods see a folder of this machine
        options = {"FIBEREXEC_BACKEND_OPTIONS": json.dumps({"namespace": namespace}), "KUBECONFIG": kubeconfig}
        run = ["run", "--backend", "kubernetes", "--image", image, "--ship", str(TESTS.parent)]
        run += ["--volume", f"{folder}:{folder}", "--env", f"TMPDIR={folder}", "--env", "TEST_BACKENDS=kubernetes"]
        command = [sys.executable, "-m", "fiberexec", *run, "python", "-m", "pytest", "-v", "-k", "kubernetes", *modules]
        environment = {**os.environ, **options, "XDG_STATE_HOME": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    print(done.stdout[-20_000:])
    assert done.returncode == 0, done.stderr
